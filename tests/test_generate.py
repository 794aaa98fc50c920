"Drawing: solvers, guidance, plans, seeds, processes that are killed, judges, edits"

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config

from protloc.core import InputError
from protloc.data.simulate import simulate_store
from protloc.data.store import ImageStore
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

CLASSES = ['Nucleoli', 'Plasma membrane', 'Cytosol']
BLOCKS = GenerateConfig(num_inference_steps=2, batch_size=3, scheduler='ddpm')
PLAN = np.eye(3, dtype=np.float32)[np.arange(16) % 3]


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def untrained(size=32, **objective):
    with seeded(0, 'untrained'):
        d = build_denoiser(4, 3, size, UNetConfig(widths=(16, 32)))
    return quiet(
        LabelConditionedPipeline(
            d.unet, d.label_encoder, make_scheduler(ObjectiveConfig(**objective)), CLASSES, STAINS, 2
        )
    )


class Knows(ModelMixin, ConfigMixin):
    "A perfect denoiser of a single image"

    @register_to_config
    def __init__(self, in_channels: int = 4, sample_size: int = 8, target: str = 'sample', low: float = -1.0):
        super().__init__()
        self.answer = torch.nn.Parameter(
            torch.linspace(low, 1, sample_size).expand(in_channels, sample_size, -1).clone()
        )
        self.alphas, self.target, self.passes = make_scheduler().alphas_cumprod, target, []

    def forward(self, sample, timestep, class_labels=None):
        self.passes.append(len(sample))
        share = self.alphas[timestep.round().long()].view(-1, 1, 1, 1)
        clean = self.answer.expand(len(sample), -1, -1, -1)
        noise = (sample - share.sqrt() * clean) / (1 - share).sqrt()
        found = dict(sample=clean, epsilon=noise, v_prediction=share.sqrt() * noise - (1 - share).sqrt() * clean)[
            self.target
        ]
        return type('Answer', (), dict(sample=found))


def knowing(target='sample', scheduler='ddim', **signal):
    solver = with_scheduler(make_scheduler(ObjectiveConfig(prediction_type=target)), scheduler)
    low = 0.0 if signal.get('signal') == 'unit' else -1.0
    return quiet(
        LabelConditionedPipeline(Knows(target=target, low=low), LabelEncoder(3, 16), solver, CLASSES, STAINS, **signal)
    )


@pytest.fixture(scope='module')
def real(tmp_path_factory):
    return simulate_store(tmp_path_factory.mktemp('real') / 'cells', dict(train=24, val=8, test=8), classes=CLASSES)


@pytest.mark.parametrize('target', ['sample', 'epsilon', 'v_prediction'])
@pytest.mark.parametrize('scheduler', SCHEDULERS)
def test_every_solver_arrives(scheduler, target):
    "Noise schedule and target are carried over: a perfect denoiser leads any solver to its image"
    pipe = knowing(target, scheduler)
    found = pipe('Cytosol', generator=generators_for(0, [0]), num_inference_steps=28, output_type='signal')
    assert (found[0] - pipe.unet.answer).abs().max() < 0.1


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
    real_one = untrained()
    LabelConditionedPipeline(
        real_one.unet, real_one.label_encoder, real_one.scheduler, CLASSES, STAINS, 2, kind
    ).save_pretrained(tmp_path / 'p')
    assert open_pipeline(tmp_path / 'p').config.signal == kind


def test_passes_of_the_denoiser():
    "One pass without guidance, a double one with it, and only inside the interval"
    pipe = knowing()

    def passes(**how):
        pipe.unet.passes.clear()
        pipe(['Cytosol', 'Nucleoli'], num_inference_steps=10, **how)
        return pipe.unet.passes.copy()

    assert passes(guidance_scale=1) == [2] * 10
    assert passes(guidance_scale=2) == [4] * 10
    assert passes(guidance_scale=2, guidance_interval=(0.35, 0.75)) == [2, 2, 4, 4, 4, 4, 2, 2, 2, 2]


def test_rescaled_guidance_is_the_papers():
    def denoiser(x, t, labels, drop):
        return x * torch.where(drop, 1.0, 2.0).view(-1, 1, 1, 1) + 0.5

    x = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    rows, t = torch.ones(3, 2), torch.tensor(0)
    w, phi, with_labels, without = 4.0, 0.7, 2 * x + 0.5, x + 0.5
    plain = without + w * (with_labels - without)
    rescaled = plain * with_labels.flatten(1).std(1).view(-1, 1, 1, 1) / plain.flatten(1).std(1).view(-1, 1, 1, 1)
    assert torch.allclose(guided(denoiser, x, t, rows, w), plain)
    assert torch.allclose(guided(denoiser, x, t, rows, w, phi), phi * rescaled + (1 - phi) * plain, atol=1e-5)


