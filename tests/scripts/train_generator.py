"""Train a generator, in one process of perhaps several; process 1 can be killed at a step.

python train_generator.py STORE SETTINGS.yaml OUT STEP (-1 to kill nobody)
"""

import os
import signal
import sys

from protloc.core import read_config
from protloc.data.store import ImageStore
from protloc.diffusion.train import GeneratorConfig, TrainingImages, train_generator
from protloc.files import read_yaml

store, settings, out, killed_at = sys.argv[1:]
read_batch = TrainingImages.__getitem__


def read_or_die(self, step):
    if step == int(killed_at) and os.environ.get('RANK') == '1':
        os.kill(os.getpid(), signal.SIGKILL)
    return read_batch(self, step)


TrainingImages.__getitem__ = read_or_die
train_generator(ImageStore(store), out, read_config(GeneratorConfig, read_yaml(settings)), seed=3)
