"""The time of one replicate of a study, stage by stage, and how much of it is arithmetic.

    python benchmarks/replicate.py [demo] [--share .2] [--jobs 1 2] [--rounds 3] [--python OTHER/bin/python]

Prints JSON lines: one for each way to run it, with the seconds of the median round. A way is a number of jobs, each
with its share of the cores; or, with `--python`, that of another environment, such as one with an older version of
protloc. Ways take turns; `ratio` is the median of the first way's time over this one's, of neighbours in time. With
`--share` below 1 generator, drawing and classifiers do that share of their steps and images, which is enough to
compare ways. `between` is what belongs to no stage: the start of Python, the rehearsal, the report, and processes that
wait. `utilisation` is the arithmetic of the trainings' forward and backward passes, as torch counts it, over what
large matrix products reach on as many cores in the same time; `validation` is the arithmetic of validations over that
of training.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode
from train_step import product_rate, squared_error

from protloc.classify.backbone import Classifier
from protloc.diffusion.denoiser import build_denoiser
from protloc.study.arms import study_config
from protloc.study.folder import RunFolder
from protloc.study.forecast import _shape_of

REPLICATES = 2  # fewer are no study


def settings(preset, share):
    "What is laid over a preset: few replicates, and a share of all steps and images"
    config = study_config(preset)
    few = {'generator.loop.steps': config.generator.loop.steps, 'generate.images': config.generate.images}
    few |= {f'classifier.loop.{name}': getattr(config.classifier.loop, name) for name in ('steps', 'evaluate_every')}
    return {'replicates': REPLICATES, **{name: max(round(value * share), 1) for name, value in few.items()}}


def run(python, preset, jobs, overrides, folder):
    "Seconds of the whole and of each stage, for one replicate"
    words = [word for name, value in overrides.items() for word in ('--set', f'{name}={value}')]
    start = time.time()
    command = [
        os.path.abspath(python),
        '-m',
        'protloc',
        'run',
        preset,
        '--jobs',
        str(jobs),
        '--out',
        str(folder),
        *words,
    ]
    environment = {**os.environ, 'TQDM_DISABLE': '1'}
    with open(folder.parent / 'stderr.txt', 'w') as said:
        subprocess.run(command, check=True, stdout=said, stderr=said, env=environment, cwd=folder.parent)
    whole = time.time() - start
    stages = RunFolder(folder).read_stages()
    kinds = stages.stage.str.replace(r' of replicate \d+', '', regex=True)
    return dict(whole=whole / REPLICATES, **(stages.groupby(kinds, sort=False).seconds.sum() / REPLICATES))


def arithmetic(config):
    "Operations of a replicate's trainings, and of their validations"
    channels, vocab, size = _shape_of(config)
    unet, loop = config.generator.unet, config.generator.loop
    shape = (len(channels), len(vocab), size)
    with torch.device('meta'):
        with FlopCounterMode(display=False) as drawn:
            images, labels = torch.zeros(loop.batch_size, shape[0], size, size), torch.zeros(loop.batch_size, shape[1])
            squared_error(build_denoiser(*shape, unet), images, labels, unet.patch_size).backward()
        model = Classifier(config.classifier.backbone, *shape).eval()  # a single image has no batch statistics
        with FlopCounterMode(display=False) as read:
            model(torch.zeros(1, shape[0], size, size, dtype=torch.uint8))
        with FlopCounterMode(display=False) as learned:
            model(torch.zeros(1, shape[0], size, size, dtype=torch.uint8)).sum().backward()
    generator = drawn.get_total_flops() * loop.steps
    loop = config.classifier.loop
    images = sum(loop.steps * loop.batch_size * (1 + arm.ratio * (len(arm.sources) - 1)) for arm in config.arms)
    val = config.data.simulate.counts['val'] * loop.steps / loop.evaluate_every * len(config.arms)
    return generator + learned.get_total_flops() * images, read.get_total_flops() * val


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('preset', nargs='?', default='demo', help='of simulated cells')
    parser.add_argument('--share', type=float, default=1.0, help='of steps and images')
    parser.add_argument('--jobs', type=int, nargs='+', default=[1])
    parser.add_argument('--rounds', type=int, default=1)
    parser.add_argument('--python', nargs='+', default=[sys.executable])
    args = parser.parse_args()
    overrides = settings(args.preset, args.share)
    config = study_config(args.preset, overrides=[f'{name}={value}' for name, value in overrides.items()])
    trained, validated = arithmetic(config)
    reach = product_rate()
    ways = {(python, jobs): [] for python in args.python for jobs in args.jobs}
    for _ in range(args.rounds):
        for (python, jobs), rounds in ways.items():
            with tempfile.TemporaryDirectory() as scratch:
                rounds.append(run(python, args.preset, jobs, overrides, Path(scratch) / 'run'))
    trained_ones = {'generator', *(arm.name for arm in config.arms)}
    first = next(iter(ways.values()))
    for (python, jobs), rounds in ways.items():
        middle = {name: float(np.median([one[name] for one in rounds])) for name in rounds[0]}
        whole = middle.pop('whole')
        trainings = sum(seconds for name, seconds in middle.items() if name in trained_ones)
        line = dict(
            benchmark='replicate',
            preset=args.preset,
            share=args.share,
            way=f'{python}, {jobs} jobs' if len(args.python) > 1 else f'{jobs} jobs',
            seconds=round(whole, 1),
            ratio=round(statistics.median(a['whole'] / b['whole'] for a, b in zip(first, rounds, strict=True)), 2),
            between=round(whole - sum(middle.values()) / jobs, 1),
            stages={name: round(seconds, 1) for name, seconds in middle.items()},
            utilisation=round(trained / (trainings / jobs) / reach, 3),
            validation=round(validated / trained, 3),
            gflop=round(trained / 1e9),
            product_gflop_per_second=round(reach / 1e9),
            threads=torch.get_num_threads(),
            rounds=args.rounds,
        )
        print(json.dumps(line))


if __name__ == '__main__':
    main()