def test_negative_labels_lead_away():
    pipe = untrained()

    def draw(**how):
        return pipe(
            ['Nucleoli', 'Cytosol'],
            generator=generators_for(0, [0, 1]),
            num_inference_steps=2,
            guidance_scale=8.0,
            output_type='signal',
            **how,
        )

    one, row, each = (
        draw(negative_labels='Plasma membrane'),
        draw(negative_labels=np.array([[0, 1, 0]])),
        draw(negative_labels=[1, 1]),
    )
    assert torch.equal(one, row) and torch.equal(one, each) and not torch.equal(one, draw())
    same = draw(negative_labels=['Nucleoli', 'Cytosol'])
    unguided = pipe(
        ['Nucleoli', 'Cytosol'],
        generator=generators_for(0, [0, 1]),
        num_inference_steps=2,
        guidance_scale=1,
        output_type='signal',
    )
    assert torch.allclose(same, unguided, atol=1e-4)


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
    'labels, how, message',
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
def test_bad_calls_are_one_sentence(labels, how, message):
    with pytest.raises(InputError) as e:
        untrained()(labels, **how)
    assert message in str(e.value) and '\n' not in str(e.value)


def test_more_channels_than_the_model():
    d = build_denoiser(4, 3, 32, UNetConfig(widths=(16, 32)))
    with pytest.raises(
        InputError, match='5 channels in patches of 2 need a U-Net with 20 input channels, this one has 16'
    ):
        LabelConditionedPipeline(d.unet, d.label_encoder, make_scheduler(), CLASSES, [*STAINS, 'gray'], 2)


@pytest.mark.parametrize(
    'scheduler', ['dpm++', 'ddpm', 'EulerAncestralDiscreteScheduler', 'KDPM2AncestralDiscreteScheduler']
)
def test_an_image_does_not_depend_on_its_company(scheduler):
    "Solvers that draw fresh noise at each step draw it from the image's own generator too"
    pipe = untrained(prediction_type='v_prediction', beta_schedule='linear')
    pipe.scheduler = with_scheduler(pipe.scheduler, scheduler)

    def draw(some):
        return pipe([CLASSES[i % 3] for i in some], generator=generators_for(5, some), num_inference_steps=4).int()

    together, again, apart = draw(range(6)), draw(range(6)), torch.cat([draw(range(4)), draw([4]), draw([5])])
    assert torch.equal(together, again)
    assert ((together - apart).abs() > 1).float().mean() < 0.001
    assert (together[0] - together[3]).abs().float().mean() > 5


def test_values_that_are_no_numbers_are_not_stored_as_black():
    pipe = untrained(prediction_type='v_prediction')
    pipe.scheduler = with_scheduler(pipe.scheduler, 'EulerAncestralDiscreteScheduler')
    with pytest.raises(
        InputError, match='EulerAncestralDiscreteScheduler with 4 steps ended in values that are no numbers'
    ):
        pipe('Cytosol', num_inference_steps=4)


def test_plans():
    rng = np.random.default_rng(0)
    labels = (rng.random((300, 6)) < [0.7, 0.4, 0.2, 0.1, 0.03, 0]).astype(np.float32)
    sets, real = {r.tobytes() for r in labels}, labels.sum(0)
    for name in PLANS:
        plan = plan_labels(name, labels, None, 120, 7)
        assert np.array_equal(plan, plan_labels(name, labels, None, 120, 7)) and np.array_equal(
            plan, plan_labels(name, labels, None, 120, 8)
        ) == (name == 'single')
        assert plan[:, 5].sum() == 0 and plan.dtype == np.float32
        if name not in ('novel', 'single'):
            assert {r.tobytes() for r in plan} <= sets
    assert np.array_equal(match_plan(labels, 300).sum(0), real)
    assert plan_labels('single', labels, None, 120).sum(0).tolist() == [24] * 5 + [0]
    balanced = plan_labels('balance', labels, None, 120)
    assert len(balanced) == 120 and np.ptp(balanced.sum(0)[:5]) <= 0.1 * balanced.sum(0).max()
    filled = plan_labels('fill_tail', labels, None, 100)
    assert (real + filled.sum(0))[:5].min() >= 100 and (real + filled[1:].sum(0))[:5].min() <= 100
    assert filled[:, 0].sum() < 0.1 * len(filled)
    novel = plan_labels('novel', labels, None, 120)
    assert not {r.tobytes() for r in novel} & sets and set(novel.sum(1)) <= set(labels.sum(1))
    with pytest.raises(ValueError, match="did you mean 'balance'"):
        GenerateConfig(plan='balanse')


