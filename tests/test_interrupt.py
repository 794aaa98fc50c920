"""Ctrl-C, SIGTERM, torchrun: one sentence, no traceback; the command that it names ends as if nothing had been.

A process of its own for each start takes long, so a few commands are stopped, one of each kind of worker;
`PROTLOC_SIGNALS=1 pytest tests/test_interrupt.py` stops every command.
"""

import hashlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from protloc.data.store import ImageStore
from protloc.labels import STAINS

PROTLOC = (sys.executable, '-m', 'protloc')
LOOP = 'loop={steps: 40, batch_size: 8, evaluate_every: 20, checkpoint_seconds: 0, workers: 2}'
UNET = ('--set', 'unet.widths=[16, 32]')
RESNET = ('--set', 'backbone=resnet10')
STUDY = [
    'data.simulate.counts={train: 60, val: 20, test: 20}',
    'data.simulate.classes=[Nucleoli, Cytosol]',
    'generator.loop={steps: 10, batch_size: 16}',
    'generator.unet.widths=[16, 32]',
    'generate={images: 32, num_inference_steps: 2}',
    'arms=[real, concat]',
    'replicates=2',
    'classifier.loop={steps: 20, batch_size: 16, evaluate_every: 10}',
]


def environment():
    return {**os.environ, 'OMP_NUM_THREADS': '1'}


def done(words, folder):
    "Run a command to its end; what it printed"
    ended = subprocess.run([*map(str, words)], cwd=folder, env=environment(), capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-3000:]
    return ended.stdout


def answers(process):
    "Whether a process has come to the first line of protloc: before it, Python itself starts, and answers in its way"
    try:
        status = Path(f'/proc/{process.pid}/status').read_text()
    except OSError:  # not Linux
        return True
    caught = int(re.search(r'^SigCgt:\s*(\w+)', status, re.MULTILINE)[1], 16)
    return caught >> (signal.SIGTERM - 1) & 1


def stopped(words, folder, when, number=signal.SIGINT, times=1):
    "Start a command and send a signal to its whole process group, as a terminal does; exit code and stderr"
    said = folder / 'stderr.txt'
    with open(said, 'w') as file:
        process = subprocess.Popen(
            [*map(str, words)],
            cwd=folder,
            env=environment(),
            stdout=subprocess.DEVNULL,
            stderr=file,
            start_new_session=True,
            # pytest may itself be run where Ctrl-C is ignored
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
    while process.poll() is None and not answers(process):
        time.sleep(0.001)
    began = time.time()
    while process.poll() is None and not when(said.read_text(), time.time() - began) and time.time() - began < 120:
        time.sleep(0.01)
    assert process.poll() is None, f'it ended before it could be stopped: {said.read_text()[-2000:]}'
    for _ in range(times):
        os.killpg(process.pid, number)
        time.sleep(0.05 if times > 1 else 0)
    return process.wait(120), said.read_text()


def at(seconds):
    return lambda text, passed: passed >= seconds


def seen(words):
    "Once a progress bar, or a line, is there"
    return lambda text, passed: words in text


def sentence_of(code, err, number=signal.SIGINT):
    "The one line that a stopped command says"
    assert code == 128 + number, err[-3000:]
    for noise in ('Traceback', 'Exception ignored', 'leaked', 'Aborted'):
        assert noise not in err, err[-3000:]
    lines = [line for line in err.splitlines() if line.startswith('protloc: ')]
    assert len(lines) == 1, err[-3000:]
    return lines[0].removeprefix('protloc: ')


def continued(sentence, folder):
    "Paste the command that a sentence ends on into a shell"
    command = sentence.partition(' with: ')[2]
    ended = subprocess.run(command, shell=True, cwd=folder, env=environment(), capture_output=True, text=True)
    assert ended.returncode == 0, (command, ended.stderr[-3000:])
    return ended.stdout


def results(folder):
    "Hashes of all arrays, weights and tables below a folder"
    files = [path for path in sorted(folder.rglob('*')) if path.suffix in ('.npy', '.safetensors', '.csv')]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope='module')
