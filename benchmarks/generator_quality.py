"""Generators under the same training time: distance to real images, precision, recall, coverage, and whether the labels can be read.

    python benchmarks/generator_quality.py [--minutes 15] [--recipes paper_simplified paper_original ours] [--out runs/quality]

Prints JSON, a line a measure and recipe, with 95 % intervals over blocks of synthetic images (of one trained generator each).
Simulated cells of 32 px, all 28 classes. How many steps fit into the time is found by timing some; then the recipe trains
for that many with its own schedule. A ResNet trained on the real training images judges all of them; the synthetic images
are drawn for the label sets of the validation part, unseen cells of the same lines, and measured beside them (one label of each
for the paper's simplified model, which knows no more). The paper's models draw as the paper does, 1000 ancestral steps and
guidance 5, save that the original's 300 steps are 30 of DPM-Solver++, a tenth of the cost.
The first lines measure real training images, which is what a perfect generator would reach. Run it again to continue.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch

from protloc.classify.predict import load_classifier
from protloc.classify.train import ClassifierConfig, train_classifier
from protloc.data.simulate import simulate_store
from protloc.data.store import ImageStore
from protloc.diffusion.generate import GenerateConfig, generate
from protloc.diffusion.train import train_generator
from protloc.evaluate.fidelity import features, measure
from protloc.study.arms import section_config
from protloc.training import LoopConfig

JUDGE = ClassifierConfig(
    backbone='resnet10', loop=LoopConfig(steps=1500, batch_size=64, lr=3e-3, warmup=50, evaluate_every=250)
)
DRAW = {
    'paper_simplified': dict(scheduler='ddpm', num_inference_steps=1000, guidance_scale=1.0),
    'paper_original': dict(scheduler='dpm++', num_inference_steps=30, guidance_scale=5.0),
}


def images(folder, size, train, val):
    "The real images and who judges"
    if not (folder / 'real').exists():
        simulate_store(folder / 'real', dict(train=train, val=val), size=size, temper=0.5)
    real = ImageStore(folder / 'real')
    if not (folder / 'judge' / 'classifier.json').exists():
        train_classifier(real, folder / 'judge', JUDGE)
    return real, load_classifier(folder / 'judge')[0]


def configured(recipe, steps, overrides):
    "A recipe's settings for some steps"
    return section_config(
        'generator',
        f"paper/generator_{recipe.removeprefix('paper_')}" if recipe.startswith('paper_') else '',
        [f'loop.steps={steps}', *overrides],
    )


def plan_for(recipe, labels):
    "Label sets to draw; the simplified model of the paper knows one class an image"
    if recipe != 'paper_simplified':
        return labels
    one = [np.random.default_rng(i).choice(np.flatnonzero(row)) for i, row in enumerate(labels)]
    return np.eye(labels.shape[1], dtype=labels.dtype)[one]


def seconds_per_step(recipe, real, folder, overrides, steps=30):
    "Measured between two short trainings, so that the start does not count"
    took = []
    for n in (10, 10 + steps):
        start = time.perf_counter()
        train_generator(real, folder / f'{recipe}.{n}.{time.time_ns()}', configured(recipe, n, overrides))
        took.append(time.perf_counter() - start)
    return (took[1] - took[0]) / steps


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--minutes', type=float, default=15, help='of training, for each')
    parser.add_argument('--recipes', nargs='+', default=['paper_simplified', 'paper_original', 'ours'])
    parser.add_argument('--size', type=int, default=32)
    parser.add_argument('--train', type=int, default=8000)
    parser.add_argument('--images', type=int, default=400, help='drawn from each; as many validation images are real')
    parser.add_argument('--blocks', type=int, default=4, help='of synthetic images, for the intervals')
    parser.add_argument(
        '--set', nargs='*', default=[], metavar='NAME=VALUE', help='settings of ours, e.g. loop.lr=0.002'
    )
    parser.add_argument('--name', default='', help='of ours with these settings')
    parser.add_argument('--out', type=Path, default=Path('runs/quality'))
    a = parser.parse_args()
    a.out.mkdir(parents=True, exist_ok=True)
    real, judge = images(a.out, a.size, a.train, a.images)
    if len(real.rows('val')) != a.images:
        parser.error(
            f"{a.out} holds {len(real.rows('val'))} validation images: use --images with that number, or another --out"
        )

    def seen(store, rows):
        return (*features(judge, store, rows), store.labels[rows])

    unseen = seen(real, real.rows('val'))

    def told(recipe, found, **more):
        for name, row in found.iterrows():
            print(
                json.dumps(
                    dict(
                        benchmark='generator_quality',
                        recipe=recipe,
                        measure=name,
                        **row.round(4).to_dict(),
                        images=a.images,
                        blocks=a.blocks,
                        **more,
                    )
                ),
                flush=True,
            )

    rows = real.rows('train')
    told(
        'real training images',
        measure(unseen, seen(real, np.random.default_rng(0).permutation(rows)[: a.images]), real.vocab, a.blocks),
    )
    for recipe in a.recipes:
        overrides = a.set if recipe == 'ours' else []
        here = a.out / (a.name or recipe if recipe == 'ours' else recipe)
        here.mkdir(exist_ok=True)
        if not (here / 'plan.json').exists():
            per = seconds_per_step(recipe, real, here, overrides)
            (here / 'plan.json').write_text(
                json.dumps(dict(ms_per_step=1000 * per, steps=max(int(60 * a.minutes / per), 1), minutes=a.minutes))
            )
        plan = json.loads((here / 'plan.json').read_text())
        if plan['minutes'] != a.minutes:
            parser.error(f"{here} was begun with --minutes {plan['minutes']}: choose another --out")
        pipe = train_generator(real, here / 'generator', configured(recipe, plan['steps'], overrides))
        how = GenerateConfig(**{**dict(images=a.images, batch_size=100), **DRAW.get(recipe, {})})
        if not (here / 'synthetic').exists():
            generate(pipe, here / 'synthetic', plan_for(recipe, real.labels[real.rows('val')][: a.images]), how)
        synthetic = ImageStore(here / 'synthetic')
        rows = np.random.default_rng(0).permutation(len(synthetic))
        told(
            here.name,
            measure(unseen, seen(synthetic, rows), real.vocab, a.blocks),
            minutes=a.minutes,
            steps=plan['steps'],
            ms_per_step=round(plan['ms_per_step'], 1),
            parameters=sum(p.numel() for p in pipe.unet.parameters()),
            threads=torch.get_num_threads(),
        )


if __name__ == '__main__':
    main()
