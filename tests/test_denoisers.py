"""Denoisers by name: what they see and ignore, their weights and schedules, and each recipe trained for a few steps."""

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

from protloc.core import InputError, read_config
from protloc.data.loading import balance_weights
from protloc.data.simulate.datasets import simulate_store
from protloc.diffusion.denoiser import ARCHITECTURES, Denoiser, PaperOriginal, UNetConfig, build_denoiser, fold
from protloc.diffusion.generate import GenerateConfig, generate
from protloc.diffusion.objective import (
    ObjectiveConfig,
    image_losses,
    losses_by_noise,
    make_scheduler,
    noisify,
    timestep_weights,
    to_images,
    to_signal,
)
from protloc.diffusion.pipeline import SCHEDULERS, _with_condition, with_scheduler
from protloc.diffusion.train import (
    GeneratorConfig,
    TrainingImages,
    generator_loss,
    open_pipeline,
    preview_rows,
    train_generator,
)
from protloc.files import read_yaml
from protloc.plots import show_cells
from protloc.study.arms import section_config
from protloc.training import seeded

SCRIPT = Path(__file__).parent / 'scripts' / 'train_generator.py'
PAPER = [name for name in ARCHITECTURES if name.startswith('paper')]
RECIPES = {
    'ours': GeneratorConfig(),
    **{name: section_config('generator', name.replace('paper_', 'paper/generator_')) for name in PAPER},
}


