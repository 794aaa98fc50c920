"""A latent generator beside one of pixels, on fields of several cells, after the same training time.

    python benchmarks/latent.py [--size 128] [--cells 4] [--minutes 6] [--out runs/latent]

Prints JSON lines: of each generator steps and seconds of its trainings, milliseconds to draw an image, and how far its
images are from unseen real ones by the measures of `generator_quality.py`, with the power of their details over that of
real ones; the same of real training images; and, stain by stain, what the autoencoder keeps. `grid.png` shows real
fields and both generators' for the same labels and seeds; nobody picks them. The latent generator spends half of the
time on its autoencoder. Timing a few steps tells how many fit into the time. Run it again to continue.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
from generator_quality import ClassifierConfig, configured, seconds_per_step

from protloc.classify.predict import load_classifier
from protloc.classify.train import train_classifier
from protloc.data.simulate.datasets import simulate_store
from protloc.data.store import ImageStore
from protloc.diffusion.autoencoder import AutoencoderConfig, train_autoencoder
from protloc.diffusion.generate import GenerateConfig, generate
from protloc.diffusion.train import preview_rows, train_generator
from protloc.evaluate.detail import band_ratios
from protloc.evaluate.features import features
from protloc.evaluate.fidelity import measure
from protloc.evaluate.reconstruction import reconstruction
from protloc.files import atomic_path
from protloc.plots import show_cells
from protloc.training import LoopConfig

CLASSES = ['Nucleoplasm', 'Nucleoli', 'Golgi apparatus', 'Microtubules', 'Plasma membrane', 'Mitochondria']
LOOP = dict(batch_size=16, lr=2e-3, warmup=20, ema_decay=0.98, mixed_precision='auto')
RECIPES = {  # overrides of a generator's settings
    'pixels': ['unet={widths: [32, 64, 64], patch_size: 4}'],
    'latents': ['unet={widths: [32, 64, 64], patch_size: 1}', 'autoencoder={widths: [32, 64]}'],
}
JUDGE = ClassifierConfig(backbone='resnet10', loop=LoopConfig(steps=200, evaluate_every=50, **LOOP))


def autoencoder_steps(real, folder, minutes):
    "Steps of an autoencoder that fit into the time"

    def seconds(steps):
        how = AutoencoderConfig(widths=(32, 64), loop=LoopConfig(steps=steps, **LOOP))
        start = time.perf_counter()
        train_autoencoder(real, folder / f'try.{steps}.{time.time_ns()}', how, JUDGE.augment, 'sqrt')
        return time.perf_counter() - start

    return max(int(60 * minutes / ((seconds(12) - seconds(4)) / 8)), 1)


def trained(name, real, folder, minutes):
    "The generator of a recipe, and what its training took"
    folder.mkdir(exist_ok=True)
    loop = [f'loop.{key}={value}' for key, value in LOOP.items()]
    overrides, noted = [*RECIPES[name], *loop], folder / 'steps.json'
    if not noted.exists():
        share, autoencoder = 1, 0
        if name == 'latents':
            share, autoencoder = 0.5, autoencoder_steps(real, folder, minutes / 2)
            overrides += ['autoencoder.loop.steps=1', 'autoencoder.loop.batch_size=16']
        each = seconds_per_step('ours', real, folder, overrides, steps=10)
        noted.write_text(json.dumps(dict(steps=max(int(60 * minutes * share / each), 1), autoencoder=autoencoder)))
    steps = json.loads(noted.read_text())
    overrides = [*RECIPES[name], *loop]
    if steps['autoencoder']:
        overrides += [f'autoencoder.loop.{key}={value}' for key, value in LOOP.items()]
        overrides += [f'autoencoder.loop.steps={steps["autoencoder"]}']
    pipe, seconds = timed(
        folder / 'training.json',
        lambda: train_generator(real, folder / 'generator', configured('ours', steps['steps'], overrides)),
    )
    return pipe, dict(steps, seconds=round(seconds))


def timed(noted, work):
    "What some work returns, and the seconds that it took when it was done first"
    start = time.perf_counter()
    result = work()
    if not noted.exists():
        noted.write_text(json.dumps(time.perf_counter() - start))
    return result, json.loads(noted.read_text())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--size', type=int, default=128)
    parser.add_argument('--cells', type=int, default=4, help='in each field')
    parser.add_argument('--minutes', type=float, default=6, help='of training, for each')
    parser.add_argument('--train', type=int, default=1500)
    parser.add_argument('--images', type=int, default=200, help='drawn from each; as many validation images are real')
    parser.add_argument('--out', type=Path, default=Path('runs/latent'))
    args = parser.parse_args()
    out = args.out
    out.mkdir(parents=True, exist_ok=True)
    if not (out / 'real').exists():
        counts = dict(train=args.train, val=args.images)
        simulate_store(out / 'real', counts, args.size, CLASSES, cells=args.cells, workers=2)
    real = ImageStore(out / 'real')
    if not (out / 'judge' / 'classifier.json').exists():
        train_classifier(real, out / 'judge', JUDGE)
    judge, _ = load_classifier(out / 'judge')
    unseen = real.rows('val')
    reference = (*features(judge, real, unseen), real.labels[unseen])
    shown, pictures = unseen[preview_rows(real.labels[unseen], 6)], {}
    pictures['real'] = real.images[shown]

    def tell(name, store, rows, **more):
        measured = measure(reference, (*features(judge, store, rows), store.labels[rows]), real.vocab, 4)
        detail = band_ratios(real.images[unseen], store.images[rows], real.channels).ratio.unstack().mean()
        line = dict(benchmark='latent', generator=name, size=args.size, cells=args.cells, **more)
        line |= {key: round(value, 3) for key, value in measured.iloc[:, 0].items()}
        print(json.dumps(line | dict(power_in_bands=detail.round(2).tolist())), flush=True)

    tell('real training images', real, real.rows('train')[: args.images])
    for name in RECIPES:
        pipe, took = trained(name, real, out / name, args.minutes)
        synthetic = out / name / 'synthetic'

        def draw(pipe=pipe, synthetic=synthetic):
            if not synthetic.exists():
                how = GenerateConfig(images=args.images, batch_size=16, mixed_precision='auto')
                generate(pipe, synthetic, real.labels[unseen], how)
            return ImageStore(synthetic)

        store, seconds = timed(out / name / 'drawing.json', draw)
        tell(name, store, store.rows(), **took, ms_an_image=round(1e3 * seconds / args.images))
        pictures[name] = store.images[np.searchsorted(unseen, shown)]
        if pipe.vae:
            for stain, row in reconstruction(pipe, real).round(3).iterrows():
                print(json.dumps(dict(benchmark='latent', generator=name, stain=stain, **row.to_dict())), flush=True)
    titles = [', '.join(real.vocab.names_of(row)) for row in real.labels[shown]]
    figure = show_cells(pictures, real.channels, titles, edge=2)
    with atomic_path(out / 'grid.png') as partial:
        figure.savefig(partial, format='png', bbox_inches='tight', dpi=110)


if __name__ == '__main__':
    main()
