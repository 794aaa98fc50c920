"Generators that draw latents: killed and continued, opened again, edited, and what a damaged or foreign VAE says"

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from protloc import training
from protloc.core import InputError
from protloc.data.simulate.datasets import simulate_store
from protloc.diffusion.autoencoder import AutoencoderConfig
from protloc.diffusion.denoiser import UNetConfig
from protloc.diffusion.generate import GenerateConfig, generate, generator_hash
from protloc.diffusion.pipeline import generators_for
from protloc.diffusion.train import GeneratorConfig, generator_settings, open_pipeline, train_generator
from protloc.files import read_json, write_json
from protloc.study.arms import study_config
from protloc.study.folder import RunFolder
from protloc.study.rehearsal import check_drawing
from protloc.training import LoopConfig, read_weights

pytestmark = pytest.mark.slow
FEW = LoopConfig(steps=6, batch_size=8, checkpoint_seconds=0, ema_decay=0.5)


def config(**changes):
    return GeneratorConfig(
        **dict(
            unet=UNetConfig(widths=(16, 32), patch_size=1),
            autoencoder=AutoencoderConfig(widths=(8, 16), latent_channels=8, loop=FEW),
            loop=FEW,
        )
        | changes
    )


@pytest.fixture(scope='module')
def store(tmp_path_factory):
    counts, classes = dict(train=24, val=8), ['Nucleoli', 'Plasma membrane']
    return simulate_store(tmp_path_factory.mktemp('latent') / 'cells', counts, size=32, classes=classes)


@pytest.fixture(scope='module')
def trained(store, tmp_path_factory):
    folder = tmp_path_factory.mktemp('latent') / 'generator'
    train_generator(store, folder, config())
    return folder


def weights(folder):
    files = sorted((folder / 'pipeline').rglob('*.safetensors'))
    return {(path.parent.name, name): value for path in files for name, value in read_weights(path).items()}


@pytest.mark.parametrize('ended', [2, 5, 6, 8, 10])
def test_killed_in_either_training_it_ends_in_the_same_weights(ended, store, trained, tmp_path, monkeypatch):
    "The first five checkpoints are the autoencoder's"
    kept, count = training.save_checkpoint, 0

    def save(*args):
        nonlocal count
        kept(*args)
        count += 1
        if count == ended:
            raise KeyboardInterrupt

    often = FEW.model_copy(update=dict(checkpoint_steps=1))
    autoencoder = config().autoencoder.model_copy(update=dict(loop=often))
    monkeypatch.setattr(training, 'save_checkpoint', save)
    with pytest.raises(KeyboardInterrupt):
        train_generator(store, tmp_path / 'cut', config(loop=often, autoencoder=autoencoder))
    begun = (tmp_path / 'cut' / 'autoencoder' / 'last.safetensors').exists()
    assert count == ended and begun == (ended > 5)
    train_generator(store, tmp_path / 'cut', config())
    for name, value in weights(trained).items():
        assert torch.equal(value, weights(tmp_path / 'cut')[name]), name


def test_it_is_a_pipeline_of_diffusers(store, trained):
    index = read_json(trained / 'pipeline' / 'model_index.json')
    assert index['vae'] == ['diffusers', 'AutoencoderKL']
    from diffusers import AutoencoderKL, DiffusionPipeline

    vae = AutoencoderKL.from_pretrained(trained / 'pipeline' / 'vae')
    pipe = DiffusionPipeline.from_pretrained(trained / 'pipeline')
    assert vae.config.scaling_factor == pipe.vae.config.scaling_factor != 1
    assert not any(weight.requires_grad for weight in train_generator(store, trained, config()).vae.parameters())


def test_drawn_and_edited(store, trained, tmp_path):
    pipe = open_pipeline(trained)
    pipe.set_progress_bar_config(disable=True)
    few = GenerateConfig(images=5, num_inference_steps=3, batch_size=2)
    labels = store.labels[store.rows('train')][:5]
    drawn = generate(pipe, tmp_path / 'two', labels, few)
    assert drawn.images.shape == (5, 4, 32, 32)
    whole = generate(pipe, tmp_path / 'five', labels, few.model_copy(update=dict(batch_size=5)))
    assert np.abs(drawn.images[:].astype(int) - whole.images[:]).max() <= 1
    images = torch.tensor(store.images[:5])
    noise = generators_for(0, range(5))
    slight = pipe(labels, images=images, strength=0.2, num_inference_steps=10, generator=noise)
    assert slight.shape == images.shape and slight.dtype == torch.uint8


