"""Milliseconds of a generator's training step: this package's loop, beside a plain one.

    python benchmarks/train_step.py [--steps 12] [--batch 64] [--size 32] [--rounds 7] [--widths 32 64 64]

Prints JSON. The plain loop is written as in the unconditional training example of diffusers: weights and images in
the usual memory order, plain AdamW, a scheduler object for the rate, EMAModel with its own defaults,
`accelerator.accumulate`, the loss read at every step, and images that Pillow and torchvision turn and normalise one
by one in the loader. Both train the same U-Net on the same simulated images with the same batch, loss, rate, decay
and clipping. They take turns: `ratio` is the median over the rounds, each of which compares two neighbours in time.
`loader_share` is the share of a step spent waiting for the batch and augmenting it. `utilisation` is the arithmetic
of a step's forward and backward passes, as torch counts it, over what a large matrix product reaches on this machine,
by whichever library is faster at it.
"""

import argparse
import itertools
import json
import statistics
import tempfile
import time

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers import DDPMScheduler
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from PIL import Image
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms
from tqdm.auto import tqdm

from protloc.data.loading import AugmentConfig, Batches
from protloc.data.simulate.datasets import simulate_store
from protloc.diffusion.denoiser import UNetConfig, build_denoiser, fold
from protloc.training import LoopConfig, fit, seeded, this_process

SCHEDULER = DDPMScheduler()


def squared_error(denoiser, clean, labels, patch):
    "Mean squared error of the predicted noise, for images in [-1, 1]"
    clean = fold(clean, patch)
    noise = torch.randn(clean.shape, device=clean.device)
    timesteps = torch.randint(1000, (len(clean),), device=clean.device)
    return F.mse_loss(denoiser(SCHEDULER.add_noise(clean, noise, timesteps), timesteps, labels), noise)


class Pictures(torch.utils.data.Dataset):
    "Pillow images, turned and normalised one at a time"

    def __init__(self, store):
        self.images = [Image.fromarray(x.transpose(1, 2, 0)) for x in store.images]
        self.labels = torch.from_numpy(store.labels)
        self.change = transforms.Compose(
            [
                transforms.RandomHorizontalFlip(),
                transforms.RandomVerticalFlip(),
                transforms.ToTensor(),
                transforms.Normalize([0.5] * 4, [0.5] * 4),
            ]
        )

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return self.change(self.images[i]), self.labels[i]


def plain(denoiser, store, config, patch, folder):
    "Times of steps and of the loader in a loop as in diffusers' example"
    AcceleratorState._reset_state()
    accelerator = Accelerator(cpu=this_process().device.type == 'cpu')
    ema = EMAModel(denoiser.parameters(), decay=config.ema_decay, use_ema_warmup=True, inv_gamma=1.0, power=3 / 4)
    optimizer = torch.optim.AdamW(denoiser.parameters(), config.lr, weight_decay=config.weight_decay)
    data = torch.utils.data.DataLoader(Pictures(store), config.batch_size, shuffle=True, drop_last=True)
    rate = get_scheduler('cosine', optimizer, num_warmup_steps=config.warmup, num_training_steps=config.steps)
    denoiser, optimizer, data, rate = accelerator.prepare(denoiser, optimizer, data, rate)
    ema.to(accelerator.device)
    denoiser.train()
    bar = tqdm(total=config.steps, leave=False)
    times, waits = [], []
    images = iter(data)
    for step in range(config.steps):
        start = time.perf_counter()
        try:
            clean, labels = next(images)
        except StopIteration:
            images = iter(data)
            clean, labels = next(images)
        waits.append(time.perf_counter() - start)
        with accelerator.accumulate(denoiser):
            loss = squared_error(denoiser, clean, labels, patch)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(denoiser.parameters(), config.max_grad_norm)
            optimizer.step()
            rate.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            ema.step(denoiser.parameters())
            bar.update()
        bar.set_postfix(loss=loss.detach().item(), lr=rate.get_last_lr()[0], step=step)
        times.append(time.perf_counter() - start)
    bar.close()
    return times, waits


