"""The loop under fire: killed, damaged, cut into parts, spread over processes, out of memory, overflowing."""

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from protloc import training
from protloc.core import InputError, sha256
from protloc.training import RUNTIME, LoopConfig, accelerator_for, fit, seeded, train_step

COMMON = '''
import torch
from torch import nn
from torch.nn import functional as F
from protloc.training import LoopConfig, fit, seeded

class Noise:
    "Images that can be told from noise by their mean; each process has its slice"
    rank, world, size = 0, 1, 16
    def shard(self, rank, world):
        new = Noise(); new.rank, new.world = rank, world
        return new
    def augmented(self, batch, step): return batch
    def __getitem__(self, step):
        g = torch.Generator().manual_seed(step)
        images, mine = torch.randn(self.size, 3, 8, 8, generator=g), slice(self.rank*self.size//self.world, (self.rank+1)*self.size//self.world)
        return images[mine], images.mean((1, 2, 3))[mine]

def build(*between):
    with seeded(0, 'model'): return nn.Sequential(nn.Conv2d(3, 8, 3), *between, nn.SiLU(), nn.Flatten(), nn.Linear(288, 1))

def loss(model, batch):
    error = (model(batch[0])[:, 0]-batch[1]).square()
    return error.mean(), dict(root=error.detach().mean().sqrt(), some=error.detach()[:4].mean())
'''
exec(COMMON)


def weights(path):
    return safetensors.torch.load_file(path)


def lines(folder):
    return [json.loads(line) for line in (folder / 'log.jsonl').read_text().splitlines()]


def script(tmp_path, text):
    path = tmp_path / 'script.py'
    path.write_text(COMMON + text)
    return path


KILLED = '''
import multiprocessing, os, random, sys, time
from pathlib import Path
from protloc.core import sha256

def train(folder, c):
    os.nice(5)
    def evaluate(m, step): return dict(score=-sum(p.abs().sum() for p in m.parameters()))
    fit(build(nn.BatchNorm2d(8), nn.Dropout(.2)), loss, Noise(), c, folder, evaluate=evaluate, score='score')
def newest(folder): return max((int(p.name[5:]) for p in (folder/'checkpoints').glob('step-*')), default=0)
def start(*args):
    process = multiprocessing.get_context('fork').Process(target=train, args=args)
    process.start()
    return process

common = dict(steps=60, batch_size=16, lr=.01, evaluate_every=15, checkpoint_steps=1)
for name, c in dict(decay=LoopConfig(ema_decay=.9, **common), length=LoopConfig(ema_length=.1, accumulate=2, keep=3, **common)).items():
    whole, cut, rng, at = Path(sys.argv[1])/name/'whole', Path(sys.argv[1])/name/'cut', random.Random(name), [0]
    start(whole, c).join()
    for _ in range(6):
        process, goal = start(cut, c), at[-1]+rng.randint(1, 8)
        while newest(cut) < goal: assert process.is_alive() or process.exitcode == 0; time.sleep(.0005)
        time.sleep(rng.uniform(0, .02))
        process.kill(); process.join()
        assert process.exitcode == -9, process.exitcode
        at.append(newest(cut))
    start(cut, c).join()
    files = [p.name for p in sorted(whole.glob('*.safetensors'))]
    assert files == ['best.safetensors', 'last.safetensors'], files
    assert all(sha256(whole/f) == sha256(cut/f) for f in files), (name, at)
    assert {p.name for p in cut.iterdir()} == {p.name for p in whole.iterdir()}, sorted(cut.iterdir())
    logs = [[{k: v for k, v in line.items() if k != 'images_per_second'} for line in map(__import__('json').loads, (f/'log.jsonl').read_text().splitlines())] for f in (whole, cut)]
    assert logs[0] == logs[1]
    print(name, at)
'''