def test_the_name_of_a_generator_knows_its_vae(trained):
    pipe = open_pipeline(trained)
    before = generator_hash(pipe)
    with torch.no_grad():
        next(pipe.vae.parameters()).add_(1)
    assert generator_hash(pipe) != before


def test_a_vae_of_another_class_or_damaged_is_refused(trained, tmp_path):
    def changed(name, change):
        shutil.copytree(trained, tmp_path / name)
        change(tmp_path / name / 'pipeline')
        with pytest.raises(InputError) as refused:
            open_pipeline(tmp_path / name)
        return str(refused.value)

    def indexed(value):
        def change(folder):
            index = json.loads((folder / 'model_index.json').read_text())
            (folder / 'model_index.json').write_text(json.dumps({**index, 'vae': value}))

        return change

    def configured(**settings):
        def change(folder):
            path = folder / 'vae' / 'config.json'
            path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))

        return change

    def cut(folder):
        path = folder / 'vae' / 'diffusion_pytorch_model.safetensors'
        path.write_bytes(path.read_bytes()[:2000])

    for number, value in enumerate((['os', 'system'], ['diffusers', 'UNet2DModel'], 'AutoencoderKL', [None], 3)):
        assert "as its 'vae'" in changed(f'index{number}', indexed(value))
    assert 'need a U-Net with' in changed('none', indexed([None, None]))
    assert 'damaged or cut off' in changed('cut', cut)
    assert 'vae' in changed('gone', lambda folder: shutil.rmtree(folder / 'vae'))
    assert 'scaling_factor' in changed('scale', configured(scaling_factor='much'))
    assert 'block_out_channels' in changed('widths', configured(block_out_channels=["8"]))
    assert 'cannot be opened' in changed('stains', configured(in_channels=3))


def test_settings_of_a_version_without_autoencoders_go_on(store, tmp_path):
    pixels = config(autoencoder=None)
    folder = tmp_path / 'generator'
    folder.mkdir()
    noted = generator_settings(store, pixels, 0)
    del noted['config']['autoencoder']
    write_json(folder / 'settings.json', json.loads(json.dumps(noted, default=str)))
    assert train_generator(store, folder, pixels).vae is None


def test_without_validation_images_it_is_trained_all_the_same(protloc, tmp_path):
    "What the autoencoder keeps is then not measured, and said so"
    store = simulate_store(tmp_path / 'cells', dict(train=12), size=32, classes=['Nucleoli'])
    preset = tmp_path / 'preset.yaml'
    preset.write_text(yaml.safe_dump(dict(generator=json.loads(config().model_dump_json()))))
    code, out, err = protloc('train-generator', store.path, tmp_path / 'generator', '--preset', preset)
    assert code == 0 and 'Pipeline: ' in out
    assert "note: what the autoencoder keeps was not measured: " in err and "split 'val'" in err


def test_two_machines_train_the_same_generator(store, trained, tmp_path):
    "Two launchers, one process each, that meet on the loopback; numbers differ from one process's by rounding"
    (tmp_path / 'preset.yaml').write_text(yaml.safe_dump(dict(generator=json.loads(config().model_dump_json()))))
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    launch = [Path(sys.executable).parent / 'torchrun', '--nnodes', 2, '--nproc_per_node', 1]
    launch += ['--master_addr', '127.0.0.1', '--master_port', port]
    words = ['-m', 'protloc', 'train-generator', store.path, tmp_path / 'two', '--preset', tmp_path / 'preset.yaml']
    environment = {**os.environ, 'OMP_NUM_THREADS': '1', 'TQDM_DISABLE': '1'}
    machines = [
        subprocess.Popen(
            [*map(str, [*launch, '--node_rank', rank, *words])],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = [machine.communicate(timeout=300) for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], said
    assert ['What the autoencoder keeps' in out for out, _ in said] == [True, False]
    for name, value in weights(tmp_path / 'two').items():
        torch.testing.assert_close(value, weights(trained)[name], rtol=1e-2, atol=1e-3)


def test_sizes_are_refused_before_training(store, tmp_path):
    with pytest.raises(InputError, match='a multiple of 64'):
        train_generator(store, tmp_path / 'a', config(autoencoder=AutoencoderConfig(widths=(8,) * 6)))
    study = study_config('demo', overrides=['generator.autoencoder={widths: [8, 16, 16, 16, 16, 16]}'])
    with pytest.raises(InputError, match='a multiple of 64'):
        check_drawing(study, store, RunFolder(tmp_path))
    assert not (tmp_path / 'a').exists()
