"Drawing: solvers, guidance, plans, seeds, processes that are killed, judges, edits"

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config

from protloc.core import InputError
from protloc.data.simulate.datasets import simulate_store
from protloc.data.store import ImageStore, TryAgain
from protloc.diffusion.denoiser import LabelEncoder, UNetConfig, build_denoiser, fold
from protloc.diffusion.edit import edit
from protloc.diffusion.filter import Judge, KnownImages, image_fidelity
from protloc.diffusion.generate import PLANS, GenerateConfig, draw_block, generate, match_plan, plan_labels
from protloc.diffusion.objective import ObjectiveConfig, make_scheduler, to_images, to_signal
from protloc.diffusion.pipeline import (
    SCHEDULERS,
    LabelConditionedPipeline,
    _start,
    generators_for,
    guided,
    with_scheduler,
)
from protloc.diffusion.train import open_pipeline
from protloc.labels import STAINS
from protloc.training import seeded

SCRIPT = Path(__file__).parent / 'scripts' / 'generate.py'
CLASSES = ['Nucleoli', 'Plasma membrane', 'Cytosol']
BLOCKS = GenerateConfig(num_inference_steps=2, batch_size=3, scheduler='ddpm')
PLAN = np.eye(3, dtype=np.float32)[np.arange(16) % 3]


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def untrained(signal='sqrt', **objective):
    with seeded(0, 'untrained'):
        denoiser = build_denoiser(4, 3, 32, UNetConfig(widths=(16, 32)))
    modules = denoiser.unet, denoiser.label_encoder, make_scheduler(ObjectiveConfig(**objective))
    return quiet(LabelConditionedPipeline(*modules, CLASSES, STAINS, 2, signal))


class Knows(ModelMixin, ConfigMixin):
    "A perfect denoiser of a single image"

    @register_to_config
    def __init__(self, in_channels: int = 4, sample_size: int = 8, target: str = 'sample', low: float = -1.0):
        super().__init__()
        ramp = torch.linspace(low, 1, sample_size).expand(in_channels, sample_size, -1)
        self.answer = torch.nn.Parameter(ramp.clone())
        self.alphas_cumprod = make_scheduler().alphas_cumprod
        self.target = target
        self.passes = []

    def forward(self, sample, timestep, class_labels=None):
        self.passes.append(len(sample))
        alpha_bar = self.alphas_cumprod[timestep.round().long()].view(-1, 1, 1, 1)
        clean = self.answer.expand(len(sample), -1, -1, -1)
        noise = (sample - alpha_bar.sqrt() * clean) / (1 - alpha_bar).sqrt()
        velocity = alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * clean
        answer = dict(sample=clean, epsilon=noise, v_prediction=velocity)[self.target]
        return type('Answer', (), dict(sample=answer))


def knowing(target='sample', scheduler='ddim', **signal):
    solver = with_scheduler(make_scheduler(ObjectiveConfig(prediction_type=target)), scheduler)
    low = 0.0 if signal.get('signal') == 'unit' else -1.0
    unet = Knows(target=target, low=low)
    return quiet(LabelConditionedPipeline(unet, LabelEncoder(3, 16), solver, CLASSES, STAINS, **signal))


@pytest.fixture(scope='module')
def real(tmp_path_factory):
    return simulate_store(tmp_path_factory.mktemp('real') / 'cells', dict(train=24, val=8, test=8), classes=CLASSES)


@pytest.mark.parametrize('target', ['sample', 'epsilon', 'v_prediction'])
@pytest.mark.parametrize('scheduler', SCHEDULERS)
def test_every_solver_arrives(scheduler, target):
    "Noise schedule and target are carried over: a perfect denoiser leads any solver to its image"
    pipe = knowing(target, scheduler)
    drawn = pipe('Cytosol', generator=generators_for(0, [0]), num_inference_steps=28, output_type='signal')
    assert (drawn[0] - pipe.unet.answer).abs().max() < 0.1