def test_killed_at_any_moment_and_continued_bit_for_bit(tmp_path):
    "Twelve SIGKILLs between two steps, in a step, in the writing of a checkpoint: the same weights and the same log"
    done = subprocess.run(
        [sys.executable, script(tmp_path, KILLED), tmp_path],
        capture_output=True,
        text=True,
        env={**os.environ, 'OMP_NUM_THREADS': '1'},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert [line.split()[0] for line in done.stdout.splitlines()] == ['decay', 'length']


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
    c = LoopConfig(steps=12, batch_size=16, lr=0.01, ema_decay=0.9, checkpoint_steps=3, keep=2)
    fit(build(), loss, Noise(), c, tmp_path / 'whole')
    with pytest.raises(PowerCut):
        fit(build(), cut_at(10), Noise(), c, tmp_path / 'cut')
    found = sorted((tmp_path / 'cut' / 'checkpoints').iterdir())
    assert [p.name for p in found] == ['step-00000006', 'step-00000009']
    state = found[1] / 'state.pt'
    state.write_bytes(state.read_bytes()[:-100])
    with pytest.warns(UserWarning, match='step-00000009 is damaged: training goes on from step-00000006'):
        with pytest.raises(PowerCut):
            fit(build(), cut_at(4), Noise(), c, tmp_path / 'cut')
    assert [p.name for p in sorted((tmp_path / 'cut' / 'checkpoints').iterdir())] == ['step-00000006', 'step-00000009']
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        with pytest.raises(PowerCut):
            fit(build(), cut_at(2), Noise(), c, tmp_path / 'cut')
    for p in found:
        (p / 'sha256.json').write_text('{')
    with pytest.raises(InputError, match=r'step-00000009 is damaged.*remove .*checkpoints to begin again'):
        fit(build(), loss, Noise(), c, tmp_path / 'cut')
    (found[0] / 'sha256.json').write_text(
        json.dumps({f: sha256(found[0] / f) for f in ('model.safetensors', 'state.pt')})
    )
    with pytest.warns(UserWarning):
        fit(build(), loss, Noise(), c, tmp_path / 'cut')
    assert sha256(tmp_path / 'cut' / 'last.safetensors') == sha256(tmp_path / 'whole' / 'last.safetensors')


@pytest.mark.parametrize('ema', [dict(ema_decay=0.9), dict(ema_length=0.1)])
def test_accumulated_steps_are_whole_steps(tmp_path, ema):
    c = LoopConfig(steps=10, batch_size=16, lr=0.003, **ema)
    fit(build(), loss, Noise(), c, tmp_path / '1')
    fit(build(), loss, Noise(), c.model_copy(update=dict(accumulate=4)), tmp_path / '4')
    one, four = (weights(tmp_path / n / 'last.safetensors') for n in '14')
    for k in one:
        torch.testing.assert_close(one[k], four[k], rtol=1e-4, atol=1e-5)
    assert lines(tmp_path / '1')[0]['loss'] == pytest.approx(lines(tmp_path / '4')[0]['loss'], rel=1e-4)
    with pytest.raises(InputError, match='accumulate: 3 does not divide the 16 images'):
        fit(build(), loss, Noise(), c.model_copy(update=dict(accumulate=3)), tmp_path / '3')


TWO = '''
import sys
from pathlib import Path
from accelerate.utils import gather_object
from protloc.core import InputError, sha256
for n in (1, 2):
    c = LoopConfig(steps=10, batch_size=16, lr=.003, ema_decay=.9, accumulate=n)
    model = build()
    run = fit(model, loss, Noise(), c, Path(sys.argv[1])/str(n))
    found = gather_object([(b''.join(p.detach().numpy().tobytes() for p in run.ema.shadow_params), [line['loss'] for line in run.log])])
    assert len(found) == 2 and found[0] == found[1]
def bad(model, batch):
    value, more = loss(model, batch)
    if int(sys.argv[2]) == bad.step and torch.distributed.get_rank(): value = value*float('nan')
    bad.step += 1
    return value, more
bad.step = 0
try: fit(build(), bad, Noise(), c.model_copy(update=dict(accumulate=1)), Path(sys.argv[1])/'bad')
except InputError as e: told = gather_object([str(e)])
assert 'not finite at step 7 ' in told[0] and told[0] == told[1]
'''


def test_two_processes_are_one(tmp_path):
    "Weights, averages, losses and parts of two processes, whole and accumulated, and a nan that only one of them meets"
    c = LoopConfig(steps=10, batch_size=16, lr=0.003, ema_decay=0.9)
    fit(build(), loss, Noise(), c, tmp_path / 'alone')
    command = [Path(sys.executable).parent / 'torchrun', '--nproc_per_node', '2', script(tmp_path, TWO), tmp_path, '7']
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, 'OMP_NUM_THREADS': '1'})
    assert done.returncode == 0, done.stderr[-3000:]
    one = weights(tmp_path / 'alone' / 'last.safetensors')
    for n in '12':
        two = weights(tmp_path / n / 'last.safetensors')
        for k in one:
            torch.testing.assert_close(one[k], two[k], rtol=1e-4, atol=1e-5)
        assert [line['loss'] for line in lines(tmp_path / n)] == pytest.approx(
            [line['loss'] for line in lines(tmp_path / 'alone')], rel=1e-4
        )


