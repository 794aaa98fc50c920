"""The loop under fire: killed, damaged, accumulated, spread over processes, out of memory, overflowing."""

import json
import os
import signal
import subprocess
import sys
import typing
import warnings
from pathlib import Path

import psutil
import pydantic
import pytest
import safetensors.torch
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from noisy_training import Noise, build, loss
from protloc import training
from protloc.classify.backbone import ClassifierCard
from protloc.classify.mixing import STRATEGIES
from protloc.classify.train import ClassifierConfig
from protloc.core import InputError, sha256
from protloc.training import RUNTIME, LogLine, LoopConfig, accelerator_for, fit, hold_folder, save_weights, train_step

SCRIPTS = Path(__file__).parent / 'scripts'


def weights(path):
    return safetensors.torch.load_file(path)


def lines(folder):
    return [json.loads(line) for line in (folder / 'log.jsonl').read_text().splitlines()]


def run_script(name, *args, processes=1):
    "Run a script of tests/scripts, by torchrun where it wants several processes"
    torchrun = [Path(sys.executable).parent / 'torchrun', '--nproc_per_node', str(processes)]
    command = [*(torchrun if processes > 1 else [sys.executable]), SCRIPTS / name, *args]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, 'OMP_NUM_THREADS': '1'})
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_killed_at_any_moment_and_continued_bit_for_bit(tmp_path):
    "Twelve SIGKILLs between two steps, in a step, in the writing of a checkpoint: the same weights and the same log"
    said = run_script('killed_training.py', tmp_path)
    assert [line.split()[0] for line in said.splitlines()] == ['decay', 'length']


class PowerCut(Exception):
    pass


def cut_at(step, function=None):
    "A loss that fails at the start of a step, counted in calls"
    calls = []

    def dies(model, batch):
        if len(calls) == step:
            raise PowerCut
        calls.append(0)
        return (function or loss)(model, batch)

    return dies


def test_damaged_checkpoints(tmp_path):
    "An older whole checkpoint is gone back to, aloud; where there is none, one sentence names the file and the mend"
    config = LoopConfig(steps=12, batch_size=16, lr=0.01, ema_decay=0.9, checkpoint_steps=3, keep_checkpoints=2)
    fit(build(), loss, Noise(), config, tmp_path / 'whole')
    with pytest.raises(PowerCut):
        fit(build(), cut_at(10), Noise(), config, tmp_path / 'cut')
    found = sorted((tmp_path / 'cut' / 'checkpoints').iterdir())
    assert [p.name for p in found] == ['step-00000006', 'step-00000009']
    state = found[1] / 'state.pt'
    state.write_bytes(state.read_bytes()[:-100])
    with pytest.warns(UserWarning, match='step-00000009 is damaged: training goes on from step-00000006'):
        with pytest.raises(PowerCut):
            fit(build(), cut_at(4), Noise(), config, tmp_path / 'cut')
    assert [p.name for p in sorted((tmp_path / 'cut' / 'checkpoints').iterdir())] == ['step-00000006', 'step-00000009']
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        with pytest.raises(PowerCut):
            fit(build(), cut_at(2), Noise(), config, tmp_path / 'cut')
    for p in found:
        (p / 'sha256.json').write_text('{')
    with pytest.raises(InputError, match=r'step-00000009 is damaged.*remove .*checkpoints to begin again'):
        fit(build(), loss, Noise(), config, tmp_path / 'cut')
    (found[0] / 'sha256.json').write_text(
        json.dumps({f: sha256(found[0] / f) for f in ('model.safetensors', 'state.pt')})
    )
    with pytest.warns(UserWarning):
        fit(build(), loss, Noise(), config, tmp_path / 'cut')
    assert sha256(tmp_path / 'cut' / 'last.safetensors') == sha256(tmp_path / 'whole' / 'last.safetensors')


def test_what_others_put_beside_checkpoints_stays(tmp_path):
    mine = [tmp_path / 'checkpoints' / name for name in ('notes.txt', 'step-00000003-good', '.step-of-mine')]
    for path in mine:
        path.mkdir(parents=True)
    fit(build(), loss, Noise(), LoopConfig(steps=12, batch_size=16, lr=0.01, checkpoint_steps=3), tmp_path)
    assert all(path.is_dir() for path in mine)


