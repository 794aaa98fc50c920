"""Denoisers by name, what they see and what they ignore, their weights and schedules, and each recipe trained for a few steps."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from protloc.core import InputError, read_config, read_yaml
from protloc.data.loading import balance_weights
from protloc.data.simulate import simulate_store
from protloc.diffusion.denoiser import PRESETS, Denoiser, PaperOriginal, UNetConfig, build_denoiser, fold
from protloc.diffusion.generate import GenerateConfig, generate
from protloc.diffusion.objective import (
    ObjectiveConfig,
    image_losses,
    losses_by_noise,
    make_scheduler,
    noisify,
    step_weights,
    to_images,
    to_signal,
)
from protloc.diffusion.pipeline import SCHEDULERS, with_scheduler
from protloc.diffusion.train import (
    GeneratorConfig,
    TrainingImages,
    generator_loss,
    open_pipeline,
    preview_rows,
    train_generator,
)
from protloc.plots import show_cells
from protloc.study.arms import section_config
from protloc.training import seeded

PAPER = [n for n in PRESETS if n.startswith('paper')]
RECIPES = {
    'ours': GeneratorConfig(),
    **{n: section_config('generator', n.replace('paper_', 'paper/generator_')) for n in PAPER},
}


def answer(denoiser, step, labels, size=16, **kw):
    "What a denoiser says of the same noisy image"
    noisy = torch.randn(1, denoiser.unet.config.in_channels, size, size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return denoiser(noisy, torch.tensor([step]), torch.tensor([labels]), **kw)


def built(preset, **changes):
    with seeded(0, 'test'):
        return build_denoiser(4, 3, 16, UNetConfig(preset=preset, **changes)).eval()


@pytest.mark.parametrize('preset', PRESETS)
@pytest.mark.parametrize('size,channels', [(32, 4), (64, 1), (256, 5)])
def test_every_preset_builds_for_every_size(preset, size, channels):
    c = UNetConfig(preset=preset)
    with torch.device('meta'):
        denoiser = build_denoiser(channels, 28, size, c)
        folded = fold(torch.empty(2, channels, size, size), c.patch_size)
        with torch.no_grad():
            assert denoiser(folded, torch.zeros(2), torch.zeros(2, 28)).shape == folded.shape
    assert (
        denoiser.unet.config.sample_size * c.patch_size == size and denoiser.unet.config.in_channels == folded.shape[1]
    )


def test_presets_grow_and_xs_is_the_default():
    def parameters(name):
        with torch.device('meta'):
            return sum(p.numel() for p in build_denoiser(4, 28, 64, UNetConfig(preset=name)).parameters())

    assert sorted('lsmx', key=lambda n: parameters(n.replace('x', 'xs'))) == ['x', 's', 'm', 'l']
    assert UNetConfig() == UNetConfig(preset='xs') and UNetConfig().model_dump(exclude={'preset'}) == dict(
        widths=(32, 64, 64), layers_per_block=1, patch_size=2, attention=False, norm_groups=8
    )


def test_overrides_win_over_the_preset_and_survive_a_file():
    c = read_config(GeneratorConfig, dict(unet=dict(preset='s', patch_size=1))).unet
    assert (c.patch_size, c.widths, c.attention) == (1, PRESETS['s']['widths'], True)
    assert UNetConfig.model_validate(json.loads(json.dumps(c.model_dump()))) == c


def test_simplified_sees_no_step_and_one_label():
    d = built('paper_simplified')
    assert [tuple(l.weight.shape) for l in d.unet.layers[::2]] == [(64, 68, 3, 3), (64, 64, 3, 3), (4, 64, 3, 3)]
    assert tuple(d.label_encoder.embedding.weight.shape) == (3, 64)
    assert (answer(d, 3, [1.0, 0, 0]) == answer(d, 900, [1.0, 0, 0])).all()
    assert (answer(d, 3, [1.0, 0, 0]) != answer(d, 3, [0, 1.0, 0])).any()
    assert (answer(d, 3, [0, 1.0, 1]) == answer(d, 3, [0, 1.0, 0])).all(), 'the first label stands for the image'
    assert (answer(d, 3, [0, 1.0, 0], drop=torch.tensor([True])) == answer(d, 3, [0.0, 0, 0])).all()


def test_simplified_draws_each_label_in_training():
    encoder = built('paper_simplified').label_encoder.train()
    with seeded(0, 'draws'), torch.no_grad():
        vectors = encoder(torch.tensor([[1.0, 0, 1]]).expand(600, -1))
    counts = [(vectors == w).all(1).sum().item() for w in encoder.embedding.weight]
    assert counts[1] == 0 and sum(counts) == 600 and abs(counts[0] - 300) < 60


def test_original_sees_step_and_all_labels():
    d = built('paper_original', widths=(16,))
    assert (answer(d, 3, [1.0, 0, 0]) != answer(d, 200, [1.0, 0, 0])).any()
    assert (answer(d, 3, [0, 1.0, 1]) != answer(d, 3, [0, 1.0, 0])).any()
    assert (answer(d, 3, [0, 1.0, 0], drop=torch.tensor([True])) == answer(d, 3, [0.0, 0, 0])).all()


def test_original_is_told_the_share_of_all_steps():
    with seeded(0, 'test'):
        short = PaperOriginal(16, num_classes=3, num_hiddens=16, num_train_timesteps=300)
    with seeded(0, 'test'):
        long = PaperOriginal(16, num_classes=3, num_hiddens=16, num_train_timesteps=600)
    x, y = torch.ones(1, 4, 16, 16), torch.eye(3)[:1]
    with torch.no_grad():
        assert torch.equal(short(x, torch.tensor(100), y).sample, long(x, torch.tensor([200]), y).sample)


@pytest.mark.parametrize('preset', ['xs', *PAPER])
def test_parts_come_back_from_their_files(preset, tmp_path):
    d = built(preset, **({'widths': (16,)} if preset in PAPER else {'widths': (16, 32)}))
    again = []
    for name, part in d.named_children():
        part.save_pretrained(tmp_path / name)
        again.append(type(part).from_pretrained(tmp_path / name))
        before, after = (
            json.dumps({k: v for k, v in m.config.items() if k[0] != '_'}, sort_keys=True) for m in (part, again[-1])
        )
        assert before == after and all(torch.equal(v, again[-1].state_dict()[k]) for k, v in part.state_dict().items())
    size = d.unet.config.sample_size
    torch.testing.assert_close(answer(Denoiser(*again).eval(), 7, [0, 1.0, 1], size), answer(d, 7, [0, 1.0, 1], size))


@pytest.mark.parametrize('kind,low', [('sqrt', -1), ('symmetric', -1), ('unit', 0)])
def test_signal_kinds_undo_themselves(kind, low):
    every = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    signal = to_signal(every, kind)
    assert (signal.min(), signal.max()) == (low, 1) and torch.equal(to_images(signal, kind), every)
    assert signal.flatten()[51].item() == pytest.approx(
        dict(sqrt=2 * 0.2**0.5 - 1, symmetric=-0.6, unit=0.2)[kind], abs=1e-6
    )


@pytest.mark.parametrize('target', ['epsilon', 'v_prediction', 'sample'])
@pytest.mark.parametrize('schedule', ['linear', 'scaled_linear', 'squaredcos_cap_v2'])
def test_weights_against_their_definitions(target, schedule):
    s, steps = (
        make_scheduler(ObjectiveConfig(prediction_type=target, beta_schedule=schedule)),
        torch.tensor([0, 10, 400, 800, 999]),
    )
    a = s.alphas_cumprod[steps].double()
    snr, gamma = a / (1 - a), 5.0
    hang = dict(
        epsilon=snr.clamp(max=gamma) / snr, v_prediction=snr.clamp(max=gamma) / (snr + 1), sample=snr.clamp(max=gamma)
    )[target]
    torch.testing.assert_close(step_weights(steps, s, 'min_snr', gamma).double(), hang, rtol=1e-3, atol=1e-9)
    ours = (snr + 1).clamp(max=gamma) / dict(epsilon=snr, v_prediction=snr + 1, sample=1)[target]
    torch.testing.assert_close(step_weights(steps, s, 'snr_plus_one', gamma).double(), ours, rtol=1e-3, atol=1e-9)
    assert step_weights(steps, s, 'uniform').tolist() == [1] * 5
    cosine = [1 + math.cos(math.pi * t / 1000) for t in steps.tolist()]
    assert step_weights(steps, s, 'cosine').tolist() == pytest.approx(cosine, abs=1e-6)


def test_min_snr_asks_the_same_of_every_target():
    "The weighted errors of one guess of the clean image, told as noise, velocity or image, are one number"
    torch.manual_seed(0)
    clean, noise, steps = torch.randn(2, 1, 4, 4), torch.randn(2, 1, 4, 4), torch.tensor([300, 600])
    found = []
    for target in ('epsilon', 'v_prediction', 'sample'):
        s = make_scheduler(ObjectiveConfig(prediction_type=target))
        a = s.alphas_cumprod[steps].view(-1, 1, 1, 1)
        guess = lambda x, t: dict(
            sample=clean + 0.1,
            epsilon=(x - a.sqrt() * (clean + 0.1)) / (1 - a).sqrt(),
            v_prediction=(a.sqrt() * x - (clean + 0.1)) / (1 - a).sqrt(),
        )[target]
        found.append(image_losses(guess, clean, noise, steps, s, 'min_snr').mean().item())
    assert found == pytest.approx([found[0]] * 3, rel=1e-3) and found[0] > 0


def test_bands_average_to_the_loss():
    losses, steps = torch.rand(64, requires_grad=True), torch.arange(64) * 300 // 64
    bands = losses_by_noise(losses, steps, 300)
    assert not any(v.requires_grad for v in bands.values())
    assert torch.stack([*bands.values()]).mean().item() == pytest.approx(losses.mean().item(), rel=1e-5)
    assert bands['loss_t3'].item() == pytest.approx(losses[steps >= 225].mean().item(), rel=1e-5)
    assert losses_by_noise(torch.ones(1), torch.tensor([299]), 300)['loss_t0'] == 0


@pytest.mark.parametrize('target', ['v_prediction', 'sample'])
def test_zero_terminal_snr(target):
    s = make_scheduler(ObjectiveConfig(prediction_type=target, rescale_betas_zero_snr=True, beta_schedule='linear'))
    clean, noise, last = torch.ones(1, 1, 2, 2), torch.randn(1, 1, 2, 2), torch.tensor([999])
    assert s.alphas_cumprod[-1] == 0 and torch.equal(noisify(clean, noise, last, s)[0], noise)
    for weighting in ('uniform', 'min_snr', 'snr_plus_one', 'cosine'):
        assert step_weights(torch.tensor([0, 500, 999]), s, weighting).isfinite().all()


def test_a_solver_that_does_not_know_the_schedule_is_refused():
    trained = make_scheduler(ObjectiveConfig(rescale_betas_zero_snr=True))
    with pytest.raises(InputError, match="'heun' does not know the zero-terminal noise schedule"):
        with_scheduler(trained, 'heun')


@pytest.mark.parametrize('target', ['v_prediction', 'sample'])
@pytest.mark.parametrize('name', [n for n in SCHEDULERS if n != 'heun'])
def test_solvers_start_from_pure_noise(name, target):
    "A denoiser that knows the image leads every solver to it"
    trained = make_scheduler(ObjectiveConfig(prediction_type=target, rescale_betas_zero_snr=True))
    s, clean = with_scheduler(trained, name), torch.linspace(-0.9, 0.9, 16).view(1, 1, 4, 4)
    s.set_timesteps(10)
    assert int(s.timesteps[0]) == 999
    x = torch.randn(1, 1, 4, 4, generator=torch.Generator().manual_seed(0)) * s.init_noise_sigma
    for t in s.timesteps:
        a = trained.alphas_cumprod[int(t)]
        noisy = s.scale_model_input(x, t)
        x = s.step(clean if target == 'sample' else (a.sqrt() * noisy - clean) / (1 - a).sqrt(), t, x).prev_sample
    assert x.isfinite().all() and (x - clean).abs().max() < 0.1


def test_defaults_are_what_they_were():
    o = ObjectiveConfig()
    assert (o.signal, o.rescale_betas_zero_snr, o.weighting, o.gamma, o.prediction_type) == (
        'sqrt',
        False,
        'snr_plus_one',
        20,
        'sample',
    )
    assert not make_scheduler().config.rescale_betas_zero_snr and make_scheduler().config.timestep_spacing == 'leading'
    assert GeneratorConfig().unet.widths == (32, 64, 64)


def test_recipes_are_the_papers():
    simple, first = RECIPES['paper_simplified'], RECIPES['paper_original']
    assert (simple.objective.num_train_timesteps, simple.objective.weighting, simple.objective.label_dropout) == (
        1000,
        'uniform',
        0,
    )
    assert (first.objective.num_train_timesteps, first.objective.weighting, first.objective.label_dropout) == (
        300,
        'cosine',
        0.1,
    )
    for c in (simple, first):
        assert (c.objective.signal, c.objective.beta_schedule, c.objective.prediction_type) == (
            'unit',
            'linear',
            'epsilon',
        )
        assert (c.loop.lr, c.loop.batch_size, c.loop.weight_decay, c.loop.ema_decay) == (1e-4, 64, 0, None)


def test_rare_classes_more_often_and_the_same_rows_again():
    labels = np.array([[1, 0]] * 90 + [[1, 1]] * 9 + [[0, 0]], np.float32)
    w = balance_weights(labels, 0.5)
    assert w.sum() == pytest.approx(1) and w[90] / w[0] == pytest.approx((99 / 9) ** 0.5) and w[99] <= w[0]
    assert balance_weights(labels, 0) == pytest.approx(np.full(100, 0.01))
    assert preview_rows(labels).tolist() == [0, 90]


@pytest.fixture(scope='module')
def cells(tmp_path_factory):
    return simulate_store(
        tmp_path_factory.mktemp('cells') / 'store',
        dict(train=48, val=8, test=8),
        size=32,
        classes=['Nucleoli', 'Plasma membrane', 'Cytosol'],
    )


def test_balanced_rows_belong_to_the_step(cells):
    c = GeneratorConfig(balance=1.0, loop=dict(batch_size=512))
    rows = [TrainingImages(cells, c, seed).rows_at(step) for seed, step in ((0, 3), (0, 3), (0, 4), (1, 3))]
    assert (rows[0] == rows[1]).all() and (rows[0] != rows[2]).any() and (rows[0] != rows[3]).any()
    assert set(rows[0]) <= set(cells.rows('train'))
    shares, expected = np.bincount(rows[0], minlength=len(cells)) / 512, np.zeros(len(cells))
    expected[cells.rows('train')] = balance_weights(cells.labels[cells.rows('train')], 1.0)
    assert np.abs(shares - expected).max() < 0.04
    halves = [TrainingImages(cells, c).shard(i, 2)[3][1] for i in range(2)]
    assert torch.equal(torch.cat(halves), torch.from_numpy(cells.labels[rows[0]]))


@pytest.mark.parametrize('name', RECIPES)
def test_each_recipe_trains_and_draws(name, cells, tmp_path):
    c = RECIPES[name]
    unet = (
        c.unet
        if name == 'paper_simplified'
        else UNetConfig(preset=c.unet.preset, widths=(16,) if name in PAPER else (16, 32))
    )
    c = c.model_copy(
        update=dict(
            unet=unet, preview_every=4, balance=0.5, loop=c.loop.model_copy(update=dict(steps=8, batch_size=8, lr=1e-3))
        )
    )
    pipe = train_generator(cells, tmp_path, c)
    lines = [json.loads(l) for l in (tmp_path / 'log.jsonl').read_text().splitlines()]
    assert lines[-1]['step'] == 8 and np.mean([lines[-1][f'loss_t{i}'] for i in range(4)]) == pytest.approx(
        lines[-1]['loss'], rel=1e-3
    )
    assert sorted(p.name for p in (tmp_path / 'previews').iterdir()) == ['step-000004.png', 'step-000008.png']
    assert 'library_name: diffusers' in (tmp_path / 'pipeline' / 'README.md').read_text()
    assert pipe.config.signal == c.objective.signal
    again, images = open_pipeline(tmp_path), []
    for p in (pipe, again):
        p.set_progress_bar_config(disable=True)
        for m in (p.unet, p.label_encoder):
            m.to(memory_format=torch.channels_last)
        images.append(p(['Cytosol', 'Nucleoli'], 1, 3, torch.Generator().manual_seed(0)))
    assert torch.equal(*images) and images[0].shape == (2, 4, 32, 32)


def test_interrupted_and_continued_it_is_the_same(cells, tmp_path, monkeypatch):
    loop = dict(steps=12, batch_size=8, lr=1e-3, ema_decay=0.9, checkpoint_seconds=0)
    c = GeneratorConfig(unet=dict(widths=(16, 32)), balance=1.0, preview_every=4, loop=loop)
    train_generator(cells, tmp_path / 'whole', c)

    def stop(rows, *args, **kw):
        if 'step 8' in rows:
            raise KeyboardInterrupt
        return show_cells(rows, *args, **kw)

    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr('protloc.diffusion.train.show_cells', stop)
        train_generator(cells, tmp_path / 'cut', c)
    assert [p.name for p in (tmp_path / 'cut' / 'checkpoints').iterdir()] == ['step-00000004'] and not (
        tmp_path / 'cut' / 'pipeline'
    ).exists()
    train_generator(cells, tmp_path / 'cut', c)
    for name in ('last.safetensors', *(f'previews/step-{s:06d}.png' for s in (4, 8, 12))):
        assert (tmp_path / 'cut' / name).read_bytes() == (tmp_path / 'whole' / name).read_bytes()


TRAIN = """
import os, signal, sys
from pathlib import Path
from protloc.core import read_config, read_yaml
from protloc.data.store import ImageStore
from protloc.diffusion.train import GeneratorConfig, TrainingImages, train_generator
store, settings, out, die, rank = *map(Path, sys.argv[1:4]), int(sys.argv[4]), os.environ.get('RANK', '0')
plain = TrainingImages.__getitem__
def cut(self, step):
    if step == die and rank == '1': os.kill(os.getpid(), signal.SIGKILL)
    return plain(self, step)
