"""What buys quality in the same training time on a small machine: recipes of the generator, several trainings each.

    python benchmarks/recipes.py [--trials NAME ...] [--minutes 0.75 5 15] [--seeds 0 1 2] [--out runs/recipes]
    python benchmarks/recipes.py --table RESULTS.jsonl [--minutes ...]
    python benchmarks/recipes.py --picture FILE.png --minutes 15 --trials before components
        --draws "as it likes" "evenly to .03"

Prints JSON, one line per training and way of drawing. The images are simulated cells of 32 px with all 28 classes; a
ResNet trained on the real training images judges. The synthetic images are drawn for the label sets of the validation
split, unseen cells of the same lines, and measured beside them: power in four bands of spatial frequency over that of
the training images (`band_ratios`), Fréchet distance, coverage, and label fidelity, over all classes and over those
that are points or thin lines. A trial trains for as many steps as fit into the time. The milliseconds of its step are
those of 'before' times a ratio, the median over some rounds in which the two take turns alone on the machine; both are
measured once and noted (`--plan` measures and does no more), so trainings may then share the machine. `--table` gives
the mean over the seeds with its 95 % interval, and that of the difference to 'before', seed by seed; `--picture` shows
an image of each class, real and drawn, at 1:1 and enlarged. Run it again to continue.
"""

import argparse
import itertools
import json
import statistics
import time
from pathlib import Path
from unittest import mock

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from generator_quality import configured, images

from protloc.data.store import ImageStore, StoreWriter
from protloc.diffusion import pipeline
from protloc.diffusion.generate import generators_for
from protloc.diffusion.objective import least_timestep, to_images
from protloc.diffusion.train import preview_rows, train_generator
from protloc.evaluate.detail import band_ratios
from protloc.evaluate.features import features
from protloc.evaluate.fidelity import coverage, frechet_distance, mean_interval
from protloc.evaluate.label_fidelity import label_fidelity, label_fidelity_by_class, micro_label_fidelity
from protloc.files import atomic_path, remove
from protloc.plots import composite

BEFORE = {  # the settings up to protloc 0.2.0
    'objective.prediction_type': 'sample',
    'objective.preconditioning': 'none',
    'objective.weighting': 'snr_plus_one',
    'objective.gamma': 20,
    'objective.skip_spread': 0.5,
    'objective.sigma_min': 0,
    'unet.patch_size': 2,
    'loop.lr': 0.002,
    'loop.ema_decay': 0.995,
    'unet.resnet_time_scale_shift': 'default',
}
PLAIN = {'loop.lr': 0.004, 'loop.ema_decay': 0.99}
FILM = {**PLAIN, 'unet.resnet_time_scale_shift': 'scale_shift'}
COMPONENTS = {**FILM, 'objective.preconditioning': 'components'}
WHOLE = {'objective.skip_spread': 1.0}
UNIFORM = {'objective.weighting': 'uniform'}
TRIALS = {
    'before': {},
    'before, twice the rate': PLAIN,
    'before, scale and shift': FILM,
    'v': {**FILM, 'objective.prediction_type': 'v_prediction'},
    'flow': {**FILM, **UNIFORM, 'objective.prediction_type': 'flow'},
    'EDM': {**FILM, **UNIFORM, **WHOLE, 'objective.preconditioning': 'edm'},
    'components': COMPONENTS,
    'components, uniform': {**COMPONENTS, **UNIFORM},
    'components, whole spread': {**COMPONENTS, **WHOLE},
    'components, whole spread, uniform': {**COMPONENTS, **WHOLE, **UNIFORM},
    'components, a quarter of the spread': {**COMPONENTS, 'objective.skip_spread': 0.25},
    'components, no scale': {**COMPONENTS, 'unet.resnet_time_scale_shift': 'default'},
    'components, patches of 4': {**COMPONENTS, 'unet.patch_size': 4},
    'components, long average': {**COMPONENTS, 'loop.ema_decay': None, 'loop.ema_length': 0.1},
}
DRAWS = {  # of the same trainings; even timesteps are protloc's
    'as it likes': dict(),
    **{f'evenly to .0{digit}': dict(sigma_min=digit / 100) for digit in (1, 2, 3, 5, 8)},
    'evenly to .03, 10 steps': dict(sigma_min=0.03, num_inference_steps=10),
    'evenly to .03, 30 steps': dict(sigma_min=0.03, num_inference_steps=30),
    'evenly to .03, guidance 1': dict(sigma_min=0.03, guidance_scale=1.0),
    'evenly to .03, guidance 1.25': dict(sigma_min=0.03, guidance_scale=1.25),
    'evenly to .03, guidance in .2 to .8': dict(sigma_min=0.03, guidance_interval=(0.2, 0.8)),
    'evenly to .03, rescaled': dict(sigma_min=0.03, guidance_rescale=0.7),
    'evenly to .03, dithered': dict(sigma_min=0.03, dither=True),
    **{f'quadratic to .0{digit}': dict(sigma_min=digit / 100, quadratic=True) for digit in (1, 2, 3)},
    'quadratic to .01, 10 steps': dict(sigma_min=0.01, quadratic=True, num_inference_steps=10),
    'quadratic to .01, guidance 1': dict(sigma_min=0.01, quadratic=True, guidance_scale=1.0),
    'quadratic to .01, guidance in .2 to .8': dict(sigma_min=0.01, quadratic=True, guidance_interval=(0.2, 0.8)),
}
POINTS = 'Actin filaments', 'Cell junctions', 'Centrosome', 'Microtubule organizing center'


