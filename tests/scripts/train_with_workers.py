"Trains for ever with two loader processes, and says when it has begun"

import sys
import time

from noisy_training import Noise, build, loss
from protloc.training import LoopConfig, fit


def slow(model, batch):
    print('begun', flush=True)
    time.sleep(0.05)
    return loss(model, batch)


fit(build(), slow, Noise(), LoopConfig(steps=100_000, batch_size=16, workers=2), sys.argv[1])