@pytest.mark.parametrize('ema', [dict(ema_decay=0.9), dict(ema_length=0.1)])
def test_accumulated_steps_are_whole_steps(tmp_path, ema):
    config = LoopConfig(steps=10, batch_size=16, lr=0.003, **ema)
    fit(build(), loss, Noise(), config, tmp_path / '1')
    fit(build(), loss, Noise(), config.model_copy(update=dict(accumulate=4)), tmp_path / '4')
    one, four = (weights(tmp_path / n / 'last.safetensors') for n in '14')
    for k in one:
        torch.testing.assert_close(one[k], four[k], rtol=1e-4, atol=1e-5)
    assert lines(tmp_path / '1')[0]['loss'] == pytest.approx(lines(tmp_path / '4')[0]['loss'], rel=1e-4)
    with pytest.raises(InputError, match='accumulate: 3 does not divide the 16 images'):
        fit(build(), loss, Noise(), config.model_copy(update=dict(accumulate=3)), tmp_path / '3')


@pytest.mark.slow
def test_two_processes_are_one(tmp_path):
    "Weights, averages and losses of two processes, whole and accumulated, and a nan that only one of them meets"
    config = LoopConfig(steps=10, batch_size=16, lr=0.003, ema_decay=0.9)
    fit(build(), loss, Noise(), config, tmp_path / 'alone')
    run_script('two_processes_train.py', tmp_path, '7', processes=2)
    one = weights(tmp_path / 'alone' / 'last.safetensors')
    for n in '12':
        two = weights(tmp_path / n / 'last.safetensors')
        for k in one:
            torch.testing.assert_close(one[k], two[k], rtol=1e-4, atol=1e-5)
        assert [line['loss'] for line in lines(tmp_path / n)] == pytest.approx(
            [line['loss'] for line in lines(tmp_path / 'alone')], rel=1e-4
        )


def test_further_numbers_are_averaged_and_nan_is_left_out(tmp_path):
    seen = []

    def numbers(model, batch):
        value, _ = loss(model, batch)
        seen.append(float(value.detach()))
        now = torch.tensor(float(len(seen)))
        return value, dict(call=now, odd=now if len(seen) % 2 else now * float('nan'), never=now * float('nan'))

    config = LoopConfig(steps=30, batch_size=16, evaluate_every=100)
    fit(build(), numbers, Noise(), config, tmp_path / 'run')
    first, second = lines(tmp_path / 'run')
    assert (first['call'], second['call'], first['odd'], second['odd']) == (10.5, 25.5, 10, 25) and 'never' not in first
    assert first['loss'] == pytest.approx(sum(seen[:20]) / 20) and second['loss'] == pytest.approx(sum(seen[20:]) / 10)


class NoSync(TorchDispatchMode):
    "Nothing may be read from the device"

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is not torch.ops.aten._local_scalar_dense.default, 'a step waits for the device'
        return func(*args, **(kwargs or {}))


def large(model, batch):
    return 10 * loss(model, batch)[0]


def prepared(config, folder, accelerator):
    model = build()
    optimizer = torch.optim.AdamW(model.parameters(), config.lr, fused=True)
    objective, optimizer = accelerator.prepare(training._Objective(model, large), optimizer)
    return objective, training.Run(
        model, optimizer, training.moving_average(model.parameters(), config), folder, scaler=accelerator.scaler
    )


def with_scaler(mixed_precision, **options):
    "An fp16 Accelerator on a processor, where Accelerate has none"
    accelerator = accelerator_for('no', **options)
    accelerator.state._mixed_precision, accelerator.native_amp = 'fp16', True
    accelerator.scaler = torch.amp.GradScaler('cpu', init_scale=2.0**24, backoff_factor=2.0**-8, growth_interval=3)
    return accelerator


@pytest.mark.parametrize('make', [accelerator_for, with_scaler])
def test_no_step_waits_for_the_device(tmp_path, make):
    config = LoopConfig(accumulate=2, ema_decay=0.9)
    accelerator = make('no')
    objective, run = prepared(config, tmp_path, accelerator)
    for step in range(2):
        batch = Noise()[step]
        with NoSync():
            train_step(objective, batch, run, accelerator, config, seed=0)
    assert run.step == 2