def answer(denoiser, timestep, labels, size=16, **options):
    "What a denoiser says of the same noisy image"
    noisy = torch.randn(1, denoiser.unet.config.in_channels, size, size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return denoiser(noisy, torch.tensor([timestep]), torch.tensor([labels]), **options)


def built(architecture, **changes):
    with seeded(0, 'test'):
        return build_denoiser(4, 3, 16, UNetConfig(architecture=architecture, **changes)).eval()


@pytest.mark.parametrize('architecture', ARCHITECTURES)
@pytest.mark.parametrize('size,channels', [(32, 4), (64, 1), (256, 5)])
def test_every_architecture_builds_for_every_size(architecture, size, channels):
    config = UNetConfig(architecture=architecture)
    with torch.device('meta'):
        denoiser = build_denoiser(channels, 28, size, config)
        folded = fold(torch.empty(2, channels, size, size), config.patch_size)
        with torch.no_grad():
            assert denoiser(folded, torch.zeros(2), torch.zeros(2, 28)).shape == folded.shape
    assert denoiser.unet.config.sample_size * config.patch_size == size
    assert denoiser.unet.config.in_channels == folded.shape[1]


def test_architectures_grow_and_xs_is_the_default():
    def parameters(name):
        with torch.device('meta'):
            return sum(p.numel() for p in build_denoiser(4, 28, 64, UNetConfig(architecture=name)).parameters())

    assert sorted(['l', 's', 'm', 'xs'], key=parameters) == ['xs', 's', 'm', 'l']
    assert UNetConfig() == UNetConfig(architecture='xs')
    assert UNetConfig().model_dump(exclude={'architecture'}) == dict(
        widths=(32, 64, 64),
        layers_per_block=1,
        patch_size=2,
        attention=False,
        norm_groups=8,
        resnet_time_scale_shift='scale_shift',
    )


def test_overrides_win_over_the_architecture_and_survive_a_file():
    config = read_config(GeneratorConfig, dict(unet=dict(architecture='s', patch_size=1))).unet
    assert (config.patch_size, config.widths, config.attention) == (1, ARCHITECTURES['s']['widths'], True)
    assert UNetConfig.model_validate(json.loads(json.dumps(config.model_dump()))) == config


def test_simplified_sees_no_timestep_and_one_label():
    simplified = built('paper_simplified')
    shapes = [tuple(layer.weight.shape) for layer in simplified.unet.layers[::2]]
    assert shapes == [(64, 68, 3, 3), (64, 64, 3, 3), (4, 64, 3, 3)]
    assert tuple(simplified.label_encoder.embedding.weight.shape) == (3, 64)
    assert (answer(simplified, 3, [1.0, 0, 0]) == answer(simplified, 900, [1.0, 0, 0])).all()
    assert (answer(simplified, 3, [1.0, 0, 0]) != answer(simplified, 3, [0, 1.0, 0])).any()
    first = answer(simplified, 3, [0, 1.0, 1])
    assert (first == answer(simplified, 3, [0, 1.0, 0])).all(), 'the first label stands for the image'
    dropped = answer(simplified, 3, [0, 1.0, 0], drop=torch.tensor([True]))
    assert (dropped == answer(simplified, 3, [0.0, 0, 0])).all()


def test_simplified_draws_each_label_in_training():
    encoder = built('paper_simplified').label_encoder.train()
    with seeded(0, 'draws'), torch.no_grad():
        vectors = encoder(torch.tensor([[1.0, 0, 1]]).expand(600, -1))
    counts = [(vectors == w).all(1).sum().item() for w in encoder.embedding.weight]
    assert counts[1] == 0 and sum(counts) == 600 and abs(counts[0] - 300) < 60


def test_original_sees_timestep_and_all_labels():
    original = built('paper_original', widths=(16,))
    assert (answer(original, 3, [1.0, 0, 0]) != answer(original, 200, [1.0, 0, 0])).any()
    assert (answer(original, 3, [0, 1.0, 1]) != answer(original, 3, [0, 1.0, 0])).any()
    dropped = answer(original, 3, [0, 1.0, 0], drop=torch.tensor([True]))
    assert (dropped == answer(original, 3, [0.0, 0, 0])).all()


def test_original_sees_the_share_of_all_timesteps():
    with seeded(0, 'test'):
        short = PaperOriginal(16, num_classes=3, num_hiddens=16, num_train_timesteps=300)
    with seeded(0, 'test'):
        long = PaperOriginal(16, num_classes=3, num_hiddens=16, num_train_timesteps=600)
    noisy, labels = torch.ones(1, 4, 16, 16), torch.eye(3)[:1]
    with torch.no_grad():
        third = long(noisy, torch.tensor([200]), labels).sample
        assert torch.equal(short(noisy, torch.tensor(100), labels).sample, third)


def public(config):
    return json.dumps({k: v for k, v in config.items() if k[0] != '_'}, sort_keys=True)


@pytest.mark.parametrize('architecture', ['xs', *PAPER])
def test_modules_come_back_from_their_files(architecture, tmp_path):
    denoiser = built(architecture, widths=(16,) if architecture in PAPER else (16, 32))
    opened = []
    for name, module in denoiser.named_children():
        module.save_pretrained(tmp_path / name)
        opened.append(type(module).from_pretrained(tmp_path / name))
        assert public(module.config) == public(opened[-1].config)
        assert all(torch.equal(v, opened[-1].state_dict()[k]) for k, v in module.state_dict().items())
    size = denoiser.unet.config.sample_size
    again = answer(Denoiser(*opened).eval(), 7, [0, 1.0, 1], size)
    torch.testing.assert_close(again, answer(denoiser, 7, [0, 1.0, 1], size))


@pytest.mark.parametrize('kind,low', [('sqrt', -1), ('symmetric', -1), ('unit', 0)])
def test_signal_kinds_undo_themselves(kind, low):
    every_value = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    signal = to_signal(every_value, kind)
    assert (signal.min(), signal.max()) == (low, 1) and torch.equal(to_images(signal, kind), every_value)
    of_51 = dict(sqrt=2 * 0.2**0.5 - 1, symmetric=-0.6, unit=0.2)
    assert signal.flatten()[51].item() == pytest.approx(of_51[kind], abs=1e-6)


@pytest.mark.parametrize('target', ['epsilon', 'v_prediction', 'sample'])
@pytest.mark.parametrize('schedule', ['linear', 'scaled_linear', 'squaredcos_cap_v2'])
def test_weights_against_their_definitions(target, schedule):
    scheduler = make_scheduler(ObjectiveConfig(prediction_type=target, beta_schedule=schedule))
    timesteps = torch.tensor([0, 10, 400, 800, 999])
    alpha_bar = scheduler.alphas_cumprod[timesteps].double()
    snr, gamma = alpha_bar / (1 - alpha_bar), 5.0

    def weights(weighting):
        return timestep_weights(timesteps, scheduler, weighting, gamma)

    capped = snr.clamp(max=gamma)
    hang = dict(epsilon=capped / snr, v_prediction=capped / (snr + 1), sample=capped)[target]
    torch.testing.assert_close(weights('min_snr').double(), hang, rtol=1e-3, atol=1e-9)
    ours = (snr + 1).clamp(max=gamma) / dict(epsilon=snr, v_prediction=snr + 1, sample=1)[target]
    torch.testing.assert_close(weights('snr_plus_one').double(), ours, rtol=1e-3, atol=1e-9)
    assert weights('uniform').tolist() == [1] * 5
    cosine = [1 + math.cos(math.pi * t / 1000) for t in timesteps.tolist()]
    assert weights('cosine').tolist() == pytest.approx(cosine, abs=1e-6)


def test_min_snr_asks_the_same_of_every_target():
    "The weighted errors of one guess of the clean image, as noise, velocity or image, are one number"
    torch.manual_seed(0)
    clean, noise, timesteps = torch.randn(2, 1, 4, 4), torch.randn(2, 1, 4, 4), torch.tensor([300, 600])
    guess = clean + 0.1

    def loss(target):
        scheduler = make_scheduler(ObjectiveConfig(prediction_type=target))
        alpha_bar = scheduler.alphas_cumprod[timesteps].view(-1, 1, 1, 1)

        def predict(noisy, _):
            if target == 'sample':
                return guess
            if target == 'epsilon':
                return (noisy - alpha_bar.sqrt() * guess) / (1 - alpha_bar).sqrt()
            return (alpha_bar.sqrt() * noisy - guess) / (1 - alpha_bar).sqrt()

        return image_losses(predict, clean, noise, timesteps, scheduler, 'min_snr').mean().item()

    losses = [loss(target) for target in ('epsilon', 'v_prediction', 'sample')]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-3) and losses[0] > 0


