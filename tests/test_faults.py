"""Bad input of every kind ends in one sentence and exit code 2, hurts nothing and leaves nothing; see `faults.py`.

`PROTLOC_FAULTS=all pytest tests/test_faults.py` tries every case instead of some of each kind.
"""

import csv
import os
import subprocess
import sys
from pathlib import Path

import faults
import pytest

import wrong
from protloc.study.arms import DesignConfig

ALL = os.environ.get('PROTLOC_FAULTS') == 'all'
PROGRAM = Path(faults.__file__)
OPTIONS = ['protloc', *faults.COMMANDS]
DESIGN = [*DesignConfig.model_fields]
SECTIONS = ['about', 'seed', 'data', 'generator', 'generate', 'filter', 'classifier', 'arms', '--set', *DESIGN]
# `plan` reads what `run` reads
READERS = [command for command in faults.COMMANDS if command not in ('presets', 'simulate', 'plan')]
PARTS = [
    *(('option', part) for part in OPTIONS),
    *(('setting', part) for part in SECTIONS),
    *(('yaml', part) for part in faults.READ_A_PRESET),
    *(('file', part) for part in READERS),
]


@pytest.fixture(scope='session')
def rows(tmp_path_factory):
    "All cases, tried once by a process of its own"
    report = tmp_path_factory.mktemp('faults') / 'faults.csv'
    words = [sys.executable, str(PROGRAM), '--report', str(report), *(['--all'] if ALL else [])]
    ended = subprocess.run(words, env={**os.environ, 'OMP_NUM_THREADS': '1'}, capture_output=True, text=True)
    assert report.exists(), ended.stderr[-3000:]
    print(ended.stdout.strip().splitlines()[-1])
    csv.field_size_limit(1 << 24)
    with open(report, newline='') as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
@pytest.mark.parametrize('group,part', PARTS, ids=[f'{group}-{part}' for group, part in PARTS])
def test_bad_input(rows, group, part):
    here = [row for row in rows if (row['group'], row['part']) == (group, part)]
    assert here, f'no case of {group} {part} was tried'
    faulty = [row for row in here if row['faults']]
    lines = [
        f'{row["faults"]:20} {row["stratum"]}: {row["case"]}: {(row["detail"] or row["sentence"])[:160]}'
        for row in faulty
    ]
    assert not faulty, f'{len(faulty)} of {len(here)} cases:\n' + '\n'.join(lines)


@pytest.mark.slow
def test_every_part_is_tested(rows):
    assert {(row['group'], row['part']) for row in rows} == set(PARTS)


@pytest.mark.slow
def test_there_are_many_cases_and_most_are_refused(rows):
    print(f'{len(rows)} cases')
    assert len(rows) >= (5000 if ALL else 800)
    assert sum(row['code'] == '2' for row in rows) > 0.6 * len(rows)
    # the sentences are about the faults, not about one thing that comes before them all
    assert len({row['sentence'] for row in rows}) > 0.3 * len(rows)


def test_every_command_is_known():
    assert set(faults.commands()) == set(faults.COMMANDS)


@pytest.mark.slow
def test_the_choice_has_every_stratum_and_is_the_same_each_time():
    cases = [*faults.option_cases(), *faults.setting_cases(), *faults.yaml_cases()]
    chosen = faults.choose(cases, 450)
    assert [case.name for case in chosen] == [case.name for case in faults.choose(cases, 450)]
    quick = {(case.group, case.stratum) for case in cases if not case.slow}
    assert quick <= {(case.group, case.stratum) for case in chosen}
    declared = {parameter for command in faults.commands().values() for parameter in command.params}
    options = {case.stratum for case in chosen if case.group == 'option'}
    assert len(options) >= len(declared) - len(faults.commands())  # report's own parameter may be among the slow ones


def test_wrong_values_are_wrong():
    from protloc.training import LoopConfig

    assert not wrong.allows(LoopConfig, 'ema_decay', '1.5') and wrong.allows(LoopConfig, 'ema_decay', '0.5')
    assert not wrong.allows(LoopConfig, 'lr', '.nan') and not wrong.allows(LoopConfig, 'workers', '-1')
    assert ('lt 1', '1') in list(wrong.edges(LoopConfig, 'ema_decay'))
    names = [name for name, *_ in faults.settings()]
    assert {'classifier.loop.lr', 'data.prepare.fractions.train', 'arms.name'} <= set(names)


def test_what_a_case_leaves_and_hurts_is_seen(tmp_path):
    from trial import changes, is_debris, look

    (tmp_path / 'kept').write_text('kept')
    (tmp_path / 'hurt').write_text('before')
    before = look(tmp_path)
    (tmp_path / 'hurt').write_text('after!')
    (tmp_path / '.new.protloc-partial').mkdir()
    hurt, new = changes(before, look(tmp_path))
    assert hurt == [str(tmp_path / 'hurt')] and new == [str(tmp_path / '.new.protloc-partial')]
    assert is_debris(new[0]) and not is_debris(hurt[0])