def test_fp16_steps_that_overflow_are_left_out_but_counted(tmp_path, monkeypatch):
    config = LoopConfig(steps=10, lr=0.01, accumulate=2, checkpoint_steps=1)
    accelerator = with_scaler('fp16')
    objective, run = prepared(config, tmp_path, accelerator)
    before, moved = [p.clone() for p in run.model.parameters()], []
    for step in range(5):
        train_step(objective, Noise()[step], run, accelerator, config, seed=0)
        moved.append(any((a != b).any() for a, b in zip(before, run.model.parameters(), strict=True)))
    assert not moved[0] and moved[-1] and run.step == 5
    assert all(p.isfinite().all() for p in run.model.parameters()) and accelerator.scaler.get_scale() < 2.0**24
    monkeypatch.setattr(training, 'accelerator_for', with_scaler)
    fit(build(), large, Noise(), config, tmp_path / 'whole')
    with pytest.raises(PowerCut):
        fit(build(), cut_at(2 * 4 + 1, large), Noise(), config, tmp_path / 'cut')
    fit(build(), large, Noise(), config, tmp_path / 'cut')
    assert sha256(tmp_path / 'cut' / 'last.safetensors') == sha256(tmp_path / 'whole' / 'last.safetensors')


@pytest.mark.parametrize('accumulate', [1, 2])
def test_nan_names_its_step(tmp_path, accumulate):
    calls = []

    def nan_at_27(model, batch):
        calls.append(0)
        return loss(model, batch)[0] * (float('nan') if len(calls) == 27 * accumulate + 1 else 1)

    config = LoopConfig(steps=60, batch_size=16, accumulate=accumulate, checkpoint_steps=10)
    with pytest.raises(InputError, match='not finite at step 27 '):
        fit(build(), nan_at_27, Noise(), config, tmp_path)
    assert [p.name for p in (tmp_path / 'checkpoints').iterdir()] == ['step-00000020']


def test_out_of_memory_is_told_and_nothing_is_lost(tmp_path):
    config = LoopConfig(steps=8, batch_size=16, ema_decay=0.9, checkpoint_steps=2)
    calls = []

    def hungry(model, batch):
        calls.append(0)
        if len(calls) == 6:
            torch.empty(2**60)
        return loss(model, batch)

    with pytest.raises(InputError, match='raise accumulate, or lower batch_size'):
        fit(build(), hungry, Noise(), config, tmp_path / 'cut')
    fit(build(), loss, Noise(), config, tmp_path / 'cut')
    fit(build(), loss, Noise(), config, tmp_path / 'whole')
    assert sha256(tmp_path / 'cut' / 'last.safetensors') == sha256(tmp_path / 'whole' / 'last.safetensors')

    def cuda(model, batch):
        raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB')

    with pytest.raises(InputError, match='raise accumulate'):
        fit(build(), cuda, Noise(), config, tmp_path / 'cuda')

    def other(model, batch):
        raise RuntimeError('shapes differ')

    with pytest.raises(RuntimeError, match='shapes differ'):
        fit(build(), other, Noise(), config, tmp_path / 'other')


def test_trackers(tmp_path, monkeypatch):
    config = LoopConfig(steps=65, batch_size=16, checkpoint_steps=30, trackers=('tensorboard',))
    with monkeypatch.context() as m:
        m.setattr(training, 'get_available_trackers', lambda: [])
        with pytest.raises(InputError, match='pip install tensorboard'):
            fit(build(), loss, Noise(), config, tmp_path / 'run')
        assert not (tmp_path / 'run').exists()
    pytest.importorskip('tensorboard')
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with pytest.raises(PowerCut):
        fit(build(), cut_at(55), Noise(), config, tmp_path / 'run')
    fit(build(), loss, Noise(), config, tmp_path / 'run', name='train')
    events = EventAccumulator(str(tmp_path / 'run' / 'tensorboard' / 'train'))
    events.Reload()
    assert [(e.step, round(e.value, 5)) for e in events.Scalars('loss')] == [
        (line['step'], round(line['loss'], 5)) for line in lines(tmp_path / 'run')
    ]
    assert [line['step'] for line in lines(tmp_path / 'run')] == [20, 30, 50, 60, 65]


def test_settings_of_the_runtime_change_nothing(tmp_path):
    "A run continued with other loader processes, other checkpoints and micro-batches is the same run"
    config = LoopConfig(steps=12, batch_size=16, lr=0.003, ema_length=0.1, checkpoint_steps=4)
    fit(build(), loss, Noise(), config, tmp_path / 'whole')
    with pytest.raises(PowerCut):
        fit(build(), cut_at(6), Noise(), config, tmp_path / 'cut')
    other = LoopConfig(
        **config.model_dump(exclude=RUNTIME), accumulate=2, checkpoint_steps=3, keep_checkpoints=4, checkpoint_seconds=0
    )
    fit(build(), loss, Noise(), other, tmp_path / 'cut')
    one, two = (weights(tmp_path / n / 'last.safetensors') for n in ('whole', 'cut'))
    for k in one:
        torch.testing.assert_close(one[k], two[k], rtol=1e-4, atol=1e-5)


