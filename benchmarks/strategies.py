"""Time and memory of a training step of each strategy, over those of `real`.

    python benchmarks/strategies.py [--steps 5] [--rounds 7] [--batch 64] [--size 32] [--backbone resnet18]

Prints JSON lines. A step is forward, backward and AdamW on batches that lie on the device already, since loading is the
same for all and measured by `loading.py`. `real` and the other take turns: `ratio` is the median over the rounds, each of
which compares two neighbours in time. `images` is the number of images that pass through the network in a step, over
`real`'s, and so the ratio to be expected. `memory_ratio` compares the peaks of what a step allocates beyond what lies
there before it (weights and AdamW's moments)."""

import argparse
import json
import statistics
import time
import warnings

import torch
from torch.profiler import ProfilerActivity, profile

from protloc.classify.backbone import Classifier, with_aux_bn
from protloc.classify.losses import bce
from protloc.classify.mixing import STRATEGIES, strategy
from protloc.training import seeded, this_process, to_device

PLAIN = [(name, {}) for name in STRATEGIES if name != 'real']
WITH = [
    *((name, dict(aux_bn=True)) for name in ('concat', 'mix_loss', 'mix_representation', 'input_mixup')),
    *(('concat', dict(align=0.1, alignment=k)) for k in ('coral', 'mmd')),
]


def wait():
    "Until the device has done what it was told"
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


class Trained:
    "A classifier, its optimizer and the batches of a strategy"

    def __init__(self, name, options, a):
        self.strategy, device, k = strategy(name, **options), this_process().device, 28
        with seeded(0, 'classifier'), warnings.catch_warnings(action='ignore'):
            self.model = Classifier(a.backbone, 4, k, a.size)
            if self.strategy.aux_bn:
                with_aux_bn(self.model)
            self.batches = {
                s: (
                    torch.randint(256, (a.batch, 4, a.size, a.size), dtype=torch.uint8),
                    torch.randint(2, (a.batch, k)).float(),
                )
                for s in self.strategy.uses
            }
        self.model, self.batches = (
            self.model.to(device, memory_format=torch.channels_last).train(),
            to_device(self.batches, device),
        )
        self.optimizer, self.progress, self.passed = (
            torch.optim.AdamW(self.model.parameters(), fused=True),
            torch.zeros((), device=device),
            [],
        )
        self.model.backbone.register_forward_pre_hook(lambda m, x: self.passed.append(len(x[0])))
        self.step()
        self.images, self.passed = sum(self.passed), []

    def step(self):
        "One step, at the start of the training"
        wanted = self.strategy.sources_at(0.0)
        self.strategy.loss(
            self.model, bce, *(self.batches[s] if s in wanted else None for s in ('real', 'synthetic')), self.progress
        ).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def seconds(self, steps):
        "Seconds a step"
        wait()
        start = time.perf_counter()
        for _ in range(steps):
            self.step()
        wait()
        return (time.perf_counter() - start) / steps

    def peak(self):
        "Most bytes that a step has allocated at any time"
        if this_process().device.type == 'cuda':
            wait()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            self.step()
            wait()
            return torch.cuda.max_memory_allocated() - before
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
            self.step()
        events = sorted(
            (e.start_ns(), e.nbytes()) for e in found.profiler.kineto_results.events() if e.name() == '[memory]'
        )
        return int(torch.tensor([n for _, n in events]).cumsum(0).max())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--steps', type=int, default=5, help='a round')
    parser.add_argument('--rounds', type=int, default=7)
    parser.add_argument('--batch', type=int, default=64, help='real images, and as many synthetic ones')
    parser.add_argument('--size', type=int, default=32)
    parser.add_argument('--backbone', default='resnet18')
    a = parser.parse_args()
    base = Trained('real', {}, a)
    least = base.peak()
    for name, options in PLAIN + WITH:
        one = Trained(name, options, a)
        peak, rounds = one.peak(), [(base.seconds(a.steps), one.seconds(a.steps)) for _ in range(a.rounds)]
        print(
            json.dumps(
                dict(
                    benchmark='strategies',
                    way=name,
                    **options,
                    backbone=a.backbone,
                    size=a.size,
                    batch=a.batch,
                    ms_per_step=round(1e3 * statistics.median(r[1] for r in rounds), 1),
                    images=round(one.images / base.images, 2),
                    ratio=round(statistics.median(y / x for x, y in rounds), 2),
                    mb=round(peak / 2**20, 1),
                    memory_ratio=round(peak / least, 2),
                    device=this_process().device.type,
                    threads=torch.get_num_threads(),
                )
            ),
            flush=True,
        )


if __name__ == '__main__':
    main()
