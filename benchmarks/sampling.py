"""Solvers: images a second and distance to real images, beside DDPM with 1000 steps, of one trained generator.

    python benchmarks/sampling.py [--folder runs/quality] [--generator ours] [--images 400] [--only NAME ...]

Prints JSON, a line a setting. The folder is one of `generator_quality.py`: its real images, its judge and a generator of it. All
settings draw the same label sets from the same noise. The distance is the kernel distance to unseen real images in the judge's
features, with a 95 % interval over blocks; `worse_than_ddpm` is the interval of the paired difference, block by block. The
fastest setting whose difference is not above 0 by its interval is the one to use. Run it again to continue."""

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
from protloc.evaluate.fidelity import features, kernel_distance, mean_interval
from protloc.evaluate.label_fidelity import label_fidelity, label_fidelity_by_class, micro_label_fidelity

SETTINGS = {
    'ddpm-1000': ('ddpm', 1000, 1.0),
    'ddim-50': ('ddim', 50, 1.0),
    **{f'dpm++-{n}': ('dpm++', n, 1.0) for n in (10, 15, 20, 30)},
    **{f'unipc-{n}': ('unipc', n, 1.0) for n in (10, 15, 20)},
    **{f'dpm++-15, guidance {g}': ('dpm++', 15, g) for g in (1.5, 2.0, 3.0, 4.0)},
}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--folder', type=Path, default=Path('runs/quality'))
    parser.add_argument('--generator', default='ours')
    parser.add_argument('--images', type=int, default=400)
    parser.add_argument('--blocks', type=int, default=4)
    parser.add_argument('--only', nargs='+', default=list(SETTINGS), help='settings besides ddpm-1000')
    a = parser.parse_args()
    real, judge = ImageStore(a.folder / 'real'), load_classifier(a.folder / 'judge')[0]
    rows, here = real.rows('val'), a.folder / f'sampling-{a.generator}'
    here.mkdir(exist_ok=True)
    unseen, said = features(judge, real, rows)
    parts, base = np.array_split(np.random.default_rng(0).permutation(a.images), a.blocks), None
    for name in dict.fromkeys(['ddpm-1000', *a.only]):
        scheduler, steps, guidance = SETTINGS[name]
        path, timing = here / name, here / f'{name}.json'
        if not timing.exists():
            start = time.perf_counter()
            pipe, plan = open_pipeline(a.folder / a.generator / 'generator'), real.labels[rows][: a.images]
            generate(
                pipe,
                path,
                plan,
                GenerateConfig(
                    images=a.images,
                    scheduler=scheduler,
                    num_inference_steps=steps,
                    guidance_scale=guidance,
                    batch_size=100,
                ),
            )
            timing.write_text(json.dumps(time.perf_counter() - start))
        store, seconds = ImageStore(path), json.loads(timing.read_text())
        f, p = features(judge, store, store.rows())
        blocks = np.array([kernel_distance(unseen, f[part]) for part in parts])
        base = (blocks, seconds) if base is None else base
        judged = p.numpy(), store.labels, said.numpy(), real.labels[rows]
        (mean, low, high), worse = mean_interval(blocks), mean_interval(blocks - base[0])
        print(
            json.dumps(
                dict(
                    benchmark='sampling',
                    setting=name,
                    images=a.images,
                    images_per_second=round(a.images / seconds, 2),
                    times_ddpm=round(base[1] / seconds, 1),
                    kernel_distance=round(mean, 5),
                    low=round(low, 5),
                    high=round(high, 5),
                    worse_than_ddpm=[round(x, 5) for x in worse],
                    fidelity_macro=round(label_fidelity(label_fidelity_by_class(*judged, real.vocab)), 3),
                    fidelity_micro=round(micro_label_fidelity(*judged), 3),
                    threads=torch.get_num_threads(),
                )
            ),
            flush=True,
        )


if __name__ == '__main__':
    main()
