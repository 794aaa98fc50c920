"""Whatever ends a command ends it in one sentence, and leaves what it read as it was."""

import contextlib
import errno
import hashlib
import importlib
import os
import pkgutil
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import time
import typing
from pathlib import Path

import annotated_types
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import psutil
import pydantic
import pytest
import yaml

import protloc as package
from protloc.core import Config, InputError, read_config
from protloc.data.store import ImageStore, StoreWriter, write_store
from protloc.files import exclusive, read_text
from protloc.labels import HPA, STAINS, Vocabulary
from protloc.study.arms import StudyConfig, arm_of, read_preset, section_config, study_config, with_overrides
from protloc.study.figures import Results, fig_training, leak_check, provenance
from protloc.study.folder import RunFolder
from protloc.study.rehearsal import dummy_run, page_in_process, rehearse
from protloc.study.runner import run_study
from protloc.study.verdict import Study, write_results

PROTLOC = (sys.executable, '-m', 'protloc')
SCRIPTS = Path(__file__).parent / 'scripts'


def refused(result, *expected):
    "Exit code 2, and one line that says what is expected"
    code, out, err = result
    assert code == 2, (code, out, err)
    assert err.startswith('protloc: ') and err.count('\n') == 1, err
    for text in expected:
        assert text in err, err