def test_bands_average_to_the_loss():
    losses, timesteps = torch.rand(64, requires_grad=True), torch.arange(64) * 300 // 64
    bands = losses_by_noise(losses, timesteps, 300)
    assert not any(band.requires_grad for band in bands.values())
    assert torch.stack([*bands.values()]).mean().item() == pytest.approx(losses.mean().item(), rel=1e-5)
    assert bands['loss_t3'].item() == pytest.approx(losses[timesteps >= 225].mean().item(), rel=1e-5)
    assert losses_by_noise(torch.ones(1), torch.tensor([299]), 300)['loss_t0'] == 0


@pytest.mark.parametrize('target', ['v_prediction', 'sample'])
def test_zero_terminal_snr(target):
    config = ObjectiveConfig(prediction_type=target, rescale_betas_zero_snr=True, beta_schedule='linear')
    scheduler = make_scheduler(config)
    clean, noise, last = torch.ones(1, 1, 2, 2), torch.randn(1, 1, 2, 2), torch.tensor([999])
    assert scheduler.alphas_cumprod[-1] == 0 and torch.equal(noisify(clean, noise, last, scheduler)[0], noise)
    for weighting in ('uniform', 'min_snr', 'snr_plus_one', 'cosine'):
        assert timestep_weights(torch.tensor([0, 500, 999]), scheduler, weighting).isfinite().all()


def test_a_solver_that_does_not_know_the_schedule_is_refused():
    trained = make_scheduler(ObjectiveConfig(rescale_betas_zero_snr=True))
    with pytest.raises(InputError, match="'heun' does not know the zero-terminal-SNR noise schedule"):
        with_scheduler(trained, 'heun')