def base(tmp_path_factory):
    "A store of cells, fields, a generator and a classifier of the fields"
    folder = tmp_path_factory.mktemp('base')
    (folder / 'fields' / 'train').mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(48):
        for stain in STAINS:
            plane = rng.integers(0, 256, (160, 160), dtype=np.uint8)
            Image.fromarray(plane).save(folder / 'fields' / 'train' / f'f{i}_{stain}.png')
    table = 'Id,Target\n' + ''.join(f'f{i},{i % 3}\n' for i in range(48))
    (folder / 'fields' / 'train.csv').write_text(table)
    few = ('--set', 'loop={steps: 4, batch_size: 8, evaluate_every: 2}')
    counts = ('--train', 40, '--val', 16, '--test', 16)
    for words in (
        ('simulate', 'cells', *counts, '--classes', 'Nucleoli,Cytosol'),
        ('train-generator', 'cells', 'generator', *few, *UNET),
        ('prepare', 'fields', 'prepared', '--size', 32, '--workers', 1),
        ('train-classifier', 'prepared', 'model', *few, *RESNET),
    ):
        done((*PROTLOC, *words), folder)
    return folder


# --- what takes no time


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize('seconds', [0, 0.15, 0.45])
def test_while_the_libraries_are_imported(tmp_path, number, seconds):
    "Before the command line is there, while it is imported, and while a command imports what it needs"
    words = (*PROTLOC, 'run', 'demo', '--out', 'a run', '--set', 'replicates=2')
    sentence = sentence_of(*stopped(words, tmp_path, at(seconds), number), number)
    assert sentence.startswith('stopped; nothing is lost; continue with: ')
    assert sentence.endswith("-m protloc run demo --out 'a run' --set replicates=2")
    assert [path.name for path in tmp_path.iterdir()] == ['stderr.txt']


def test_twice_in_a_row(tmp_path):
    words = (*PROTLOC, 'simulate', 'out', '--train', 4000)
    sentence = sentence_of(*stopped(words, tmp_path, seen('simulating'), times=3))
    assert sentence.startswith('stopped; out was not written; run it again with: ')
    assert [path.name for path in tmp_path.iterdir()] == ['stderr.txt']


def test_the_installed_command_is_named_as_it_was_called(tmp_path):
    folder = tmp_path / 'some bin'
    folder.mkdir()
    program = folder / 'protloc'
    program.write_text(f'#!{sys.executable}\nimport sys\nfrom protloc.__main__ import main\nsys.exit(main())\n')
    program.chmod(0o755)
    words = ('simulate', 'my cells', '--train', 200, '--val', 0, '--test', 0, '--classes', 'Nucleoli')
    sentence = sentence_of(*stopped((program, *words), tmp_path, seen('simulating')))
    assert sentence.endswith(
        f"run it again with: '{program}' simulate 'my cells' --train 200 --val 0 --test 0 --classes Nucleoli"
    )
    continued(sentence, tmp_path)
    assert len(ImageStore(tmp_path / 'my cells')) == 200


def test_who_has_interrupts_ignored_goes_on(tmp_path):
    "As under nohup, or in the background of a script"
    ignoring = (
        'import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_IGN); os.execv(sys.argv[1], sys.argv[1:])'
    )
    process = subprocess.Popen(
        [sys.executable, '-c', ignoring, *PROTLOC, 'simulate', 'out', '--train', '200', '--val', '0', '--test', '0'],
        cwd=tmp_path,
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
    )
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate()
    assert process.returncode == 0, err
    assert len(ImageStore(tmp_path / 'out')) == 200


# --- each command, stopped at work, and continued to what an uninterrupted one makes

AT_WORK = {
    'presets': (('presets',), at(0.4), 'nothing was written'),
    'simulate, two processes': (
        ('simulate', 'out', '--train', 2000, '--workers', 2),
        seen('simulating'),
        'out was not written',
    ),
    'prepare, two processes': (
        ('prepare', 'fields', 'out', '--size', 32, '--tile', 80, '--workers', 2),
        seen('prepare:'),
        'nothing is lost',
    ),
    'info': (('info', 'cells', '--sheet', 'out.png'), at(0.5), 'written'),
    'split': (('split', 'out', '--folds', 3), at(0.5), 'nothing is lost'),
    'train-generator': (('train-generator', 'cells', 'out', *UNET, '--set', LOOP), seen('20/40'), 'nothing is lost'),
    'generate': (
        ('generate', 'generator', 'out', '--like', 'cells', '--images', 80, '--batch-size', 4),
        seen('8/80'),
        'nothing is lost',
    ),
    'train-classifier': (
        ('train-classifier', 'cells', 'out', *RESNET, '--set', LOOP),
        seen('20/40'),
        'nothing is lost',
    ),
    'evaluate': (('evaluate', 'model', 'prepared', '--tta'), seen('evaluate:'), 'nothing was written'),
    'thresholds': (
        ('thresholds', 'model', 'prepared', '--tta', '--out', 'out.json'),
        seen('thresholds:'),
        'out.json was not written',
    ),
    'predict': (
        ('predict', 'model', 'fields', 'out.csv', '--probabilities', 'p.csv', '--workers', 2),
        seen('prepare:'),
        'out.csv and p.csv were not written',
    ),
    'export': (('export', 'model', 'out.pt', '--kind', 'torchscript'), at(1.5), 'written'),
}