def test_parts_of_the_loss_are_averaged_and_nan_is_left_out(tmp_path):
    seen = []

    def parts(model, batch):
        value, _ = loss(model, batch)
        seen.append(float(value.detach()))
        now = torch.tensor(float(len(seen)))
        return value, dict(call=now, odd=now if len(seen) % 2 else now * float('nan'), never=now * float('nan'))

    c = LoopConfig(steps=30, batch_size=16, evaluate_every=100)
    fit(build(), parts, Noise(), c, tmp_path / 'run')
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


def prepared(c, folder, accelerator):
    model = build()
    optimizer = torch.optim.AdamW(model.parameters(), c.lr, fused=True)
    objective, optimizer = accelerator.prepare(training._Objective(model, large), optimizer)
    return objective, training.Run(
        model, optimizer, training.moving_average(model.parameters(), c), folder, scaler=accelerator.scaler
    )


def with_scaler(mixed_precision, **options):
    "An fp16 Accelerator on a processor, where Accelerate has none"
    accelerator = accelerator_for('no', **options)
    accelerator.state._mixed_precision, accelerator.native_amp = 'fp16', True
    accelerator.scaler = torch.amp.GradScaler('cpu', init_scale=2.0**24, backoff_factor=2.0**-8, growth_interval=3)
    return accelerator


@pytest.mark.parametrize('make', [accelerator_for, with_scaler])
def test_no_step_waits_for_the_device(tmp_path, make):
    c, accelerator = LoopConfig(accumulate=2, ema_decay=0.9), make('no')
    objective, run = prepared(c, tmp_path, accelerator)
    for step in range(2):
        batch = Noise()[step]
        with NoSync():
            train_step(objective, batch, run, accelerator, c, seed=0)
    assert run.step == 2


def test_fp16_steps_that_overflow_are_left_out_but_counted(tmp_path, monkeypatch):
    c = LoopConfig(steps=10, lr=0.01, accumulate=2, checkpoint_steps=1)
    accelerator = with_scaler('fp16')
    objective, run = prepared(c, tmp_path, accelerator)
    before, moved = [p.clone() for p in run.model.parameters()], []
    for step in range(5):
        train_step(objective, Noise()[step], run, accelerator, c, seed=0)
        moved.append(any((a != b).any() for a, b in zip(before, run.model.parameters())))
    assert not moved[0] and moved[-1] and run.step == 5
    assert all(p.isfinite().all() for p in run.model.parameters()) and accelerator.scaler.get_scale() < 2.0**24
    monkeypatch.setattr(training, 'accelerator_for', with_scaler)
    fit(build(), large, Noise(), c, tmp_path / 'whole')
    with pytest.raises(PowerCut):
        fit(build(), cut_at(2 * 4 + 1, large), Noise(), c, tmp_path / 'cut')
    fit(build(), large, Noise(), c, tmp_path / 'cut')
    assert sha256(tmp_path / 'cut' / 'last.safetensors') == sha256(tmp_path / 'whole' / 'last.safetensors')


