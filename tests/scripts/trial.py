"""Try commands on bad input in one warm process, and say of each how it ended and what it left.

A parent forks a process that has imported everything and lets it try one case after the other. A case that hangs in
a way that Python cannot interrupt, or that eats the memory, costs that process alone: another one is forked.
"""

import contextlib
import errno
import hashlib
import json
import os
import re
import resource
import select
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

SECONDS = 20  # that a refusal may take
LONG_SECONDS = 90  # that a command may take whose input turns out to be good: a whole report
HARD_SECONDS = 95  # until the process is killed that did not hear the alarm
MEMORY = 6 << 30  # bytes of address space that a case may take
LONGEST = 1000  # letters of a sentence
DEBRIS = re.compile(r'^\..*|.*partial.*|.*\.lock$|.*-lock$|.*\.tmp$|^tmp.*|.*aside.*', re.IGNORECASE)


@dataclass
class Case:
    "One bad input: what is done to the inputs, and the command that reads them"

    group: str  # option, setting, yaml or file
    stratum: str  # what is wrong: 'predict --threshold', 'classifier.loop.steps', 'store/images.npy'
    what: str  # how it is wrong: 'nan', 'cut in half'
    words: list[str]  # of the command; {home} and {work} stand for the inputs and for the case's own folder
    names: tuple[str, ...] = ()  # one of them must be in the sentence; any sentence is good if empty
    fine: str = ''  # why it may be no mistake after all; '' where it must be refused
    copies: tuple[str, ...] = ()  # inputs that the command also writes: copied into the case's own folder
    target: str = ''  # the path of an input that is spoiled, with {home} or {work}
    spoil: Callable[[Path], None] | None = None  # spoil(path) does it; without a target it gets the case's own folder
    grows: bool = False  # what is refused may have been continued before that: only debris counts as left over
    right: dict = field(default_factory=dict)  # file of the result -> SHA-256, where it is not refused
    slow: bool = False  # takes seconds where it is fine

    @property
    def name(self):
        return f'{self.group}: {self.stratum}: {self.what}'


@dataclass
class Result:
    "How a case ended"

    code: int = 0
    faults: list[str] = field(default_factory=list)  # none for a case that ended as it should
    seconds: float = 0.0
    sentence: str = ''
    detail: str = ''  # of an exception: its type, and the last line of protloc that it passed
    trained: bool = False  # it got as far as the first step of a training


class Hang(BaseException):
    "A case took too long"


class Trained(BaseException):
    "A case got as far as the first step of a training, past every check"


# -- the state of folders


def look(*folders):
    "What lies in folders: path -> what tells whether it was changed"
    seen = {}
    for top in map(str, folders):
        stack = [top]
        while stack:
            with os.scandir(stack.pop()) as entries:
                for entry in entries:
                    state = entry.stat(follow_symlinks=False)
                    is_folder = entry.is_dir(follow_symlinks=False)
                    if is_folder:
                        stack.append(entry.path)
                    seen[entry.path] = (
                        ('folder',)
                        if is_folder
                        else (state.st_mode, state.st_size, state.st_mtime_ns, state.st_ctime_ns)
                    )
    return seen


def hashes(*folders):
    "The content of every regular file in folders"
    return {
        path: hashlib.sha256(Path(path).read_bytes()).hexdigest()
        for path in look(*folders)
        if os.path.isfile(path) and not os.path.islink(path)
    }


def content(path):
    if os.path.islink(path):
        return os.readlink(path)
    return hashlib.sha256(Path(path).read_bytes()).hexdigest() if os.path.isfile(path) else ''


def changes(before, after, known=None):
    "Paths that are gone or changed, and new ones; a file that was written again with its content is as before"
    hurt = []
    for path, state in before.items():
        if path not in after or after[path][0] != state[0]:
            hurt.append(path)
        elif after[path] != state and (known or {}).get(path) != content(path):
            hurt.append(path)
    return hurt, [path for path in after if path not in before]


def is_debris(path, tmp=None):
    "Whether a new path is something unfinished, a lock, or left in the folder for temporary files"
    name = os.path.basename(path)
    # a library of ONNX Runtime notes its session there, and PyTorch's compiler makes a folder for its cache
    if name == '.ses' or 'torchinductor' in path:
        return False
    return bool(DEBRIS.match(name)) or tmp is not None and path.startswith(str(tmp))


# -- running a case


@contextlib.contextmanager
def printed_to(out, err):
    "What this process and its children print goes to files"
    sys.stdout.flush()
    sys.stderr.flush()
    kept = os.dup(1), os.dup(2)
    streams = sys.stdout, sys.stderr
    for number, path in ((1, out), (2, err)):
        target = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(target, number)
        os.close(target)
    sys.stdout = open(1, 'w', closefd=False, errors='backslashreplace')
    sys.stderr = open(2, 'w', closefd=False, errors='backslashreplace', buffering=1)
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        sys.stdout, sys.stderr = streams
        for number, fd in zip((1, 2), kept, strict=True):
            os.dup2(fd, number)
            os.close(fd)


