"""The MixModel as it was released, and its defects repaired one at a time: test macro-F1 after each.

    python benchmarks/defects.py [--seeds 4] [--out runs/defects]

Prints JSON, a line a repair and seed. Simulated cells: the demo's eight classes, 2,000 training and 800 test images of 32 px,
the test images of other cell lines. The released generator drew 32 px images that were enlarged to 512 px beside real ones; here
it draws 8 px images that are enlarged to 32, so that a generated cell has about as many pixels as there. The MixModel is a
ResNet-10 without pretrained weights that is trained with Mix Loss for a few minutes' share of the paper's steps: the table says which
defects matter here and by how much, not what the paper would have measured. Repairs add up, from the first row to the last; a seed
decides weights, batches and lambdas, and is the same in all rows. Some repairs are larger than their names: the U-Net that sees
the time step comes with our recipe (target, schedule, guidance, moving average), since the released three convolutions have no
place for a time step; real label sets come in real proportions, where single labels came in equal ones; the released
warm-up, which began after a first epoch at full rate, is none here. Left out are the split that ignores antibodies (simulated
cells are split by antibody) and the notebook that reads the wrong checkpoint. Run it again to continue."""

import argparse
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image

from protloc.classify.predict import probabilities
from protloc.classify.train import ClassifierConfig, train_classifier
from protloc.core import derive_seed, read_config, write_json
from protloc.data.simulate.datasets import simulate_store
from protloc.data.store import ImageStore, write_store
from protloc.diffusion.generate import GenerateConfig, generate, match_plan
from protloc.diffusion.train import GeneratorConfig, train_generator
from protloc.metrics import scores
from protloc.study.arms import section_config, study_config
from protloc.training import LoopConfig

DEMO, SMALL = study_config('demo'), 8
GENERATORS = {  # what it is trained on: the edge of its images, and whether it is told one label of each
    'simplified': (SMALL, True, section_config('generator', 'paper/generator_simplified', ['loop.steps=6000'])),
    'with_time_step': (
        SMALL,
        True,
        read_config(
            GeneratorConfig, dict(unet=dict(widths=[32, 64], patch_size=1), loop=DEMO.generator.loop.model_dump())
        ),
    ),
    'full_size': (32, True, DEMO.generator),
    'all_labels': (32, False, DEMO.generator),
}


@dataclass(frozen=True)
class Model:
    "A MixModel: how its images are made, how it is trained and tested"

    evaluates: bool = False  # eval mode when it is tested
    generator: str = 'simplified'
    as_rgba: bool = True  # enlarged as RGBA, so that the yellow stain counts as opacity
    aux_bn: bool = False  # synthetic batches have BatchNorm statistics of their own
    plateau_mode: str = 'min'
    warmup: int = 0
    keep: str = 'last'
    as_released: bool = True  # each batch's loss is averaged before the lambdas weigh it, which leaves about one half


REPAIRS = [
    ('as released', {}),
    ('eval mode at the test', dict(evaluates=True)),
    ('a U-Net that sees the time step', dict(generator='with_time_step')),
    ('stains enlarged one by one', dict(as_rgba=False)),
    ('generator at full resolution', dict(generator='full_size')),
    ('label sets as in real images', dict(generator='all_labels')),
    ('BatchNorm of their own', dict(aux_bn=True)),
    ('plateau upwards, a warm-up', dict(plateau_mode='max', warmup=16)),
    ('best weights', dict(keep='best')),
    ('lambda an image', dict(as_released=False)),
]


def resized(store, path, edge, as_rgba=False, **changes):
    "A store at another size: smaller by area, larger by bilinear interpolation; its table with changes"

    def one(image):
        if as_rgba:
            return np.asarray(
                Image.fromarray(image.transpose(1, 2, 0), 'RGBA').resize((edge, edge), Image.Resampling.BILINEAR)
            ).transpose(2, 0, 1)
        way = cv2.INTER_AREA if edge < image.shape[-1] else cv2.INTER_LINEAR
        return np.stack([cv2.resize(plane, (edge, edge), interpolation=way) for plane in image])

    if not Path(path).exists():
        write_store(
            path,
            np.stack([one(image) for image in store.images]),
            store.table.assign(**changes),
            store.channels,
            store.vocab,
        )
    return ImageStore(path)


