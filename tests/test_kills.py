"""Commands that are killed at a change of a file go on with the same command, to the same bytes; see `kills.py`.

`PROTLOC_KILLS=all pytest tests/test_kills.py` kills each command before and after every change, which takes an hour.
"""

import csv
import os
import subprocess
import sys
from pathlib import Path

import kills
import pytest

ALL = os.environ.get('PROTLOC_KILLS') == 'all'


@pytest.fixture(scope='session')
def rows(tmp_path_factory):
    "All kills, made by a process of its own"
    report = tmp_path_factory.mktemp('kills') / 'kills.csv'
    words = [sys.executable, str(Path(kills.__file__)), '--report', str(report), *(['--all'] if ALL else [])]
    ended = subprocess.run(words, env={**os.environ, 'OMP_NUM_THREADS': '1'}, capture_output=True, text=True)
    assert report.exists(), ended.stderr[-3000:]
    print(ended.stdout.strip().splitlines()[-1])
    with open(report, newline='') as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
@pytest.mark.parametrize('command', kills.WRITING)
def test_a_killed_command_goes_on(rows, command):
    here = [row for row in rows if row['command'] == command]
    assert here, f'{command} was not killed'
    lines = [f'{row["moment"]} {row["event"]}: {row["human"]} debris: {row["debris"]} differ: {row["differ"]}'
             for row in here if row['good'] == '0']  # fmt: skip
    assert not lines, f'{len(lines)} of {len(here)} kills:\n' + '\n'.join(lines)


def test_every_command_that_writes_is_killed():
    from faults import commands

    assert set(commands()) - set(kills.WRITING) == {'presets', 'evaluate', 'plan'}


def test_events_are_counted_and_end_the_process(tmp_path):
    from trial import in_child

    def work(number, moment):
        events = kills.Events(tmp_path, number, moment)
        events.watch()
        (tmp_path / 'a').mkdir()
        (tmp_path / 'a' / 'b').write_text('b')
        os.rename(tmp_path / 'a' / 'b', tmp_path / 'c')
        assert len(events.seen) == 3, events.seen

    assert in_child(lambda: work(0, 'before')) == 0
    assert (tmp_path / 'c').read_text() == 'b'
    (tmp_path / 'c').unlink()
    (tmp_path / 'a').rmdir()
    assert in_child(lambda: work(3, 'before')) == kills.KILLED
    assert (tmp_path / 'a' / 'b').read_text() == 'b' and not (tmp_path / 'c').exists()