@pytest.mark.parametrize('target', ['v_prediction', 'sample'])
@pytest.mark.parametrize('name', [n for n in SCHEDULERS if n != 'heun'])
def test_solvers_start_from_pure_noise(name, target):
    "A denoiser that knows the image leads every solver to it"
    trained = make_scheduler(ObjectiveConfig(prediction_type=target, rescale_betas_zero_snr=True))
    solver, clean = with_scheduler(trained, name), torch.linspace(-0.9, 0.9, 16).view(1, 1, 4, 4)
    solver.set_timesteps(10)
    assert int(solver.timesteps[0]) == 999
    x = torch.randn(1, 1, 4, 4, generator=torch.Generator().manual_seed(0)) * solver.init_noise_sigma
    for timestep in solver.timesteps:
        alpha_bar = trained.alphas_cumprod[int(timestep)]
        noisy = solver.scale_model_input(x, timestep)
        velocity = (alpha_bar.sqrt() * noisy - clean) / (1 - alpha_bar).sqrt()
        x = solver.step(clean if target == 'sample' else velocity, timestep, x).prev_sample
    assert x.isfinite().all() and (x - clean).abs().max() < 0.1


def test_defaults_are_what_they_were():
    defaults, scheduler = ObjectiveConfig().model_dump(), make_scheduler()
    expected = dict(
        signal='sqrt', rescale_betas_zero_snr=False, weighting='snr_plus_one', gamma=20, prediction_type='sample',
        preconditioning='components', sigma_min=0.03,
    )  # fmt: skip
    assert {name: defaults[name] for name in expected} == expected
    assert not scheduler.config.rescale_betas_zero_snr and scheduler.config.timestep_spacing == 'leading'
    assert GeneratorConfig().unet.widths == (32, 64, 64)


def test_recipes_are_the_papers():
    simplified, original = RECIPES['paper_simplified'].objective, RECIPES['paper_original'].objective
    names = ('num_train_timesteps', 'weighting', 'label_dropout')
    assert [getattr(simplified, name) for name in names] == [1000, 'uniform', 0]
    assert [getattr(original, name) for name in names] == [300, 'cosine', 0.1]
    for name in ('paper_simplified', 'paper_original'):
        objective, loop = RECIPES[name].objective, RECIPES[name].loop
        assert (objective.signal, objective.beta_schedule, objective.prediction_type) == ('unit', 'linear', 'epsilon')
        assert (loop.lr, loop.batch_size, loop.weight_decay, loop.ema_decay) == (1e-4, 64, 0, None)


def test_rare_classes_more_often_and_the_same_rows_again():
    labels = np.array([[1, 0]] * 90 + [[1, 1]] * 9 + [[0, 0]], np.float32)
    weights = balance_weights(labels, 0.5)
    assert weights.sum() == pytest.approx(1) and weights[90] / weights[0] == pytest.approx((99 / 9) ** 0.5)
    assert weights[99] <= weights[0]
    assert balance_weights(labels, 0) == pytest.approx(np.full(100, 0.01))
    assert preview_rows(labels).tolist() == [0, 90]


@pytest.fixture(scope='module')
def cells(tmp_path_factory):
    path, counts = tmp_path_factory.mktemp('cells') / 'store', dict(train=48, val=8, test=8)
    return simulate_store(path, counts, size=32, classes=['Nucleoli', 'Plasma membrane', 'Cytosol'])


def test_balanced_rows_belong_to_the_step(cells):
    config = GeneratorConfig(balance=1.0, loop=dict(batch_size=512))
    rows = [TrainingImages(cells, config, seed).rows_at(step) for seed, step in ((0, 3), (0, 3), (0, 4), (1, 3))]
    assert (rows[0] == rows[1]).all() and (rows[0] != rows[2]).any() and (rows[0] != rows[3]).any()
    assert set(rows[0]) <= set(cells.rows('train'))
    shares, expected = np.bincount(rows[0], minlength=len(cells)) / 512, np.zeros(len(cells))
    expected[cells.rows('train')] = balance_weights(cells.labels[cells.rows('train')], 1.0)
    assert np.abs(shares - expected).max() < 0.04
    halves = [TrainingImages(cells, config).shard(i, 2)[3][1] for i in range(2)]
    assert torch.equal(torch.cat(halves), torch.from_numpy(cells.labels[rows[0]]))


