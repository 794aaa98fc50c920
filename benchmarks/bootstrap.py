"""The bootstrap of macro-F1: groups summed first, beside images weighed one by one, as protloc 0.2 did it.

    python benchmarks/bootstrap.py [--draws 10000] [--images 10000] [--classifiers 25] [--classes 28] [--threads 2]

Each way in a process of its own, in turns; prints JSON with CPU seconds and the largest resident set, and how far the
two agree. The decisions are random: a bootstrap does not care what they are."""

import argparse
import json
import os
import resource
import subprocess
import sys
import time

import numpy as np

from protloc.core import rng_for

WAYS = ('images', 'groups')


def decisions_of(args):
    "Decisions, labels and groups of one to four images"
    rng = rng_for(0, 'bootstrap benchmark')
    sizes = rng.integers(1, 5, args.images)
    groups = np.repeat(np.arange(len(sizes)), sizes)[: args.images]
    labels = rng.random((args.images, args.classes)) < 0.06
    wrong = rng.random((args.classifiers, *labels.shape), np.float32) < 0.05
    return labels ^ wrong, labels, groups.astype(str)


def by_images(decisions, labels, groups, draws):
    "As in 0.2: a weight for each draw and image, one classifier after the other; the draws of `by_groups`"
    from protloc.evaluate.intervals import drawn_groups

    _, member = np.unique(groups, return_inverse=True)
    weights = np.concatenate([*drawn_groups(member.max() + 1, draws)])[:, member]
    present = weights @ labels.astype(np.float32)
    macro = []
    for said in decisions:
        hits = weights @ (said & labels).astype(np.float32)
        predicted = weights @ said.astype(np.float32)
        macro.append((2 * hits / np.maximum(predicted + present, 1e-9)).mean(1))
    return np.stack(macro)


def by_groups(decisions, labels, groups, draws):
    "As it is now"
    from protloc.evaluate.intervals import count_in_groups, macro, resampled_f1

    return macro(resampled_f1(count_in_groups(decisions, labels, groups), draws))[:, 1:]


def measure(args):
    "One way, in this process"
    inputs = decisions_of(args)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start, cpu = time.perf_counter(), time.process_time()
    macro = (by_images if args.way == 'images' else by_groups)(*inputs, args.draws)
    took, used = time.perf_counter() - start, time.process_time() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(
        json.dumps(
            dict(
                seconds=round(took, 2),
                cpu_seconds=round(used, 2),
                peak_mb=round(peak / 1024),
                above_inputs_mb=round((peak - before) / 1024),
                mean=float(macro.mean(dtype=float)),
                sd=float(macro.std(1, dtype=float).mean()),
            )
        )
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    for name, value in dict(draws=10_000, images=10_000, classifiers=25, classes=28, threads=2).items():
        parser.add_argument(f'--{name}', type=int, default=value)
    parser.add_argument('--way', choices=WAYS)
    args = parser.parse_args()
    if args.way:
        return measure(args)
    env = {**os.environ, **dict.fromkeys(('OMP_NUM_THREADS', 'OPENBLAS_NUM_THREADS'), str(args.threads))}
    ways = {}
    for way in WAYS:
        command = [sys.executable, __file__, *sys.argv[1:], '--way', way]
        ways[way] = json.loads(subprocess.run(command, env=env, check=True, capture_output=True, text=True).stdout)
    sizes = {name: getattr(args, name) for name in ('draws', 'images', 'classifiers', 'classes', 'threads')}
    ratio = ways['groups']['cpu_seconds'] / ways['images']['cpu_seconds']
    print(json.dumps(dict(benchmark='bootstrap', **sizes, cpu_ratio=round(ratio, 3), ways=ways)))


if __name__ == '__main__':
    main()
