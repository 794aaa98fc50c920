"""The MixModel as it was released, and its defects repaired one at a time: test macro-F1 after each.

    python benchmarks/defects.py [--seeds 4] [--out runs/defects]

Prints JSON, a line for each repair and seed. The cells are simulated, of the demo's eight classes: 2,000 training and
800 test images of 32 px, the test images from other cell lines. The released generator drew 32 px images that were
enlarged to 512 px beside real ones; here it draws 8 px images that are enlarged to 32, so that a generated cell has
about as many pixels as there. The MixModel is a ResNet-10 without pretrained weights, trained with Mix Loss for a
small share of the paper's steps: the table says which defects matter here and by how much, not what the paper would
have measured. Repairs add up, from the first row to the last; a seed decides weights, batches and lambdas, and is the
same in all rows.

Some repairs are larger than their names. The U-Net that sees the timestep comes with our recipe (target, schedule,
guidance, moving average), since the released three convolutions have no place for a timestep; real label sets come in
real proportions, where single labels came in equal ones; the released warm-up, which began after a first epoch at full
rate, is none here. Left out are the split that ignores antibodies (simulated cells are split by antibody) and the
notebook that reads the wrong checkpoint. Run it again to continue."""

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
from protloc.core import derive_seed, read_config
from protloc.data.simulate.datasets import simulate_store
from protloc.data.store import ImageStore, write_store
from protloc.diffusion.generate import GenerateConfig, generate, match_plan
from protloc.diffusion.train import GeneratorConfig, train_generator
from protloc.files import write_json
from protloc.metrics import scores
from protloc.study.arms import section_config, study_config
from protloc.training import LoopConfig

DEMO = study_config('demo')
NUM_SYNTHETIC = 1000
SIMPLIFIED = section_config('generator', 'paper/generator_simplified', ['loop.steps=6000'])
WITH_TIMESTEP = read_config(
    GeneratorConfig, dict(unet=dict(widths=[32, 64], patch_size=1), loop=DEMO.generator.loop.model_dump())
)


@dataclass(frozen=True)
class Generator:
    "A generator, and what it is trained on"

    config: GeneratorConfig
    edge: int  # of its images, px
    one_label: bool  # whether it is told one label of each image only