def shortened(name):
    "A recipe for 8 steps, and a small U-Net for it"
    config = RECIPES[name]
    unet = config.unet
    if name != 'paper_simplified':
        unet = UNetConfig(architecture=unet.architecture, widths=(16,) if name in PAPER else (16, 32))
    loop = config.loop.model_copy(update=dict(steps=8, batch_size=8, lr=1e-3))
    return config.model_copy(update=dict(unet=unet, preview_every=4, balance=0.5, loop=loop))


@pytest.mark.parametrize('name', RECIPES)
def test_each_recipe_trains_and_draws(name, cells, tmp_path):
    config = shortened(name)
    pipe = train_generator(cells, tmp_path, config)
    last = json.loads((tmp_path / 'log.jsonl').read_text().splitlines()[-1])
    assert last['step'] == 8
    assert np.mean([last[f'loss_t{i}'] for i in range(4)]) == pytest.approx(last['loss'], rel=1e-3)
    assert sorted(p.name for p in (tmp_path / 'previews').iterdir()) == ['step-000004.png', 'step-000008.png']
    assert 'library_name: diffusers' in (tmp_path / 'pipeline' / 'README.md').read_text()
    assert pipe.config.signal == config.objective.signal
    images = []
    for opened in (pipe, open_pipeline(tmp_path)):
        opened.set_progress_bar_config(disable=True)
        for module in (opened.unet, opened.label_encoder):
            module.to(memory_format=torch.channels_last)
        images.append(opened(['Cytosol', 'Nucleoli'], 1, 3, torch.Generator().manual_seed(0)))
    assert torch.equal(*images) and images[0].shape == (2, 4, 32, 32)


def test_interrupted_and_continued_it_is_the_same(cells, tmp_path, monkeypatch):
    loop = dict(steps=12, batch_size=8, lr=1e-3, ema_decay=0.9, checkpoint_seconds=0)
    config = GeneratorConfig(unet=dict(widths=(16, 32)), balance=1.0, preview_every=4, loop=loop)
    whole, cut = tmp_path / 'whole', tmp_path / 'cut'
    train_generator(cells, whole, config)

    def stop(rows, *args, **options):
        if 'step 8' in rows:
            raise KeyboardInterrupt
        return show_cells(rows, *args, **options)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr('protloc.diffusion.train.show_cells', stop)
        train_generator(cells, cut, config)
    assert [p.name for p in (cut / 'checkpoints').iterdir()] == ['step-00000004'] and not (cut / 'pipeline').exists()
    train_generator(cells, cut, config)
    for name in ('last.safetensors', *(f'previews/step-{step:06d}.png' for step in (4, 8, 12))):
        assert (cut / name).read_bytes() == (whole / name).read_bytes()


@pytest.fixture(scope='module')
def apart(cells, tmp_path_factory):
    "A generator trained by one process, and a way to train it by several"
    folder = tmp_path_factory.mktemp('apart')
    loop = dict(steps=10, batch_size=12, lr=1e-3, ema_decay=0.9, checkpoint_steps=2)
    objective = dict(preconditioning='components', weighting='uniform', sigma_min=0.03)
    unet = dict(widths=(16, 32), resnet_time_scale_shift='scale_shift')
    config = GeneratorConfig(unet=unet, objective=objective, balance=0.5, condition='cell_line', loop=loop)
    (folder / 'settings.yaml').write_text(yaml.safe_dump(json.loads(config.model_dump_json())))
    train_generator(cells, folder / 'one', config, seed=3)

    def two(out, killed_at=-1):
        start = [Path(sys.executable).parent / 'torchrun', '--nproc_per_node', '2', SCRIPT]
        command = [*start, cells.path, folder / 'settings.yaml', out, str(killed_at)]
        return subprocess.run(command, capture_output=True, text=True, env={**os.environ, 'OMP_NUM_THREADS': '1'})

    return folder / 'one', two


