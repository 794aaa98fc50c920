"""A small training that the tests and the scripts beside this file share: predict the mean of noise images."""

import torch
from torch import nn

from protloc.training import seeded


class Noise:
    "Images and their means; each process has its slice"

    rank, world_size, batch_size = 0, 1, 16

    def shard(self, rank, world_size):
        new = Noise()
        new.rank = rank
        new.world_size = world_size
        return new

    def augmented(self, batch, step):
        return batch

    def __getitem__(self, step):
        images = torch.randn(self.batch_size, 3, 8, 8, generator=torch.Generator().manual_seed(step))
        first, last = (rank * self.batch_size // self.world_size for rank in (self.rank, self.rank + 1))
        return images[first:last], images.mean((1, 2, 3))[first:last]


def build(*between, last=nn.Linear):
    with seeded(0, 'model'):
        return nn.Sequential(nn.Conv2d(3, 8, 3), *between, nn.SiLU(), nn.Flatten(), last(288, 1))


def loss(model, batch):
    error = (model(batch[0])[:, 0] - batch[1]).square()
    return error.mean(), dict(root=error.detach().mean().sqrt(), some=error.detach()[:4].mean())
