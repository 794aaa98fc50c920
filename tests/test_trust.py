"Files of others are data: what they hold is never run, imported or unpickled, and their names stay text"

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
from bs4 import BeautifulSoup
from diffusers import DiffusionPipeline
from markdown_it import MarkdownIt

from protloc.classify.predict import load_classifier
from protloc.classify.train import ClassifierConfig, train_classifier
from protloc.core import InputError, sha256
from protloc.data.simulate.datasets import simulate_store
from protloc.data.store import ImageStore
from protloc.diffusion.denoiser import UNetConfig
from protloc.diffusion.generate import _read_block
from protloc.diffusion.pipeline import LabelConditionedPipeline, known_schedulers
from protloc.diffusion.train import GeneratorConfig, model_card, open_pipeline, train_generator
from protloc.files import parse_yaml, read_array
from protloc.labels import Vocabulary
from protloc.training import LoopConfig, Run, load_checkpoint, save_checkpoint

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
    code += 'class Evil:\n    def __init__(self, *a, **k): pass\n'
    code += '    from_pretrained = classmethod(lambda *a, **k: Evil())\n'
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


@pytest.mark.parametrize('name', ['classes', 'channels', 'conditions'])
def test_a_list_of_names_is_no_component(name, folder, marker):
    put_code(folder)
    both = dict(condition='line') if name == 'conditions' else {}
    change(folder / 'model_index.json', **{name: [EVIL, 'Evil']}, **both)
    try:
        assert list(open_pipeline(folder).config[name]) == [EVIL, 'Evil']
    except InputError as error:
        assert name == 'channels' and str(folder) in str(error)


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
        change(folder / file, auto_map=AUTO, _module=EVIL, trust_remote_code=True)
    for opened in (open_pipeline, LabelConditionedPipeline.from_pretrained, DiffusionPipeline.from_pretrained):
        assert torch.equal(draw_first(opened(folder)), whole)
    for file in ('unet/config.json', 'label_encoder/config.json', 'scheduler/scheduler_config.json'):
        change(folder / file, _class_name='Evil')
    assert torch.equal(draw_first(DiffusionPipeline.from_pretrained(folder)), whole)
    with pytest.raises(InputError, match="has settings of 'Evil', not of UNet2DModel"):
        open_pipeline(folder)


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
    code, _, err = protloc('evaluate', folder, made / 'store')
    assert code == 2 and one_sentence(err) and 'classifier.safetensors' in err


@pytest.mark.parametrize('name', ['w.pth', 'w.pt', 'w.bin', 'w.ckpt', 'w.safetensors', 'w.pkl', 'w'])
@pytest.mark.parametrize('legacy', [False, True])
def test_pickled_weights_to_begin_with(name, legacy, made, marker, tmp_path, protloc):
    file = tmp_path / name
    torch.save({'conv1.weight': trap(marker)}, file, _use_new_zipfile_serialization=not legacy)
    out = tmp_path / 'out'
    settings = ['--set', 'backbone=resnet10', '--set', f'weights={file}', '--set', 'loop.steps=2']
    code, _, err = protloc('train-classifier', made / 'store', out, *settings)
    assert code == 2 and one_sentence(err) and str(file) in err, err


def test_pickled_checkpoints(marker, tmp_path):
    "Whole by its own hashes, so that only the unpickling is left to refuse it"
    model = torch.nn.Linear(2, 2)
    run = Run(model, torch.optim.SGD(model.parameters()), None, tmp_path / 'run')
    save_checkpoint(run)
    assert load_checkpoint(run)
    (state,) = (tmp_path / 'run').rglob('state.pt')
    torch.save(trap(marker), state)
    change(state.parent / 'sha256.json', **{'state.pt': sha256(state)})
    with pytest.raises(InputError, match='does not fit this training'):
        load_checkpoint(run)