GENERATORS = {
    'simplified': Generator(SIMPLIFIED, 8, one_label=True),
    'with_time_step': Generator(WITH_TIMESTEP, 8, one_label=True),
    'full_size': Generator(DEMO.generator, 32, one_label=True),
    'all_labels': Generator(DEMO.generator, 32, one_label=False),
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


def resize(image, edge, as_rgba=False):
    "An image at another size: smaller by area, larger by bilinear interpolation"
    if as_rgba:
        rgba = Image.fromarray(image.transpose(1, 2, 0), 'RGBA')
        return np.asarray(rgba.resize((edge, edge), Image.Resampling.BILINEAR)).transpose(2, 0, 1)
    way = cv2.INTER_AREA if edge < image.shape[-1] else cv2.INTER_LINEAR
    return np.stack([cv2.resize(plane, (edge, edge), interpolation=way) for plane in image])


def resized(store, path, edge, as_rgba=False, **changes):
    "A store at another size; its table with changes"
    if not Path(path).exists():
        images = np.stack([resize(image, edge, as_rgba) for image in store.images])
        write_store(path, images, store.table.assign(**changes), store.channels, store.vocab)
    return ImageStore(path)


def one_label(store, seed=0):
    "Targets with one label of each image, drawn at random"
    rng = np.random.default_rng(seed)
    one_hot = np.eye(len(store.vocab))
    return [store.vocab.decode(one_hot[rng.choice(np.flatnonzero(row))]) for row in store.labels]


def draw(generator, name, real, folder):
    "The images of a trained generator, at its own size"
    labels = dict(target=one_label(real)) if generator.one_label else {}
    path = folder / f"real-{generator.edge}-{'one' if generator.one_label else 'all'}"
    training_images = resized(real, path, generator.edge, **labels)
    drawn = folder / f'drawn-{name}'
    if not drawn.exists():
        pipe = train_generator(training_images, folder / f'generator-{name}', generator.config)
        if generator.one_label:
            num_classes = len(real.vocab)
            plan = np.eye(num_classes, dtype=np.float32)[np.arange(NUM_SYNTHETIC) % num_classes]
        else:
            plan = match_plan(real.labels[real.rows('train')], NUM_SYNTHETIC)
        if name == 'simplified':
            how = dict(scheduler='ddpm', num_inference_steps=1000, guidance_scale=1.0)
        else:
            how = DEMO.generate.model_dump(exclude={'images', 'batch_size'})
        generate(pipe, drawn, plan, GenerateConfig(**how, images=NUM_SYNTHETIC, batch_size=250))
    return ImageStore(drawn)


def synthetic_images(model, real, folder):
    "The synthetic images of a model, at the size of the real ones"
    generator = GENERATORS[model.generator]
    drawn = draw(generator, model.generator, real, folder)
    if generator.edge == real.size:
        return drawn
    path = folder / f"enlarged-{model.generator}-{'rgba' if model.as_rgba else 'stains'}"
    return resized(drawn, path, real.size, model.as_rgba)


@torch.no_grad()
def one_at_a_time(classifier, store, rows):
    "Probabilities in training mode, as the released submission code computes them"
    classifier.train()
    images = torch.from_numpy(store.images[rows])
    return np.concatenate([classifier(image[None]).sigmoid().numpy() for image in images])


BASELINE = Model(evaluates=True, plateau_mode='max', warmup=16, keep='best')  # trained on real images alone


def train(model, real, folder, seed, steps):
    "A classifier trained as a model says; the baseline without synthetic images"
    loop = LoopConfig(
        steps=steps,
        batch_size=64,
        lr=3e-3,
        warmup=model.warmup,
        schedule='plateau',
        plateau_mode=model.plateau_mode,
        plateau_patience=2,
        evaluate_every=steps // 16,
        patience=5,
    )
    config = ClassifierConfig(backbone='resnet10', keep=model.keep, loop=loop)
    seed = derive_seed(0, 'arm', seed)
    if model is BASELINE:
        return train_classifier(real, folder, config, 'real', seed=seed)
    synthetic = synthetic_images(model, real, folder.parents[2])
    options = dict(as_released=model.as_released, aux_bn=model.aux_bn)
    return train_classifier(real, folder, config, 'mix_loss', synthetic, seed, **options)


def f1_of(model, real, folder, seed, steps):
    "Validation and test macro-F1 of a model"
    classifier = train(model, real, folder, seed, steps)

    def f1(split, predict):
        rows = real.rows(split)
        return scores(predict(classifier, real, rows), real.labels[rows])['macro_f1']

    val = f1('val', probabilities)
    return dict(val_macro_f1=val, test_macro_f1=f1('test', probabilities if model.evaluates else one_at_a_time))


def models():
    "Name and model of each row: the repairs add up; the baseline comes last"
    model = Model()
    for name, repair in REPAIRS:
        model = replace(model, **repair)
        yield name, model
    yield 'real images alone', BASELINE


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--seeds', type=int, default=4)
    parser.add_argument('--steps', type=int, default=160, help='of each classifier')
    parser.add_argument('--out', type=Path, default=Path('runs/defects'))
    args = parser.parse_args()
    if not (args.out / 'real').exists():
        simulate_store(args.out / 'real', **DEMO.data.simulate.model_dump(), seed=DEMO.seed)
    real = ImageStore(args.out / 'real')
    for number, (name, model) in enumerate(models()):
        for seed in range(args.seeds):
            folder = args.out / f'{args.steps}-steps' / f'{number:02d}' / f'seed-{seed}'
            path = folder / 'scores.json'
            if not path.exists():
                write_json(path, f1_of(model, real, folder, seed, args.steps))
            result = dict(benchmark='defects', number=number, repair=name, seed=seed, steps=args.steps)
            result |= {score: round(value, 4) for score, value in json.loads(path.read_text()).items()}
            if model is not BASELINE:
                result |= asdict(model)
            print(json.dumps(result), flush=True)


if __name__ == '__main__':
    main()
