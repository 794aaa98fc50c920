"""Kill each command that writes at every change of a file, and let the same command again make all good.

    python tests/kills.py                   # the chosen moments that the tests try
    python tests/kills.py --all             # every moment: minutes for each command
    python tests/kills.py --only split      # of one command

A process that has imported everything is forked. The child counts each file that is opened for writing, renamed,
linked, removed or cut, each folder that is made or removed, and ends at once, without any clean-up, before or after
the n-th of them. Another child runs the same command again: it must end well, and leave the bytes of a run that was
left alone, and nothing else.
"""

import os

os.environ.setdefault('OMP_NUM_THREADS', '1')

import argparse
import builtins
import collections
import csv
import functools
import io
import json
import re
import shutil
import sys
import tempfile
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent / 'scripts'), str(Path(__file__).parent.parent)]

from faults import COMMANDS, copies_of, draw_of, make_inputs, split_words, warm_up

from trial import Tries, call, in_child, is_debris, look, printed_to

KILLED = 137
WRITING = {
    'simulate': COMMANDS['simulate'],
    'prepare': COMMANDS['prepare'],
    'prepare, an image a file': COMMANDS['prepare'],
    'split': COMMANDS['split'],
    'info': COMMANDS['info'],
    'train-generator': COMMANDS['train-generator'],
    'generate': 'generate {home}/generator {work}/out --like {home}/store --images 6 --num-inference-steps 1'
    ' --batch-size 2',
    'train-classifier': COMMANDS['train-classifier'],
    'thresholds': COMMANDS['thresholds'],
    'predict': COMMANDS['predict'] + ' --probabilities {work}/probabilities.csv',
    'export': COMMANDS['export'],
    'run': COMMANDS['run'],
    'report': COMMANDS['report'],
    'fidelity': COMMANDS['fidelity'],
    'compare': COMMANDS['compare'],
}
CHOSEN = dict.fromkeys(WRITING, 2) | {
    'simulate': 4,
    'prepare': 4,
    'prepare, an image a file': 6,
    'split': 4,
    'generate': 4,
    'run': 1,
    'report': 1,
}
TIMED = {'images_per_second', 'seconds', 'time', 'started', 'finished', 'minutes'}  # fields that no two runs share
# files that hold such fields in a text, so that only their being there is compared
TIMED_FILES = re.compile(r'(^|/)(report\.html|report\.ipynb|figures/training\.png)$|^out/log\.jsonl$|^run/log\.jsonl$')


# -- events


def place_of(path, dir_fd):
    "The whole path of what an event is about; '' where it is no file of a folder"
    if isinstance(path, int):
        return ''
    path = os.fsdecode(path)
    if dir_fd is not None and not os.path.isabs(path):
        path = os.path.join(os.readlink(f'/proc/self/fd/{dir_fd}'), path)
    return os.path.abspath(path)


class Events:
    "Counts the changes of files below a folder, and ends the process at one of them"

    def __init__(self, folder, number=0, moment='before'):
        self.folder = f'{folder}{os.sep}'
        self.number, self.moment = number, moment
        self.seen = []

    def happen(self, name, path, change):
        "Make a change that counts"
        self.seen.append((name, path.removeprefix(self.folder)))
        is_it = len(self.seen) == self.number
        if is_it and self.moment == 'before':
            os._exit(KILLED)
        try:
            return change()
        finally:
            if is_it:
                os._exit(KILLED)

    def watch(self):
        "Put this counter before all functions that change files"
        for name in ('replace', 'rename', 'link', 'symlink'):
            self._two(name)
        for name in ('unlink', 'remove', 'mkdir', 'rmdir', 'truncate'):
            self._one(name)
        self._open()

    def _two(self, name):
        plain = getattr(os, name)

        @functools.wraps(plain)
        def counted(src, dst, **named):
            path = place_of(dst, named.get('dst_dir_fd', named.get('dir_fd')))
            if not path.startswith(self.folder):
                return plain(src, dst, **named)
            return self.happen(name, path, lambda: plain(src, dst, **named))

        setattr(os, name, counted)

    def _one(self, name):
        plain = getattr(os, name)

        @functools.wraps(plain)
        def counted(path, *rest, **named):
            place = place_of(path, named.get('dir_fd'))
            if not place.startswith(self.folder):
                return plain(path, *rest, **named)
            return self.happen(name, place, lambda: plain(path, *rest, **named))

        setattr(os, name, counted)

    def _open(self):
        plain, plain_os = io.open, os.open

        @functools.wraps(plain)
        def counted(file, mode='r', *rest, **named):
            place = '' if isinstance(file, int) else place_of(file, None)
            if not set(mode) & set('wax+') or not place.startswith(self.folder):
                return plain(file, mode, *rest, **named)
            return self.happen('open', place, lambda: plain(file, mode, *rest, **named))

        @functools.wraps(plain_os)
        def counted_os(path, flags, *rest, **named):
            place = place_of(path, named.get('dir_fd'))
            if not flags & (os.O_CREAT | os.O_TRUNC) or not place.startswith(self.folder):
                return plain_os(path, flags, *rest, **named)
            return self.happen('open', place, lambda: plain_os(path, flags, *rest, **named))

        builtins.open = io.open = counted
        os.open = counted_os