def room(base, folder, command):
    "A folder with links to what commands read; `split` gets a store of its own"
    folder.mkdir()
    for path in base.iterdir():
        (folder / path.name).symlink_to(path)
    if command == 'split':
        store = folder / 'out'
        store.mkdir()
        for path in (base / 'cells').iterdir():
            (store / path.name).write_bytes(path.read_bytes())
    return folder


ALWAYS = ('prepare, two processes', 'train-classifier')
every_command = pytest.mark.skipif('PROTLOC_SIGNALS' not in os.environ, reason='PROTLOC_SIGNALS=1 stops every command')


@pytest.mark.slow
@pytest.mark.parametrize(
    'words,when,what',
    [pytest.param(*case, id=name, marks=[] if name in ALWAYS else every_command) for name, case in AT_WORK.items()],
)
def test_at_work(base, tmp_path, words, when, what):
    whole, cut = (room(base, tmp_path / name, words[0]) for name in ('whole', 'cut'))
    printed = done((*PROTLOC, *words), whole)
    sentence = sentence_of(*stopped((*PROTLOC, *words), cut, when))
    assert sentence.startswith('stopped; ') and what in sentence
    if 'written' in what:
        assert not [path.name for path in cut.iterdir() if path.name.startswith(('out', 'p.csv', '.'))]
    printed_again = continued(sentence, cut)
    (cut / 'stderr.txt').unlink()
    assert results(cut) == results(whole)
    assert not list(cut.rglob('*partial*'))
    if words[0] in ('presets', 'evaluate'):
        assert printed_again == printed


@pytest.mark.slow
@every_command
def test_a_study_at_work_and_at_its_report(base, tmp_path):
    "Stopped while two processes train, and while the report is made"
    study = ('run', 'demo', '--out', 'out', *[word for setting in STUDY for word in ('--set', setting)])
    whole, cut = (room(base, tmp_path / name, 'run') for name in ('whole', 'cut'))
    done((*PROTLOC, *study), whole)
    for words, when in (((*study, '--jobs', 2), seen('0/4')), (study, seen('report:'))):
        sentence = sentence_of(*stopped((*PROTLOC, *words), cut, when))
        assert sentence.startswith('stopped; nothing is lost; continue with: ')
        if when('report:', 0):
            assert not (cut / 'out' / 'report.html').exists()
    continued(sentence, cut)
    (cut / 'stderr.txt').unlink()
    assert results(cut) == results(whole)
    assert not list(cut.rglob('*partial*'))


@pytest.mark.slow
def test_a_store_that_had_been_finished_is_not_called_unfinished(base, tmp_path):
    "Stopped after its store has its name, `prepare` does not advise to do it again, which would be refused"
    late = (
        'import os, signal, sys\n'
        'from protloc import cli\n'
        'from protloc.data import prepare\n'
        'whole = prepare.prepare\n'
        'def late(*args, **options):\n'
        '    store = whole(*args, **options)\n'
        '    os.kill(os.getpid(), signal.SIGINT)\n'
        '    return store\n'
        'prepare.prepare = late\n'
        'cli.main()\n'
    )
    words = (sys.executable, '-c', late, 'prepare', base / 'fields', 'out', '--size', 32, '--workers', 1)
    ended = subprocess.run([*map(str, words)], cwd=tmp_path, env=environment(), capture_output=True, text=True)
    assert sentence_of(ended.returncode, ended.stderr) == 'stopped; out had been finished already'
    assert len(ImageStore(tmp_path / 'out')) == 48


@pytest.mark.slow
@every_command
def test_under_torchrun(base, tmp_path):
    "One of two processes says it, and names the command that starts both"
    words = ('generate', base / 'generator', 'out', '--like', base / 'cells', '--images', 100, '--batch-size', 4)
    torchrun = (sys.executable, '-m', 'torch.distributed.run', '--nproc_per_node', 2, '-m', 'protloc')
    _, err = stopped((*torchrun, *words), tmp_path, seen('8/100'))
    lines = [line for line in err.splitlines() if line.startswith('protloc: ')]
    assert len(lines) == 1, err[-3000:]
    assert lines[0].startswith('protloc: stopped; nothing is lost; continue with: ')
    continued(lines[0], tmp_path)
    (tmp_path / 'whole').mkdir()
    done((*PROTLOC, *words), tmp_path / 'whole')
    assert results(tmp_path / 'out') == results(tmp_path / 'whole' / 'out')
