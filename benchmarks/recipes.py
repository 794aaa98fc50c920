"""What buys quality in the same training time on a small machine: one setting of the generator changed at a time.

    python benchmarks/recipes.py [--minutes 0.75] [--out runs/quality]

Prints JSON, a line a trial. Data, judge and measures are those of generator_quality.py, whose folder is used. Each trial
trains for as many steps as fit into the time: the milliseconds of its step are the defaults' times a ratio, the median
over some rounds in which the two take turns, so that a busy machine does not decide. One training each, with the same
seed: intervals are over blocks of synthetic images and say nothing of other seeds. Run it again to continue."""

import argparse
import json
import statistics
import time
from pathlib import Path

import numpy as np
from generator_quality import configured, images

from protloc.core import remove
from protloc.data.store import ImageStore
from protloc.diffusion.generate import GenerateConfig, generate
from protloc.diffusion.train import train_generator
from protloc.evaluate.fidelity import features, measure

TRIALS = {
    'defaults': [],
    'patch size 1': ['unet.patch_size=1'],
    'patch size 4': ['unet.patch_size=4'],
    'half the width': ['unet.widths=[16, 32, 32]'],
    'twice the width': ['unet.widths=[64, 128, 128]'],
    'attention': ['unet.attention=true'],
    'half the rate': ['loop.lr=0.001'],
    'twice the rate': ['loop.lr=0.004'],
    'batch 64': ['loop.batch_size=64'],
    'EMA .98': ['loop.ema_decay=0.98'],
    'power EMA .1': ['loop.ema_decay=null', 'loop.ema_length=0.1'],
    'target epsilon': ['objective.prediction_type=epsilon'],
    'target v': ['objective.prediction_type=v_prediction'],
    'uniform weights': ['objective.weighting=uniform'],
    'no square root': ['objective.signal=symmetric'],
    'balance .5': ['balance=0.5'],
}


def seconds(changes, real, folder, steps=20):
    "A step's, over the later half of a short training, so that the start does not count"
    c = configured('ours', 2 * steps, changes)
    here = folder / f'timed-{time.time_ns()}'
    train_generator(real, here, c)
    line = json.loads((here / 'log.jsonl').read_text().splitlines()[-1])
    remove(here)
    return c.loop.batch_size / line['images_per_second']


def steps_for(name, real, folder, minutes, rounds=2):
    "How many steps of a trial fit into the time; measured once, beside the defaults"
    path = folder / 'plan.json'
    if not path.exists():
        turns = [
            [seconds(changes, real, folder) for changes in (TRIALS['defaults'], TRIALS[name])]
            for _ in range(1 if name == 'defaults' else rounds)
        ]
        path.write_text(
            json.dumps(
                dict(
                    ratio=statistics.median(b / a for a, b in turns) if name != 'defaults' else 1.0,
                    ms=1000 * min(a for a, _ in turns),
                )
            )
        )
    plan, base = (json.loads((f / 'plan.json').read_text()) for f in (folder, folder.parent / 'defaults'))
    return plan['ratio'], max(int(6e4 * minutes / base['ms'] / plan['ratio']), 1)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--minutes', type=float, default=0.75, help='of training, for each')
    parser.add_argument('--size', type=int, default=32)
    parser.add_argument('--train', type=int, default=8000)
    parser.add_argument('--images', type=int, default=400, help='drawn from each; as many validation images are real')
    parser.add_argument('--blocks', type=int, default=4, help='of synthetic images, for the intervals')
    parser.add_argument('--trials', nargs='+', default=list(TRIALS))
    parser.add_argument('--plan', action='store_true', help='only measure the steps')
    parser.add_argument('--out', type=Path, default=Path('runs/quality'))
    a = parser.parse_args()
    a.out.mkdir(parents=True, exist_ok=True)
    real, judge = images(a.out, a.size, a.train, a.images)
    folders = {name: a.out / 'recipes' / name for name in dict.fromkeys(['defaults', *a.trials])}
    for folder in folders.values():
        folder.mkdir(parents=True, exist_ok=True)
    steps = {name: steps_for(name, real, folder, a.minutes) for name, folder in folders.items()}
    if a.plan:
        return print(json.dumps(steps))
    val = real.rows('val')
    if len(val) < a.images:
        parser.error(f'{a.out} holds {len(val)} validation images: ask for no more with --images')
    unseen = *features(judge, real, val), real.labels[val]
    for name, (ratio, n) in steps.items():
        folder = folders[name]
        pipe = train_generator(real, folder / f'generator-{n}', configured('ours', n, TRIALS[name]))
        path = folder / f'synthetic-{n}'
        if not path.exists():
            generate(pipe, path, real.labels[val][: a.images], GenerateConfig(images=a.images, batch_size=100))
        rows, synthetic = np.random.default_rng(0).permutation(a.images), ImageStore(path)
        found = measure(unseen, (*features(judge, synthetic, rows), synthetic.labels[rows]), real.vocab, a.blocks)
        print(
            json.dumps(
                dict(
                    benchmark='recipes',
                    trial=name,
                    settings=TRIALS[name],
                    step_ratio=round(ratio, 2),
                    steps=n,
                    minutes=a.minutes,
                    images=a.images,
                    parameters=sum(p.numel() for p in pipe.unet.parameters()),
                    **{k: [round(v, 3) for v in row] for k, row in zip(found.index, found.values)},
                )
            ),
            flush=True,
        )


if __name__ == '__main__':
    main()