TrainingImages.__getitem__ = cut
train_generator(ImageStore(store), out, read_config(GeneratorConfig, read_yaml(settings)), seed=3)
"""


@pytest.fixture(scope='module')
def apart(cells, tmp_path_factory):
    "A generator trained by one process, and a way to train it by several"
    folder = tmp_path_factory.mktemp('apart')
    c = GeneratorConfig(
        unet=dict(widths=(16, 32)),
        balance=0.5,
        condition='cell_line',
        loop=dict(steps=10, batch_size=12, lr=1e-3, ema_decay=0.9, checkpoint_steps=2),
    )
    (folder / 'train.py').write_text(TRAIN)
    (folder / 'settings.yaml').write_text(yaml.safe_dump(json.loads(c.model_dump_json())))
    train_generator(cells, folder / 'one', c, seed=3)

    def two(out, die=-1):
        command = [
            Path(sys.executable).parent / 'torchrun',
            '--nproc_per_node',
            '2',
            folder / 'train.py',
            cells.path,
            folder / 'settings.yaml',
            out,
            str(die),
        ]
        return subprocess.run(command, capture_output=True, text=True, env={**os.environ, 'OMP_NUM_THREADS': '1'})

    return folder / 'one', two


def logged(folder):
    return [
        [json.loads(l)[k] for k in ('step', 'loss', 'loss_t0', 'loss_t3')]
        for l in (folder / 'log.jsonl').read_text().splitlines()
    ]


def test_two_processes_train_the_same_generator(apart, tmp_path):
    one, two = apart
    done = two(tmp_path / 'two')
    assert done.returncode == 0, done.stderr[-3000:]
    assert np.allclose(logged(tmp_path / 'two'), logged(one), rtol=1e-4)
    for k, v in load_file(tmp_path / 'two' / 'last.safetensors').items():
        torch.testing.assert_close(v, load_file(one / 'last.safetensors')[k], rtol=1e-3, atol=1e-4)
    assert open_pipeline(tmp_path / 'two').config.conditions


def test_two_processes_killed_and_continued(apart, tmp_path):
    "The second process is killed at step 7; continued by two, the weights are those of two that nobody stopped, bit for bit"
    one, two = apart
    assert two(tmp_path / 'cut', die=7).returncode != 0
    assert (
        not (tmp_path / 'cut' / 'pipeline').exists() and (tmp_path / 'cut' / 'checkpoints' / 'step-00000006').exists()
    )
    assert two(tmp_path / 'cut').returncode == 0 and two(tmp_path / 'whole').returncode == 0
    assert (tmp_path / 'cut' / 'last.safetensors').read_bytes() == (
        tmp_path / 'whole' / 'last.safetensors'
    ).read_bytes()


def test_accumulated_parts_train_the_same_generator(apart, cells, tmp_path):
    c = read_config(GeneratorConfig, read_yaml(apart[0].parent / 'settings.yaml'))
    train_generator(
        cells, tmp_path / 'parts', c.model_copy(update=dict(loop=c.loop.model_copy(update=dict(accumulate=3)))), seed=3
    )
    assert np.allclose(logged(tmp_path / 'parts'), logged(apart[0]), rtol=1e-4)


def test_a_condition_is_drawn_and_noted(apart, tmp_path):
    pipe = open_pipeline(apart[0])
    pipe.set_progress_bar_config(disable=True)
    lines = pipe.config.conditions

    def draw(condition):
        return pipe(
            ['Cytosol'] * 2,
            1.5,
            2,
            [torch.Generator().manual_seed(i) for i in range(2)],
            output_type='signal',
            condition=condition,
        )

    each = draw(lines[:2])
    assert (draw(lines[0])[0] - each[0]).abs().max() < 1e-4 < (draw(lines[1])[0] - each[0]).abs().max()
    assert (draw(None) - each).abs().max() > 1e-4
    from protloc.diffusion.pipeline import _told

    told = _told(pipe, np.zeros((len(lines), 3), np.float32), lines)
    assert lines != sorted(lines, key=int) and torch.equal(told[:, 3:], torch.eye(len(lines)))
    store = generate(
        pipe, tmp_path / 'store', np.eye(3, dtype=np.float32), GenerateConfig(num_inference_steps=2, condition=lines[0])
    )
    assert set(store.table.cell_line.astype(str)) == {lines[0]} and store.manifest['made']['condition'] == lines[0]
    for wrong, said in ((lines[:3], '3 conditions for 2 images'), ('nowhere', 'nowhere')):
        with pytest.raises(InputError, match=said):
            draw(wrong)
    with pytest.raises(InputError, match="no column 'slide'"):
        train_generator(store, tmp_path / 'other', GeneratorConfig(condition='slide'))


@pytest.mark.parametrize('name', PAPER)
def test_paper_denoisers_learn(name):
    "On one batch with the same noise each time the loss falls"
    c = RECIPES[name].model_copy(update=dict(unet=UNetConfig(preset=name, widths=(32,))))
    with seeded(0, 'test'):
        d = build_denoiser(4, 3, 16, c.unet, c.objective.num_train_timesteps)
    torch.manual_seed(0)
    steps = torch.randint(c.objective.num_train_timesteps, (16,))
    batch = (
        torch.randint(0, 256, (16, 4, 16, 16), dtype=torch.uint8),
        torch.eye(3)[torch.arange(16) % 3],
        torch.randn(16, 4, 16, 16),
        steps,
        torch.zeros(16, dtype=torch.bool),
    )
    optimizer, found, loss = torch.optim.Adam(d.parameters(), 2e-3), [], generator_loss(c)
    for _ in range(25):
        value, _ = loss(d, batch)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        found.append(value.item())
    assert found[-1] < 0.8 * found[0] and all(p.grad is not None for p in d.parameters())


@pytest.mark.parametrize('kind,black', [('sqrt', 1), ('symmetric', 1), ('unit', 0)])
def test_the_loss_sees_the_range_that_is_asked_for(kind, black):
    c = GeneratorConfig(unet=dict(patch_size=1), objective=dict(signal=kind, weighting='uniform'))
    blank = (
        torch.zeros(2, 4, 8, 8, dtype=torch.uint8),
        torch.zeros(2, 3),
        torch.zeros(2, 4, 8, 8),
        torch.zeros(2, dtype=torch.long),
        torch.zeros(2, dtype=torch.bool),
    )
    assert generator_loss(c)(lambda noisy, *rest: torch.zeros_like(noisy), blank)[0] == black


def test_gradient_checkpointing_changes_no_gradient():
    found = []
    for on in (False, True):
        with seeded(0, 'test'):
            d = build_denoiser(4, 3, 16, UNetConfig(widths=(16, 32))).train()
        if on:
            d.unet.enable_gradient_checkpointing()
        d(torch.ones(1, 16, 8, 8), torch.tensor([5]), torch.eye(3)[:1]).square().sum().backward()
        found.append(d.unet.conv_in.weight.grad)
    torch.testing.assert_close(*found)


@pytest.mark.parametrize(
    'values,said',
    [
        (dict(unet=dict(preset='paper_simplifed')), "did you mean 'paper_simplified'?"),
        (dict(unet=dict(preset='xxl')), 'there is no denoiser'),
        (dict(unet=dict(preset='paper_original', attention=True)), 'has no attention: only its widths can be changed'),
        (dict(unet=dict(preset='paper_simplified', widths=[64, 64])), 'has one width'),
        (dict(unet=dict(preset='paper_simplified'), gradient_checkpointing=True), 'leave it off'),
        (dict(objective=dict(rescale_betas_zero_snr=True, prediction_type='epsilon')), 'use v_prediction or sample'),
        (dict(objective=dict(weighting='cosin')), 'weighting'),
        (dict(objective=dict(signal='log')), 'signal'),
    ],
)
def test_settings_that_cannot_be(values, said):
    with pytest.raises(InputError, match='(?s)' + said.replace('?', r'\?')) as e:
        read_config(GeneratorConfig, values)
    assert '\n' not in str(e.value)


@pytest.mark.parametrize(
    'preset,size,said',
    [
        ('xs', 30, 'use a multiple of 8'),
        ('l', 24, 'use a multiple of 16'),
        ('paper_original', 30, 'use a multiple of 4'),
    ],
)
def test_images_that_cannot_be_halved(preset, size, said):
    with pytest.raises(InputError, match=said), torch.device('meta'):
        build_denoiser(4, 3, size, UNetConfig(preset=preset))


@pytest.mark.parametrize('preset', ['xs', *PAPER])
def test_labels_of_another_width(preset):
    with pytest.raises(InputError, match='give rows of 3 numbers'):
        answer(built(preset), 0, [1.0, 0, 0, 0])


def test_a_store_without_training_images(cells, tmp_path):
    rest = simulate_store(tmp_path / 'rest', dict(val=8), size=32, classes=['Nucleoli', 'Cytosol'])
    with pytest.raises(InputError, match="no image in its split 'train'"):
        train_generator(rest, tmp_path / 'run', GeneratorConfig(unet=dict(widths=(16, 32))))
