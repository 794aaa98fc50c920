"Files of others are data: what they hold is never run, imported or unpickled, and their names stay text"

import json
import shutil
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline

from protloc.classify.predict import load_classifier
from protloc.classify.train import ClassifierConfig, teacher_labels, train_classifier
from protloc.core import InputError
from protloc.data.simulate.datasets import simulate_store
from protloc.data.store import ImageStore
from protloc.diffusion.denoiser import UNetConfig
from protloc.diffusion.generate import _read_block
from protloc.diffusion.pipeline import LabelConditionedPipeline
from protloc.diffusion.train import GeneratorConfig, open_pipeline, train_generator
from protloc.files import parse_yaml, read_array
from protloc.training import LoopConfig

NAMES = ['Nucleoli', 'Cytosol']
EVIL = 'protloc_evil'  # a module that is installed, and says so when it is imported


class Trap:
    "A pickle of it makes a file when it is opened"

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (Path(self.marker),)


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    "A store, a generator and a classifier, which nobody has changed"
    folder = tmp_path_factory.mktemp('made')
    store = simulate_store(folder / 'store', dict(train=16, val=8, test=8), size=32, classes=NAMES)
    loop = LoopConfig(steps=2, batch_size=8)
    train_generator(store, folder / 'generator', GeneratorConfig(unet=UNetConfig(widths=(16, 32)), loop=loop), seed=1)
    train_classifier(store, folder / 'classifier', ClassifierConfig(backbone='resnet10', loop=loop))
    return folder


@pytest.fixture
def marker(tmp_path, monkeypatch):
    "A file that is there as soon as something has run"
    marker = tmp_path / 'it_ran'
    code = f'import pathlib\npathlib.Path({str(marker)!r}).touch()\n'
    code += 'class Evil:\n    def __init__(self, *a, **k): pass\n    from_pretrained = classmethod(lambda *a, **k: Evil())\n'
    (tmp_path / 'installed').mkdir()
    (tmp_path / 'installed' / f'{EVIL}.py').write_text(code)
    monkeypatch.syspath_prepend(tmp_path / 'installed')
    yield marker
    assert not marker.exists() and EVIL not in sys.modules
    __import__(EVIL)
    del sys.modules[EVIL]
    assert marker.exists()  # else this test would not see anything


@pytest.fixture
def folder(made, tmp_path):
    "A copy of the generator's pipeline"
    return shutil.copytree(made / 'generator' / 'pipeline', tmp_path / 'pipeline')


