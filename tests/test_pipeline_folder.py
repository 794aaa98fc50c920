"A pipeline's folder as users of diffusers open, move and share it; and every scheduler that diffusers has"

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import safetensors
import torch
import yaml
from diffusers import ConfigMixin, DDIMScheduler, DDPMPipeline, DiffusionPipeline, ModelMixin, UNet2DModel
from diffusers.configuration_utils import register_to_config
from huggingface_hub import ModelCard, ModelCardData
from PIL import Image
from safetensors.torch import load_file, save_file

from protloc.core import InputError
from protloc.data.simulate.datasets import simulate_store
from protloc.data.store import ImageStore
from protloc.diffusion.denoiser import LabelEncoder, UNetConfig, build_denoiser
from protloc.diffusion.generate import GenerateConfig
from protloc.diffusion.objective import ObjectiveConfig, make_scheduler
from protloc.diffusion.pipeline import (
    LabelConditionedPipeline,
    _start,
    generators_for,
    known_schedulers,
    with_scheduler,
)
from protloc.diffusion.train import GeneratorConfig, open_pipeline, train_generator
from protloc.labels import STAINS
from protloc.training import LoopConfig, seeded

ROOT = Path(__file__).parents[1]
CLASSES = ['Nucleoli', 'Golgi apparatus', 'Cytosol']
TARGETS = ['sample', 'v_prediction', 'epsilon']
SOLVERS = sorted(set(known_schedulers().values()))
ADD_NOISE = {
    'DDPMParallelScheduler',
    'DDPMScheduler',
    'EulerAncestralDiscreteScheduler',
    'KDPM2AncestralDiscreteScheduler',
    'SASolverScheduler',
    'TCDScheduler',
}


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    "A folder with runs/demo/real and runs/demo/replicate-0/generator, the smallest that the demo's paths fit"
    folder = tmp_path_factory.mktemp('runs')
    demo = folder / 'runs' / 'demo'
    store = simulate_store(demo / 'real', dict(train=32, val=8, test=8), size=32, classes=CLASSES)
    loop = LoopConfig(steps=4, batch_size=8, ema_decay=0.9)
    train_generator(
        store, demo / 'replicate-0' / 'generator', GeneratorConfig(unet=UNetConfig(widths=(16, 32)), loop=loop), seed=1
    )
    return folder


@pytest.fixture
def folder(runs, tmp_path):
    "A copy of the trained pipeline's folder"
    return shutil.copytree(runs / 'runs' / 'demo' / 'replicate-0' / 'generator' / 'pipeline', tmp_path / 'pipeline')