def logged(folder):
    lines = [json.loads(line) for line in (folder / 'log.jsonl').read_text().splitlines()]
    return [[line[name] for name in ('step', 'loss', 'loss_t0', 'loss_t3')] for line in lines]


@pytest.mark.slow
def test_two_processes_train_the_same_generator(apart, tmp_path):
    one, two = apart
    done = two(tmp_path / 'two')
    assert done.returncode == 0, done.stderr[-3000:]
    assert np.allclose(logged(tmp_path / 'two'), logged(one), rtol=1e-4)
    expected = load_file(one / 'last.safetensors')
    for name, value in load_file(tmp_path / 'two' / 'last.safetensors').items():
        torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-4)
    assert open_pipeline(tmp_path / 'two').config.conditions


@pytest.mark.thorough
def test_two_processes_killed_and_continued(apart, tmp_path):
    "The second process is killed at step 7; continued by two, the weights are bit for bit those of two never stopped"
    _, two = apart
    cut, whole = tmp_path / 'cut', tmp_path / 'whole'
    assert two(cut, killed_at=7).returncode != 0
    assert not (cut / 'pipeline').exists() and (cut / 'checkpoints' / 'step-00000006').exists()
    assert two(cut).returncode == 0 and two(whole).returncode == 0
    assert (cut / 'last.safetensors').read_bytes() == (whole / 'last.safetensors').read_bytes()


def test_accumulated_micro_batches_train_the_same_generator(apart, cells, tmp_path):
    one, _ = apart
    config = read_config(GeneratorConfig, read_yaml(one.parent / 'settings.yaml'))
    loop = config.loop.model_copy(update=dict(accumulate=3))
    train_generator(cells, tmp_path / 'accumulated', config.model_copy(update=dict(loop=loop)), seed=3)
    assert np.allclose(logged(tmp_path / 'accumulated'), logged(one), rtol=1e-4)


def test_a_condition_is_drawn_and_noted(apart, tmp_path):
    pipe = open_pipeline(apart[0])
    pipe.set_progress_bar_config(disable=True)
    cell_lines = pipe.config.conditions

    def draw(condition):
        generators = [torch.Generator().manual_seed(i) for i in range(2)]
        return pipe(['Cytosol'] * 2, 1.5, 2, generators, output_type='signal', condition=condition)

    each = draw(cell_lines[:2])
    same, other = draw(cell_lines[0])[0], draw(cell_lines[1])[0]
    assert (same - each[0]).abs().max() < 1e-4 < (other - each[0]).abs().max()
    assert (draw(None) - each).abs().max() > 1e-4
    rows = _with_condition(pipe, np.zeros((len(cell_lines), 3), np.float32), cell_lines)
    assert cell_lines != sorted(cell_lines, key=int) and torch.equal(rows[:, 3:], torch.eye(len(cell_lines)))

    config = GenerateConfig(num_inference_steps=2, condition=cell_lines[0])
    store = generate(pipe, tmp_path / 'store', np.eye(3, dtype=np.float32), config)
    assert set(store.table.cell_line.astype(str)) == {cell_lines[0]}
    assert store.manifest['made']['condition'] == cell_lines[0]
    for wrong, message in ((cell_lines[:3], '3 conditions for 2 images'), ('nowhere', 'nowhere')):
        with pytest.raises(InputError, match=message):
            draw(wrong)
    with pytest.raises(InputError, match="no column 'slide'"):
        train_generator(store, tmp_path / 'other', GeneratorConfig(condition='slide'))


@pytest.mark.parametrize('name', PAPER)
def test_paper_denoisers_learn(name):
    "On one batch with the same noise each time the loss falls"
    config = RECIPES[name].model_copy(update=dict(unet=UNetConfig(architecture=name, widths=(32,))))
    num_train_timesteps = config.objective.num_train_timesteps
    with seeded(0, 'test'):
        denoiser = build_denoiser(4, 3, 16, config.unet, num_train_timesteps)
    torch.manual_seed(0)
    timesteps = torch.randint(num_train_timesteps, (16,))
    batch = (
        torch.randint(0, 256, (16, 4, 16, 16), dtype=torch.uint8),
        torch.eye(3)[torch.arange(16) % 3],
        torch.randn(16, 4, 16, 16),
        timesteps,
        torch.zeros(16, dtype=torch.bool),
    )
    optimizer = torch.optim.Adam(denoiser.parameters(), 2e-3)
    loss, losses = generator_loss(config, make_scheduler(config.objective)), []
    for _ in range(25):
        value, _ = loss(denoiser, batch)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        losses.append(value.item())
    assert losses[-1] < 0.8 * losses[0] and all(p.grad is not None for p in denoiser.parameters())