def test_plan_from_a_file(tmp_path):
    vocab, file = untrained().vocab, tmp_path / 'plan.csv'
    file.write_text('Target,n\n0 2,2\n,1\n1,0\n')
    assert plan_labels(file, None, vocab, 0).tolist() == [[1, 0, 1], [1, 0, 1], [0, 0, 0]]
    for text, message in (
        ('Id\n1\n', 'needs a column Target'),
        ('Target\n7\n', 'row 2: there is no class number 7'),
        ('classes\nCytosol; Golgi\n', "row 2: there is no class 'Golgi'"),
        ('Target,n\n0,two\n', "n is 'two', not a whole number"),
        ('Target,n\n0,0\n', 'plans no image'),
    ):
        file.write_text(text)
        with pytest.raises(InputError, match=message):
            plan_labels(file, None, vocab, 0)


PART = '''
import os, signal, sys
import numpy as np
from pathlib import Path
from protloc.diffusion.generate import GenerateConfig, generate
from protloc.diffusion.train import open_pipeline
folder, die = Path(sys.argv[1]), int(sys.argv[2])
pipe, passes, rank = open_pipeline(folder), [], os.environ.get('RANK', '0')
def count(module, args):
    passes.append(len(args[0]))
    if len(passes) == die and rank == sys.argv[3]: os.kill(os.getpid(), signal.SIGKILL)
pipe.unet.register_forward_pre_hook(count)
c = GenerateConfig(num_inference_steps=2, batch_size=3, scheduler='ddpm')
generate(pipe, sys.argv[4], np.load(folder/'plan.npy'), c, seed=3)
(folder/f'passes-{rank}').write_text(str(len(passes)))
'''


@pytest.fixture(scope='module')
def drawn(tmp_path_factory):
    "An uninterrupted store, its folder, and a way to draw it in other processes"
    folder = tmp_path_factory.mktemp('drawn')
    untrained().save_pretrained(folder)
    np.save(folder / 'plan.npy', PLAN)
    (folder / 'part.py').write_text(PART)

    def others(out, processes=1, die=0, rank=0):
        start = (
            [Path(sys.executable).parent / 'torchrun', '--nproc_per_node', str(processes)]
            if processes > 1
            else [sys.executable]
        )
        env = {**os.environ, 'OMP_NUM_THREADS': str(torch.get_num_threads())}
        return subprocess.run(
            [*start, folder / 'part.py', folder, str(die), str(rank), out], capture_output=True, text=True, env=env
        )

    return generate(quiet(open_pipeline(folder)), folder / 'whole', PLAN, BLOCKS, seed=3), folder, others


def same(a, b):
    "Stores are equal to the last byte, but for the command that made them"
    texts = [json.loads((p / 'manifest.json').read_text()) for p in (a, b)]
    for t in texts:
        t['made'].pop('command')
    assert texts[0] == texts[1] and sorted(os.listdir(a)) == sorted(os.listdir(b))
    for name in ('images.npy', 'table.csv'):
        assert (a / name).read_bytes() == (b / name).read_bytes(), name


def test_killed_and_continued(drawn, tmp_path):
    "Killed in the fourth of six blocks; a block that was committed but not swept is no trouble"
    whole, folder, others = drawn
    assert others(tmp_path / 'cut', die=8).returncode == -signal.SIGKILL
    partial = tmp_path / '.cut.partial'
    assert len((partial / 'log.jsonl').read_text().splitlines()) == 3 and not (tmp_path / 'cut').exists()
    (partial / 'blocks' / '00000001.npz').write_bytes(b'stale')
    pipe, passes = quiet(open_pipeline(folder)), []
    pipe.unet.register_forward_pre_hook(lambda m, args: passes.append(len(args[0])))
    generate(pipe, tmp_path / 'cut', PLAN, BLOCKS, seed=3)
    same(tmp_path / 'cut', whole.path)
    assert len(passes) == 2 * 3 and not partial.exists()