def test_unknown_scheduler_is_one_sentence():
    with pytest.raises(InputError, match="there is no scheduler 'eular': did you mean 'euler'"):
        with_scheduler(make_scheduler(), 'eular')
    with pytest.raises(InputError, match="cannot draw from a model that predicts 'sample'"):
        with_scheduler(make_scheduler(), 'KDPM2DiscreteScheduler')
    with pytest.raises(InputError, match="there is no scheduler 'EDMEulerScheduler'"):
        with_scheduler(make_scheduler(), 'EDMEulerScheduler')


@pytest.mark.parametrize('kind', ['sqrt', 'symmetric', 'unit'])
def test_signal_kind_decides_the_images_and_is_saved(kind, tmp_path):
    pipe = knowing(signal=kind)
    expected = to_images(pipe.unet.answer[None].detach(), kind)
    assert (pipe('Cytosol', num_inference_steps=20).int() - expected.int()).abs().max() <= 1
    signal = pipe('Cytosol', num_inference_steps=20, output_type='signal')
    low, high = to_signal(torch.tensor([0, 255], dtype=torch.uint8), kind)
    assert signal.min() >= low and signal.max() <= high
    untrained().save_pretrained(tmp_path / 'sqrt')
    assert open_pipeline(tmp_path / 'sqrt').config.signal == 'sqrt'
    untrained(signal=kind).save_pretrained(tmp_path / 'kind')
    assert open_pipeline(tmp_path / 'kind').config.signal == kind


def test_passes_of_the_denoiser():
    "One pass without guidance, a double one with it, and only inside the interval"
    pipe = knowing()

    def passes(**options):
        pipe.unet.passes.clear()
        pipe(['Cytosol', 'Nucleoli'], num_inference_steps=10, **options)
        return pipe.unet.passes.copy()

    assert passes(guidance_scale=1) == [2] * 10
    assert passes(guidance_scale=2) == [4] * 10
    assert passes(guidance_scale=2, guidance_interval=(0.35, 0.75)) == [2, 2, 4, 4, 4, 4, 2, 2, 2, 2]


def test_rescaled_guidance_is_the_papers():
    def denoiser(noisy, timesteps, labels, drop):
        return noisy * torch.where(drop, 1.0, 2.0).view(-1, 1, 1, 1) + 0.5

    def spread(images):
        return images.flatten(1).std(1).view(-1, 1, 1, 1)

    noisy = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    labels, timestep = torch.ones(3, 2), torch.tensor(0)
    scale, share = 4.0, 0.7
    with_labels, without = 2 * noisy + 0.5, noisy + 0.5
    plain = without + scale * (with_labels - without)
    rescaled = plain * spread(with_labels) / spread(plain)
    assert torch.allclose(guided(denoiser, noisy, timestep, labels, scale), plain)
    mixed = guided(denoiser, noisy, timestep, labels, scale, share)
    assert torch.allclose(mixed, share * rescaled + (1 - share) * plain, atol=1e-5)


def test_negative_labels_lead_away():
    pipe = untrained()

    def draw(guidance_scale=8.0, **options):
        return pipe(
            ['Nucleoli', 'Cytosol'],
            guidance_scale,
            generator=generators_for(0, [0, 1]),
            num_inference_steps=2,
            output_type='signal',
            **options,
        )

    one = draw(negative_labels='Plasma membrane')
    row = draw(negative_labels=np.array([[0, 1, 0]]))
    each = draw(negative_labels=[1, 1])
    assert torch.equal(one, row) and torch.equal(one, each) and not torch.equal(one, draw())
    same = draw(negative_labels=['Nucleoli', 'Cytosol'])
    assert torch.allclose(same, draw(guidance_scale=1), atol=1e-4)


