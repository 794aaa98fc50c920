"""What buys quality in the same training time on a small machine: one setting of the generator changed at a time.

    python benchmarks/recipes.py [--minutes 0.75] [--out runs/quality]

Prints JSON, one line per trial. Data, judge and measures are those of generator_quality.py, whose folder is used.
Each trial trains for as many steps as fit into the time. The milliseconds of its step are the defaults' times a
ratio, the median over some rounds in which the two take turns, so that a busy machine does not decide. One training
each, with the same seed: intervals are over blocks of synthetic images and say nothing of other seeds. Run it again
to continue.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import numpy as np
from generator_quality import configured, images

from protloc.data.store import ImageStore
from protloc.diffusion.generate import GenerateConfig, generate
from protloc.diffusion.train import train_generator
from protloc.evaluate.fidelity import features, measure
from protloc.files import remove

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


def seconds_per_step(changes, real, folder, steps=20):
    "Over the later half of a short training, so that the start does not count"
    config = configured('ours', 2 * steps, changes)
    training = folder / f'timed-{time.time_ns()}'
    train_generator(real, training, config)
    line = json.loads((training / 'log.jsonl').read_text().splitlines()[-1])
    remove(training)
    return config.loop.batch_size / line['images_per_second']


def time_trial(name, real, folder, rounds=2):
    "A trial's step beside that of the defaults, and the milliseconds of the latter"
    if name == 'defaults':
        return dict(ratio=1.0, ms=1000 * seconds_per_step(TRIALS['defaults'], real, folder))
    turns = []
    for _ in range(rounds):
        turns.append([seconds_per_step(TRIALS[trial], real, folder) for trial in ('defaults', name)])
    ratio = statistics.median(changed / defaults for defaults, changed in turns)
    return dict(ratio=ratio, ms=1000 * min(defaults for defaults, _ in turns))


def steps_for(name, real, folder, minutes):
    "How many steps of a trial fit into the time; measured once, beside the defaults"
    path = folder / 'plan.json'
    if not path.exists():
        path.write_text(json.dumps(time_trial(name, real, folder)))
    ratio = json.loads(path.read_text())['ratio']
    ms = json.loads((folder.parent / 'defaults' / 'plan.json').read_text())['ms']
    return ratio, max(int(6e4 * minutes / ms / ratio), 1)


def draw(pipe, path, plan):
    "The synthetic images of a trial; drawn once"
    if not path.exists():
        generate(pipe, path, plan, GenerateConfig(images=len(plan), batch_size=100))
    return ImageStore(path)


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
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    real, judge = images(args.out, args.size, args.train, args.images)
    folders = {name: args.out / 'recipes' / name for name in dict.fromkeys(['defaults', *args.trials])}
    for folder in folders.values():
        folder.mkdir(parents=True, exist_ok=True)
    plans = {name: steps_for(name, real, folder, args.minutes) for name, folder in folders.items()}
    if args.plan:
        return print(json.dumps(plans))
    unseen = real.rows('val')
    if len(unseen) < args.images:
        parser.error(f'{args.out} holds {len(unseen)} validation images: ask for no more with --images')
    judged = *features(judge, real, unseen), real.labels[unseen]
    for name, (ratio, steps) in plans.items():
        folder = folders[name]
        pipe = train_generator(real, folder / f'generator-{steps}', configured('ours', steps, TRIALS[name]))
        synthetic = draw(pipe, folder / f'synthetic-{steps}', real.labels[unseen][: args.images])
        rows = np.random.default_rng(0).permutation(args.images)
        table = measure(judged, (*features(judge, synthetic, rows), synthetic.labels[rows]), real.vocab, args.blocks)
        line = dict(
            benchmark='recipes',
            trial=name,
            settings=TRIALS[name],
            step_ratio=round(ratio, 2),
            steps=steps,
            minutes=args.minutes,
            images=args.images,
            parameters=sum(p.numel() for p in pipe.unet.parameters()),
        )
        line.update({key: row.round(3).tolist() for key, row in table.iterrows()})
        print(json.dumps(line), flush=True)


if __name__ == '__main__':
    main()