def settings(trial, steps):
    "A trial's settings as `NAME=VALUE`"
    values = {**BEFORE, **TRIALS[trial]}
    return configured('ours', steps, [f'{name}={json.dumps(value)}' for name, value in values.items()])


def seconds_per_step(trial, real, folder, steps=20):
    "Over the later half of a short training, so that the start does not count"
    config = settings(trial, 2 * steps)
    training = folder / f'timed-{time.time_ns()}'
    train_generator(real, training, config)
    line = json.loads((training / 'log.jsonl').read_text().splitlines()[-1])
    remove(training)
    return config.loop.batch_size / line['images_per_second']


def plan(trial, real, folder, rounds=2):
    "A step of a trial over one of 'before', and the seconds of the latter; measured once"
    path = folder / trial / 'plan.json'
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        turns = [[seconds_per_step(name, real, folder) for name in ('before', trial)] for _ in range(rounds)]
        ratio = statistics.median(changed / before for before, changed in turns) if trial != 'before' else 1.0
        noted = dict(ratio=ratio, seconds=min(before for before, _ in turns))
        with atomic_path(path) as partial:
            partial.write_text(json.dumps(noted))
    return json.loads(path.read_text())


def quadratic_timesteps(scheduler, num_inference_steps, sigma_min):
    "From pure noise to a noise level in steps that become shorter (Song et al. 2021)"
    first, last = scheduler.config.num_train_timesteps - 1, least_timestep(scheduler, sigma_min)
    falling = last + (first - last) * np.linspace(1, 0, num_inference_steps) ** 2
    least = last + np.arange(num_inference_steps)[::-1]  # none is visited twice
    return np.maximum(falling.round().astype(int), least).tolist()


def draw(pipe, labels, path, sigma_min=0.0, quadratic=False, **options):
    "Draw images into a store, once"
    if path.exists():
        return ImageStore(path)
    pipe.register_to_config(sigma_min=sigma_min)
    pipe.set_progress_bar_config(disable=True)
    spacing = quadratic_timesteps if quadratic else pipeline.spaced_timesteps
    with mock.patch.object(pipeline, 'spaced_timesteps', spacing):
        return write_drawn(pipe, labels, path, **options)


