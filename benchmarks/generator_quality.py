"""Generators after the same training time: distance to real images, precision, recall, coverage, and legible labels.

    python benchmarks/generator_quality.py [--minutes 15] [--recipes paper_simplified paper_original ours]
        [--out runs/quality]

Prints JSON, one line per measure and recipe, with 95 % intervals over blocks of synthetic images (of one trained
generator each). The images are simulated cells of 32 px with all 28 classes. Timing a few steps tells how many fit
into the time; the recipe then trains for that many with its own schedule. A ResNet trained on the real training
images judges all generators. The synthetic images are drawn for the label sets of the validation split, unseen cells
of the same lines, and measured beside them (one label of each for the paper's simplified model, which knows no more).
The paper's models draw as the paper does, 1000 ancestral steps and guidance 5, except that the original's 300 steps
are 30 of DPM-Solver++, a tenth of the cost. The first lines measure real training images, which is what a perfect
generator would reach. Run it again to continue.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch

from protloc.classify.predict import load_classifier
from protloc.classify.train import ClassifierConfig, train_classifier
from protloc.data.simulate.datasets import simulate_store
from protloc.data.store import ImageStore
from protloc.diffusion.generate import GenerateConfig, generate
from protloc.diffusion.train import train_generator
from protloc.evaluate.features import features
from protloc.evaluate.fidelity import measure
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
    preset = ''
    if recipe.startswith('paper_'):
        preset = f'paper/generator_{recipe.removeprefix("paper_")}'
    return section_config('generator', preset, [f'loop.steps={steps}', *overrides])


def plan_for(recipe, labels):
    "Label sets to draw; the simplified model of the paper knows one class an image"
    if recipe != 'paper_simplified':
        return labels
    classes = [np.random.default_rng(i).choice(np.flatnonzero(row)) for i, row in enumerate(labels)]
    return np.eye(labels.shape[1], dtype=labels.dtype)[classes]


def seconds_per_step(recipe, real, folder, overrides, steps=30):
    "Measured between two short trainings, so that the start does not count"
    seconds = []
    for n in (10, 10 + steps):
        start = time.perf_counter()
        train_generator(real, folder / f'{recipe}.{n}.{time.time_ns()}', configured(recipe, n, overrides))
        seconds.append(time.perf_counter() - start)
    return (seconds[1] - seconds[0]) / steps


def steps_within(minutes, recipe, real, folder, overrides):
    "The steps that fit into the time; measured once and noted in plan.json"
    path = folder / 'plan.json'
    if not path.exists():
        seconds = seconds_per_step(recipe, real, folder, overrides)
        steps = max(int(60 * minutes / seconds), 1)
        path.write_text(json.dumps(dict(ms_per_step=1000 * seconds, steps=steps, minutes=minutes)))
    return json.loads(path.read_text())


def draw(recipe, pipe, real, folder, images):
    "The synthetic images of a recipe; drawn once"
    if not (folder / 'synthetic').exists():
        config = GenerateConfig(**{**dict(images=images, batch_size=100), **DRAW.get(recipe, {})})
        generate(pipe, folder / 'synthetic', plan_for(recipe, real.labels[real.rows('val')][:images]), config)
    return ImageStore(folder / 'synthetic')


def arguments():
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
    return parser, parser.parse_args()


def main():
    parser, args = arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    real, judge = images(args.out, args.size, args.train, args.images)
    unseen = real.rows('val')
    if len(unseen) != args.images:
        parser.error(
            f'{args.out} holds {len(unseen)} validation images: use --images with that number, or another --out'
        )

    def judged(store, rows):
        return (*features(judge, store, rows), store.labels[rows])

    reference = judged(real, unseen)

    def report(recipe, store, rows, **more):
        rows = np.random.default_rng(0).permutation(rows)[: args.images]
        for name, row in measure(reference, judged(store, rows), real.vocab, args.blocks).iterrows():
            line = dict(benchmark='generator_quality', recipe=recipe, measure=name, **row.round(4).to_dict())
            print(json.dumps(dict(line, images=args.images, blocks=args.blocks, **more)), flush=True)

    report('real training images', real, real.rows('train'))
    for recipe in args.recipes:
        overrides, name = (args.set, args.name or recipe) if recipe == 'ours' else ([], recipe)
        folder = args.out / name
        folder.mkdir(exist_ok=True)
        plan = steps_within(args.minutes, recipe, real, folder, overrides)
        if plan['minutes'] != args.minutes:
            parser.error(f"{folder} was begun with --minutes {plan['minutes']}: choose another --out")
        pipe = train_generator(real, folder / 'generator', configured(recipe, plan['steps'], overrides))
        synthetic = draw(recipe, pipe, real, folder, args.images)
        report(
            name,
            synthetic,
            np.arange(len(synthetic)),
            minutes=args.minutes,
            steps=plan['steps'],
            ms_per_step=round(plan['ms_per_step'], 1),
            parameters=sum(p.numel() for p in pipe.unet.parameters()),
            threads=torch.get_num_threads(),
        )


if __name__ == '__main__':
    main()
