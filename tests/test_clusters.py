"""A study on a Dask cluster of this machine, with a worker that is killed; and commands that others launch."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
from test_chain import PROTLOC, numbers_and_images

from protloc.core import InputError
from protloc.study.arms import study_config
from protloc.study.folder import RunFolder
from protloc.study.runner import run_study
from protloc.study.scores import Study
from protloc.study.verdict import write_results
from protloc.study.workers import Call, Workers, work_through
from protloc.threads import cores

pytest.importorskip('distributed')
SMALLER = [
    'data.simulate.counts={train: 120, val: 40, test: 40}',
    'data.simulate.classes=[Nucleoli, Plasma membrane, Cytosol]',
    'generator.loop={steps: 60, batch_size: 16, lr: 0.002, ema_decay: 0.9, checkpoint_seconds: 0}',
    'generator.unet.widths=[16, 32]',
    'replicates=2',
    'generators=1',
    'generate={images: 64, num_inference_steps: 3}',
    'arms=[real, concat]',
    'controls=false',
    'classifier.loop={steps: 60, batch_size: 16, lr: 0.003, evaluate_every: 20, checkpoint_seconds: 0}',
]


@pytest.fixture(scope='module')
def alone(tmp_path_factory):
    "The folder of the study that this process makes alone"
    folder = tmp_path_factory.mktemp('alone') / 'run'
    run_study(study_config('demo', overrides=SMALLER), folder)
    write_results(Study(folder))
    return folder


def command(folder, *words):
    "The command that makes the study"
    settings = [word for setting in SMALLER for word in ('--set', setting)]
    return list(map(str, [PROTLOC, 'run', 'demo', '--out', folder, *settings, *words]))


def environment():
    "As many threads a task as the study of one process had, and bars that nobody reads"
    return {**os.environ, 'OMP_NUM_THREADS': str(cores()), 'TQDM_DISABLE': '1'}


class Cluster:
    "A Dask scheduler and its workers, as processes on this machine"

    def __init__(self, folder):
        self.folder = folder
        self.processes = []
        with socket.socket() as free:
            free.bind(('127.0.0.1', 0))
            self.address = f'127.0.0.1:{free.getsockname()[1]}'
        self.start('scheduler', '--host', '127.0.0.1', '--port', self.address.partition(':')[2], '--no-dashboard')

    def start(self, kind, *words):
        with open(self.folder / f'{len(self.processes)}.log', 'w') as log:
            start = [sys.executable, '-m', f'distributed.cli.dask_{kind}', *words]
            process = subprocess.Popen(start, cwd=self.folder, stdout=log, stderr=log, env=environment())
        self.processes.append(process)
        return process

    def worker(self, *words):
        "Start a worker; without a nanny, that would start another one in its place"
        scratch = ('--local-directory', str(self.folder), '--no-dashboard')
        return self.start('worker', self.address, '--nthreads', '1', '--no-nanny', *scratch, *words)

    def end(self):
        for process in reversed(self.processes):
            process.terminate()
        for process in reversed(self.processes):
            try:
                process.wait(3)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@pytest.fixture
def cluster(tmp_path):
    "A scheduler without workers"
    folder = tmp_path / 'dask'
    folder.mkdir()
    started = Cluster(folder)
    yield started
    started.end()


def wait_for(found, process, seconds=120):
    "Wait until something is found while a process is at work; what it is"
    deadline = time.time() + seconds
    while not found() and time.time() < deadline and process.poll() is None:
        time.sleep(0.02)
    assert found(), process.poll()
    return found()


class InThread(threading.Thread):
    "A call at work, with an end as a process has it"

    def __init__(self, call):
        super().__init__(daemon=True)
        self.call, self.code = call, None
        self.start()

    def run(self):
        self.code = 1
        self.call()
        self.code = 0

    def poll(self):
        return None if self.is_alive() else self.code


def tasks_of(folder):
    "The commands at work for a study: process -> its parent and its words"
    found = {}
    for path in Path('/proc').glob('[0-9]*'):
        try:
            words = (path / 'cmdline').read_bytes().decode().split('\0')
            if 'task' in words and str(folder) in words:
                found[int(path.name)] = int((path / 'stat').read_text().rsplit(')', 1)[1].split()[1]), words
        except OSError:
            continue  # it has ended
    return found


def debris(folder):
    "Locks and what is not whole"
    return [path for path in folder.parent.rglob('.*protloc*')]


def log_of(run):
    return [line['stage'] for line in map(json.loads, run.log.read_text().splitlines())]


@pytest.mark.slow
@pytest.mark.skipif(not Path('/proc').exists(), reason='looks into /proc')
def test_a_killed_worker_is_replaced_by_another(alone, cluster, monkeypatch, tmp_path):
    "Its training goes on from the checkpoint in another worker; the study ends in the numbers of one process"
    monkeypatch.setenv('OMP_NUM_THREADS', str(cores()))
    run = RunFolder(tmp_path / 'apart' / 'run')
    pids = [cluster.worker().pid, cluster.worker().pid]
    config, workers = study_config('demo', overrides=SMALLER), Workers(backend='dask', address=cluster.address)
    study = InThread(lambda: run_study(config, run.path, workers))
    wait_for(lambda: list(run.generator().glob('checkpoints/step-*')), study)
    # the worker's command that trains the generator
    found = tasks_of(run.path).items()
    task, worker = next((task, parent) for task, (parent, words) in found if 'generator' in words)
    assert worker in pids
    os.kill(worker, signal.SIGKILL)
    wait_for(lambda: task not in tasks_of(run.path), study, 10)
    first = json.loads(run.generator().joinpath('log.jsonl').read_text().splitlines()[0])
    again = wait_for(lambda: [p for p, (_, words) in tasks_of(run.path).items() if 'generator' in words], study)
    assert task not in again
    study.join(200)
    assert study.poll() == 0
    assert json.loads(run.generator().joinpath('log.jsonl').read_text().splitlines()[0]) == first  # it went on
    assert sorted(log_of(run)) == sorted(log_of(RunFolder(alone)))
    assert not run.read_failures()
    write_results(Study(run.path))
    assert numbers_and_images(run.path) == numbers_and_images(alone)
    assert not tasks_of(run.path)
    assert not debris(run.path)


@pytest.mark.slow
@pytest.mark.skipif(not Path('/proc').exists(), reason='looks into /proc')
def test_ctrl_c_ends_the_tasks_and_the_workers_stay(cluster, tmp_path):
    run = RunFolder(tmp_path / 'apart' / 'run')
    worker = cluster.worker()
    words = command(run.path, '--backend', 'dask', '--address', cluster.address)
    started = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment())
    try:
        wait_for(lambda: tasks_of(run.path), started)
        time.sleep(1)
        started.send_signal(signal.SIGINT)
        _, err = started.communicate(timeout=30)
    finally:
        started.kill()
        started.wait()
    assert started.returncode == 130, err
    assert re.search('protloc: stopped; nothing is lost; continue with: .*protloc run demo', err)
    assert 'Traceback' not in err
    wait_for(lambda: not tasks_of(run.path), worker, 10)
    calls = [Call('anything', (), ('-c', 'print(\'protloc answers {"result": 7}\')'))]
    assert list(work_through(None, calls, Workers(backend='dask', address=cluster.address))) == [(calls[0], 7)]
    assert not debris(run.path)


def test_what_a_task_says_comes_back(cluster, capsys):
    "A refusal is a refusal here too; without workers it waits, and says so"
    workers = Workers(backend='dask', address=cluster.address)
    refuses = Call('bad part', (), ('-c', 'print(\'protloc answers {"refused": "mend it"}\')'))
    dies = Call('dead part', (), ('-c', 'import os; os.kill(os.getpid(), 9)'))
    cluster.worker()
    with pytest.raises(InputError, match=r'bad part: mend it \(on '):
        list(work_through(None, [refuses], workers))
    with pytest.raises(InputError, match='dead part: .* was ended by signal 9, most likely for want of memory'):
        list(work_through(None, [dies], workers))
    capsys.readouterr()


def test_a_lost_scheduler_ends_the_study(cluster, capfd):
    call = Call('part', (), ('-c', 'import time; time.sleep(100)'))
    cluster.worker()
    threading.Timer(4, cluster.processes[0].kill).start()
    start = time.time()
    with pytest.raises(InputError, match='part: the scheduler at .* is lost: start it again, and run the same command'):
        list(work_through(None, [call], Workers(backend='dask', address=cluster.address)))
    assert time.time() - start < 60
    assert 'Traceback' not in capfd.readouterr().err


def test_without_workers_it_waits(cluster, monkeypatch, capsys):
    monkeypatch.setattr('protloc.study.workers.DASK_SECONDS', 2)
    call = Call('part', (), ('-c', 'print(\'protloc answers {"result": 1}\')'))
    done = work_through(None, [call], Workers(backend='dask', address=cluster.address))
    threading.Timer(4, cluster.worker).start()
    assert next(done) == (call, 1)
    assert 'note: the cluster has no worker: waiting for one' in capsys.readouterr().err


@pytest.mark.parametrize(
    'words,message',
    [
        (('--backend', 'dask', '--address', '127.0.0.1:1'), 'no Dask scheduler answers at 127.0.0.1:1'),
        (('--backend', 'ray', '--address', '127.0.0.1:1'), 'no Ray cluster answers at 127.0.0.1:1'),
        (('--backend', 'dask', '--address', 'nowhere'), "'nowhere' is no address of a scheduler"),
        (('--backend', 'dask'), 'needs --address'),
        (('--address', '127.0.0.1:1'), 'choose --backend dask or --backend ray'),
        (('--gpus', '1'), 'choose --backend dask or --backend ray'),
        (('--backend', 'dask', '--address', '127.0.0.1:1', '--jobs', '2'), '--jobs is for this machine'),
        (('--launch', 'no-such-launcher -n 2'), 'there is no such program'),
        (('--launch', "accelerate 'launch"), 'close its quotes'),
    ],
)
def test_mistakes(protloc, monkeypatch, tmp_path, words, message):
    if 'ray' in words:
        pytest.importorskip('ray', reason='Ray is not installed')
    monkeypatch.setattr('protloc.study.workers.DASK_SECONDS', 3)
    start = time.time()
    code, _, err = protloc('run', 'demo', '--out', tmp_path / 'run', *words)
    assert code == 2
    assert message in err
    assert err.count('\n') == 1, err
    assert time.time() - start < 20
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('backend,package', [('dask', 'distributed'), ('ray', 'ray')])
def test_a_backend_without_its_package(protloc, monkeypatch, tmp_path, backend, package):
    monkeypatch.setitem(sys.modules, package, None)
    code, _, err = protloc('run', 'demo', '--out', tmp_path / 'run', '--backend', backend, '--address', 'localhost:1')
    assert code == 2
    assert f"pip install 'protloc[{backend}]'" in err
    assert err.count('\n') == 1, err


@pytest.mark.slow
def test_launched_commands_make_the_same(alone, monkeypatch, tmp_path):
    "Each part in a command of its own, two at a time"
    monkeypatch.setenv('OMP_NUM_THREADS', str(cores()))
    run = RunFolder(shutil.copytree(alone, tmp_path / 'apart' / 'run'))
    for part in (run.generator(), run.classifier('concat', 0)):
        shutil.rmtree(part)
    run.predictions('real', 0, 'synthetic').unlink()
    run_study(study_config('demo', overrides=SMALLER), run.path, Workers(jobs=2, launch='python'))
    for name in ('generator/last', 'classifiers/concat/classifier'):
        weights = run.replicate(0) / f'{name}.safetensors'
        assert weights.read_bytes() == (alone / 'replicate-0' / f'{name}.safetensors').read_bytes()
    assert (run.predictions('real', 0, 'synthetic')).read_bytes() == (
        RunFolder(alone).predictions('real', 0, 'synthetic')
    ).read_bytes()
    assert not debris(run.path)


LAUNCH = 'torchrun --nproc_per_node 2'  # on CPUs `accelerate launch` starts one process, whatever is asked


@pytest.mark.thorough
def test_two_processes_share_a_part(alone, monkeypatch, tmp_path):
    "As the same launch by hand: half of a batch each, and one of them writes and answers"
    monkeypatch.setenv('OMP_NUM_THREADS', '1')
    launched, by_hand = (RunFolder(tmp_path / name / 'run') for name in ('launched', 'by-hand'))
    part = ('classifier', '0', 'real')
    for run in (launched, by_hand):
        shutil.copytree(alone, run.path, ignore=shutil.ignore_patterns('real', 'results', 'figures', 'report.*'))
        shutil.copytree(RunFolder(alone).real, run.real)
    run_study(study_config('demo', overrides=SMALLER), launched.path, Workers(launch=LAUNCH))
    assert log_of(launched).count('real of replicate 0') == 2
    words = [*LAUNCH.split(), '-m', 'protloc', 'task', by_hand.path, *part]
    words[0] = PROTLOC.with_name(words[0])
    assert subprocess.run(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode == 0
    for file in ('classifier.safetensors', 'val.npy', 'test.npy'):
        one, other, whole = (r.classifier('real', 0) / file for r in (launched, by_hand, RunFolder(alone)))
        assert one.read_bytes() == other.read_bytes() != whole.read_bytes()
    assert not debris(launched.path)


def test_a_failing_launcher_is_one_sentence(tmp_path):
    call = Call('part', (), ('-c', 'raise SystemExit("no GPU here")'), True)
    with pytest.raises(InputError, match='part: `python -u -c .* ended with 1 and no answer: no GPU here'):
        list(work_through(None, [call, call], Workers(launch='python -u', jobs=2)))


def test_a_part_by_hand(protloc, alone, tmp_path):
    assert protloc('task', alone, 'classifier', 0, 'real')[0] == 0
    code, _, err = protloc('task', alone, 'classifier', 0, 'nobody')
    assert code == 2
    assert 'has no part classifier 0 nobody' in err
    code, _, err = protloc('task', tmp_path / 'nowhere', 'generator', 0)
    assert code == 2
    assert 'is not to be seen on' in err


RAY = """
import sys
import tempfile
from ray.scripts.scripts import main
sys.argv[0] = 'ray'
main()
"""


@pytest.mark.slow
def test_what_a_task_says_comes_back_from_ray(monkeypatch):
    pytest.importorskip('ray', reason='Ray is not installed: the extra `ray` has it')
    monkeypatch.setenv('RAY_USAGE_STATS_ENABLED', '0')
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    scratch = tempfile.mkdtemp(dir='/tmp')  # its sockets want short names
    options = f'--head --block --port {port} --num-cpus 2 --include-dashboard false --object-store-memory 100000000'
    start = [sys.executable, '-c', RAY, 'start', *options.split(), '--temp-dir', scratch, '--min-worker-port', '0']
    head = subprocess.Popen(
        [*start, '--max-worker-port', '0'], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment()
    )
    try:
        wait_for(lambda: list(Path(scratch).glob('session_latest/sockets/raylet*')), head, 60)
        workers = Workers(backend='ray', address=f'127.0.0.1:{port}')
        calls = [Call(f'part {i}', (), ('-c', f'print(\'protloc answers {{"result": {i}}}\')')) for i in range(3)]
        assert {result for _, result in work_through(None, calls, workers)} == {0, 1, 2}
        refuses = Call('bad part', (), ('-c', 'print(\'protloc answers {"refused": "mend it"}\')'))
        with pytest.raises(InputError, match=r'bad part: mend it \(on '):
            list(work_through(None, [refuses], workers))
    finally:
        head.terminate()
        head.wait(30)
        shutil.rmtree(scratch, ignore_errors=True)