def test_pickled_arrays(made, marker, tmp_path, protloc):
    file, block = tmp_path / 'a.npy', tmp_path / 'b.npz'
    np.save(file, np.array([trap(marker)] * 32, object), allow_pickle=True)
    np.savez(block, images=np.array([trap(marker)], object), fidelity=np.zeros(1), reason=np.zeros(1))
    with pytest.raises(InputError, match='is no array'):
        read_array(file)
    with pytest.raises(InputError, match='was damaged and has been removed'):
        _read_block(block)
    for name in ('images.npy', 'checksums.npy'):
        store = shutil.copytree(made / 'store', tmp_path / name)
        shutil.copyfile(file, store / name)
        manifest = json.loads((store / 'manifest.json').read_text())
        hashes = {**manifest['sha256'], name.split('.')[0]: sha256(file)}
        change(store / 'manifest.json', sha256=hashes)
        with pytest.raises(InputError, match=name):
            ImageStore(store).images[0]
        code, _, err = protloc('info', store, '--verify')
        assert code == 2 and one_sentence(err) and name in err


def test_yaml_makes_no_objects(marker, tmp_path, protloc):
    mine = tmp_path / 'mine.yaml'
    for tag in ('object/apply:os.system', 'object/new:os.system', 'name:os.system', f'module:{EVIL}'):
        text = f'about: x.\ndata: !!python/{tag} ["touch {marker}"]\n'
        with pytest.raises(InputError, match='is not valid YAML'):
            parse_yaml(text, 'x')
        mine.write_text(text)
        code, _, err = protloc('run', mine, '--out', tmp_path / 'out')
        assert code == 2 and one_sentence(err) and 'is not valid YAML' in err and not (tmp_path / 'out').exists(), err


WORDS = ['<script>alert(1)</script>', 'a|b', '`x` ``y', '![x](javascript:1)', '---', '{braces} {0} {size}', '[a](b)']
WORDS += ['<img src=x onerror=alert(1)>', '**b** ~~s~~', '&lt;script&gt;', 'back\\slash\\|', '```', '# head', "it's"]


def test_names_stay_text_in_a_card():
    labels = np.eye(len(WORDS), dtype=np.float32)
    store = SimpleNamespace(
        labels=labels,
        rows=lambda split: np.arange(len(WORDS)),
        size=32,
        vocab=Vocabulary(WORDS),
        channels=WORDS,
        manifest=dict(sha256=dict(images='0' * 64)),
    )
    config = GeneratorConfig(condition='cell_line')
    log = [dict(step=2, loss=0.5)]
    card = model_card(torch.nn.Linear(2, 2), store, config, 0, log, WORDS, '![Images](samples.png)')
    text = card.split('---\n', 2)[2]
    page = BeautifulSoup(MarkdownIt('commonmark').enable(['table', 'strikethrough']).render(text), 'html.parser')
    assert not page.find_all(['script', 'a', 's', 'strong', 'hr'])
    assert [image['src'] for image in page.find_all('img')] == ['samples.png']
    rows = [[cell.get_text() for cell in row.find_all('td')] for row in page.find('table').find_all('tr')[1:]]
    assert rows == [[word, '1'] for word in WORDS]
    text = page.get_text()
    assert ', '.join(WORDS) in text and f'of each cell_line: {", ".join(WORDS)}' in text
    assert repr(WORDS[0]) in page.find_all('code', class_='language-python')[0].get_text()


@pytest.mark.slow
def test_a_report_imports_nothing_from_its_folder(finished, tmp_path, protloc):
    run, marker = shutil.copytree(finished, tmp_path / 'run'), tmp_path / 'it_ran'
    for name in ('numpy', 'pandas', 'seaborn', 'sitecustomize', 'protloc'):
        (run / f'{name}.py').write_text(f'open({str(marker)!r}, "w").write("ran")')
    assert protloc('report', run)[0] == 0 and not marker.exists()


@pytest.mark.parametrize('name', sorted(set(known_schedulers().values()) - {'SASolverScheduler', 'PNDMScheduler'}))
def test_a_generator_with_another_scheduler_is_opened_again(name, folder, tmp_path):
    "What diffusers notes of it, values that are not set among them, is no damage"
    pipe = open_pipeline(folder)
    pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config)
    pipe.save_pretrained(tmp_path / 'again')
    assert type(open_pipeline(tmp_path / 'again').scheduler).__name__ == name