def write_drawn(pipe, labels, path, dither=False, batch=100, **options):
    with StoreWriter(path, pipe.config.channels, pipe.vocab, pipe.size, dict(kind='synthetic')) as writer:
        for start in range(0, len(labels), batch):
            rows = labels[start : start + batch]
            signal = pipe(
                rows, generator=generators_for(0, range(start, start + len(rows))), output_type='signal', **options
            )
            for number, (image, row) in enumerate(zip(finished(signal, pipe, dither, start), rows, strict=True)):
                target = pipe.vocab.decode(row)
                writer.add(image, id=f'{start + number}', target=target, split='train', source='synthetic')
    return ImageStore(path)


def finished(signal, pipe, dither, seed):
    "Signals as stored images, perhaps rounded up or down by chance"
    if not dither:
        return to_images(signal, pipe.config.signal).numpy()
    values = ((signal + 1) / 2).clamp(0, 1).square() * 255
    chance = torch.rand(values.shape, generator=torch.Generator().manual_seed(seed))
    return (values + chance).floor().clamp(max=255).to(torch.uint8).numpy()


def measured(judge, real, reference, synthetic):
    "All measures of a set of synthetic images"
    seen, scores = features(judge, synthetic, synthetic.rows())
    by_class = label_fidelity_by_class(scores.numpy(), synthetic.labels, *reference[1:], real.vocab)
    ratios = band_ratios(real.images[real.rows('train')], synthetic.images[:], real.channels)
    n = min(len(seen), len(reference[0]))
    return dict(
        bands={channel: row.round(3).tolist() for channel, row in ratios.ratio.unstack().T.items()},
        frechet=round(frechet_distance(reference[0][:n], seen[:n]), 2),
        coverage=round(coverage(reference[0][:n], seen[:n]), 4),
        fidelity_macro=round(label_fidelity(by_class), 4),
        fidelity_micro=round(micro_label_fidelity(scores.numpy(), synthetic.labels, *reference[1:]), 4),
        fidelity_points=round(label_fidelity(by_class.loc[list(POINTS)]), 4),
        fidelity_by_class=by_class.round(3).T.to_dict('list'),
    )


def measures_of(lines):
    "The numbers of some lines that are compared, a row each"
    rows = []
    for line in lines:
        bands = np.array(list(line['bands'].values()))
        row = {f'band {i + 1}': value for i, value in enumerate(bands.mean(0))}
        row['worst band'] = np.exp(np.abs(np.log(bands)).max())
        row |= {name: value for name, value in line.items() if name.startswith('fidelity') and 'class' not in name}
        rows.append({**row, 'frechet': line['frechet'], 'coverage': line['coverage']})
    return pd.DataFrame(rows, index=[line['seed'] for line in lines])


def table(path, minutes):
    "Print mean and interval of each trial and draw, and of the difference to 'before'"
    lines = [json.loads(line) for line in Path(path).read_text().splitlines()]
    lines = [line for line in lines if line['benchmark'] == 'recipes' and line.get('bands')]
    for budget in minutes:
        groups = {}
        for line in lines:
            if line['minutes'] == budget:
                groups.setdefault((line['trial'], line['draw']), []).append(line)
        before = measures_of(groups.get(('before', 'as it likes'), []))
        for (trial, way), group in groups.items():
            if len(group) < 2:
                continue  # one training has no interval
            values = measures_of(group)
            line = dict(benchmark='recipes table', minutes=budget, trial=trial, draw=way, trainings=len(values))
            for name in values:
                mean, low, high = mean_interval(values[name].to_numpy())
                line[name] = [round(value, 3) for value in (mean, low, high)]
                paired = (values[name] - before[name]).dropna() if len(before) else []
                if len(paired) > 1 and (trial, way) != ('before', 'as it likes'):
                    line[f'{name}, more than before'] = [round(v, 3) for v in mean_interval(paired.to_numpy())]
            print(json.dumps(line))