def draw(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe(CLASSES, generator=generators_for(0, range(3)), num_inference_steps=3)


def clean_process(code, cwd, **env):
    "Run code in a Python of its own, without the network"
    env = {**os.environ, 'PYTHONPATH': str(ROOT), 'HF_HUB_OFFLINE': '1', **env}
    return subprocess.run([sys.executable, '-c', code], cwd=cwd, env=env, capture_output=True, text=True)


def code_of(text):
    return re.findall(r'```python\n(.*?)```', text, re.DOTALL)


@pytest.mark.slow
def test_the_code_of_the_readme_runs(runs):
    blocks = code_of((ROOT / 'README.md').read_text())
    assert len(blocks) == 2
    shapes = '\nassert images.shape == (2, 4, 32, 32) and images.dtype.is_floating_point is False and len(store) == 48'
    for code in (blocks[0] + shapes, blocks[1] + '\nassert images.shape == (1, 4, 32, 32)'):
        done = clean_process(code, runs)
        assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.slow
def test_the_code_of_the_card_runs(folder):
    (code,) = code_of((folder / 'README.md').read_text())
    done = clean_process(code + '\nassert images.shape == (1, 4, 32, 32)', folder)
    assert done.returncode == 0, done.stderr[-2000:]
    without = code.replace('import protloc.diffusion.pipeline', '')
    done = clean_process(without, folder)
    assert 'no attribute protloc.diffusion.pipeline.LabelConditionedPipeline' in done.stderr.splitlines()[-1]


def test_the_card(folder, runs, tmp_path):
    card = ModelCard((folder / 'README.md').read_text())
    head = yaml.safe_load(card.content.split('---\n')[1])
    assert ModelCardData(**head).to_dict() == head == card.data.to_dict() and head['license'] == 'other'
    assert 'pip install' in card.text and '## Licence' in card.text and '| step | 4 |' in card.text
    picture = re.search(r'!\[.*\]\((.*)\)', card.text)[1]
    with Image.open(folder / picture) as image:
        assert image.width > 300 and np.ptp(np.asarray(image.convert('L'))) > 100
    loop = LoopConfig(steps=4, batch_size=8, ema_decay=0.9)
    config = GeneratorConfig(unet=UNetConfig(widths=(16, 32)), loop=loop)
    pipe = train_generator(ImageStore(runs / 'runs' / 'demo' / 'real'), tmp_path / 'again', config, seed=1)
    assert (tmp_path / 'again' / 'pipeline' / picture).read_bytes() == (folder / picture).read_bytes()
    pipe.save_pretrained(tmp_path / 'saved')
    assert (tmp_path / 'saved' / picture).exists()


def test_diffusers_opens_the_same(folder):
    ours, plain = LabelConditionedPipeline.from_pretrained(folder), DiffusionPipeline.from_pretrained(folder)
    expected = draw(open_pipeline(folder))
    assert type(plain) is LabelConditionedPipeline and plain.config.classes == CLASSES
    assert torch.equal(draw(plain), expected) and torch.equal(draw(ours), expected)
    assert torch.equal(draw(DiffusionPipeline.from_pretrained(folder, device_map='cpu')), expected)
    with pytest.raises(NotImplementedError, match='Supported strategies are'):
        DiffusionPipeline.from_pretrained(folder, device_map='auto')


def test_parts_and_precision_can_be_given(folder):
    expected = draw(open_pipeline(folder))
    solver = DDIMScheduler.from_config(open_pipeline(folder).scheduler.config)
    unet = UNet2DModel.from_pretrained(folder / 'unet')
    encoder = LabelEncoder.from_pretrained(folder / 'label_encoder')
    for kind in (DiffusionPipeline, LabelConditionedPipeline):
        assert kind.from_pretrained(folder, scheduler=solver).scheduler is solver
        assert torch.equal(draw(kind.from_pretrained(folder, unet=unet, label_encoder=encoder)), expected)
        half = kind.from_pretrained(folder, torch_dtype=torch.bfloat16)
        assert half.unet.dtype == torch.bfloat16 == half.label_encoder.dtype
        assert 0 < (draw(half).float() - expected.float()).abs().mean() < 2
    shutil.rmtree(folder / 'unet')
    assert LabelConditionedPipeline.from_pretrained(folder, unet=unet).unet is unet


def test_a_folder_of_the_first_versions_opens(folder):
    expected = draw(open_pipeline(folder))
    index = json.loads((folder / 'model_index.json').read_text())
    index.update(_class_name='LabelConditionedPipeline', classes=CLASSES, channels=list(STAINS), conditions=[])
    del index['noise_schedule']
    (folder / 'model_index.json').write_text(json.dumps(index))
    for kind in (DiffusionPipeline, LabelConditionedPipeline):
        assert torch.equal(draw(kind.from_pretrained(folder)), expected)
    training = json.loads((folder / 'training.json').read_text())
    training['config']['objective']['num_train_timesteps'] = 300
    (folder / 'training.json').write_text(json.dumps(training))
    pipe = open_pipeline(folder)
    assert pipe.scheduler.config.num_train_timesteps == len(pipe.scheduler.alphas_cumprod) == 300
    assert draw(pipe).shape == expected.shape


@pytest.mark.parametrize('dtype', [torch.float32, torch.float16])
def test_variants(folder, tmp_path, dtype, protloc, runs):
    pipe = open_pipeline(folder).to(dtype)
    pipe.save_pretrained(tmp_path / 'half', variant='fp16')
    stored = load_file(tmp_path / 'half' / 'unet' / 'diffusion_pytorch_model.fp16.safetensors')
    assert {value.dtype for value in stored.values()} == {dtype}
    named = DiffusionPipeline.from_pretrained(tmp_path / 'half', variant='fp16')
    for opened in (named, open_pipeline(tmp_path / 'half'), open_pipeline(tmp_path / 'half', variant='fp16')):
        assert opened.unet.dtype == torch.float32
        for name, value in opened.unet.state_dict().items():
            assert torch.equal(value, stored[name].float())
    with pytest.raises(InputError, match="only the variant 'fp16': open it with variant='fp16'"):
        DiffusionPipeline.from_pretrained(tmp_path / 'half')
    with pytest.raises(InputError, match="no weights of the variant 'bf16', it has variants fp16"):
        open_pipeline(tmp_path / 'half', variant='bf16')
    options = ['--like', runs / 'runs' / 'demo' / 'real', '--images', 2, '--num-inference-steps', 2]
    code, _, err = protloc('generate', tmp_path / 'half', tmp_path / 'drawn', *options)
    assert code == 0, err
    made = json.loads((tmp_path / 'drawn' / 'manifest.json').read_text())['made']
    assert made['kind'] == 'synthetic' and made['dtype'] == 'float32'


def test_of_several_variants_one_must_be_chosen(folder, tmp_path):
    pipe = open_pipeline(folder)
    for variant in ('fp16', 'bf16'):
        pipe.save_pretrained(tmp_path / 'two', variant=variant)
    with pytest.raises(InputError, match='choose one of the variants bf16, fp16 with variant='):
        open_pipeline(tmp_path / 'two')
    assert torch.equal(draw(open_pipeline(tmp_path / 'two', variant='bf16')), draw(pipe))
    pipe.save_pretrained(tmp_path / 'two')
    assert torch.equal(draw(open_pipeline(tmp_path / 'two')), draw(pipe))
    pipe.save_pretrained(tmp_path / 'shards', max_shard_size='50KB', variant='fp16')
    shards = sorted((tmp_path / 'shards' / 'unet').glob('*-of-*'))
    assert len(shards) > 2 and torch.equal(draw(open_pipeline(tmp_path / 'shards')), draw(pipe))
    shards[1].unlink()
    with pytest.raises(InputError, match=f'has {len(shards) - 1} of {len(shards)} files of weights'):
        open_pipeline(tmp_path / 'shards')


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def drop_a_weight(path):
    weights = load_file(path)
    weights.pop('no_label')
    save_file(weights, path)


def other_settings(path):
    path.write_text(json.dumps({**json.loads(path.read_text()), 'block_out_channels': [32, 64]}))


WEIGHTS = 'diffusion_pytorch_model.safetensors'
BROKEN = {
    'no weights': (f'unet/{WEIGHTS}', Path.unlink, f'unet has no weights, {WEIGHTS} is missing'),
    'cut off': (f'unet/{WEIGHTS}', cut, 'is damaged or cut off'),
    'empty': (f'label_encoder/{WEIGHTS}', lambda path: path.write_bytes(b''), 'is damaged or cut off'),
    'a weight less': (f'label_encoder/{WEIGHTS}', drop_a_weight, 'lacks the weights no_label'),
    'other shapes': ('unet/config.json', other_settings, 'expected shape'),
    'no settings': ('unet/config.json', Path.unlink, 'unet/config.json is missing'),
    'no label encoder': ('label_encoder', shutil.rmtree, 'label_encoder/config.json is missing'),
    'no scheduler': ('scheduler', shutil.rmtree, 'scheduler_config.json is missing'),
    'not JSON': ('model_index.json', lambda path: path.write_text('{"a":'), 'model_index.json is not valid JSON'),
    'a list': ('model_index.json', lambda path: path.write_text('[]'), 'model_index.json holds []'),
    'no scheduler settings': ('scheduler/scheduler_config.json', lambda p: p.write_text(''), 'is not valid JSON'),
}


@pytest.mark.parametrize('case', BROKEN)
def test_a_damaged_folder_is_one_sentence(case, folder, tmp_path, protloc, runs):
    name, damage, message = BROKEN[case]
    damage(folder / name)
    for opened in (open_pipeline, LabelConditionedPipeline.from_pretrained):
        with pytest.raises(InputError) as error:
            opened(folder)
        assert message in str(error.value) and str(folder) in str(error.value) and '\n' not in str(error.value)
    code, _, err = protloc('generate', folder, tmp_path / 'drawn', '--like', runs / 'runs' / 'demo' / 'real')
    assert code == 2 and message in err and sorted(os.listdir(tmp_path)) == ['pipeline']


def test_other_folders_are_one_sentence(folder, tmp_path):
    unet = UNet2DModel.from_pretrained(folder / 'unet')
    DDPMPipeline(unet, make_scheduler()).save_pretrained(tmp_path / 'ddpm')
    with pytest.raises(InputError, match="a pipeline of the class 'DDPMPipeline', not a generator of protloc"):
        open_pipeline(tmp_path / 'ddpm')
    open_pipeline(folder).save_pretrained(tmp_path / 'pickled', safe_serialization=False)
    for opened in (open_pipeline, DiffusionPipeline.from_pretrained):
        with pytest.raises(InputError, match='pickled weights, which are not opened'):
            opened(tmp_path / 'pickled')
    with pytest.raises(InputError, match='there is no folder'):
        LabelConditionedPipeline.from_pretrained(tmp_path / 'nowhere')


def test_the_card_goes_to_the_hub(folder, tmp_path, monkeypatch):
    "The Hub is replaced by a list of what was uploaded"
    uploaded = []

    def upload_folder(folder_path, **options):
        files = {str(p.relative_to(folder_path)): p.read_bytes() for p in Path(folder_path).rglob('*') if p.is_file()}
        uploaded.append((options['repo_id'], files))
        return 'commit'

    monkeypatch.setattr('protloc.diffusion.pipeline.create_repo', lambda name, **_: SimpleNamespace(repo_id=name))
    monkeypatch.setattr('diffusers.utils.hub_utils.upload_folder', upload_folder)
    (folder / 'README.md').write_text('# A card with a remark')
    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.save_pretrained(tmp_path / 'new', push_to_hub=True, repo_id='me/new')
    pipe.save_pretrained(folder, push_to_hub=True, repo_id='me/same')
    assert pipe.push_to_hub('me/pushed', variant='fp16') == 'commit'
    assert [name for name, _ in uploaded] == ['me/new', 'me/same', 'me/pushed']
    for _, files in uploaded:
        assert files['README.md'] == b'# A card with a remark' and {'samples.png', 'training.json'} <= set(files)
    assert 'unet/diffusion_pytorch_model.fp16.safetensors' in uploaded[2][1]
    assert torch.equal(draw(open_pipeline(tmp_path / 'new')), draw(pipe))


def test_without_the_hub_the_folder_is_whole(folder, tmp_path, monkeypatch):
    def unreachable(*_, **__):
        raise ConnectionError('no route to the Hub')

    monkeypatch.setattr('protloc.diffusion.pipeline.create_repo', unreachable)
    pipe = open_pipeline(folder)
    with pytest.raises(InputError, match="nothing was pushed to 'me/new' on the Hub .ConnectionError: no route"):
        pipe.save_pretrained(tmp_path / 'new', push_to_hub=True, repo_id='me/new')
    assert torch.equal(draw(open_pipeline(tmp_path / 'new')), draw(pipe))
    assert (tmp_path / 'new' / 'README.md').read_bytes() == (folder / 'README.md').read_bytes()
    with pytest.raises(InputError, match='hf upload me/new FOLDER'):
        pipe.push_to_hub('me/new')


def test_from_the_hub(folder, monkeypatch):
    "diffusers reads the names of all files before it downloads any"
    names = [str(path.relative_to(folder)) for path in folder.rglob('*') if path.is_file()]
    info = SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in names], sha='0' * 40)
    utils, asked = 'diffusers.pipelines.pipeline_utils', []
    monkeypatch.setattr(f'{utils}.model_info', lambda name, **_: asked.append(name) or info)
    monkeypatch.setattr(f'{utils}.hf_hub_download', lambda name, file, **_: str(folder / file))
    monkeypatch.setattr(f'{utils}.snapshot_download', lambda *_, **__: str(folder))
    index = json.loads((folder / 'model_index.json').read_text())
    monkeypatch.setattr(DiffusionPipeline, 'load_config', classmethod(lambda *_, **__: dict(index)))
    for kind in (DiffusionPipeline, LabelConditionedPipeline):
        assert torch.equal(draw(kind.from_pretrained('me/generator')), draw(open_pipeline(folder)))
    assert asked == ['me/generator'] * 2