# -- one command


@dataclass
class Killed:
    "What became of a command that was killed and run again"

    command: str
    number: int  # of the event, from 1
    moment: str
    event: str
    equal: bool = False
    debris: tuple = ()
    human: str = ''  # what the second run said, where it did not go on
    whole: bool = False  # it had been finished, and the second run said so
    differ: tuple = ()

    @property
    def good(self):
        return self.equal and not self.debris and not self.human


class Subject:
    "A command, and what it leaves when it is left alone"

    def __init__(self, tries, name):
        self.tries, self.name = tries, name
        self.words = WRITING[name]

    def fresh(self):
        self.tries.clear()
        for name in copies_of(self.words):
            shutil.copytree(self.tries.home / name, self.tries.work / name, symlinks=True)

    def start(self, number=0, moment='before'):
        "Run the command in a child, perhaps killed; exit code, its events"
        noted = self.tries.root / 'events.json'
        noted.unlink(missing_ok=True)

        def work():
            import torch

            from protloc.data import shards

            torch.set_num_threads(1)
            if self.name.endswith('an image a file'):
                shards.SHARD_BYTES = 1
            os.environ['TMPDIR'] = str(self.tries.tmp)
            tempfile.tempdir = None
            os.chdir(self.tries.work)
            events = Events(self.tries.work, number, moment)
            write = Path.write_text
            with printed_to(self.tries.root / 'stdout', self.tries.root / 'stderr'):
                events.watch()
                words = [self.tries.filled(word) for word in split_words(self.words)]
                code, detail, _ = call(words)
                if detail:
                    print(detail, file=sys.stderr)
            builtins.open = io.open
            write(noted, json.dumps(events.seen))
            os._exit(code)

        code = in_child(work)
        return code, json.loads(noted.read_text()) if noted.exists() else []

    def said(self):
        lines = (self.tries.root / 'stderr').read_text(errors='replace').strip().splitlines()
        return ' / '.join(lines[-2:])[-300:].replace(str(self.tries.root), '')

    def alone(self, steadily):
        "Run it undisturbed: its events, and what is there, which a second run leaves too"
        self.fresh()
        code, self.events = self.start()
        if code:
            raise RuntimeError(f'{self.name} cannot be run: {code} {self.said()}')
        self.tree = tree(self.tries.work)
        self.debris = debris(self.tries)
        self.steady = []
        if steadily:
            self.fresh()
            self.start()
            self.steady = differences(self.tree, tree(self.tries.work))

    def kill(self, number, moment):
        "Kill it at an event, and run it again"
        self.fresh()
        code, _ = self.start(number, moment)
        outcome = Killed(self.name, number, moment, ' '.join(self.events[number - 1]))
        if code != KILLED:
            outcome.human = f'it was not killed, and ended with {code}: {self.said()}'
            return outcome
        code, _ = self.start()
        now = tree(self.tries.work)
        if code == 2 and 'exists already' in self.said() and not differences(self.tree, now):
            outcome.whole = True
        elif code:
            outcome.human = f'{code}: {self.said()}'
        outcome.debris = tuple(sorted(debris(self.tries)))
        outcome.differ = tuple(name for name in differences(self.tree, now) if name not in outcome.debris)
        outcome.equal = not outcome.differ
        return outcome


def debris(tries):
    "What should not be there: unfinished files, locks, anything in the folder for temporary files"
    there = [path for path in look(tries.work, tries.tmp) if is_debris(path, tries.tmp)]
    return [os.path.relpath(path, tries.root) for path in there]


def tree(folder):
    "path -> content, as it is compared"
    found = {}
    for path in sorted(folder.rglob('*')):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = os.readlink(path)
        elif path.is_dir():
            found[name] = 'folder'
        elif TIMED_FILES.search(name):
            found[name] = 'a file with times'
        elif zipfile.is_zipfile(path):  # of TorchScript: without the lines of the caller, and the number of the file
            with zipfile.ZipFile(path) as archive:
                members = [each for each in archive.namelist() if not each.endswith(('.debug_pkl', 'serialization_id'))]
                found[name] = {member: archive.read(member) for member in members}
        elif path.name == 'README.md':  # of a generator
            found[name] = re.sub(r'\| images_per_second \|.*', '', path.read_text())
        elif path.suffix in ('.jsonl', '.json'):
            found[name] = without_times(path)
        else:
            found[name] = path.read_bytes()
    return found