@pytest.mark.parametrize('accumulate', [1, 2])
def test_nan_names_its_step(tmp_path, accumulate):
    calls = []

    def nan_at_27(model, batch):
        calls.append(0)
        return loss(model, batch)[0] * (float('nan') if len(calls) == 27 * accumulate + 1 else 1)

    c = LoopConfig(steps=60, batch_size=16, accumulate=accumulate, checkpoint_steps=10)
    with pytest.raises(InputError, match='not finite at step 27 '):
        fit(build(), nan_at_27, Noise(), c, tmp_path)
    assert [p.name for p in (tmp_path / 'checkpoints').iterdir()] == ['step-00000020']


def test_out_of_memory_is_told_and_nothing_is_lost(tmp_path):
    c = LoopConfig(steps=8, batch_size=16, ema_decay=0.9, checkpoint_steps=2)
    calls = []

    def hungry(model, batch):
        calls.append(0)
        if len(calls) == 6:
            torch.empty(2**60)
        return loss(model, batch)

    with pytest.raises(InputError, match='raise accumulate, or lower batch_size'):
        fit(build(), hungry, Noise(), c, tmp_path / 'cut')
    fit(build(), loss, Noise(), c, tmp_path / 'cut')
    fit(build(), loss, Noise(), c, tmp_path / 'whole')
    assert sha256(tmp_path / 'cut' / 'last.safetensors') == sha256(tmp_path / 'whole' / 'last.safetensors')

    def cuda(model, batch):
        raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB')

    with pytest.raises(InputError, match='raise accumulate'):
        fit(build(), cuda, Noise(), c, tmp_path / 'cuda')

    def other(model, batch):
        raise RuntimeError('shapes differ')

    with pytest.raises(RuntimeError, match='shapes differ'):
        fit(build(), other, Noise(), c, tmp_path / 'other')


def test_trackers(tmp_path, monkeypatch):
    c = LoopConfig(steps=65, batch_size=16, checkpoint_steps=30, trackers=('tensorboard',))
    with monkeypatch.context() as m:
        m.setattr(training, 'get_available_trackers', lambda: [])
        with pytest.raises(InputError, match='pip install tensorboard'):
            fit(build(), loss, Noise(), c, tmp_path / 'run')
        assert not (tmp_path / 'run').exists()
    pytest.importorskip('tensorboard')
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with pytest.raises(PowerCut):
        fit(build(), cut_at(55), Noise(), c, tmp_path / 'run')
    fit(build(), loss, Noise(), c, tmp_path / 'run', name='train')
    events = EventAccumulator(str(tmp_path / 'run' / 'tensorboard' / 'train'))
    events.Reload()
    assert [(e.step, round(e.value, 5)) for e in events.Scalars('loss')] == [
        (line['step'], round(line['loss'], 5)) for line in lines(tmp_path / 'run')
    ]
    assert [line['step'] for line in lines(tmp_path / 'run')] == [20, 30, 50, 60, 65]


def test_settings_of_the_runtime_change_nothing(tmp_path):
    "A run continued with other loader processes, other checkpoints and more parts is the same run"
    c = LoopConfig(steps=12, batch_size=16, lr=0.003, ema_length=0.1, checkpoint_steps=4)
    fit(build(), loss, Noise(), c, tmp_path / 'whole')
    with pytest.raises(PowerCut):
        fit(build(), cut_at(6), Noise(), c, tmp_path / 'cut')
    other = LoopConfig(**c.model_dump(exclude=RUNTIME), accumulate=2, checkpoint_steps=3, keep=4, checkpoint_seconds=0)
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