@pytest.mark.parametrize('kind,black', [('sqrt', 1), ('symmetric', 1), ('unit', 0)])
def test_the_loss_sees_the_range_that_is_asked_for(kind, black):
    config = GeneratorConfig(unet=dict(patch_size=1), objective=dict(signal=kind, weighting='uniform'))
    blank = (
        torch.zeros(2, 4, 8, 8, dtype=torch.uint8),
        torch.zeros(2, 3),
        torch.zeros(2, 4, 8, 8),
        torch.zeros(2, dtype=torch.long),
        torch.zeros(2, dtype=torch.bool),
    )
    loss = generator_loss(config, make_scheduler(config.objective))
    assert loss(lambda noisy, *rest: torch.zeros_like(noisy), blank)[0] == black


def test_gradient_checkpointing_changes_no_gradient():
    gradients = []
    for checkpointing in (False, True):
        with seeded(0, 'test'):
            denoiser = build_denoiser(4, 3, 16, UNetConfig(widths=(16, 32))).train()
        if checkpointing:
            denoiser.unet.enable_gradient_checkpointing()
        denoiser(torch.ones(1, 16, 8, 8), torch.tensor([5]), torch.eye(3)[:1]).square().sum().backward()
        gradients.append(denoiser.unet.conv_in.weight.grad)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize(
    'values,message',
    [
        (dict(unet=dict(architecture='paper_simplifed')), "did you mean 'paper_simplified'?"),
        (dict(unet=dict(architecture='xxl')), 'there is no architecture'),
        (
            dict(unet=dict(architecture='paper_original', attention=True)),
            'has no attention: only its widths can be changed',
        ),
        (dict(unet=dict(architecture='paper_simplified', widths=[64, 64])), 'has one width'),
        (dict(unet=dict(architecture='paper_simplified'), gradient_checkpointing=True), 'leave it off'),
        (dict(objective=dict(rescale_betas_zero_snr=True, prediction_type='epsilon')), 'use v_prediction or sample'),
        (dict(objective=dict(weighting='cosin')), 'weighting'),
        (dict(objective=dict(signal='log')), 'signal'),
    ],
)
def test_settings_that_cannot_be(values, message):
    with pytest.raises(InputError, match='(?s)' + message.replace('?', r'\?')) as error:
        read_config(GeneratorConfig, values)
    assert '\n' not in str(error.value)


@pytest.mark.parametrize(
    'architecture,size,message',
    [
        ('xs', 30, 'use a multiple of 8'),
        ('l', 24, 'use a multiple of 16'),
        ('paper_original', 30, 'use a multiple of 4'),
    ],
)
def test_images_that_cannot_be_halved(architecture, size, message):
    with pytest.raises(InputError, match=message), torch.device('meta'):
        build_denoiser(4, 3, size, UNetConfig(architecture=architecture))


@pytest.mark.parametrize('architecture', ['xs', *PAPER])
def test_labels_of_another_width(architecture):
    with pytest.raises(InputError, match='give rows of 3 numbers'):
        answer(built(architecture), 0, [1.0, 0, 0, 0])


def test_a_store_without_training_images(cells, tmp_path):
    rest = simulate_store(tmp_path / 'rest', dict(val=8), size=32, classes=['Nucleoli', 'Cytosol'])
    with pytest.raises(InputError, match="no image in its split 'train'"):
        train_generator(rest, tmp_path / 'run', GeneratorConfig(unet=dict(widths=(16, 32))))