@pytest.mark.parametrize('scheduler', ['dpm++', 'ddpm', 'euler'])
def test_half_precision_is_close(scheduler):
    pipe = untrained()
    pipe.scheduler = with_scheduler(pipe.scheduler, scheduler)

    def draw():
        return pipe(
            CLASSES,
            generator=generators_for(0, range(3)),
            num_inference_steps=5,
            output_type='signal',
            negative_labels=[['Nucleoli', 'Cytosol']],
        )

    full = draw()
    pipe.to(torch.bfloat16)
    half = draw()
    assert half.dtype == torch.float32 and 0 < (full - half).abs().mean() < 0.02


@pytest.mark.parametrize(
    'labels, options, message',
    [
        ('Golgi', {}, "there is no class 'Golgi'"),
        ([3], {}, 'there is no class number 3'),
        (np.ones((1, 4)), {}, 'labels have 4 columns, the vocabulary has 3'),
        ('Cytosol', dict(guidance_scale=-1), 'guidance_scale must not be negative'),
        ('Cytosol', dict(guidance_rescale=2), 'guidance_rescale must lie between 0 and 1'),
        ('Cytosol', dict(guidance_interval=(0.6, 0.2)), 'guidance_interval must be two shares'),
        ('Cytosol', dict(negative_labels='Golgi'), "there is no class 'Golgi'"),
        ('Cytosol', dict(negative_labels=[0, 1]), '2 rows of negative_labels for 1 images'),
        ('Cytosol', dict(num_inference_steps=0), 'num_inference_steps must be at least 1'),
        (
            'Cytosol',
            dict(images=torch.zeros(1, 5, 32, 32, dtype=torch.uint8)),
            'images are torch.uint8 (1, 5, 32, 32), this generator needs uint8 (N, 4, 32, 32): red',
        ),
        ('Cytosol', dict(images=torch.zeros(2, 4, 32, 32, dtype=torch.uint8)), '2 images for 1 rows'),
        ('Cytosol', dict(strength=0), 'strength must be above 0'),
    ],
)
def test_bad_calls_are_one_sentence(labels, options, message):
    with pytest.raises(InputError) as error:
        untrained()(labels, **options)
    assert message in str(error.value) and '\n' not in str(error.value)


def test_more_channels_than_the_model():
    denoiser = build_denoiser(4, 3, 32, UNetConfig(widths=(16, 32)))
    modules = denoiser.unet, denoiser.label_encoder, make_scheduler()
    message = '5 channels in patches of 2 need a U-Net with 20 input channels, this one has 16'
    with pytest.raises(InputError, match=message):
        LabelConditionedPipeline(*modules, CLASSES, [*STAINS, 'gray'], 2)


@pytest.mark.parametrize(
    'scheduler', ['dpm++', 'ddpm', 'EulerAncestralDiscreteScheduler', 'KDPM2AncestralDiscreteScheduler']
)
def test_an_image_does_not_depend_on_its_company(scheduler):
    "Solvers that add noise at each step draw it from the image's own generator too"
    pipe = untrained(prediction_type='v_prediction', beta_schedule='linear')
    pipe.scheduler = with_scheduler(pipe.scheduler, scheduler)

    def draw(numbers):
        labels = [CLASSES[i % 3] for i in numbers]
        return pipe(labels, generator=generators_for(5, numbers), num_inference_steps=4).int()

    together = draw(range(6))
    apart = torch.cat([draw(range(4)), draw([4]), draw([5])])
    assert torch.equal(together, draw(range(6)))
    assert ((together - apart).abs() > 1).float().mean() < 0.001
    assert (together[0] - together[3]).abs().float().mean() > 5


def test_values_that_are_no_numbers_are_not_stored_as_black():
    pipe = untrained(prediction_type='v_prediction')
    pipe.scheduler = with_scheduler(pipe.scheduler, 'EulerAncestralDiscreteScheduler')
    message = 'EulerAncestralDiscreteScheduler with 4 steps ended in values that are not numbers'
    with pytest.raises(InputError, match=message):
        pipe('Cytosol', num_inference_steps=4)


@pytest.fixture(scope='module')
def labels():
    "300 rows of six classes, the last of which never occurs"
    return (np.random.default_rng(0).random((300, 6)) < [0.7, 0.4, 0.2, 0.1, 0.03, 0]).astype(np.float32)