def counted(*between):
    with seeded(0, 'model'):
        return torch.nn.Sequential(
            torch.nn.Conv2d(3, 8, 3), *between, torch.nn.SiLU(), torch.nn.Flatten(), Counted(288, 1)
        )


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
    c = LoopConfig(steps=60, batch_size=16, lr=0.01, lr_factor=0.5, evaluate_every=5, checkpoint_steps=4, **how)

    def run(name, function=loss):
        return fit(
            counted(torch.nn.BatchNorm2d(8)), function, Noise(), c, tmp_path / name, evaluate=scored(), score='score'
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
    expected = [0.01 * 0.5**n for n in drops['step' if c.schedule == 'step' else c.plateau_mode]][: len(rates)]
    assert rates[2:] == pytest.approx(expected[2:]) and len(rates) == (10 if c.patience else 12)
    if c.patience:
        assert whole.step == 50 and not (tmp_path / 'whole' / 'checkpoints').exists()


@pytest.mark.parametrize('how', [dict(ema_decay=0.95), dict(ema_length=0.1), dict(swa_start=0.5)])
def test_averaged_weights_have_batchnorm_statistics_of_their_own(tmp_path, how):
    "Those of one cumulative pass over the last batches; the ones of the weights in training are untouched by a validation"
    c, seen = LoopConfig(steps=24, batch_size=16, lr=0.02, evaluate_every=8, schedule='constant', **how), []

    def run(name, evaluate=None):
        model = build(torch.nn.BatchNorm2d(8))
        fit(model, loss, Noise(), c, tmp_path / name, evaluate=evaluate, score='score' if evaluate else '')
        return model

    run('without')
    model = run('with', lambda m, step: seen.append(m[1].running_mean.clone()) or dict(score=float(len(seen))))
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
    c, seen = LoopConfig(steps=10, batch_size=16, lr=0.01, schedule='constant', swa_start=0.6), []
    model = build()
    fit(
        model,
        lambda m, b: seen.append([p.detach().clone() for p in m.parameters()]) or loss(m, b),
        Noise(),
        c.model_copy(update=dict(steps=11)),
        tmp_path / 'longer',
    )
    fit(again := build(), loss, Noise(), c, tmp_path / 'run')
    for i, p in enumerate(again.parameters()):
        torch.testing.assert_close(p.data, torch.stack([s[i] for s in seen[7:11]]).mean(0), rtol=1e-5, atol=1e-6)


def test_what_looks_at_a_score_needs_one(tmp_path):
    for how in (dict(patience=2), dict(schedule='plateau')):
        with pytest.raises(InputError, match='needs a validation score'):
            fit(build(), loss, Noise(), LoopConfig(**how), tmp_path / 'run')
    assert not (tmp_path / 'run').exists()
    with pytest.raises(ValueError, match='ema_decay and swa_start are 2 kinds of averages'):
        LoopConfig(ema_decay=0.9, swa_start=0)


TOGETHER = '''
import sys
from pathlib import Path
from accelerate.utils import gather_object
c = LoopConfig(steps=60, batch_size=16, lr=.003, evaluate_every=5, schedule='plateau', plateau_patience=1, patience=3)
found = []
def evaluate(m, step):
    found.append(0)
    return dict(score=float([5, 6, 6, 6, 6, 9, 9, 9, 9, 9, 9, 9][len(found)-1] if torch.distributed.get_rank() == 0 else len(found)))
run = fit(build(nn.BatchNorm2d(8)), loss, Noise(), c, Path(sys.argv[1])/'run', evaluate=evaluate, score='score')
told = gather_object([(run.step, run.scores, [line['lr'] for line in run.log])])
assert len(told) == 2 and told[0] == told[1] and told[0][:2] == (25, [5, 6, 6, 6, 6]), told
class Two(nn.Module):
    def __init__(self): super().__init__(); self.a, self.b = build(), build()
def either(model, batch): return loss(model.a if float(batch[0].mean()) < 9 else model.b, batch)
fit(Two(), either, Noise(), LoopConfig(steps=3, batch_size=16), Path(sys.argv[1])/'two', unused=True)
'''


def test_two_processes_stop_together(tmp_path):
    "Each finds other scores; both go by the main one's. A step that leaves parameters out is possible"
    command = [Path(sys.executable).parent / 'torchrun', '--nproc_per_node', '2', script(tmp_path, TOGETHER), tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, 'OMP_NUM_THREADS': '1'})
    assert done.returncode == 0, done.stderr[-3000:]