def hashes(folder):
    "Hash of each file below a folder"
    files = [path for path in sorted(folder.rglob('*')) if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


# --- sentences

USAGE = {
    'no such command': (['rum'], 'rum'),
    'no such option': (['info', 'a', '--verfy'], '--verfy'),
    'missing argument': (['info'], 'store'),
    'no number': (['simulate', 'a', '--train', 'many'], '--train'),
    'negative': (['simulate', 'a', '--train', '-5'], '--train'),
    'beyond': (['simulate', 'a', '--train', '1000000000000'], '--train'),
    'of 5,000 digits': (['simulate', 'a', '--train', '9' * 5000], '--train'),
    'infinite': (['simulate', 'a', '--shift', 'inf'], '--shift'),
    'no number at all': (['simulate', 'a', '--temper', 'nan'], '--temper'),
    'two numbers': (['generate', 'a', 'b', '--like', 'c', '--guidance-interval', 'nan', '1'], '--guidance-interval'),
    'too many words': (['info', 'a', 'b'], 'b'),
    'no value': (['info', 'a', '--most'], '--most'),
    'zero jobs': (['run', 'demo', '--jobs', '0'], '--jobs'),
    'a seed below 0': (['run', 'demo', '--set', 'seed=-1'], "'seed' is wrong"),
}


@pytest.mark.parametrize('words,expected', USAGE.values(), ids=USAGE.keys())
def test_words_that_are_no_command(protloc, tmp_path, monkeypatch, words, expected):
    monkeypatch.chdir(tmp_path)
    refused(protloc(*words), expected)
    assert list(tmp_path.iterdir()) == []


def wrapped():
    error = RuntimeError('a pool was closed')
    error.__cause__ = InputError('row 3\nis\x1b[2J empty')
    return error


ENDINGS = {
    'several lines': (InputError('one\n\ntwo\x1b[2J'), 'protloc: one two\\x1b[2J\n'),
    'wrapped': (wrapped(), 'protloc: row 3 is\\x1b[2J empty\n'),
    'a full disk': (OSError(errno.ENOSPC, 'No space left on device', '/d/a'), '/d/a cannot be read or written: No sp'),
    'too many files': (OSError(errno.EMFILE, 'Too many open files'), 'lower --workers and --jobs'),
    'a broken disk': (OSError(errno.EIO, 'Input/output error', '/d/a'), 'check the disk'),
    'a pipe of a helper': (BrokenPipeError(errno.EPIPE, 'Broken pipe'), 'Broken pipe'),
    'no temporary folder': (FileNotFoundError(2, "No usable temporary directory found in ['/tmp']"), 'TMPDIR'),
    'memory': (MemoryError(), 'not enough memory'),
    'recursion': (RecursionError('maximum'), 'nested too deeply'),
    'a name': (UnicodeEncodeError('utf-8', 'a\udcff', 1, 2, 'surrogates'), 'a\\udcff is not text in UTF-8'),
    'a lost helper': (type('TerminatedWorkerError', (RuntimeError,), {})('a worker'), 'lower --workers or --jobs'),
    'a loader': (InputError('Caught InputError in worker 0.\nOriginal Traceback:\nInputError: no cell\n'), ': no cell'),
}


@pytest.mark.parametrize('error,expected', ENDINGS.values(), ids=ENDINGS.keys())
def test_what_can_be_mended(protloc, monkeypatch, error, expected):
    def presets():
        raise error

    monkeypatch.setattr('protloc.study.arms.presets', presets)
    refused(protloc('presets'), expected)


@pytest.mark.parametrize('error', [TypeError('a bug'), EOFError(), OSError('no number'), KeyError('a\nb' * 999)])
def test_a_bug_keeps_its_traceback(protloc, monkeypatch, tmp_path, error):
    def presets():
        raise error

    monkeypatch.setattr('protloc.study.arms.presets', presets)
    monkeypatch.setattr('tempfile.tempdir', str(tmp_path))
    code, _, err = protloc('presets')
    assert (code, err.count('\n')) == (1, 1)
    assert err.startswith(f'protloc: unexpected: {type(error).__name__}') and 'Aborted' not in err
    (kept,) = tmp_path.iterdir()
    assert f'the traceback is in {kept}: please report it with that file at https://github.com/' in err
    assert 'in presets' in kept.read_text() and "'protloc': " in kept.read_text()
    kept.unlink()
    code, _, err = protloc('presets', '--debug')
    assert code == 1 and err.startswith('Traceback') and err.splitlines()[-1].startswith('protloc: unexpected: ')
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr('tempfile.tempdir', str(tmp_path / 'gone'))
    code, _, err = protloc('presets')
    assert code == 1 and err.startswith('Traceback') and 'the traceback is above' in err.splitlines()[-1]


def command(*words, **environment):
    return subprocess.run([*PROTLOC, *words], capture_output=True, env={**os.environ, **environment}, timeout=60)


def test_terminals():
    "ASCII alone, a reader that goes, a full one"
    ended = command('Käse λ', PYTHONIOENCODING='ascii', LC_ALL='C')
    assert ended.returncode == 2 and b"'K\\xe4se \\u03bb'" in ended.stderr and ended.stderr.count(b'\n') == 1
    program = ' '.join([*PROTLOC, '--help'])
    ended = subprocess.run(['bash', '-c', f'set -o pipefail; {program} | true'], capture_output=True, timeout=60)
    assert (ended.returncode, ended.stderr) == (141, b'')
    ended = subprocess.run(['bash', '-c', f'{program} > /dev/full'], capture_output=True, timeout=60)
    assert ended.returncode == 2 and ended.stderr.count(b'\n') == 1 and b'No space left on device' in ended.stderr


def test_names_that_are_no_text(protloc):
    refused(protloc('info', 'a\udcff'), "the name 'a\\udcff' is not text in UTF-8")


def test_a_folder_that_is_gone(protloc, tmp_path, monkeypatch):
    (tmp_path / 'gone').mkdir()
    monkeypatch.chdir(tmp_path / 'gone')
    (tmp_path / 'gone').rmdir()
    refused(protloc('info', 'a'), 'the working folder was deleted')


# --- outputs and inputs


@pytest.fixture(scope='module')
def things(tmp_path_factory):
    "A store, fields, a generator and a classifier that are known by a file each"
    folder = tmp_path_factory.mktemp('things')
    for name, file in {'G': 'pipeline/model_index.json', 'C': 'classifier.json', 'M': 'classifier.json'}.items():
        (folder / name / file).parent.mkdir(parents=True)
        (folder / name / file).write_text('{}')
    (folder / 'D').mkdir()
    (folder / 'D' / 'train.csv').write_text('Id,Target\n')
    (folder / 'mine.yaml').write_text('about: mine\n')
    (folder / 'mine.json').write_text('{}')
    (folder / 'plan.csv').write_text('Target,n\n0,3\n')
    (folder / 'limits.csv').write_text('class,threshold\n')
    with StoreWriter(folder / 'S', STAINS, HPA, 32) as writer:
        for i in range(9):
            writer.add(np.full((4, 32, 32), i, np.uint8), id=i, target=i % 2, split=('train', 'val', 'test')[i % 3])
    shutil.copytree(folder / 'S', folder / 'T')
    (folder / 'to S').symlink_to(folder / 'S')
    (folder / 'dangling').symlink_to(folder / 'nowhere' / 'a')
    return folder


REFUSALS = ('not to be changed', 'which does not exist', 'exists already', ' wants a ', 'name a file that ends in')
OVER = [
    'info S --sheet S/images.npy',
    'info S --sheet S/new.png',
    'info S --sheet dangling',
    'info S --sheet mine.yaml',
    'prepare D D/store',
    'prepare D .',
    'prepare D out --labels out.bad.csv',
    'simulate dangling',
    'train-generator S S/generator',
    'train-generator S out --preset out/mine.yaml',
    'train-classifier S S/model',
    'train-classifier S T --synthetic T --strategy concat',
    'train-classifier S C --teacher C --strategy soft_labels',
    'generate G G/drawn --like S',
    'generate G S/drawn --like S',
    'generate G out --like S --plan out',
    'generate G C/drawn --like S --classifier C --min-fidelity .5',
    'thresholds C S --out C/classifier.json',
    'thresholds C S --out S/table.csv',
    'thresholds C S --also M --out M/t.json',
    'thresholds C S --out mine.json',
    'predict C D D/train.csv',
    'predict C D D/new.csv',
    'predict C D C/new.csv',
    'predict C D out.csv --also M --probabilities M/p.csv',
    'predict C D out.csv --probabilities out.csv',
    'predict C D out.csv --probabilities out.csv.bad.csv',
    'predict C D limits.csv --threshold limits.csv',
    'predict C D mine.yaml',
    'predict C D dangling',
    'export C C/classifier.safetensors',
    'export C mine.yaml',
    'export C dangling',
    'run demo --data S --out S/run',
    'run demo --data S --out .',
    'run mine.yaml --out mine.yaml',
    'run demo --data S --out dangling',
    'info S --sheet to?S/new.png',
]


@pytest.mark.parametrize('words', OVER)
def test_no_output_over_an_input(protloc, things, monkeypatch, words):
    monkeypatch.chdir(things)
    if words == 'generate G out --like S --plan out':  # a plan is known by being a file
        words = 'generate G plan.csv --like S --plan plan.csv'
    before, names = hashes(things), sorted(path.name for path in things.rglob('*'))
    result = protloc(*[word.replace('?', ' ') for word in words.split()])
    if 'out/mine.yaml' in words or 'out.bad.csv' in words and 'labels' in words:
        assert result[0] == 2  # whatever is said first: that file is missing
    else:
        refused(result)
        assert any(text in result[2] for text in REFUSALS), result[2]
    assert hashes(things) == before
    assert sorted(path.name for path in things.rglob('*')) == names


def test_a_device_is_not_replaced(protloc, things, tmp_path):
    os.mkfifo(tmp_path / 'pipe.png')
    refused(protloc('info', things / 'S', '--sheet', tmp_path / 'pipe.png', '--overwrite'), 'is a device or a pipe')
    assert stat.S_ISFIFO((tmp_path / 'pipe.png').stat().st_mode)


def test_what_was_written_while_a_command_waited_is_not_replaced(protloc, things, tmp_path, monkeypatch):
    sheet = tmp_path / 'sheet.png'

    @contextlib.contextmanager
    def another_was_faster(path):
        Path(path).write_bytes(b'its sheet')
        yield

    monkeypatch.setattr('protloc.cli.exclusive', another_was_faster)
    refused(protloc('info', things / 'S', '--sheet', sheet), 'has been written meanwhile', '--overwrite')
    assert sheet.read_bytes() == b'its sheet'


@pytest.mark.parametrize('word', ['', ' '])
def test_empty_words(protloc, things, word, tmp_path, monkeypatch):
    "A path '' would be the working folder"
    monkeypatch.chdir(tmp_path)
    refused(protloc('report', word), 'FOLDER is empty')
    refused(protloc('train-classifier', things / 'S', word), 'OUT is empty')
    refused(protloc('info', things / 'S', f'--sheet={word}'), '--sheet is empty')
    refused(protloc('simulate', 'out', '--classes', word), '--classes is empty')
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize('command', ['train-classifier', 'train-generator'])
def test_a_training_keeps_out_of_other_folders(protloc, things, command, tmp_path):
    (tmp_path / 'project' / 'checkpoints').mkdir(parents=True)
    for name in ('settings.json', 'log.jsonl', 'checkpoints/epoch10.pt'):
        (tmp_path / 'project' / name).write_text('{}')
    refused(protloc(command, things / 'S', tmp_path / 'project'), 'and no training: choose another folder')
    assert sum(path.read_text() == '{}' for path in (tmp_path / 'project').rglob('*') if path.is_file()) == 3
    (tmp_path / 'new').mkdir()
    (tmp_path / 'new' / 'train.log').touch()  # of a scheduler, say
    assert protloc(command, things / 'S', tmp_path / 'new', '--set', 'loop.steps=1')[0] == 0


@pytest.mark.slow
@pytest.mark.parametrize('closed', ['2>&-', '>&-', '>&- 2>&-'])
def test_closed_streams(closed, tmp_path):
    command = f'{shlex.join(PROTLOC)} simulate out --train 6 --val 3 --test 3 --classes Nucleoli,Cytosol {closed}'
    assert subprocess.run(command, shell=True, cwd=tmp_path).returncode == 0
    assert len(ImageStore(tmp_path / 'out')) == 12


def test_files_are_replaced_on_request_alone(protloc, things, tmp_path):
    sheet = tmp_path / 'sheet.png'
    sheet.write_bytes(b'mine')
    refused(protloc('info', things / 'S', '--sheet', sheet), 'exists already', '--overwrite')
    assert sheet.read_bytes() == b'mine'
    assert protloc('info', things / 'S', '--sheet', sheet, '--overwrite')[0] == 0
    assert sheet.read_bytes()[:4] == b'\x89PNG'
    with exclusive(tmp_path / 'other.png'):
        refused(protloc('info', things / 'S', '--sheet', tmp_path / 'other.png'), 'is being written by')
    assert [path.name for path in tmp_path.iterdir()] == ['sheet.png']


# --- settings of any shape


def paths_of(kind, above=''):
    "The dotted names of all settings below a class of settings"
    for name, field in kind.model_fields.items():
        yield above + name
        for inside in (field.annotation, *typing.get_args(field.annotation)):
            if isinstance(inside, type) and issubclass(inside, Config):
                yield from paths_of(inside, f'{above}{name}.')


VALUES = (
    '[]', '[[1]]', '{}', '{1: 2}', '{a: {b: {c: [d]}}}', '5', '-1', '0', '2020-01-01', 'null', 'true', 'yes', '.nan',
    '.inf', '1.0e+400', '1' + '0' * 400, '9' * 5000, "''", '"a\\nb"', '"\\0"', '[1, &a 2, *a]', '&a [*a]', '[' * 2000,
    "'" + 'x' * 100_000 + "'", '!!python/object:os.system ls', '1000000000000', '${HOME}', '../..', '!!binary aGk=',
)  # fmt: skip


@pytest.mark.thorough
def test_settings_of_any_shape():
    "Each setting with a sixth of the values: valid or refused in one sentence, and none takes long"
    demo = read_preset('demo')
    count, began = 0, time.time()
    for i, path in enumerate(paths_of(StudyConfig)):
        for value in VALUES[i % 6 :: 6]:
            count += 1
            try:
                read_config(StudyConfig, with_overrides(demo, [f'{path}={value}']), 'demo')
            except InputError as error:
                assert len(str(error)) < 1000, (path, value[:50])
    assert count > 350 and time.time() - began < 60
    for text in ('=', '=1', 'a.b.c.d=1', 'a' * 9999, '.=1', 'seed.=1', '.'.join('a' * 999) + '=1', 'arms.0.name=x'):
        with pytest.raises(InputError):
            read_config(StudyConfig, with_overrides(demo, [text]), 'demo')


PRESETS = ['data: 5', 'arms: [[1]]', 'arms: 5', 'arms: [{1: 2}]', 'generator: [1]', '1: 2', 'generate: x']
PRESETS += ['arms: {real: 1}', 'replicates: &a [*a]', 'arms: [null]', 'true: 1']


@pytest.mark.parametrize('text', PRESETS)
def test_presets_of_any_shape(tmp_path, things, text):
    mine = tmp_path / 'mine.yaml'
    mine.write_text(text)
    with pytest.raises(InputError):
        study_config(str(mine), things / 'S')
    for call in (lambda: arm_of(str(mine)), lambda: section_config('generator', str(mine))):
        try:
            call()
        except InputError:
            pass


# --- every number has bounds

# rooms whose bounds are still to come
UNBOUNDED = ()


def all_settings():
    for module in pkgutil.walk_packages(package.__path__, 'protloc.'):
        importlib.import_module(module.name)
    kinds = [Config]
    for kind in kinds:
        kinds += kind.__subclasses__()
    return sorted({kind for kind in kinds if kind.__module__.startswith('protloc.')}, key=lambda kind: kind.__name__)


def bounds_of(metadata):
    "Which of 'low' and 'high' some annotations bound"
    low = any(isinstance(part, annotated_types.Ge | annotated_types.Gt | annotated_types.Interval) for part in metadata)
    high = any(
        isinstance(part, annotated_types.Le | annotated_types.Lt | annotated_types.Interval) for part in metadata
    )
    return low and high


def unbounded(annotation, bounded):
    "Whether a number without two bounds is in a type"
    if annotation in (int, float):
        return not bounded
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        inside = [part for field in args[1:] for part in getattr(field, 'metadata', [field])]
        return unbounded(args[0], bounded or bounds_of(inside))
    of_the_field = bounded if origin in (typing.Union, type(int | None)) else False
    return any(unbounded(part, of_the_field) for part in args if origin is not typing.Literal and part is not Ellipsis)


def fields_without_bounds(kind):
    hints = typing.get_type_hints(kind, include_extras=True)
    return [
        f'{kind.__name__}.{name}'
        for name, field in kind.model_fields.items()
        if unbounded(hints[name], bounds_of(field.metadata)) and not declared_in(kind, name).startswith(UNBOUNDED)
    ]


def declared_in(kind, name):
    "The module of the class that has a field first"
    return next(above.__module__ for above in reversed(kind.__mro__) if name in vars(above).get('__annotations__', ()))


def test_every_number_has_two_bounds():
    class Loose(Config):
        a: int = 1
        b: float | None = pydantic.Field(None, ge=0)
        c: tuple[float, float] = (0.0, 1.0)
        d: dict[str, int] = {}
        e: int = pydantic.Field(1, ge=0, le=3)

    loose = [
        name for name, field in Loose.model_fields.items() if unbounded(field.annotation, bounds_of(field.metadata))
    ]
    assert loose == ['a', 'b', 'c', 'd']
    kinds = all_settings()
    assert len(kinds) > 20
    missing = [name for kind in kinds for name in fields_without_bounds(kind)]
    assert missing == []


# --- names in reports

NAMES = [
    'None',
    'NA',
    'nan',
    '<script>alert(1)</script>',
    '=1+1',
    'x' * 100,
    r'$\frac',
    '$x',
    '_y',
    '{{7*7}}',
    '`a`',
    '&amp;',
]
ARMS = ['NA', 'None', 'true', '$x', '_y', '=1', "it's & co"]


def study_of(classes, arms, folder):
    rng = np.random.default_rng(0)
    n = 6 * len(classes)
    table = pd.DataFrame(dict(id=range(n), target=[str(i % len(classes)) for i in range(n)]))
    table['split'] = [('train', 'val', 'test')[i // len(classes) % 3] for i in range(n)]
    images = rng.integers(0, 255, (n, 2, 16, 16), np.uint8)
    store = write_store(folder / 'cells', images, table, ('a', 'b'), Vocabulary(classes))
    settings = read_preset('demo')
    named = ['real', *[dict(name=name, strategy='concat') for name in arms]]
    settings |= dict(about=classes[3] if len(classes) > 3 else '', arms=named, replicates=2)
    settings['data'] = dict(folder=str(store.path))
    return read_config(StudyConfig, settings), store


def test_names_in_a_report(tmp_path):
    "Names that look like something else are shown as they are: in tables, figures, page"
    config, store = study_of(NAMES, ARMS, tmp_path)
    run = dummy_run(config, store, tmp_path / 'run')
    write_results(Study(run.path), examined=False)
    tables = run.read_results()
    assert set(tables['classes']['class']) == set(NAMES)
    assert set(tables['verdict'].arm) == set(ARMS)
    text = page_in_process(run)
    assert '<script>alert(1)' not in text and '&lt;script&gt;alert(1)' in text
    assert 's & co' not in text and 's &amp; co' in text
    assert text.count('data:image/svg+xml') >= 8
    html = Study(run.path)._repr_html_()
    assert '<script>' not in html


def test_names_that_no_folder_can_have(protloc, things, tmp_path):
    for name in ('../other', 'a/b', '/a', '', 'a\nb', 'x' * 300, '<script>'):
        arms = yaml.safe_dump(['real', dict(name=name, strategy='concat')], default_flow_style=True)
        result = protloc('run', 'demo', '--data', things / 'S', '--out', tmp_path / 'run', '--set', f'arms={arms}')
        refused(result, 'control character' if '\n' in name else 'the arm ')
    assert list(tmp_path.iterdir()) == []


def test_a_rehearsal_names_what_would_come_late(tmp_path):
    config, store = study_of(['a', 'b'], ['mixed'], tmp_path)
    run = RunFolder(tmp_path / 'run')
    run.path.mkdir()
    for change, expected in (
        (dict(negative_labels=['c']), "'c'"),
        (dict(condition='HeLa'), 'generator.condition names no column'),
        (dict(images=10_000_000, plan='balance'), ''),
    ):
        generate = config.generate.model_copy(update=change)
        if expected:
            with pytest.raises(InputError, match=expected):
                rehearse(config.model_copy(update=dict(generate=generate)), store, run)
    rehearse(config, store, run)
    assert list(run.path.iterdir()) == []


def test_no_room_on_the_disk(tmp_path, monkeypatch):
    config, store = study_of(['a', 'b'], ['mixed'], tmp_path)
    (tmp_path / 'run').mkdir()
    monkeypatch.setattr('shutil.disk_usage', lambda path: shutil._ntuple_diskusage(10, 0, 10))
    with pytest.raises(InputError, match='free some space'):
        rehearse(config, store, RunFolder(tmp_path / 'run'))


# --- kills


@pytest.mark.slow
def test_killed_at_every_event_of_its_beginning(tmp_path):
    ended = subprocess.run([sys.executable, SCRIPTS / 'killed_at_events.py', tmp_path], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert int(ended.stdout.split()[-1]) >= 8


def test_folders_of_others_are_refused(protloc, things, tmp_path):
    for name, text in (('notes.txt', 'mine'), ('config.yaml', 'port: 80\n'), ('versions.json.old', '{}')):
        folder = tmp_path / name.replace('.', '-')
        folder.mkdir()
        (folder / name).write_text(text)
        refused(protloc('run', 'demo', '--data', things / 'S', '--out', folder), 'holds no study')
        assert [(path.name, path.read_text()) for path in folder.iterdir()] == [(name, text)]


def family(process):
    return [process, *process.children(recursive=True)]


def killed(words, when):
    "Kill a command with -9 once a condition of its family holds; those of its family that live 3 s later"
    process = psutil.Popen([*PROTLOC, *map(str, words)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    began = time.time()
    try:
        while not when(family(process)) and process.poll() is None and time.time() - began < 90:
            time.sleep(0.05)
        assert process.poll() is None, 'it ended before it could be killed'
        members = family(process)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    _, alive = psutil.wait_procs(members[1:], timeout=3)
    for member in alive:
        member.kill()
    assert len(members) > 1
    return alive


STUDY = (
    'data.simulate.counts={train: 40, val: 20, test: 20}',
    'data.simulate.classes=[Nucleoli, Cytosol]',
    'generator.loop={steps: 2, batch_size: 8}',
    'generator.unet.widths=[16, 32]',
    'generate={images: 16, num_inference_steps: 2}',
    'arms=[real, concat]',
    'classifier.loop={steps: 4000, batch_size: 8}',
    'replicates=2',
)


@pytest.mark.slow
def test_helpers_of_a_study_end_with_it(tmp_path):
    words = ['run', 'demo', '--out', tmp_path / 'run', '--jobs', 2, *[word for s in STUDY for word in ('--set', s)]]
    training = tmp_path / 'run'
    alive = killed(words, lambda members: len(list(training.glob('replicate-*/classifiers/*/settings.json'))) == 2)
    assert alive == []


@pytest.mark.slow
def test_the_kernel_of_a_report_ends_with_it(finished, tmp_path):
    run = shutil.copytree(finished, tmp_path / 'run')
    alive = killed(['report', run], lambda members: any('ipykernel' in ' '.join(p.cmdline()) for p in members[1:]))
    assert alive == []


# --- files of a run

DAMAGES = {
    'removed': lambda path: path.unlink(),
    'emptied': lambda path: path.write_bytes(b''),
    'cut': lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    'binary': lambda path: path.write_bytes(bytes(range(256)) * 8),
    'other JSON': lambda path: path.write_text('[{"a": 1}]'),
    'other array': lambda path: np.save(open(path, 'wb'), np.zeros((3, 2, 1))),
}
OFTEN = ('removed', 'cut')
RARELY = [name for name in DAMAGES if name not in OFTEN]
NOTES = (
    'config.yaml',
    'log.jsonl',
    'versions.json',
    'plan.yaml',
    'replicate-0/generator/log.jsonl',
    'replicate-0/generator/pipeline/training.json',
    'replicate-0/classifiers/real/test.npy',
    'replicate-0/judgement-by-real.npy',
    'replicate-1/classifiers/concat/val.npy',
    'replicate-1/classifiers/concat/log.jsonl',
)


@pytest.mark.parametrize('damage', [*OFTEN, *(pytest.param(name, marks=pytest.mark.thorough) for name in RARELY)])
def test_a_run_without_its_files(finished, tmp_path, damage):
    "Each file that a report reads: it is made all the same where the file is a note alone, or one sentence names it"
    folder = shutil.copytree(finished, tmp_path / 'run')
    outcomes = {}
    for name in NOTES:
        path = folder / name
        whole = path.read_bytes()
        DAMAGES[damage](path)
        try:
            write_results(Study(folder))
            results = Results(folder)
            for show in (fig_training, provenance, leak_check):
                show(results)
                plt.close('all')
            outcomes[name] = ''
        except InputError as error:
            outcomes[name] = str(error)
        path.write_bytes(whole)
    notes = NOTES[1:3] + ('replicate-0/generator/log.jsonl', 'replicate-0/generator/pipeline/training.json')
    for name, sentence in outcomes.items():
        if damage == 'removed' and name in notes:
            assert not sentence
        else:
            assert Path(name).name in sentence or 'is missing: continue it' in sentence, (name, sentence)


def test_predictions_are_made_again(finished, tmp_path, protloc):
    folder = shutil.copytree(finished, tmp_path / 'run')
    run = RunFolder(folder)
    config = study_config(str(run.config))
    path = run.predictions('concat', 1, 'val')
    whole = path.read_bytes()
    for gone in (b'', None):
        path.unlink()
        if gone is not None:
            path.write_bytes(gone)
        run_study(config, folder)
        assert path.read_bytes() == whole
    path.write_bytes(whole[:-8])
    with pytest.raises(InputError, match='val.npy'):
        run_study(config, folder)
    path.write_bytes(whole)
    assert not run.report.exists()
    run.report.write_text(read_text(RunFolder(finished).report)[:1000])
    assert not run.reported