SCORES = [0.1, 0.4, 0.3, 0.2, 0.4, 0.5, 0.1, 0.45, 0.5, 0.2, 0.6, 0.1]


def scored(values=SCORES):
    "An evaluation that says these numbers, whatever the weights, by the step that the run has come to"
    return lambda m, step: dict(score=values[int(m[-1].steps) // 5 - 1])


class Counted(torch.nn.Linear):
    "Counts the training steps in a buffer, so that a continued run knows where it is"

    def __init__(self, *args):
        super().__init__(*args)
        self.register_buffer('steps', torch.tensor(0))

    def forward(self, x):
        if self.training and torch.is_grad_enabled():
            self.steps += 1
        return super().forward(x)


@pytest.mark.parametrize(
    'how',
    [
        dict(schedule='step', lr_every=7),
        dict(schedule='plateau', plateau_patience=2, warmup=8),
        dict(schedule='plateau', plateau_mode='min', plateau_patience=2),
        dict(schedule='plateau', plateau_patience=2, patience=4, swa_start=0.3),
    ],
)
def test_schedules_that_look_back_are_continued_bit_for_bit(tmp_path, how):
    config = LoopConfig(steps=60, batch_size=16, lr=0.01, lr_factor=0.5, evaluate_every=5, checkpoint_steps=4, **how)

    def run(name, function=loss):
        return fit(
            build(torch.nn.BatchNorm2d(8), last=Counted),
            function,
            Noise(),
            config,
            tmp_path / name,
            evaluate=scored(),
            score='score',
        )

    whole = run('whole')
    for step in (13, 9, 15):
        with pytest.raises(PowerCut):
            run('cut', cut_at(step))
    cut = run('cut')
    for f in ('best.safetensors', 'last.safetensors'):
        assert sha256(tmp_path / 'whole' / f) == sha256(tmp_path / 'cut' / f)

    def said(run):
        return [{k: v for k, v in line.items() if k != 'images_per_second'} for line in run.log]

    assert said(whole) == said(cut) and whole.scores == cut.scores
    rates = [line['lr'] for line in whole.log if 'score' in line]
    drops = dict(
        step=[(5 * k + 4) // 7 for k in range(12)],
        max=[0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 3, 3],
        min=[0, 0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5],
    )
    expected = [0.01 * 0.5**n for n in drops['step' if config.schedule == 'step' else config.plateau_mode]][
        : len(rates)
    ]
    assert rates[2:] == pytest.approx(expected[2:]) and len(rates) == (10 if config.patience else 12)
    if config.patience:
        assert whole.step == 50 and not (tmp_path / 'whole' / 'checkpoints').exists()


@pytest.mark.parametrize('how', [dict(ema_decay=0.95), dict(ema_length=0.1), dict(swa_start=0.5)])
def test_averaged_weights_have_batchnorm_statistics_of_their_own(tmp_path, how):
    "Those of one cumulative pass over the last batches; a validation leaves those of the weights in training alone"
    config = LoopConfig(steps=24, batch_size=16, lr=0.02, evaluate_every=8, schedule='constant', **how)
    seen = []

    def run(name, evaluate=None):
        model = build(torch.nn.BatchNorm2d(8))
        fit(model, loss, Noise(), config, tmp_path / name, evaluate=evaluate, score='score' if evaluate else '')
        return model

    def evaluate(model, step):
        seen.append(model[1].running_mean.clone())
        return dict(score=float(len(seen)))

    run('without')
    model = run('with', evaluate)
    assert (
        sha256(tmp_path / 'with' / 'last.safetensors')
        == sha256(tmp_path / 'without' / 'last.safetensors')
        == sha256(tmp_path / 'with' / 'best.safetensors')
    )
    assert (seen[-1] == model[1].running_mean).all()
    between = torch.stack([model[0](Noise()[step][0]) for step in range(24 - training.BATCHNORM_STEPS, 24)])
    torch.testing.assert_close(model[1].running_mean, between.mean((0, 1, 3, 4)), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(model[1].running_var, between.var((1, 3, 4)).mean(0), rtol=1e-3, atol=1e-6)


def test_swa_is_the_mean_of_the_last_weights(tmp_path):
    config = LoopConfig(steps=10, batch_size=16, lr=0.01, schedule='constant', swa_start=0.6)
    seen = []

    def watched(model, batch):
        seen.append([p.detach().clone() for p in model.parameters()])
        return loss(model, batch)

    fit(build(), watched, Noise(), config.model_copy(update=dict(steps=11)), tmp_path / 'longer')
    again = build()
    fit(again, loss, Noise(), config, tmp_path / 'run')
    for i, averaged in enumerate(again.parameters()):
        last = torch.stack([weights[i] for weights in seen[7:11]])
        torch.testing.assert_close(averaged.data, last.mean(0), rtol=1e-5, atol=1e-6)


def test_what_looks_at_a_score_needs_one(tmp_path):
    for how in (dict(patience=2), dict(schedule='plateau')):
        with pytest.raises(InputError, match='needs a validation score'):
            fit(build(), loss, Noise(), LoopConfig(**how), tmp_path / 'run')
    assert not (tmp_path / 'run').exists()
    with pytest.raises(ValueError, match='ema_decay and swa_start are 2 kinds of averages'):
        LoopConfig(ema_decay=0.9, swa_start=0)


@pytest.mark.slow
def test_two_processes_stop_together(tmp_path):
    "Each finds other scores; both go by the main one's. A step that leaves parameters out is possible"
    run_script('two_processes_stop.py', tmp_path, processes=2)


@pytest.mark.slow
def test_killed_at_every_change_of_files(tmp_path):
    "Continued to the same bytes, with nothing left behind, and nobody had to help"
    assert int(run_script('kill_at_events.py', tmp_path)) > 40


@pytest.mark.slow
def test_a_folder_has_one_training(tmp_path):
    "The second of two processes says who holds it; after a kill the lock holds nobody up"
    command = [sys.executable, SCRIPTS / 'hold_a_folder.py', tmp_path / 'run']
    holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == 'held\n'
    with pytest.raises(InputError, match=f'is being written by process {holder.pid} .*: wait for it'):
        fit(build(), loss, Noise(), LoopConfig(steps=2, batch_size=16), tmp_path / 'run')
    assert not (tmp_path / 'run').exists()
    holder.kill()
    holder.communicate()
    fit(build(), loss, Noise(), LoopConfig(steps=2, batch_size=16), tmp_path / 'run')
    assert sorted(path.name for path in tmp_path.iterdir()) == ['run']


@pytest.mark.slow
def test_loader_processes_end_with_a_killed_training(tmp_path):
    command = [sys.executable, SCRIPTS / 'train_with_workers.py', tmp_path / 'run']
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert parent.stdout.readline() == 'begun\n'
    workers = psutil.Process(parent.pid).children(recursive=True)
    assert len(workers) >= 2
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    assert not psutil.wait_procs(workers, timeout=4)[1]
    with hold_folder(tmp_path / 'run'):
        pass


def test_a_full_disk_is_told_and_nothing_is_lost(tmp_path, monkeypatch):
    config = LoopConfig(steps=8, batch_size=16, checkpoint_steps=2)
    saved = []

    def full(model, path, without=''):
        saved.append(path)
        if len(saved) == 3:
            with training.disk_errors(path):
                raise safetensors.SafetensorError('I/O error: No space left on device (os error 28)')
        return save_weights(model, path, without)

    with monkeypatch.context() as patches:
        patches.setattr(training, 'save_weights', full)
        with pytest.raises(OSError, match='No space left') as caught:
            fit(build(), loss, Noise(), config, tmp_path / 'cut')
    assert caught.value.errno == 28 and caught.value.filename.endswith('model.safetensors')
    assert [path.name for path in (tmp_path / 'cut' / 'checkpoints').iterdir()] == ['step-00000004']
    fit(build(), loss, Noise(), config, tmp_path / 'cut')
    fit(build(), loss, Noise(), config, tmp_path / 'whole')
    assert sha256(tmp_path / 'cut' / 'last.safetensors') == sha256(tmp_path / 'whole' / 'last.safetensors')


def numbers_of(kind):
    "Names and field infos of all numbers in a settings class, also of optional ones"
    for name, info in kind.model_fields.items():
        inside = {info.annotation, *typing.get_args(info.annotation)}
        if inside & {int, float}:
            yield name, info


@pytest.mark.parametrize('kind', [LoopConfig, LogLine, ClassifierConfig, ClassifierCard, *STRATEGIES.values()])
def test_every_number_has_bounds_on_both_sides(kind):
    assert issubclass(kind, pydantic.BaseModel)
    for name, info in numbers_of(kind):
        bounds = {limit for rule in info.metadata for limit in ('gt', 'ge', 'lt', 'le') if hasattr(rule, limit)}
        assert bounds & {'gt', 'ge'} and bounds & {'lt', 'le'}, f'{kind.__name__}.{name} has bounds {bounds}'