class Timed:
    "Batches that note when they are asked for and how long they take"

    def __init__(self, batches):
        self.batches, self.asked, self.waits = batches, [], []

    def shard(self, rank, world):
        self.batches = self.batches.shard(rank, world)
        return self

    def __getitem__(self, step):
        self.asked.append(time.perf_counter())
        batch = self.batches[step]
        self.waits.append(time.perf_counter() - self.asked[-1])
        return batch

    def augmented(self, batch, step):
        start = time.perf_counter()
        batch = self.batches.augmented(batch, step)
        self.waits[-1] += time.perf_counter() - start
        return batch


def ours(denoiser, store, config, patch, folder):
    "Times of steps and of the loader in `fit`"
    batches = Timed(Batches(store, store.rows('train'), config.batch_size, 0, AugmentConfig()))

    def loss(model, batch):
        images, labels = batch
        return squared_error(model, images.float() / 127.5 - 1, labels, patch)

    fit(denoiser, loss, batches, config, folder)
    return [later - earlier for earlier, later in itertools.pairwise(batches.asked)], batches.waits


def flops(denoiser, batch_size, size, patch):
    "Operations of a forward and a backward pass"
    device = this_process().device
    denoiser.to(device)
    with FlopCounterMode(display=False) as counted:
        images = torch.zeros(batch_size, 4, size, size, device=device)
        labels = torch.zeros(batch_size, denoiser.label_encoder.config.num_classes, device=device)
        squared_error(denoiser, images, labels, patch).backward()
    return counted.get_total_flops()


def product_rate(n=2048, times=5):
    "Operations per second of a large matrix product, written as one or as a convolution of 1 x 1: the best of some"
    device = this_process().device
    square = torch.randn(n, n, device=device)
    images = torch.randn(64, 256, 16, 16, device=device).contiguous(memory_format=torch.channels_last)
    kernel = torch.randn(256, 256, 1, 1, device=device).contiguous(memory_format=torch.channels_last)

    def rate(operations, product):
        start = time.perf_counter()
        product().item()
        return operations / (time.perf_counter() - start)

    matrix = [rate(2 * n**3, lambda: (square @ square)[0, 0]) for _ in range(times)]
    convolution = [
        rate(2 * 256 * 256 * 64 * 16 * 16, lambda: F.conv2d(images, kernel)[0, 0, 0, 0]) for _ in range(times)
    ]
    return max(matrix + convolution)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--steps', type=int, default=12, help='a round')
    parser.add_argument('--rounds', type=int, default=7)
    parser.add_argument('--batch', type=int, default=64)
    parser.add_argument('--size', type=int, default=32)
    parser.add_argument('--images', type=int, default=512, help='in the store')
    parser.add_argument('--widths', type=int, nargs='+', default=[32, 64, 64])
    parser.add_argument('--patch', type=int, default=2)
    args = parser.parse_args()
    config = LoopConfig(steps=args.steps, batch_size=args.batch, warmup=5, ema_decay=0.995, checkpoint_seconds=1e9)

    def build(store):
        unet = UNetConfig(widths=tuple(args.widths), patch_size=args.patch)
        with seeded(0, 'generator'):
            return build_denoiser(4, len(store.vocab), args.size, unet)

    rounds = {'plain': [], 'fit': []}  # name -> median seconds of a step and of its wait, for each round
    with tempfile.TemporaryDirectory() as folder:
        store = simulate_store(f'{folder}/store', dict(train=args.images), size=args.size)
        work, reach = flops(build(store), config.batch_size, args.size, args.patch), product_rate()
        for i in range(args.rounds):
            for name, loop in (('plain', plain), ('fit', ours)):
                times, waits = loop(build(store), store, config, args.patch, f'{folder}/{name}-{i}')
                rounds[name].append([statistics.median(times[2:]), statistics.median(waits[2:])])
    for name, medians in rounds.items():
        step, wait = (statistics.median(column) for column in zip(*medians, strict=True))
        ratios = [base[0] / own[0] for base, own in zip(rounds['plain'], medians, strict=True)]
        line = dict(
            benchmark='train_step',
            way=name,
            size=args.size,
            batch=args.batch,
            ms_per_step=round(1e3 * step, 1),
            ratio=round(statistics.median(ratios), 2),
            loader_share=round(wait / step, 4),
            gflop_per_step=round(work / 1e9, 1),
            matrix_gflop_per_second=round(reach / 1e9, 1),
            utilisation=round(work / step / reach, 3),
            device=this_process().device.type,
            threads=torch.get_num_threads(),
        )
        print(json.dumps(line))


if __name__ == '__main__':
    main()