def change(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def put_code(folder):
    "Python files wherever some version of diffusers looks for them"
    code = (folder.parent / 'installed' / f'{EVIL}.py').read_text()
    for place in ('', 'unet', 'label_encoder', 'scheduler', 'evil', EVIL):
        (folder / place).mkdir(exist_ok=True)
        for name in ('pipeline', 'evil', EVIL, 'unet', 'modeling', '__init__', 'denoiser', 'protloc'):
            (folder / place / f'{name}.py').write_text(code)


def one_sentence(err):
    line = err.strip()
    return '\n' not in line and line.startswith('protloc: ') and 'Traceback' not in line


def trap(marker):
    return Trap(str(marker))


def test_the_trap_works(tmp_path):
    torch.save(Trap(tmp_path / 'sprung'), tmp_path / 'trap.pt')
    torch.load(tmp_path / 'trap.pt', weights_only=False)
    assert (tmp_path / 'sprung').exists()


INDEXES = {
    'pipeline of the folder': dict(_class_name=['pipeline', 'Evil']),
    'pipeline of a module': dict(_class_name=[EVIL, 'Evil']),
    'class by name': dict(_class_name='Evil'),
    'class by module': dict(_class_name=f'{EVIL}.Evil'),
    'component of the folder': dict(unet=['evil', 'EvilUNet']),
    'component of its own folder': dict(unet=['unet', 'Evil']),
    'module': dict(unet=[EVIL, 'Evil']),
    'label encoder': dict(label_encoder=[EVIL, 'Evil']),
    'scheduler': dict(scheduler=[EVIL, 'Evil']),
    'one more component': dict(safety=[EVIL, 'Evil']),
    'a list of names': dict(classes=[EVIL, 'Evil']),
    'channels': dict(channels=[EVIL, 'Evil']),
    'conditions': dict(conditions=[EVIL, 'Evil']),
    'condition': dict(condition=[EVIL, 'Evil']),
    'signal': dict(signal=[EVIL, 'Evil']),
    'size': dict(patch_size=[EVIL, 'Evil']),
    'Popen': dict(unet=['subprocess', 'Popen']),
    'system': dict(label_encoder=['os', 'system']),
    'eval': dict(scheduler=['builtins', 'eval']),
    'no scheduler': dict(scheduler=['diffusers', 'UNet2DModel']),
    'a pipeline as scheduler': dict(scheduler=['diffusers', 'DDPMPipeline']),
    'a function of diffusers': dict(scheduler=['diffusers', 'logging']),
    'a class of transformers': dict(unet=['transformers', 'AutoModel']),
    'an imported name': dict(unet=['protloc.diffusion.denoiser', 'read_json']),
    'another module of protloc': dict(unet=['protloc.diffusion.train', 'open_pipeline']),
    'three': dict(unet=['diffusers', 'UNet2DModel', EVIL]),
    'no pair': dict(unet=[[EVIL], ['Evil']]),
    'nothing': dict(unet=[None, None]),
    'text': dict(unet=f'{EVIL}.Evil'),
    'object': dict(unet={'0': EVIL, '1': 'Evil'}),
    'number': dict(scheduler=3),
    'null': dict(label_encoder=None),
}


@pytest.mark.parametrize('case', INDEXES)
def test_a_generator_names_only_classes_of_protloc(case, folder, made, marker, tmp_path, protloc):
    put_code(folder)
    change(folder / 'model_index.json', **INDEXES[case])
    for opened in (open_pipeline, LabelConditionedPipeline.from_pretrained):
        with pytest.raises(InputError) as error:
            opened(folder)
        assert str(folder) in str(error.value) and '\n' not in str(error.value)
    code, _, err = protloc('generate', folder, tmp_path / 'drawn', '--like', made / 'store', '--set', 'images=2')
    assert code == 2 and one_sentence(err) and not (tmp_path / 'drawn').exists(), err


AUTO = {
    'AutoModel': f'{EVIL}.Evil',
    'UNet2DModel': f'{EVIL}.Evil',
    'AutoConfig': 'evil.Evil',
    'LabelConditionedPipeline': 'pipeline.Evil',
}


def test_code_that_only_lies_there_is_not_run(folder, marker):
    whole = draw_first(open_pipeline(folder))
    put_code(folder)
    change(folder / 'model_index.json', auto_map=AUTO, custom_pipeline='pipeline', trust_remote_code=True)
    for file in ('unet/config.json', 'label_encoder/config.json', 'scheduler/scheduler_config.json'):
        change(folder / file, auto_map=AUTO, _class_name='Evil', _module=EVIL, trust_remote_code=True)
    for opened in (open_pipeline, LabelConditionedPipeline.from_pretrained, DiffusionPipeline.from_pretrained):
        assert torch.equal(draw_first(opened(folder)), whole)


def draw_first(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe('Cytosol', num_inference_steps=2, generator=torch.Generator().manual_seed(0))


WEIGHTS = [
    'diffusion_pytorch_model.bin',
    'diffusion_pytorch_model.ckpt',
    'diffusion_pytorch_model.fp16.bin',
    'pytorch_model.bin',
    'model.ckpt',
]


@pytest.mark.parametrize('place', ['unet', 'label_encoder'])
def test_pickled_weights_of_a_generator(place, folder, made, marker, tmp_path, protloc):
    whole = draw_first(open_pipeline(folder))
    for name in WEIGHTS:
        torch.save(trap(marker), folder / place / name)
        torch.save(trap(marker), folder / name)
    for opened in (open_pipeline, DiffusionPipeline.from_pretrained):
        assert torch.equal(draw_first(opened(folder)), whole)  # the safetensors beside them are taken
    safe = folder / place / 'diffusion_pytorch_model.safetensors'
    shutil.copyfile(folder / place / WEIGHTS[0], safe)
    sentences = ['is damaged or cut off', 'pickled weights, which are not opened']
    for sentence in sentences:
        for opened in (open_pipeline, LabelConditionedPipeline.from_pretrained):
            with pytest.raises(InputError, match=sentence):
                opened(folder)
        code, _, err = protloc('generate', folder, tmp_path / 'drawn', '--like', made / 'store')
        assert code == 2 and sentence in err and one_sentence(err) and not (tmp_path / 'drawn').exists()
        safe.unlink(missing_ok=True)


def test_pickled_weights_of_a_classifier(made, marker, tmp_path, protloc):
    folder = shutil.copytree(made / 'classifier', tmp_path / 'classifier')
    torch.save(trap(marker), folder / 'classifier.safetensors')
    for name in ('classifier.bin', 'classifier.pt', 'pytorch_model.bin', 'classifier.pkl'):
        torch.save(trap(marker), folder / name)
    with pytest.raises(InputError, match=r'classifier\.safetensors'):
        load_classifier(folder)
    code, _, err = protloc('predict', folder, made / 'store', tmp_path / 'out.csv')
    assert code == 2 and one_sentence(err) and 'classifier.safetensors' in err and not (tmp_path / 'out.csv').exists()


@pytest.mark.parametrize('name', ['w.pth', 'w.pt', 'w.bin', 'w.ckpt', 'w.safetensors', 'w.pkl', 'w'])
@pytest.mark.parametrize('legacy', [False, True])
def test_pickled_weights_to_begin_with(name, legacy, made, marker, tmp_path, protloc):
    file = tmp_path / name
    torch.save({'conv1.weight': trap(marker)}, file, _use_new_zipfile_serialization=not legacy)
    out = tmp_path / 'out'
    settings = ['--set', 'backbone=resnet10', '--set', f'weights={file}', '--set', 'loop.steps=2']
    code, _, err = protloc('train-classifier', made / 'store', out, *settings)
    assert code == 2 and one_sentence(err) and str(file) in err, err


def test_pickled_checkpoints(made, marker, tmp_path, protloc):
    "Whole by its own hashes, so that only the unpickling is left to refuse it"
    from protloc.core import sha256

    words = ['--set', 'backbone=resnet10', '--set', 'loop={steps: 4, batch_size: 8, checkpoint_seconds: 0}']
    code, _, err = protloc('train-classifier', made / 'store', tmp_path / 'out', *words)
    assert code == 0, err
    checkpoints = list((tmp_path / 'out').rglob('state.pt'))
    print(checkpoints, list((tmp_path / 'out').rglob('*')), sha256)
