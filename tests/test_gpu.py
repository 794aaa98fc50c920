"""What an accelerator changes: precisions, compilation, pinned batches, augmentation there, memory, several of them.

`pytest -m gpu` on a machine with one; elsewhere all are skipped.
"""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from protloc import training
from protloc.classify.predict import probabilities
from protloc.classify.train import ClassifierConfig, train_classifier
from protloc.core import Failure
from protloc.data.loading import AugmentConfig, turn_and_crop
from protloc.data.simulate.datasets import simulate_store
from protloc.diffusion.autoencoder import AutoencoderConfig
from protloc.diffusion.denoiser import UNetConfig
from protloc.diffusion.generate import GenerateConfig, generate
from protloc.diffusion.train import GeneratorConfig, train_generator
from protloc.training import LoopConfig, native_precision, read_weights, this_process

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.accelerator.is_available(), reason='there is no accelerator'),
]
CROPPED = AugmentConfig(crop_scale=(0.5, 1), jitter=0.1)


@pytest.fixture(scope='module')
def store(tmp_path_factory):
    counts, classes = dict(train=64, val=16, test=16), ['Nucleoli', 'Plasma membrane', 'Cytosol']
    return simulate_store(tmp_path_factory.mktemp('gpu') / 'cells', counts, size=32, classes=classes)


def generator_config(latent=False, **loop):
    "A small generator, of pixels or of latents"
    loop = LoopConfig(**dict(steps=12, batch_size=16, lr=1e-3, ema_decay=0.5, checkpoint_seconds=1e9) | loop)
    autoencoder = AutoencoderConfig(widths=(16, 32), latent_channels=8, loop=loop) if latent else None
    unet = UNetConfig(widths=(32, 64), patch_size=1 if latent else 2)
    return GeneratorConfig(unet=unet, augment=CROPPED, loop=loop, autoencoder=autoencoder)


def classifier_config(**loop):
    loop = LoopConfig(**dict(steps=12, batch_size=16, evaluate_every=6, checkpoint_seconds=1e9) | loop)
    return ClassifierConfig(backbone='resnet10', augment=CROPPED, loop=loop)


def largest_difference(one, other):
    "Of two files of weights, over the largest weight"
    one, other = read_weights(one), read_weights(other)
    return max(float((one[name] - other[name]).abs().max() / one[name].abs().max().clamp(min=1e-3)) for name in one)


def test_training_is_on_the_accelerator(store, tmp_path):
    pipe = train_generator(store, tmp_path, generator_config())
    assert pipe.unet.device.type == this_process().device.type != 'cpu'


@pytest.mark.parametrize('latent', [False, True])
@pytest.mark.parametrize('precision', ['no', 'bf16', 'fp16', 'auto'])
def test_generators_in_every_precision(precision, latent, store, tmp_path):
    "Half precision ends near full precision, and images that both draw differ by little"
    full = train_generator(store, tmp_path / 'full', generator_config(latent))
    pipe = train_generator(store, tmp_path / 'this', generator_config(latent, mixed_precision=precision))
    assert pipe.unet.dtype == torch.float32
    assert largest_difference(tmp_path / 'full/last.safetensors', tmp_path / 'this/last.safetensors') < 0.2
    labels, few = store.labels[:8], GenerateConfig(images=8, num_inference_steps=10)
    exact = generate(full, tmp_path / 'exact', labels, few).images[:].astype(int)
    drawn = generate(full, tmp_path / 'drawn', labels, few.model_copy(update=dict(mixed_precision=precision))).images[:]
    assert np.abs(exact - drawn).mean() < (0.5 if precision == 'no' else 4)


@pytest.mark.parametrize('strategy', ['real', 'mix_loss', 'mix_representation', 'concat'])
@pytest.mark.parametrize('precision', ['no', 'bf16', 'fp16', 'auto'])
def test_classifiers_in_every_precision(precision, strategy, store, tmp_path):
    second = None if strategy == 'real' else store
    model = train_classifier(store, tmp_path, classifier_config(mixed_precision=precision), strategy, second)
    predicted = probabilities(model, store, store.rows('test'))
    assert predicted.shape == (16, 3) and np.isfinite(predicted).all() and predicted.std() > 0


def test_auto_is_what_the_device_multiplies():
    if not torch.cuda.is_available():
        pytest.skip('known of CUDA alone')
    assert (native_precision() == 'bf16') == (torch.cuda.get_device_capability() >= (8, 0))


def test_compiled_it_trains_the_same(store, tmp_path):
    train_generator(store, tmp_path / 'eager', generator_config())
    train_generator(store, tmp_path / 'compiled', generator_config(compile=True))
    assert largest_difference(tmp_path / 'eager/last.safetensors', tmp_path / 'compiled/last.safetensors') < 0.05


def test_pinned_batches_of_helpers_are_the_same(store, tmp_path):
    for workers in (0, 2):
        train_classifier(store, tmp_path / str(workers), classifier_config(workers=workers))
    files = [tmp_path / str(workers) / 'last.safetensors' for workers in (0, 2)]
    assert largest_difference(*files) < 0.01


def test_images_are_turned_and_cropped_as_on_cpus(store):
    images = torch.tensor(store.images[:16])
    symmetries = np.arange(16) % 8
    device = this_process().device
    assert torch.equal(turn_and_crop(images, symmetries), turn_and_crop(images.to(device), symmetries).cpu())
    boxes = np.random.default_rng(0).uniform([0, 0, 0.5, 0.5], [0.5, 0.5, 1, 1], (16, 4))
    boxes[:, :2] *= 1 - boxes[:, 2:]
    here, there = (turn_and_crop(some, symmetries, boxes).cpu().int() for some in (images, images.to(device)))
    assert (here - there).abs().float().mean() < 1


def test_memory_that_runs_out_is_a_sentence(store, tmp_path):
    if not torch.cuda.is_available():
        pytest.skip('only CUDA can be given less memory')
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(1e-3)
    try:
        with pytest.raises(Failure, match='does not fit into memory: raise accumulate, or lower batch_size'):
            train_generator(store, tmp_path, generator_config(batch_size=20_000))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.parametrize('latent', [False, True])
def test_killed_and_continued(latent, store, tmp_path, monkeypatch):
    "To the same weights, but for the order of sums on the device"
    kept = training.save_checkpoint

    def save(*args):
        kept(*args)
        raise KeyboardInterrupt

    train_generator(store, tmp_path / 'whole', generator_config(latent))
    monkeypatch.setattr(training, 'save_checkpoint', save)
    with pytest.raises(KeyboardInterrupt):
        train_generator(store, tmp_path / 'cut', generator_config(latent, checkpoint_steps=5))
    monkeypatch.setattr(training, 'save_checkpoint', kept)
    train_generator(store, tmp_path / 'cut', generator_config(latent))
    assert largest_difference(tmp_path / 'whole/last.safetensors', tmp_path / 'cut/last.safetensors') < 0.01


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason='there are not two GPUs')
def test_two_gpus_train_the_same(store, tmp_path):
    "By NCCL, half of each batch on each"
    words = ['-m', 'protloc', 'train-generator', store.path, '--set', 'loop.steps=12', '--set', 'loop.batch_size=16']
    start = [Path(sys.executable).parent / 'torchrun', '--nproc_per_node']
    for processes in (1, 2):
        command = [*start, processes, *words[:4], tmp_path / str(processes), *words[4:]]
        done = subprocess.run([*map(str, command)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
    files = [tmp_path / str(processes) / 'last.safetensors' for processes in (1, 2)]
    assert largest_difference(*files) < 0.01