def picture(args, real):
    "One image of each class: real, and drawn for the same labels by each trial's first seed, in the draws' turn"
    labels = real.labels[real.rows('val')]
    rows = preview_rows(labels, labels.shape[1])
    columns = {'real': real.images[real.rows('val')[rows]]}
    for trial, way in zip(args.trials, itertools.cycle(args.draws)):
        path = args.out / trial / f'{args.minutes[0]:g}-minutes-{args.seeds[0]}' / f'drawn {way}'
        columns[f'{trial}, {way}'] = ImageStore(path).images[rows]
    names = [name for name in real.vocab if labels[:, real.vocab.numbers[name]].any()]
    figure, axes = plt.subplots(
        len(names),
        2 * len(columns),
        figsize=(1.8 * len(columns), 1.05 * len(names)),
        dpi=160,
        gridspec_kw=dict(width_ratios=[3, 1] * len(columns), wspace=0.05, hspace=0.06),
    )
    for number, (title, shown) in enumerate(columns.items()):
        coloured = composite(shown, real.channels)
        for ax, image, name in zip(axes[:, 2 * number : 2 * number + 2], coloured, names, strict=True):
            ax[0].imshow(image, interpolation='nearest')
            ax[0].set(xticks=[], yticks=[])
            ax[1].set_axis_off()
            edge = image.shape[0] / figure.dpi / (ax[1].get_position().width * figure.get_figwidth())
            small = ax[1].inset_axes([0.05, 0.3, edge, edge])  # one pixel of the image for one of the picture
            small.imshow(image, interpolation='nearest')
            small.set_axis_off()
            if number == 0:
                ax[0].set_ylabel(name, rotation=0, ha='right', va='center', fontsize=8)
        axes[0, 2 * number].set_title(title, fontsize=9, loc='left')
    with atomic_path(Path(args.picture)) as partial:
        figure.savefig(partial, format='png', bbox_inches='tight')


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--minutes', type=float, nargs='+', default=[0.75, 5, 15], help='of training, for each')
    parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
    parser.add_argument('--trials', nargs='+', default=list(TRIALS), choices=TRIALS, metavar='NAME')
    parser.add_argument('--draws', nargs='+', default=['as it likes', 'evenly to .03'], choices=DRAWS, metavar='NAME')
    parser.add_argument('--size', type=int, default=32)
    parser.add_argument('--train', type=int, default=8000)
    parser.add_argument('--images', type=int, default=400, help='drawn from each; as many validation images are real')
    parser.add_argument('--plan', action='store_true', help='only measure the steps')
    parser.add_argument('--table', metavar='RESULTS.jsonl', help='only compare lines that were printed before')
    parser.add_argument('--picture', metavar='FILE.png', help='only show what was drawn before')
    parser.add_argument('--out', type=Path, default=Path('runs/recipes'))
    return parser.parse_args()


def main():
    args = arguments()
    if args.table:
        return table(args.table, args.minutes)
    args.out.mkdir(parents=True, exist_ok=True)
    real, judge = images(args.out, args.size, args.train, args.images)
    if args.picture:
        return picture(args, real)
    plans = {trial: plan(trial, real, args.out) for trial in dict.fromkeys(['before', *args.trials])}
    if args.plan:
        return print(json.dumps(plans))
    unseen = real.rows('val')
    reference = [*features(judge, real, unseen), real.labels[unseen]]
    reference[1] = reference[1].numpy()
    for minutes in args.minutes:
        for seed in args.seeds:
            for trial in args.trials:
                steps = max(int(60 * minutes / plans['before']['seconds'] / plans[trial]['ratio']), 1)
                folder = args.out / trial / f'{minutes:g}-minutes-{seed}'
                started = time.perf_counter()
                pipe = train_generator(real, folder / 'generator', settings(trial, steps), seed)
                seconds = time.perf_counter() - started
                for way in args.draws if trial not in ('flow',) else ['as it likes']:
                    synthetic = draw(pipe, real.labels[unseen], folder / f'drawn {way}', **DRAWS[way])
                    line = dict(benchmark='recipes', trial=trial, draw=way, minutes=minutes, seed=seed, steps=steps)
                    line |= dict(step_ratio=round(plans[trial]['ratio'], 2), seconds=round(seconds, 1))
                    print(json.dumps(line | measured(judge, real, reference, synthetic)), flush=True)


if __name__ == '__main__':
    main()
