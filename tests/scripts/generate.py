"""Draw a store, in one process of perhaps several; one of them can be killed at a pass of its denoiser.

python generate.py FOLDER OUT PASS RANK (pass 0 to kill nobody)

FOLDER holds a pipeline and plan.npy; each process writes its number of passes to passes-RANK there.
"""

import os
import signal
import sys
from pathlib import Path

import numpy as np

from protloc.diffusion.generate import GenerateConfig, generate
from protloc.diffusion.train import open_pipeline

folder, out, killed_at, killed_rank = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4]
rank = os.environ.get('RANK', '0')
pipe = open_pipeline(folder)
passes = 0


def count_or_die(module, args):
    global passes
    passes += 1
    if passes == killed_at and rank == killed_rank:
        os.kill(os.getpid(), signal.SIGKILL)


pipe.unet.register_forward_pre_hook(count_or_die)
config = GenerateConfig(num_inference_steps=2, batch_size=3, scheduler='ddpm')
generate(pipe, out, np.load(folder / 'plan.npy'), config, seed=3)
(folder / f'passes-{rank}').write_text(str(passes))