def sets(rows):
    return {row.tobytes() for row in rows}


@pytest.mark.parametrize('name', PLANS)
def test_every_plan(name, labels):
    plan = plan_labels(name, labels, None, 120, 7)
    assert np.array_equal(plan, plan_labels(name, labels, None, 120, 7))
    assert np.array_equal(plan, plan_labels(name, labels, None, 120, 8)) == (name == 'single')
    assert plan[:, 5].sum() == 0 and plan.dtype == np.float32
    if name not in ('novel', 'single'):
        assert sets(plan) <= sets(labels)


def test_plans(labels):
    real = labels.sum(0)
    assert np.array_equal(match_plan(labels, 300).sum(0), real)
    assert plan_labels('single', labels, None, 120).sum(0).tolist() == [24] * 5 + [0]
    balanced = plan_labels('balance', labels, None, 120)
    assert len(balanced) == 120 and np.ptp(balanced.sum(0)[:5]) <= 0.1 * balanced.sum(0).max()
    filled = plan_labels('fill_tail', labels, None, 100)
    assert (real + filled.sum(0))[:5].min() >= 100 and (real + filled[1:].sum(0))[:5].min() <= 100
    assert filled[:, 0].sum() < 0.1 * len(filled)
    novel = plan_labels('novel', labels, None, 120)
    assert not sets(novel) & sets(labels) and set(novel.sum(1)) <= set(labels.sum(1))
    with pytest.raises(ValueError, match="did you mean 'balance'"):
        GenerateConfig(plan='balanse')


def test_plan_from_a_file(tmp_path):
    vocab, file = untrained().vocab, tmp_path / 'plan.csv'
    file.write_text('Target,n\n0 2,2\n,1\n1,0\n')
    assert plan_labels(file, None, vocab, 0).tolist() == [[1, 0, 1], [1, 0, 1], [0, 0, 0]]
    for text, message in (
        ('Id\n1\n', 'needs a column Target'),
        ('Target\n7\n', 'line 2: there is no class number 7'),
        ('classes\nCytosol; Golgi\n', "line 2: there is no class 'Golgi'"),
        ('Target,n\n0,two\n', "n is 'two', not a whole number"),
        ('Target,n\n0,0\n', 'plans no image'),
    ):
        file.write_text(text)
        with pytest.raises(InputError, match=message):
            plan_labels(file, None, vocab, 0)


@pytest.fixture(scope='module')
def drawn(tmp_path_factory):
    "An uninterrupted store, its folder, and a way to draw it in other processes"
    folder = tmp_path_factory.mktemp('drawn')
    untrained().save_pretrained(folder)
    np.save(folder / 'plan.npy', PLAN)

    def others(out, processes=1, killed_at=0, rank=0):
        start = [sys.executable]
        if processes > 1:
            start = [Path(sys.executable).parent / 'torchrun', '--nproc_per_node', str(processes)]
        command = [*start, SCRIPT, folder, out, str(killed_at), str(rank)]
        env = {**os.environ, 'OMP_NUM_THREADS': str(torch.get_num_threads())}
        return subprocess.run(command, capture_output=True, text=True, env=env)

    return generate(quiet(open_pipeline(folder)), folder / 'whole', PLAN, BLOCKS, seed=3), folder, others


def same(one, two):
    "Stores are equal to the last byte, except for the command that made them"
    manifests = [json.loads((path / 'manifest.json').read_text()) for path in (one, two)]
    for manifest in manifests:
        manifest['made'].pop('command')
    assert manifests[0] == manifests[1] and sorted(os.listdir(one)) == sorted(os.listdir(two))
    for name in ('images.npy', 'table.csv'):
        assert (one / name).read_bytes() == (two / name).read_bytes(), name