class Gaussian(ModelMixin, ConfigMixin):
    "A U-Net without error for images whose values are normally distributed around MEAN with the deviation SPREAD"

    MEAN, SPREAD = 0.2, 0.2

    @register_to_config
    def __init__(self, target: str = 'sample', beta_schedule: str = 'linear', in_channels=4, sample_size=32):
        super().__init__()
        objective = ObjectiveConfig(beta_schedule=beta_schedule)
        self.register_buffer('shares', make_scheduler(objective).alphas_cumprod.double().sqrt())
        self.scale = torch.nn.Parameter(torch.ones(()))

    def share(self, timestep):
        return float(np.interp(float(timestep), np.arange(len(self.shares)), self.shares.numpy()))

    def forward(self, sample, timestep, class_labels=None):
        share, noisy = self.share(timestep.flatten()[0]), sample.double()
        rest = 1 - share**2
        gain = share * self.SPREAD**2 / (share**2 * self.SPREAD**2 + rest)
        clean = self.MEAN + gain * (noisy - share * self.MEAN)
        noise = (noisy - share * clean) / rest**0.5
        answers = dict(sample=clean, epsilon=noise, v_prediction=share * noise - rest**0.5 * clean)
        return SimpleNamespace(sample=answers[self.config.target].float())


def exact(name, target, beta_schedule):
    trained = make_scheduler(ObjectiveConfig(prediction_type=target, beta_schedule=beta_schedule))
    unet = Gaussian(target, beta_schedule)
    pipe = LabelConditionedPipeline(
        unet, LabelEncoder(3, 8), with_scheduler(trained, name), CLASSES, STAINS, signal='symmetric'
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def ends_at(pipe, **options):
    "Where the flow from a start to the images leads: without noise, a straight line for normally distributed values"
    start, timesteps = _start(pipe, 1, 50, generators_for(0, [0]), **options)
    share = pipe.unet.share(timesteps[0])
    noisy = pipe.scheduler.scale_model_input(start, timesteps[0])
    scale = pipe.unet.SPREAD / (share**2 * pipe.unet.SPREAD**2 + 1 - share**2) ** 0.5
    return (pipe.unet.MEAN + scale * (noisy - share * pipe.unet.MEAN)).clamp(-1, 1)


@pytest.mark.parametrize('beta_schedule', ['linear', 'squaredcos_cap_v2'])
@pytest.mark.parametrize('target', TARGETS)
@pytest.mark.parametrize('name', SOLVERS)
def test_every_solver_draws_and_edits_rightly(name, target, beta_schedule):
    try:
        pipe = exact(name, target, beta_schedule)
    except InputError as error:
        assert target == 'sample' and "cannot draw from a model that predicts 'sample'" in str(error)
        assert name[:4] in ('Eule', 'KDPM', 'PNDM')
        return
    values = np.random.default_rng(0).normal(pipe.unet.MEAN, pipe.unet.SPREAD, (1, 4, 32, 32)).clip(-1, 1)
    images = torch.from_numpy(((values + 1) * 127.5).round().astype(np.uint8))
    for options in ({}, dict(images=images, strength=0.6), dict(images=images, strength=0.25)):
        drawn = pipe('Cytosol', 1, 50, generators_for(0, [0]), output_type='signal', **options)
        mean, spread = drawn.mean().item(), drawn.std().item()
        assert mean == pytest.approx(pipe.unet.MEAN, abs=0.015)
        assert spread == pytest.approx(pipe.unet.SPREAD, rel=0.27 if name in ADD_NOISE else 0.16)
        if name not in ADD_NOISE:
            error = (drawn - ends_at(pipe, **options)) / pipe.unet.SPREAD
            assert error.square().mean().sqrt() < 0.13 and error.abs().max() < 0.6


@pytest.mark.parametrize('target', ['sample', 'v_prediction'])
def test_with_a_zero_terminal_schedule(target):
    trained = make_scheduler(ObjectiveConfig(prediction_type=target, rescale_betas_zero_snr=True))
    able = set()
    for name in SOLVERS:
        try:
            able.add(type(with_scheduler(trained, name)).__name__)
        except InputError as error:
            assert 'zero-terminal' in str(error) or "that predicts 'sample'" in str(error)
    both = {'DDIMParallelScheduler', 'DDIMScheduler', 'DDPMParallelScheduler', 'DDPMScheduler', 'TCDScheduler'}
    both |= {'DPMSolverMultistepScheduler', 'EulerDiscreteScheduler', 'UniPCMultistepScheduler'}
    assert able == both | ({'EulerAncestralDiscreteScheduler'} if target == 'v_prediction' else set())


def test_all_of_diffusers_schedulers_are_known_or_refused():
    every = {name for name in dir(diffusers) if name.endswith('Scheduler')} - {'SchedulerMixin'}
    assert set(SOLVERS) <= every and len(every) > 40
    flows = set(known_schedulers(flow=True).values())
    for name in every - set(SOLVERS) - flows:
        with pytest.raises(InputError, match='choose another one, such as dpm++'.replace('+', r'\+')) as error:
            with_scheduler(make_scheduler(), name)
        assert f"there is no scheduler '{name}' for these generators, it " in str(error.value)
        with pytest.raises(ValueError, match='for these generators'):
            GenerateConfig(scheduler=name)


def test_a_solver_that_draws_wrongly_is_refused(monkeypatch):
    "A class that forgets the target, or another noise schedule, draws without complaint"

    class Forgetful(DDIMScheduler):
        def step(self, model_output, timestep, sample, **options):
            self.register_to_config(prediction_type='epsilon')
            return super().step(model_output, timestep, sample, **options)

    class Shifted(DDIMScheduler):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            self.alphas_cumprod = self.alphas_cumprod**2

    monkeypatch.setattr(diffusers, 'DDIMScheduler', Shifted)
    with pytest.raises(InputError, match='its noise schedule is not that of the training'):
        with_scheduler(make_scheduler(), 'ddim')
    monkeypatch.setattr(diffusers, 'DDIMScheduler', Forgetful)
    for target, message in (
        ('v_prediction', 'times as varied as they should be'),
        ('sample', 'away from the only image'),
    ):
        with pytest.raises(InputError, match=f"cannot draw from a model that predicts '{target}' .*{message}"):
            with_scheduler(make_scheduler(ObjectiveConfig(prediction_type=target)), 'ddim')
    assert isinstance(with_scheduler(make_scheduler(ObjectiveConfig(prediction_type='epsilon')), 'ddim'), Forgetful)


@pytest.mark.parametrize('name', SOLVERS)
def test_solvers_keep_the_noise_of_the_training(name):
    for options in (dict(num_train_timesteps=300), dict(beta_schedule='linear'), dict(beta_schedule='scaled_linear')):
        trained = make_scheduler(ObjectiveConfig(prediction_type='v_prediction', **options))
        solver = with_scheduler(trained, name)
        assert torch.equal(solver.alphas_cumprod, trained.alphas_cumprod)
        assert solver.config.num_train_timesteps == trained.config.num_train_timesteps


def test_numbers_of_steps():
    with seeded(0, 'example'):
        denoiser = build_denoiser(4, 3, 16, UNetConfig(widths=(16, 32)))
    trained = make_scheduler(ObjectiveConfig(prediction_type='v_prediction'))
    pipe = LabelConditionedPipeline(*denoiser.children(), trained, CLASSES, STAINS, 2)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = with_scheduler(trained, 'PNDMScheduler')
    images = torch.full((1, 4, 16, 16), 80, dtype=torch.uint8)
    for steps in (4, 5, 15):
        assert pipe('Cytosol', num_inference_steps=steps).shape == (1, 4, 16, 16)
    assert pipe('Cytosol', num_inference_steps=8, images=images, strength=0.5).shape == images.shape
    for options in (dict(num_inference_steps=3), dict(num_inference_steps=9, images=images, strength=0.3)):
        with pytest.raises(InputError, match='PNDMScheduler needs at least 4 solver steps, not 3: take more'):
            pipe('Cytosol', **options)
    for name, steps, message in (
        ('ddim', 1001, '1001 solver steps are more than the 1000 timesteps'),
        ('TCDScheduler', 60, 'TCDScheduler cannot take 60 solver steps'),
    ):
        pipe.scheduler = with_scheduler(trained, name)
        with pytest.raises(InputError, match=message):
            pipe('Cytosol', num_inference_steps=steps)
    pipe.scheduler = diffusers.LCMScheduler.from_config(trained.config)
    with pytest.raises(InputError, match='made for distilled models'):
        pipe('Cytosol')


def test_a_full_disk_while_the_pipeline_is_saved_is_one_sentence(protloc, tmp_path, monkeypatch):
    simulate_store(tmp_path / 'cells', dict(train=24, val=8, test=8), 32, ['Nucleoli', 'Cytosol'])
    words = ['train-generator', tmp_path / 'cells', tmp_path / 'g', '--set', 'unet.widths=[16, 32]']
    words += ['--set', 'loop={steps: 2, batch_size: 4}']

    def save(weights, filename, **options):
        raise safetensors.SafetensorError('Error while serializing: I/O error: No space left on device (os error 28)')

    with monkeypatch.context() as full:
        full.setattr('safetensors.torch.save_file', save)
        code, _, err = protloc(*words)
    sentence = err.strip().splitlines()[-1]
    assert code == 2 and sentence.startswith('protloc: ') and 'pipeline' in sentence, err
    assert 'No space left on device' in sentence and 'free some space' in sentence
    assert not [path.name for path in (tmp_path / 'g').rglob('.*protloc*')]
    code, _, err = protloc(*words)
    assert code == 0 and (tmp_path / 'g' / 'pipeline' / 'model_index.json').exists(), err
