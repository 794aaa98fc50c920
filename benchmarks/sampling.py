"""Solvers beside DDPM with 1000 steps: images per second and distance to real images, of one trained generator.

    python benchmarks/sampling.py [--folder runs/quality] [--generator ours] [--images 400] [--only NAME ...]
        [--sigma-min .03]

Prints JSON, one line per setting. The folder is one of `generator_quality.py` or `recipes.py`: its real images, its
judge and one of its generators are used (of the latter such as `--folder runs/recipes --generator
components/15-minutes-0`, which were trained without a last noise level). All settings draw the same label sets from
the same noise. The distance is the kernel distance to unseen real images in the judge's features, with a 95 % interval
over blocks; `worse_than_ddpm` is the interval of the paired difference, block by block. `bands` is the power in four
bands of spatial frequency over that of the training images, mean over the stains, and `band_error` the mean size of
its logarithm. The setting to use is the fastest one whose interval of the difference reaches down to 0. Run it again
to continue.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch

from protloc.classify.predict import load_classifier
from protloc.data.store import ImageStore
from protloc.diffusion.generate import GenerateConfig, generate
from protloc.diffusion.train import open_pipeline
from protloc.evaluate.detail import band_ratios
from protloc.evaluate.features import features
from protloc.evaluate.fidelity import kernel_distance, mean_interval
from protloc.evaluate.label_fidelity import label_fidelity, label_fidelity_by_class, micro_label_fidelity

SETTINGS = {  # name -> scheduler, num_inference_steps, guidance_scale
    'ddpm-1000': ('ddpm', 1000, 1.0),
    'ddim-50': ('ddim', 50, 1.0),
    **{f'dpm++-{n}': ('dpm++', n, 1.0) for n in (10, 15, 20, 30)},
    **{f'unipc-{n}': ('unipc', n, 1.0) for n in (10, 15, 20)},
    **{f'dpm++-15, guidance {g}': ('dpm++', 15, g) for g in (1.5, 2.0, 3.0, 4.0)},
}


def draw(name, generator, plan, folder, sigma_min=None):
    "Draw with a setting, once; returns the store and the seconds that it took"
    path, timing = folder / name, folder / f'{name}.json'
    if not timing.exists():
        start = time.perf_counter()
        scheduler, num_inference_steps, guidance_scale = SETTINGS[name]
        config = GenerateConfig(
            images=len(plan),
            scheduler=scheduler,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            batch_size=100,
        )
        pipe = open_pipeline(generator)
        if sigma_min is not None:
            pipe.register_to_config(sigma_min=sigma_min)
        generate(pipe, path, plan, config)
        timing.write_text(json.dumps(time.perf_counter() - start))
    return ImageStore(path), json.loads(timing.read_text())


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--folder', type=Path, default=Path('runs/quality'))
    parser.add_argument('--generator', default='ours')
    parser.add_argument('--images', type=int, default=400)
    parser.add_argument('--sigma-min', type=float, help="last noise level of the solvers; the generator's unless given")
    parser.add_argument('--blocks', type=int, default=4)
    parser.add_argument('--only', nargs='+', default=list(SETTINGS), help='settings besides ddpm-1000')
    args = parser.parse_args()
    real, judge = ImageStore(args.folder / 'real'), load_classifier(args.folder / 'judge')[0]
    ending = '' if args.sigma_min is None else f'-to-{args.sigma_min:g}'
    folder = args.folder / f'sampling-{args.generator}{ending}'
    folder.mkdir(exist_ok=True, parents=True)
    rows = real.rows('val')
    real_features, real_scores = features(judge, real, rows)
    blocks = np.array_split(np.random.default_rng(0).permutation(args.images), args.blocks)
    ddpm = None
    for name in dict.fromkeys(['ddpm-1000', *args.only]):
        plan = real.labels[rows][: args.images]
        store, seconds = draw(name, args.folder / args.generator / 'generator', plan, folder, args.sigma_min)
        drawn_features, drawn_scores = features(judge, store, store.rows())
        distances = np.array([kernel_distance(real_features, drawn_features[block]) for block in blocks])
        ddpm = ddpm or (distances, seconds)
        judged = drawn_scores.numpy(), store.labels, real_scores.numpy(), real.labels[rows]
        mean, low, high = mean_interval(distances)
        ratios = band_ratios(real.images[real.rows('train')], store.images[:], real.channels)
        line = dict(
            benchmark='sampling',
            setting=name,
            images=args.images,
            images_per_second=round(args.images / seconds, 2),
            times_ddpm=round(ddpm[1] / seconds, 1),
            kernel_distance=round(mean, 5),
            low=round(low, 5),
            high=round(high, 5),
            bands=ratios.ratio.unstack().mean().round(3).tolist(),
            band_error=round(float(np.abs(np.log(ratios.ratio)).mean()), 4),
            worse_than_ddpm=[round(x, 5) for x in mean_interval(distances - ddpm[0])],
            fidelity_macro=round(label_fidelity(label_fidelity_by_class(*judged, real.vocab)), 3),
            fidelity_micro=round(micro_label_fidelity(*judged), 3),
            threads=torch.get_num_threads(),
        )
        print(json.dumps(line), flush=True)


if __name__ == '__main__':
    main()