@pytest.mark.slow
def test_killed_and_continued(drawn, tmp_path):
    "Killed in the fourth of six blocks; a block that was committed but not removed does no harm"
    whole, folder, others = drawn
    assert others(tmp_path / 'cut', killed_at=8).returncode == -signal.SIGKILL
    partial = tmp_path / '.cut.protloc-partial'
    assert len((partial / 'log.jsonl').read_text().splitlines()) == 3 and not (tmp_path / 'cut').exists()
    (partial / 'blocks' / '00000001.npz').write_bytes(b'stale')
    pipe, passes = quiet(open_pipeline(folder)), []
    pipe.unet.register_forward_pre_hook(lambda m, args: passes.append(len(args[0])))
    generate(pipe, tmp_path / 'cut', PLAN, BLOCKS, seed=3)
    same(tmp_path / 'cut', whole.path)
    assert len(passes) == 2 * 3 and not partial.exists()


@pytest.mark.slow
def test_two_processes_draw_one_store(drawn, tmp_path):
    whole, folder, others = drawn
    done = others(tmp_path / 'two', processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    same(tmp_path / 'two', whole.path)
    assert [(folder / f'passes-{r}').read_text() for r in (0, 1)] == ['6', '6']


@pytest.mark.slow
def test_one_of_two_processes_is_killed(drawn, tmp_path):
    whole, folder, others = drawn
    assert others(tmp_path / 'cut', processes=2, killed_at=4, rank=1).returncode != 0
    assert (tmp_path / '.cut.protloc-partial').exists() and not (tmp_path / 'cut').exists()
    generate(quiet(open_pipeline(folder)), tmp_path / 'cut', PLAN, BLOCKS, seed=3)
    same(tmp_path / 'cut', whole.path)


def interrupted(pipe, after, error=KeyboardInterrupt):
    "Stop a pipeline after some passes of its denoiser, as Ctrl-C does"
    passes = []

    def stop(module, args):
        passes.append(1)
        if len(passes) == after:
            raise error

    return pipe.unet.register_forward_pre_hook(stop)


def test_other_settings_are_refused(drawn, tmp_path):
    whole, folder, _ = drawn
    pipe = quiet(open_pipeline(folder))
    hook = interrupted(pipe, 5)
    with pytest.raises(KeyboardInterrupt):
        generate(pipe, tmp_path / 'a', PLAN, BLOCKS, seed=4)
    hook.remove()
    partial = tmp_path / '.a.protloc-partial'
    half_written = {p: p.read_bytes() for p in partial.rglob('*') if p.is_file()}
    with pytest.raises(InputError, match=r'seed is 4 there and 3 now.* remove .*\.a\.protloc-partial'):
        generate(pipe, tmp_path / 'a', PLAN, BLOCKS, seed=3)
    assert half_written == {p: p.read_bytes() for p in partial.rglob('*') if p.is_file()}
    shutil.rmtree(partial)
    generate(pipe, tmp_path / 'a', PLAN, BLOCKS, seed=3)
    same(tmp_path / 'a', whole.path)
    with pytest.raises(InputError, match='exists already'):
        generate(pipe, tmp_path / 'a', PLAN, BLOCKS, seed=3)


def test_batch_size_changes_next_to_nothing(drawn, tmp_path):
    whole, folder, _ = drawn
    larger = BLOCKS.model_copy(update=dict(batch_size=7))
    other = generate(quiet(open_pipeline(folder)), tmp_path / 'b', PLAN, larger, seed=3)
    assert (np.abs(other.images.astype(int) - whole.images) > 1).mean() < 0.001


def test_fidelity():
    probabilities = np.array([[0.9, 0.2, 0.4], [0.1, 0.2, 0.3], [0.9, 0.8, 0.7]])
    labels = np.array([[1, 0, 0], [0, 0, 0], [1, 1, 1]])
    assert np.allclose(image_fidelity(probabilities, labels), [(0.9 + 0.7) / 2, 0.8, 0.8])


def brightness(images):
    return np.stack([images.mean((1, 2, 3)) / 255] * 3, 1)


def test_judge_drops_counts_and_keeps_the_best(drawn, tmp_path):
    whole, folder, _ = drawn
    pipe, labels = quiet(open_pipeline(folder)), np.ones_like(PLAN)
    plain = generate(pipe, tmp_path / 'plain', labels, BLOCKS, seed=3)
    bright = plain.images.mean((1, 2, 3)) / 255
    middle = float(np.median(bright))
    kept = generate(pipe, tmp_path / 'kept', labels, BLOCKS, 3, Judge(brightness, middle, name='brightness'))
    passed, made = bright >= middle, kept.manifest['made']
    assert np.array_equal(kept.images, plain.images[passed])
    assert list(kept.table.id) == list(plain.table.id[passed])
    assert np.allclose(kept.table.fidelity, bright[passed], atol=1e-4)
    assert made['dropped'] == {'low fidelity': 16 - len(kept)} and made['filter']['classifier'] == 'brightness'
    best = generate(pipe, tmp_path / 'best', labels, BLOCKS.model_copy(update=dict(best_of=3)), 3, Judge(brightness))
    gain = best.images.mean((1, 2, 3)) / 255 - bright
    assert gain.min() >= 0 and gain.max() > 0 and len(best) == 16
    with pytest.raises(InputError, match='best_of 2 needs'):
        generate(pipe, tmp_path / 'x', labels, GenerateConfig(best_of=2))
    with pytest.raises(InputError, match='needs a classifier'):
        Judge(min_fidelity=0.1)


def test_copies_are_found_turned_or_not(real):
    rows = real.rows('train')
    known, images = KnownImages(real, rows), real.images[rows]
    for copies in (images, np.rot90(images, 1, (2, 3)), images[..., ::-1], images // 2):
        assert (known.similarity(copies) > 0.98).all()
    assert (known.similarity(real.images[real.rows('test')]) < 0.99).all()
    fidelity, reason = Judge(known=known)(images, None)
    assert np.isnan(fidelity).all() and set(reason) == {'copy'}


def test_edits_change_training_images_only(real, tmp_path):
    pipe, config = untrained(), GenerateConfig(images=30, strength=0.5, num_inference_steps=2, batch_size=8)
    whole = edit(pipe, tmp_path / 'whole', real, config, seed=1)
    base = real.table.set_index('id').loc[whole.table.edited]
    assert set(base.split) == {'train'}
    assert list(base.group) == list(whole.table.group) and list(base.target) == list(whole.table.target)
    assert set(whole.table.edited) == set(real.table.id[real.rows('train')]) and set(whole.table.split) == {'train'}
    hook = interrupted(pipe, 3)
    with pytest.raises(KeyboardInterrupt):
        edit(pipe, tmp_path / 'cut', real, config, seed=1)
    hook.remove()
    same(edit(pipe, tmp_path / 'cut', real, config, seed=1).path, whole.path)


class Unchanged(Knows):
    "A perfect denoiser of a single image that notes the timesteps"

    def forward(self, sample, timestep, class_labels=None):
        self.timesteps.append(timestep.max().item())
        return super().forward(sample, timestep)


@pytest.mark.parametrize('name', SCHEDULERS)
def test_strength_is_a_noise_level(name, real):
    "With a perfect denoiser of nothing but the noise that was added, an edit gives the image back"
    image = torch.tensor(real.images[:1])
    unet = Unchanged(sample_size=32)
    unet.answer.data, unet.timesteps = to_signal(image[0]), []
    solver = with_scheduler(make_scheduler(), name)
    pipe = quiet(LabelConditionedPipeline(unet, LabelEncoder(3, 16), solver, CLASSES, STAINS))
    edited = pipe('Cytosol', images=image, strength=0.3, guidance_scale=1, num_inference_steps=10)
    assert (edited.int() - image.int()).abs().max() <= 1
    assert max(unet.timesteps) == unet.timesteps[0] and 150 < unet.timesteps[0] < 350
    pipe('Cytosol', guidance_scale=1, num_inference_steps=10)
    assert max(unet.timesteps) > 800


def test_an_edit_starts_with_as_much_noise_as_its_timestep_has(real):
    pipe, image = untrained(), torch.tensor(real.images[:1])
    pipe.scheduler = with_scheduler(pipe.scheduler, 'ddim')
    start, timesteps = _start(pipe, 1, 10, generators_for(0, [0]), image, 0.4)
    alpha_bar = pipe.scheduler.alphas_cumprod[timesteps[0]]
    noise = torch.randn(start.shape, generator=generators_for(0, [0])[0])
    expected = alpha_bar.sqrt() * fold(to_signal(image), 2) + (1 - alpha_bar).sqrt() * noise
    assert len(timesteps) == 4 and torch.allclose(start, expected, atol=1e-5)


def test_a_dropped_candidate_never_wins(drawn):
    "The second of three candidates has the best fidelity, and is a copy"
    pipe, calls = quiet(open_pipeline(drawn[1])), []

    def judge(images, labels):
        fidelity, reason = [(0.2, ''), (0.9, 'copy'), (0.6, '')][len(calls)]
        calls.append(images)
        return np.full(len(images), fidelity), np.full(len(images), reason)

    block = draw_block(pipe, PLAN[:2], range(2), BLOCKS.model_copy(update=dict(best_of=3)), 3, judge)
    assert np.array_equal(block['images'], calls[2])
    assert block['fidelity'].tolist() == [0.6, 0.6] and set(block['reason']) == {''}


@pytest.mark.parametrize('error, kept', [(RuntimeError, True), (InputError, False), (TryAgain, True)])
def test_an_error_costs_no_finished_blocks_but_bad_input_leaves_nothing(drawn, tmp_path, error, kept):
    "A GPU that runs out of memory, another process that ends, or a damaged block must not cost the work of hours"
    whole, folder, _ = drawn
    pipe = quiet(open_pipeline(folder))
    hook = interrupted(pipe, 5, error)
    with pytest.raises(error):
        generate(pipe, tmp_path / 'e', PLAN, BLOCKS, seed=3)
    hook.remove()
    assert (tmp_path / '.e.protloc-partial').exists() == kept
    same(generate(pipe, tmp_path / 'e', PLAN, BLOCKS, seed=3).path, whole.path)


def test_command_line(protloc, real, drawn, tmp_path):
    from protloc.classify.backbone import Classifier
    from protloc.classify.predict import save_classifier

    _, folder, _ = drawn
    with seeded(0, 'classifier'):
        save_classifier(Classifier('resnet10', 4, 3), tmp_path / 'model', real)
    options = ['--like', real.path, '--images', 4, '--num-inference-steps', 2]

    def run(name, *words):
        code, _, err = protloc('generate', folder, tmp_path / name, *options, *words)
        assert code == 0, err
        return ImageStore(tmp_path / name)

    filters = ['--classifier', tmp_path / 'model', '--min-fidelity', 0.01, '--best-of', 2, '--drop-copies']
    guidance = ['--guidance-interval', 0.2, 0.8, '--negative', 'Cytosol']
    judged = run('judged', '--plan', 'balance', *filters, *guidance)
    made = judged.manifest['made']
    assert (made['plan'], made['best_of'], made['dropped']) == ('balance', 2, {})
    assert len(made['filter']['classifier']) == 16 and 'fidelity' in judged.table
    edited = run('edited', '--edit', 0.5, '--half')
    made = edited.manifest['made']
    assert (made['dtype'], made['strength']) == ('bfloat16', 0.5) and 'edited' in edited.table
    for words, message in (
        (['--min-fidelity', 0.5], 'needs a classifier'),
        (['--plan', 'equal'], "there is no plan 'equal'"),
        (['--edit', 0], "'--edit': Input should be greater than or equal to 0.001"),
        (['--best-of', 2], '--best-of needs a classifier'),
    ):
        code, _, err = protloc('generate', folder, tmp_path / 'bad', *options, *words)
        assert code == 2 and message in err and err.splitlines()[-1].startswith('protloc: '), err
