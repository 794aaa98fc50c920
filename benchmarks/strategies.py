"""Time and memory of a training step of each strategy, over those of `real`.

    python benchmarks/strategies.py [--steps 5] [--rounds 7] [--batch 64] [--size 32] [--backbone resnet18]

Prints JSON lines. A step is forward, backward and AdamW on batches that are on the device already, since loading is
the same for all and measured by `loading.py`. `real` and the other strategy take turns: `ratio` is the median over the
rounds, each of which compares two neighbours in time. `images` is the number of images that pass through the network
in a step, over `real`'s, and so the ratio to be expected. `memory_ratio` compares the peaks of what a step allocates
beyond what is there before it (weights and AdamW's moments)."""

import argparse
import json
import statistics
import time
import warnings

import torch
from torch.profiler import ProfilerActivity, profile

from protloc.classify.backbone import Classifier, with_aux_bn
from protloc.classify.losses import bce
from protloc.classify.mixing import STRATEGIES, build_strategy
from protloc.training import seeded, this_process, to_device

NUM_CLASSES = 28
PLAIN = [(name, {}) for name in STRATEGIES if name != 'real']
WITH_OPTIONS = [
    *((name, dict(aux_bn=True)) for name in ('concat', 'mix_loss', 'mix_representation', 'input_mixup')),
    *(('concat', dict(align=0.1, alignment=alignment)) for alignment in ('coral', 'mmd')),
]


def wait():
    "Until the device has done what it was told"
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


class Training:
    "A classifier, its optimizer and the batches of a strategy"

    def __init__(self, name, options, args):
        self.strategy, device = build_strategy(name, **options), this_process().device
        with seeded(0, 'classifier'), warnings.catch_warnings(action='ignore'):
            model = Classifier(args.backbone, 4, NUM_CLASSES, args.size)
            if self.strategy.aux_bn:
                with_aux_bn(model)
            batches = {source: self.random_batch(args) for source in self.strategy.sources}
        self.model = model.to(device, memory_format=torch.channels_last).train()
        self.batches = to_device(batches, device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), fused=True)
        self.progress = torch.zeros((), device=device)
        self.images = self.count_images()

    @staticmethod
    def random_batch(args):
        "Images and labels"
        images = torch.randint(256, (args.batch, 4, args.size, args.size), dtype=torch.uint8)
        return images, torch.randint(2, (args.batch, NUM_CLASSES)).float()

    def count_images(self):
        "Images that pass through the network in a step"
        passes = []
        hook = self.model.backbone.register_forward_pre_hook(lambda module, inputs: passes.append(len(inputs[0])))
        self.step()
        hook.remove()
        return sum(passes)

    def step(self):
        "One step, at the start of the training"
        wanted = self.strategy.sources_at(0.0)
        real, synthetic = (self.batches[source] if source in wanted else None for source in ('real', 'synthetic'))
        self.strategy.loss(self.model, bce, real, synthetic, self.progress).backward()
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
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
            self.step()
        memory = [event for event in profiled.profiler.kineto_results.events() if event.name() == '[memory]']
        memory.sort(key=lambda event: (event.start_ns(), event.nbytes()))
        return int(torch.tensor([event.nbytes() for event in memory]).cumsum(0).max())


def compare(name, options, base, base_peak, args):
    "A line of results for a strategy"
    training = Training(name, options, args)
    peak = training.peak()
    rounds = [(base.seconds(args.steps), training.seconds(args.steps)) for _ in range(args.rounds)]
    return dict(
        benchmark='strategies',
        way=name,
        **options,
        backbone=args.backbone,
        size=args.size,
        batch=args.batch,
        ms_per_step=round(1e3 * statistics.median(seconds for _, seconds in rounds), 1),
        images=round(training.images / base.images, 2),
        ratio=round(statistics.median(seconds / of_real for of_real, seconds in rounds), 2),
        mb=round(peak / 2**20, 1),
        memory_ratio=round(peak / base_peak, 2),
        device=this_process().device.type,
        threads=torch.get_num_threads(),
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--steps', type=int, default=5, help='a round')
    parser.add_argument('--rounds', type=int, default=7)
    parser.add_argument('--batch', type=int, default=64, help='real images, and as many synthetic ones')
    parser.add_argument('--size', type=int, default=32)
    parser.add_argument('--backbone', default='resnet18')
    args = parser.parse_args()
    base = Training('real', {}, args)
    base_peak = base.peak()
    for name, options in PLAIN + WITH_OPTIONS:
        print(json.dumps(compare(name, options, base, base_peak, args)), flush=True)


if __name__ == '__main__':
    main()