def last_of_protloc(lines):
    "The last place in protloc that a traceback names"
    places = re.findall(r'File "[^"]*?(protloc/[^"]+)", line (\d+), in (\S+)', lines)
    return '{}:{} {}'.format(*places[-1]) if places else ''


def call(words):
    "protloc's command line in this process: exit code, the traceback's type and place, whether training began"
    from protloc import cli

    sys.argv = ['protloc', *words]
    try:
        cli.main()
    except SystemExit as ending:
        return ending.code if isinstance(ending.code, int) else int(bool(ending.code)), '', False
    except Trained:
        return 0, '', True
    except Hang:
        return 124, f'hang at {last_of_protloc(traceback.format_exc())}', False
    except BaseException as error:
        text = ' '.join(str(error).split())[:200].encode('ascii', 'backslashreplace').decode()
        return 1, f'{type(error).__name__} at {last_of_protloc(traceback.format_exc())}: {text}', False
    return 0, '', False


class Tries:
    "Folders of inputs, and a process that tries cases on them"

    def __init__(self, root):
        self.root = Path(root)
        self.home, self.work, self.tmp = (self.root / name for name in ('home', 'work', 'tmp'))
        self.pristine = self.root / 'pristine'
        self.kept = self.root / 'kept'
        self.known = {}

    def begin(self):
        "In the process that tries: hooks, limits, and a temporary folder of our own"
        import tempfile

        import torch
        from torch.optim.optimizer import register_optimizer_step_pre_hook

        torch.set_num_threads(1)
        os.environ['TMPDIR'] = str(self.tmp)
        tempfile.tempdir = None
        signal.signal(signal.SIGALRM, self._alarm)
        register_optimizer_step_pre_hook(self._first_step)
        with open('/proc/self/statm') as file:
            now = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))
        self.known = hashes(self.home)

    def _alarm(self, number, frame):
        raise Hang

    def _first_step(self, *args):
        raise Trained

    def clear(self):
        "An empty folder for the next case"
        os.chdir(self.root)
        for folder in (self.work, self.tmp):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(exist_ok=True)

    def keep_all(self):
        "A copy of the inputs, to be put in their place where they are hurt"
        shutil.copytree(self.home, self.pristine, symlinks=True)
        self.clear()

    def restore(self):
        "The inputs as they were"
        shutil.rmtree(self.home)
        shutil.copytree(self.pristine, self.home, symlinks=True)

    def arguments(self, case):
        return [self.filled(word) for word in case.words]

    def attempt(self, case):
        "Try a case"
        self.clear()
        for name in case.copies:
            shutil.copytree(self.home / name, self.work / name, symlinks=True)
        target = Path(self.filled(case.target or '{work}'))
        in_home = case.target.startswith('{home}')
        if in_home:
            self.keep(target)
        if case.spoil:
            case.spoil(target)
        os.chdir(self.work)
        before = look(self.home, self.work)
        known = self.known | hashes(self.work)
        if in_home and target.is_dir():
            known |= hashes(target)
        elif in_home and os.path.lexists(target):
            known[str(target)] = content(target)
        out, err = self.root / 'stdout', self.root / 'stderr'
        began = time.perf_counter()
        with printed_to(out, err):
            signal.alarm(LONG_SECONDS)
            try:
                code, detail, trained = call(self.arguments(case))
            except Hang:
                code, detail, trained = 124, 'hang', False
            finally:
                signal.alarm(0)
        seconds = time.perf_counter() - began
        said = err.read_text(errors='backslashreplace')
        result = Result(code, [], seconds, detail=detail, trained=trained)
        self.judge(case, result, said)
        after = look(self.home, self.work)
        hurt, new = changes(before, after, known)
        self.judge_folders(case, result, hurt, new)
        if result.code == 0 and not result.trained:
            for path, right in case.right.items():
                if content(self.filled(path)) != right:
                    result.faults.append('wrong result')
                    result.detail += f' wrong: {path}'
        os.chdir(self.root)
        if in_home:
            self.bring_back(target)
        if any(path.startswith(str(self.home)) for path in (*hurt, *new)):
            self.restore()
        return result

    def filled(self, word):
        return word.replace('{home}', str(self.home)).replace('{work}', str(self.work))

    def keep(self, target):
        "Put the original aside, and a copy in its place"
        self.kept = self.root / 'kept'
        os.rename(target, self.kept)
        if self.kept.is_dir():
            shutil.copytree(self.kept, target, symlinks=True)
        else:
            shutil.copy2(self.kept, target)

    def bring_back(self, target):
        "The original in its place"
        if target.is_dir() and not target.is_symlink():
            shutil.rmtree(target)
        else:
            target.unlink(missing_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.rename(self.kept, target)

    def judge(self, case, result, said):
        "What is wrong with the exit code and the sentence"
        lines = [line for line in re.split(r'[\r\n]+', said) if line.strip()]
        ours = [line for line in lines if line.startswith('protloc: ')]
        result.sentence = ours[0] if ours else ' / '.join(lines[-3:])[:300]
        faults = result.faults
        if result.code == 124 or (result.code != 0 and result.seconds > SECONDS):
            faults.append('hang')
        elif result.code == 1:
            faults.append('traceback')
            self.find_traceback(result)
        elif result.code == 0:
            if not case.fine:
                faults.append('taken')
        elif result.code != 2:
            faults.append('exit code')
        if result.code == 2:
            if not ours:
                faults.append('usage' if 'Usage:' in said or 'Error:' in said else 'no sentence')
            elif len(ours) > 1 or lines[-1] != ours[0]:
                faults.append('several lines')
            if ours and len(ours[0]) > LONGEST:
                faults.append('long')
            if ours and not ours[0].isprintable():
                faults.append('unprintable')
            if ours and case.names and not any(name.lower() in ours[0].lower() for name in case.names):
                faults.append('unnamed')
            if 'Traceback' in said or 'Aborted' in said:
                faults.append('traceback')

    def find_traceback(self, result):
        "The type and place of an exception that protloc reported itself"
        if result.detail:
            return
        written = [path for folder in (self.tmp, self.work) for path in folder.rglob('*') if path.is_file()]
        for path in written:
            text = path.read_text(errors='replace') if path.stat().st_size < 1 << 20 else ''
            if 'Traceback (most recent' in text:
                result.detail = f'{text.strip().splitlines()[-1][:150]} at {last_of_protloc(text)}'
                path.unlink()

    def judge_folders(self, case, result, hurt, new):
        "What is wrong with the folders"
        tmp = [path for path in look(self.tmp) if is_debris(path, self.tmp)]
        debris = [path for path in new if is_debris(path)] + tmp
        if result.trained or result.code not in (0, 2):
            debris = []
        written_over = [path for path in hurt if not (result.code != 2 and self.may_write(path, case))]
        written_over = [path for path in written_over if not (case.grows and str(self.work) in path)]
        if written_over:
            result.faults.append('input hurt')
            result.detail += f' hurt: {", ".join(sorted(written_over)[:4])}'
        left = debris if case.grows or result.code != 2 else new + tmp
        # a list of what is bad is what the user is told to read
        left = [path for path in left if not path.endswith('.bad.csv')]
        if left and (result.code == 2 or debris):
            result.faults.append('left over')
            result.detail += f' left: {", ".join(sorted(left)[:4])}'
        result.detail = result.detail.replace(str(self.root), '')
        result.sentence = result.sentence.replace(str(self.root), '')

    def may_write(self, path, case):
        "Whether a command that was not refused may have written here"
        return path.startswith(str(self.work))


# -- a process for many cases


def _worker(tries, cases, places, pipe):
    os.setpgid(0, 0)
    tries.begin()
    with open(pipe, 'w') as to_parent:
        for place in places:
            to_parent.write(json.dumps([place, None]) + '\n')
            to_parent.flush()
            result = tries.attempt(cases[place])
            to_parent.write(json.dumps([place, vars(result)]) + '\n')
            to_parent.flush()
    os._exit(0)


def run_cases(tries, cases, seen=lambda place, result: None):
    "Try all cases; place -> result"
    results = {}
    while len(results) < len(cases):
        left = [place for place in range(len(cases)) if place not in results]
        reading, writing = os.pipe()
        process = os.fork()
        if not process:
            try:
                os.close(reading)
                _worker(tries, cases, left, writing)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(3)
        os.close(writing)
        trying = None
        how = 'died'
        text = b''
        while True:
            ready = select.select([reading], [], [], HARD_SECONDS)[0]
            if not ready:
                how = 'hang'
                break
            chunk = os.read(reading, 1 << 16)
            if not chunk:
                break
            *lines, text = (text + chunk).split(b'\n')
            for line in lines:
                place, result = json.loads(line)
                trying = place
                if result is not None:
                    results[place] = Result(**result)
                    seen(place, results[place])
                    trying = None
        os.close(reading)
        with contextlib.suppress(OSError):
            os.killpg(process, signal.SIGKILL)
        with contextlib.suppress(OSError):
            os.kill(process, signal.SIGKILL)
        status = os.waitpid(process, 0)[1]
        if trying is not None:
            code = 124 if how == 'hang' else os.waitstatus_to_exitcode(status)
            results[trying] = Result(code, ['hang' if how == 'hang' else 'died'], HARD_SECONDS, detail=f'{how}: {code}')
            seen(trying, results[trying])
            tries.clear()
            tries.restore()
        elif len(results) < len(cases) and how == 'died' and left == [n for n in range(len(cases)) if n not in results]:
            raise RuntimeError(f'the process that tries cases ended with {os.waitstatus_to_exitcode(status)}')
    return results


def in_child(work):
    "Let a forked process do some work; its exit code"
    process = os.fork()
    if process:
        return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    code = 1
    try:
        work()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def can_make_devices(folder):
    "Whether devices can be made, so that none of the machine's own is touched"
    try:
        os.mknod(Path(folder) / 'device', 0o600 | 0o020000, os.makedev(1, 7))
        os.unlink(Path(folder) / 'device')
        return True
    except OSError as error:
        assert error.errno in (errno.EPERM, errno.EACCES, errno.ENOSYS, errno.EINVAL, errno.EROFS), error
        return False