def without_times(path):
    "JSON, or lines of it, without the fields that no two runs share"

    def clean(value):
        if isinstance(value, dict):
            return {key: clean(part) for key, part in value.items() if key not in TIMED}
        return [clean(part) for part in value] if isinstance(value, list) else value

    text = path.read_text()
    try:
        return [clean(json.loads(line)) for line in (text.splitlines() if path.suffix == '.jsonl' else [text])]
    except ValueError:
        return text


def differences(one, other, debris_too=True):
    "Names of files that are not in both, or not alike"
    names = {name for name in {**one, **other} if one.get(name) != other.get(name)}
    if not debris_too:
        names = {name for name in names if not any(is_debris(part) for part in Path(name).parts)}
    return sorted(names)


def moments(subject, count):
    "All moments, or some of them: the last rename always, the others by a rule that does not change"
    everything = [(n, moment) for n in range(1, len(subject.events) + 1) for moment in ('before', 'after')]
    if count is None or count >= len(everything):
        return everything
    ordered = sorted(everything, key=lambda each: draw_of(f'{subject.name} {each}'))
    renames = [n for n, (event, _) in enumerate(subject.events, 1) if event in ('replace', 'rename')]
    last = [(renames[-1], 'after')] if renames and count > 1 else []
    return sorted([*last, *[each for each in ordered if each not in last]][:count])


# -- as a program


def table_of(rows, subjects):
    head = ('command', 'events', 'killed', 'continued equal', 'whole already', 'debris', 'needed a human', 'differ')
    lines = [head]
    by_command = collections.defaultdict(list)
    for row in rows:
        by_command[row.command].append(row)
    for name, found in by_command.items():
        lines.append((name, len(subjects[name].events), len(found), sum(row.equal and not row.human for row in found),
                      sum(row.whole for row in found), sum(bool(row.debris) for row in found),
                      sum(bool(row.human) for row in found), sum(bool(row.differ) for row in found)))  # fmt: skip
    lines.append(('all', *(sum(line[n] for line in lines[1:]) for n in range(1, len(head)))))
    widths = [max(len(str(line[n])) for line in lines) for n in range(len(head))]
    return '\n'.join(
        '  '.join(str(cell).ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--all', action='store_true', help='every moment, not the chosen ones')
    parser.add_argument('--only', default='', metavar='PATTERN', help='commands whose name fits a regular expression')
    parser.add_argument('--most', type=int, help='moments of each command')
    parser.add_argument('--report', type=Path, metavar='FILE.csv', help='write a row for each kill')
    asked = parser.parse_args()
    began = time.time()
    warm_up()
    names = [name for name in WRITING if re.search(asked.only, name)]
    rows, subjects = [], {}
    with tempfile.TemporaryDirectory(prefix='kills-', ignore_cleanup_errors=True) as folder:
        tries = Tries(Path(folder).resolve())
        if in_child(lambda: make_inputs(tries.home, not {'report', 'compare'}.isdisjoint(names))):
            raise RuntimeError('the inputs could not be made')
        print(f'imports and inputs {time.time() - began:.0f} s', flush=True)
        for name in names:
            since = time.time()
            subject = subjects[name] = Subject(tries, name)
            try:
                subject.alone(asked.all)
            except RuntimeError as error:
                print(f'{name}: {error}', flush=True)
                rows.append(Killed(name, 0, 'never', '', human=str(error)))
                subject.events = []
                continue
            if subject.debris:
                rows.append(Killed(name, 0, 'never', '', True, tuple(subject.debris)))
            if subject.steady:
                rows.append(
                    Killed(name, 0, 'never', 'two runs that were left alone', False, differ=tuple(subject.steady))
                )
            count = None if asked.all else CHOSEN[name]
            if asked.most is not None:
                count = asked.most
            for number, moment in moments(subject, count):
                rows.append(subject.kill(number, moment))
                if not rows[-1].good:
                    row = rows[-1]
                    print(f'  {name} {moment} event {number} ({row.event}): {row.human or ""}'
                          f' debris {row.debris[:4]} differ {row.differ[:4]}', flush=True)  # fmt: skip
            print(f'{name}: {len(subject.events)} events, {time.time() - since:.1f} s', flush=True)
        os.chdir('/')
    if asked.report:
        with open(asked.report, 'w', newline='', errors='backslashreplace') as file:
            out = csv.writer(file)
            out.writerow(
                ('command', 'number', 'moment', 'event', 'good', 'equal', 'whole', 'debris', 'human', 'differ')
            )
            for row in rows:
                out.writerow((row.command, row.number, row.moment, row.event,
                              int(row.good), int(row.equal), int(row.whole),
                              ' '.join(row.debris), row.human, ' '.join(row.differ)))  # fmt: skip
    print(table_of(rows, subjects))
    faulty = [row for row in rows if not row.good]
    print(f'{len(rows)} kills, {len(faulty)} faulty, {time.time() - began:.0f} s')
    return int(bool(faulty))


if __name__ == '__main__':
    sys.exit(main())
