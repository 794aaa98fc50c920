"Trains a classifier under torchrun; fails unless both processes have the same weights. Arguments: store, folder."

import sys

import torch
from accelerate.utils import gather

from protloc.classify.train import ClassifierConfig, train_classifier
from protloc.data.store import ImageStore
from protloc.training import LoopConfig

store = ImageStore(sys.argv[1])
loop = LoopConfig(steps=8, batch_size=16, lr=1e-3, ema_decay=0.9, evaluate_every=4)
config = ClassifierConfig(backbone='resnet10', loop=loop)
model = train_classifier(store, sys.argv[2], config, 'mix_loss', store)
sums = gather(torch.stack([p.detach().abs().sum() for p in model.parameters()])[None])
assert len(sums) == 2, sums
assert (sums[0] == sums[1]).all(), sums