def one_label(store, seed=0):
    "Targets with one label of each image, drawn by lot"
    rng = np.random.default_rng(seed)
    return [store.vocab.decode(np.eye(len(store.vocab))[rng.choice(np.flatnonzero(row))]) for row in store.labels]


def synthetic(model, real, folder):
    "The synthetic images of a model, at the size of the real ones"
    edge, single, config = GENERATORS[model.generator]
    name = f"{edge}-{'one' if single else 'all'}"
    seen = resized(real, folder / f'real-{name}', edge, **(dict(target=one_label(real)) if single else {}))
    drawn = folder / f'drawn-{model.generator}'
    if not drawn.exists():
        pipe = train_generator(seen, folder / f'generator-{model.generator}', config)
        k = len(real.vocab)
        plan = (
            np.eye(k, dtype=np.float32)[np.arange(1000) % k]
            if single
            else match_plan(real.labels[real.rows('train')], 1000)
        )
        how = (
            dict(scheduler='ddpm', num_inference_steps=1000, guidance_scale=1.0)
            if model.generator == 'simplified'
            else DEMO.generate.model_dump(exclude={'images', 'batch_size'})
        )
        generate(pipe, drawn, plan, GenerateConfig(**{**how, 'images': 1000, 'batch_size': 250}))
    if edge == real.size:
        return ImageStore(drawn)
    return resized(
        ImageStore(drawn),
        folder / f"enlarged-{model.generator}-{'rgba' if model.as_rgba else 'stains'}",
        real.size,
        model.as_rgba,
    )


@torch.no_grad()
def one_at_a_time(classifier, store, rows):
    "Probabilities in training mode, as the released submission code computes them"
    classifier.train()
    images = torch.from_numpy(store.images[rows])
    return np.concatenate([classifier(image[None]).sigmoid().numpy() for image in images])


def f1_of(model, real, folder, seed, steps):
    "Validation and test macro-F1 of a model; None is the baseline, real images alone"
    m = model or Model(evaluates=True, plateau_mode='max', warmup=16, keep='best')
    loop = LoopConfig(
        steps=steps,
        batch_size=64,
        lr=3e-3,
        warmup=m.warmup,
        schedule='plateau',
        plateau_mode=m.plateau_mode,
        plateau_patience=2,
        evaluate_every=steps // 16,
        patience=5,
    )
    how = ('mix_loss', synthetic(m, real, folder.parents[2])) if model else ('real', None)
    options = dict(as_released=m.as_released, aux_bn=m.aux_bn) if model else {}
    classifier = train_classifier(
        real,
        folder,
        ClassifierConfig(backbone='resnet10', keep=m.keep, loop=loop),
        *how,
        derive_seed(0, 'arm', seed),
        **options,
    )

    def f1(part, how):
        return scores(how(classifier, real, real.rows(part)), real.labels[real.rows(part)])['macro_f1']

    return dict(
        val_macro_f1=f1('val', probabilities), test_macro_f1=f1('test', probabilities if m.evaluates else one_at_a_time)
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--seeds', type=int, default=4)
    parser.add_argument('--steps', type=int, default=160, help='of each classifier')
    parser.add_argument('--out', type=Path, default=Path('runs/defects'))
    a = parser.parse_args()
    if not (a.out / 'real').exists():
        simulate_store(a.out / 'real', **DEMO.data.simulate.model_dump(), seed=DEMO.seed)
    real, model = ImageStore(a.out / 'real'), Model()
    for i, (name, repair) in enumerate([*REPAIRS, ('real images alone', None)]):
        if repair is not None:
            model = replace(model, **repair)
        for seed in range(a.seeds):
            folder = a.out / f'{a.steps}-steps' / f'{i:02d}' / f'seed-{seed}'
            if not (folder / 'scores.json').exists():
                write_json(
                    folder / 'scores.json', f1_of(None if repair is None else model, real, folder, seed, a.steps)
                )
            values = {k: round(v, 4) for k, v in json.loads((folder / 'scores.json').read_text()).items()}
            print(
                json.dumps(
                    dict(
                        benchmark='defects',
                        number=i,
                        repair=name,
                        seed=seed,
                        steps=a.steps,
                        **values,
                        **(asdict(model) if repair is not None else {}),
                    )
                ),
                flush=True,
            )


if __name__ == '__main__':
    main()