def test_two_processes_draw_one_store(drawn, tmp_path):
    whole, folder, others = drawn
    done = others(tmp_path / 'two', processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    same(tmp_path / 'two', whole.path)
    assert [(folder / f'passes-{r}').read_text() for r in (0, 1)] == ['6', '6']


def test_one_of_two_processes_is_killed(drawn, tmp_path):
    whole, folder, others = drawn
    assert others(tmp_path / 'cut', processes=2, die=4, rank=1).returncode != 0
    assert (tmp_path / '.cut.partial').exists() and not (tmp_path / 'cut').exists()
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
    partial = tmp_path / '.a.partial'
    half_written = {p: p.read_bytes() for p in partial.rglob('*') if p.is_file()}
    with pytest.raises(InputError, match=r'seed is 4 there and 3 now.* remove .*\.a\.partial'):
        generate(pipe, tmp_path / 'a', PLAN, BLOCKS, seed=3)
    assert half_written == {p: p.read_bytes() for p in partial.rglob('*') if p.is_file()}
    shutil.rmtree(partial)
    generate(pipe, tmp_path / 'a', PLAN, BLOCKS, seed=3)
    same(tmp_path / 'a', whole.path)
    with pytest.raises(InputError, match='exists already'):
        generate(pipe, tmp_path / 'a', PLAN, BLOCKS, seed=3)


def test_batch_size_changes_next_to_nothing(drawn, tmp_path):
    whole, folder, _ = drawn
    other = generate(
        quiet(open_pipeline(folder)), tmp_path / 'b', PLAN, BLOCKS.model_copy(update=dict(batch_size=7)), seed=3
    )
    assert (np.abs(other.images.astype(int) - whole.images) > 1).mean() < 0.001


def test_fidelity():
    p, labels = (
        np.array([[0.9, 0.2, 0.4], [0.1, 0.2, 0.3], [0.9, 0.8, 0.7]]),
        np.array([[1, 0, 0], [0, 0, 0], [1, 1, 1]]),
    )
    assert np.allclose(image_fidelity(p, labels), [(0.9 + 0.7) / 2, 0.8, 0.8])


def brightness(images):
    return np.stack([images.mean((1, 2, 3)) / 255] * 3, 1)


def test_judge_drops_counts_and_keeps_the_best(drawn, tmp_path):
    whole, folder, _ = drawn
    pipe, labels = quiet(open_pipeline(folder)), np.ones_like(PLAN)
    plain = generate(pipe, tmp_path / 'plain', labels, BLOCKS, seed=3)
    bright = plain.images.mean((1, 2, 3)) / 255
    middle = float(np.median(bright))
    kept = generate(pipe, tmp_path / 'kept', labels, BLOCKS, 3, Judge(brightness, middle, name='brightness'))
    assert np.array_equal(kept.images, plain.images[bright >= middle])
    assert list(kept.table.id) == list(plain.table.id[bright >= middle]) and np.allclose(
        kept.table.fidelity, bright[bright >= middle], atol=1e-4
    )
    assert (
        kept.manifest['made']['dropped'] == {'low fidelity': 16 - len(kept)}
        and kept.manifest['made']['filter']['classifier'] == 'brightness'
    )
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
    for change in (lambda x: x, lambda x: np.rot90(x, 1, (2, 3)), lambda x: x[..., ::-1], lambda x: x // 2):
        assert (known.likeness(change(images)) > 0.98).all()
    assert (known.likeness(real.images[real.rows('test')]) < 0.99).all()
    fidelity, reason = Judge(known=known)(images, None)
    assert np.isnan(fidelity).all() and set(reason) == {'copy'}


def test_edits_change_training_images_only(real, tmp_path):
    pipe, c = untrained(), GenerateConfig(images=30, strength=0.5, num_inference_steps=2, batch_size=8)
    whole = edit(pipe, tmp_path / 'whole', real, c, seed=1)
    base = real.table.set_index('id').loc[whole.table.edited]
    assert (
        set(base.split) == {'train'}
        and list(base.group) == list(whole.table.group)
        and list(base.target) == list(whole.table.target)
    )
    assert set(whole.table.edited) == set(real.table.id[real.rows('train')]) and set(whole.table.split) == {'train'}
    hook = interrupted(pipe, 3)
    with pytest.raises(KeyboardInterrupt):
        edit(pipe, tmp_path / 'cut', real, c, seed=1)
    hook.remove()
    same(edit(pipe, tmp_path / 'cut', real, c, seed=1).path, whole.path)


def test_strength_is_a_noise_level(real):
    "With a perfect denoiser of nothing but the noise that was added, an edit gives the image back"

    class Unchanged(Knows):
        def forward(self, sample, timestep, class_labels=None):
            steps.append(timestep.max().item())
            return super().forward(sample, timestep)

    for name in SCHEDULERS:
        unet, steps = Unchanged(sample_size=32), []
        pipe = quiet(
            LabelConditionedPipeline(unet, LabelEncoder(3, 16), with_scheduler(make_scheduler(), name), CLASSES, STAINS)
        )
        image = torch.tensor(real.images[:1])
        unet.answer.data = to_signal(image[0])
        edited = pipe('Cytosol', images=image, strength=0.3, guidance_scale=1, num_inference_steps=10)
        assert (edited.int() - image.int()).abs().max() <= 1
        assert max(steps) == steps[0] and 150 < steps[0] < 350, name
        pipe('Cytosol', guidance_scale=1, num_inference_steps=10)
        assert max(steps) > 800


def test_an_edit_starts_with_as_much_noise_as_its_step_has(real):
    pipe, image = untrained(), torch.tensor(real.images[:1])
    pipe.scheduler = with_scheduler(pipe.scheduler, 'ddim')
    x, steps = _start(pipe, 1, 10, generators_for(0, [0]), image, 0.4)
    share, noise = pipe.scheduler.alphas_cumprod[steps[0]], torch.randn(x.shape, generator=generators_for(0, [0])[0])
    assert len(steps) == 4 and torch.allclose(
        x, share.sqrt() * fold(to_signal(image), 2) + (1 - share).sqrt() * noise, atol=1e-5
    )


def test_a_dropped_candidate_never_wins(drawn):
    "The second of three candidates has the best fidelity, and is a copy"
    pipe, calls = quiet(open_pipeline(drawn[1])), []

    def judge(images, labels):
        calls.append(images)
        return np.full(len(images), [0.2, 0.9, 0.6][len(calls) - 1]), np.full(
            len(images), ['', 'copy', ''][len(calls) - 1]
        )

    block = draw_block(pipe, PLAN[:2], range(2), BLOCKS.model_copy(update=dict(best_of=3)), 3, judge)
    assert (
        np.array_equal(block['images'], calls[2])
        and block['fidelity'].tolist() == [0.6, 0.6]
        and set(block['reason']) == {''}
    )


@pytest.mark.parametrize('error, kept', [(RuntimeError, True), (InputError, False)])
def test_an_error_costs_no_finished_blocks_but_bad_input_leaves_nothing(drawn, tmp_path, error, kept):
    "A GPU that runs out of memory, or another process that ends, must not cost the work of hours"
    whole, folder, _ = drawn
    pipe = quiet(open_pipeline(folder))
    hook = interrupted(pipe, 5, error)
    with pytest.raises(error):
        generate(pipe, tmp_path / 'e', PLAN, BLOCKS, seed=3)
    hook.remove()
    assert (tmp_path / '.e.partial').exists() == kept
    same(generate(pipe, tmp_path / 'e', PLAN, BLOCKS, seed=3).path, whole.path)


def test_command_line(protloc, real, drawn, tmp_path):
    from protloc.classify.backbone import Classifier
    from protloc.classify.predict import save_classifier

    _, folder, _ = drawn
    with seeded(0, 'classifier'):
        save_classifier(Classifier('resnet10', 4, 3), tmp_path / 'model', real)
    base = ['generate', folder, '--like', real.path, '--images', 4, '--steps', 2]

    def run(name, *words):
        code, out, err = protloc(*base[:2], tmp_path / name, *base[2:], *words)
        assert code == 0, err
        return ImageStore(tmp_path / name)

    judged = run(
        'judged',
        '--plan',
        'balance',
        '--classifier',
        tmp_path / 'model',
        '--min-fidelity',
        0.01,
        '--best-of',
        2,
        '--drop-copies',
        '--guidance-interval',
        0.2,
        0.8,
        '--negative',
        'Cytosol',
    )
    made = judged.manifest['made']
    assert (
        made['plan'] == 'balance'
        and made['best_of'] == 2
        and made['dropped'] == {}
        and len(made['filter']['classifier']) == 16
        and 'fidelity' in judged.table
    )
    edited = run('edited', '--edit', 0.5, '--half')
    assert (
        'edited' in edited.table
        and edited.manifest['made']['dtype'] == 'bfloat16'
        and edited.manifest['made']['strength'] == 0.5
    )
    for words, message in (
        (['--min-fidelity', 0.5], 'needs a classifier'),
        (['--plan', 'equal'], "there is no plan 'equal'"),
        (['--edit', 0], "'strength' is wrong"),
        (['--best-of', 2], 'best_of 2 needs'),
    ):
        code, _, err = protloc(*base[:2], tmp_path / 'bad', *base[2:], *words)
        assert code == 2 and message in err and err.splitlines()[-1].startswith('protloc: '), err
