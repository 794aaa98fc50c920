"""FOLDER STEP, by torchrun: both processes have the same averages and losses, and both stop at a nan that one meets."""

import sys
from pathlib import Path

import torch
from accelerate.utils import gather_object

from noisy_training import Noise, build, loss
from protloc.core import InputError
from protloc.training import LoopConfig, fit

folder = Path(sys.argv[1])
bad_step = int(sys.argv[2])
config = LoopConfig(steps=10, batch_size=16, lr=0.003, ema_decay=0.9)
for n in (1, 2):
    run = fit(build(), loss, Noise(), config.model_copy(update=dict(accumulate=n)), folder / str(n))
    average = b''.join(p.detach().numpy().tobytes() for p in run.ema.shadow_params)
    both = gather_object([(average, [line['loss'] for line in run.log])])
    assert len(both) == 2 and both[0] == both[1]

calls = []


def bad(model, batch):
    value, more = loss(model, batch)
    if len(calls) == bad_step and torch.distributed.get_rank():
        value = value * float('nan')
    calls.append(0)
    return value, more


try:
    fit(build(), bad, Noise(), config, folder / 'bad')
    said = gather_object(['trained to the end'])
except InputError as e:
    said = gather_object([str(e)])
assert f'not finite at step {bad_step} ' in said[0] and said[0] == said[1], said
