"Preconditioning, flow matching and the last noise level: formulas, folders, and schedulers with their usual options"

import inspect
import json

import diffusers
import numpy as np
import pytest
import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from test_pipeline_folder import CLASSES, SOLVERS, exact

from protloc.core import InputError, read_config
from protloc.data.simulate.datasets import simulate_store
from protloc.diffusion.denoiser import LabelEncoder
from protloc.diffusion.generate import GenerateConfig, generate, generator_hash
from protloc.diffusion.objective import ObjectiveConfig, image_and_noise, image_losses, make_scheduler, noisify
from protloc.diffusion.pipeline import (
    LabelConditionedPipeline,
    _draw_values,
    generators_for,
    known_schedulers,
    spaced_timesteps,
    with_scheduler,
)
from protloc.diffusion.precondition import PatchStatistics, Preconditioner, patch_statistics
from protloc.diffusion.train import GeneratorConfig, open_pipeline, train_generator
from protloc.labels import STAINS

FLOWS = sorted(set(known_schedulers(flow=True).values()))


@pytest.fixture(scope='module')
def cells(tmp_path_factory):
    return simulate_store(tmp_path_factory.mktemp('cells') / 'store', dict(train=40, val=8), size=32, classes=CLASSES)


def config(**objective):
    loop = dict(steps=6, batch_size=8, lr=1e-3, ema_decay=0.9)
    return GeneratorConfig(unet=dict(widths=(16, 32)), objective=objective, loop=loop)


OBJECTIVES = {
    'components': dict(preconditioning='components', weighting='uniform', sigma_min=0.03),
    'edm': dict(preconditioning='edm', weighting='snr_plus_one'),
    'flow': dict(prediction_type='flow', weighting='uniform'),
}


@pytest.fixture(scope='module', params=OBJECTIVES)
def trained(request, cells, tmp_path_factory):
    "The name of an objective, and the folder of a generator that was trained with it"
    folder = tmp_path_factory.mktemp(request.param)
    train_generator(cells, folder, config(**OBJECTIVES[request.param]))
    return request.param, folder


def draw(pipe, **options):
    pipe.set_progress_bar_config(disable=True)
    for module in (pipe.unet, pipe.label_encoder):
        module.to(memory_format=torch.channels_last)
    options = dict(dict(guidance_scale=1.5, num_inference_steps=4), **options)
    return pipe(['Cytosol', 'Nucleoli'], generator=generators_for(0, [0, 1]), **options)


def some_statistics(size=4):
    generator = torch.Generator().manual_seed(0)
    mixed = torch.randn(size, size, generator=generator)
    values = torch.randn(500, size, 2, 2, generator=generator)
    return patch_statistics([torch.einsum('dc,nchw->ndhw', mixed, values) + 0.3])


def test_statistics_are_those_of_numpy_however_they_are_batched():
    images = torch.randn(90, 6, 4, 4, generator=torch.Generator().manual_seed(0)) * torch.arange(6)[:, None, None] - 1
    values = images.permute(0, 2, 3, 1).reshape(-1, 6).double().numpy()
    for batches in ([images], images.split(7)):
        found = patch_statistics(batches)
        assert np.allclose(found.mean, values.mean(0))
        assert np.allclose(np.square(found.sigma_data)[:-1], np.linalg.eigvalsh(np.cov(values.T, ddof=0))[:0:-1])
        along = values @ np.array(found.components).T
        assert np.allclose(along.std(0)[:-1], found.sigma_data[:-1]) and found.sigma_data[-1] == 1e-3
    one = patch_statistics(images.split(7), 'edm')
    assert np.allclose(one.sigma_data, values.std()) and np.allclose(one.mean, values.mean())


@pytest.mark.parametrize('timestep', [0, 20, 500, 999])
def test_scales_are_those_of_karras(timestep):
    "With x / alpha and sigma / alpha, the formulas are those of table 1 of the paper"
    statistics, scheduler = some_statistics(), make_scheduler()
    along = Preconditioner(statistics, scheduler)(torch.zeros(1, 4, 2, 2), torch.tensor([timestep]))
    kept = scheduler.alphas_cumprod[timestep].double()
    sigma, data = ((1 - kept) / kept).sqrt(), torch.tensor(statistics.sigma_data).double()
    norm = (sigma**2 + data**2).sqrt()
    for ours, theirs in ((along.c_skip * kept.sqrt(), data**2 / norm**2), (along.c_out, sigma * data / norm)):
        torch.testing.assert_close(ours.flatten().double(), theirs, rtol=3e-3, atol=1e-9)
    torch.testing.assert_close(along.c_in.flatten().double() * kept.sqrt(), 1 / norm, rtol=3e-3, atol=0)


def test_a_spread_of_one_is_the_velocity_but_for_its_sign():
    scheduler = make_scheduler(ObjectiveConfig(prediction_type='v_prediction'))
    size = 4
    eye = tuple(tuple(float(i == j) for j in range(size)) for i in range(size))
    plain = PatchStatistics(mean=(0.0,) * size, sigma_data=(1.0,) * size, components=eye)
    clean, noise = torch.randn(2, 3, size, 2, 2, generator=torch.Generator().manual_seed(0))
    timesteps = torch.tensor([10, 500, 990])
    noisy, velocity = noisify(clean, noise, timesteps, scheduler)
    target = Preconditioner(plain, scheduler)(noisy, timesteps).target(clean)
    torch.testing.assert_close(target, -velocity, rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize('weighting', ['uniform', 'snr_plus_one', 'min_snr', 'cosine'])
def test_weights_of_the_clean_image_are_of_the_same_error(weighting):
    "An error of the answer is an error of the clean image, larger by c_out"
    statistics, scheduler = some_statistics(), make_scheduler()
    preconditioner = Preconditioner(statistics, scheduler)
    clean, noise = torch.randn(2, 3, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    timesteps = torch.tensor([100, 500, 900])
    noisy, _ = noisify(clean, noise, timesteps, scheduler)
    along = preconditioner(noisy, timesteps)
    right = along.target(clean)

    def losses(answer, preconditioner):
        return image_losses(lambda *_: answer, clean, noise, timesteps, scheduler, weighting, 20.0, preconditioner)

    assert losses(right, preconditioner).abs().max() < 1e-6
    wrong = right + 0.1
    with_it = losses(wrong, preconditioner)
    if weighting in ('snr_plus_one', 'min_snr'):
        torch.testing.assert_close(with_it, losses(along.clean(wrong), None))
    else:
        torch.testing.assert_close(with_it, losses(clean + 0.1, None))


def test_noise_levels_between_timesteps():
    for objective in (dict(), dict(beta_schedule='linear'), dict(rescale_betas_zero_snr=True), dict(sigma_min=0.1)):
        scheduler = make_scheduler(ObjectiveConfig(**objective))
        image, noise = image_and_noise(scheduler, torch.arange(1000))
        torch.testing.assert_close(image, scheduler.alphas_cumprod.sqrt(), atol=1e-4, rtol=0)
        between = image_and_noise(scheduler, torch.arange(0, 999, 0.25))[1]
        assert (between.diff() > -1e-7).all() and torch.allclose(between[::4], noise[:-1], atol=1e-6)


class Linear(ModelMixin, ConfigMixin):
    "A denoiser that knows nothing: with preconditioning, the best one for patches of normally distributed values"

    @register_to_config
    def __init__(self, in_channels: int = 16, sample_size: int = 16):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))

    def forward(self, sample, timestep, class_labels=None):
        return type('Answer', (), dict(sample=torch.zeros_like(sample)))


def drawn_spreads(name, sigma_min, steps):
    "Mean of patches drawn with exact answers, and their spread over the right one, for components from .3 to .05"
    generator = np.random.default_rng(0)
    components, _ = np.linalg.qr(generator.normal(size=(16, 16)))
    spread = np.geomspace(0.3, 0.05, 16)
    statistics = PatchStatistics(
        mean=[0.1] * 16, sigma_data=spread.tolist(), components=components.astype(np.float32).tolist()
    )
    pipe = LabelConditionedPipeline(
        Linear(), LabelEncoder(3, 8), with_scheduler(make_scheduler(), name), CLASSES, STAINS, 2, 'symmetric',
        preconditioning=statistics.model_dump(), sigma_min=sigma_min,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    drawn = pipe(['Cytosol'] * 4, 1, steps, generators_for(0, range(4)), output_type='signal')
    patches = torch.nn.functional.pixel_unshuffle(drawn, 2).permute(0, 2, 3, 1).reshape(-1, 16).double().numpy()
    return patches.mean(), ((patches - 0.1) @ components.T).std(0) / spread


@pytest.mark.parametrize('name', ['dpm++', 'unipc', 'ddim', 'ddpm', 'DEISMultistepScheduler'])
@pytest.mark.parametrize('sigma_min', [0.0, 0.02])
def test_normally_distributed_patches_are_drawn_as_they_are(name, sigma_min):
    "Each component comes out with its own spread, and the mean with it"
    mean, ratios = drawn_spreads(name, sigma_min, 300 if name == 'ddpm' else 60)
    assert mean == pytest.approx(0.1, abs=0.02)
    assert ratios.min() > 0.75 and ratios.max() < 1.25


def test_a_last_step_from_little_noise_keeps_what_is_fine():
    _, ratios = drawn_spreads('dpm++', 0.03, 10)
    assert ratios.min() > 0.6 and ratios.max() < 1.25
    assert drawn_spreads('dpm++', 0.0, 10)[1].min() < 0.4


def test_too_few_steps_are_warned_of():
    with pytest.warns(UserWarning, match='HeunDiscreteScheduler with 8 solver steps draws images .* take more steps'):
        drawn_spreads('heun', 0.0, 8)
    with pytest.warns(UserWarning, match='with 1 solver steps'):
        drawn_spreads('ddim', 0.0, 1)


def test_it_is_the_same_in_memory_and_from_its_folder(trained, cells):
    name, folder = trained
    pipe = open_pipeline(folder)
    again = train_generator(cells, folder, config(**OBJECTIVES[name]))
    assert torch.equal(draw(pipe), draw(again)) and draw(pipe).float().std() > 0
    assert generator_hash(pipe) == generator_hash(again)
    assert pipe.config.prediction_type == ('flow' if name == 'flow' else 'sample')
    assert (folder / 'statistics.json').exists() == (name != 'flow')
    by_diffusers = diffusers.DiffusionPipeline.from_pretrained(folder / 'pipeline')
    assert torch.equal(draw(by_diffusers), draw(pipe))
    images = torch.full((2, 4, 32, 32), 60, dtype=torch.uint8)
    assert draw(pipe, images=images, strength=0.5).shape == images.shape


def test_half_precision_rounds_the_answers_alone(trained):
    pipe = open_pipeline(trained[1])
    full = draw(pipe, output_type='signal')
    half = draw(pipe.to(torch.bfloat16), output_type='signal')
    assert 0 < (full - half).abs().mean() < 0.05


def test_trained_again_it_is_the_same_and_goes_on_with_its_statistics(cells, tmp_path, monkeypatch):
    "The statistics that a training began with are those of the whole training, on whatever machine it goes on"
    settings = config(**OBJECTIVES['components'])
    train_generator(cells, tmp_path / 'whole', settings)
    train_generator(cells, tmp_path / 'again', settings)
    weights = [(tmp_path / name / 'last.safetensors').read_bytes() for name in ('whole', 'again')]
    assert weights[0] == weights[1]
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr('protloc.diffusion.train._train', lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        train_generator(cells, tmp_path / 'cut', settings)
    monkeypatch.setattr('protloc.diffusion.train.patch_statistics', lambda *_: pytest.fail('measured again'))
    train_generator(cells, tmp_path / 'cut', settings)
    assert (tmp_path / 'cut' / 'last.safetensors').read_bytes() == weights[0]


def test_damaged_statistics_are_one_sentence(cells, tmp_path):
    settings = config(**OBJECTIVES['components'])
    train_generator(cells, tmp_path / 'whole', settings)
    noted = json.loads((tmp_path / 'whole' / 'statistics.json').read_text())
    index = json.loads((tmp_path / 'whole' / 'pipeline' / 'model_index.json').read_text())
    for change, message in (
        (dict(sigma_data=[0.0] * 16), 'sigma_data'),
        (dict(sigma_data=[1e300] * 16), 'sigma_data'),
        (dict(mean=[0.0] * 4), 'not all of 4 values'),
        (dict(components=[[1.0] * 16] * 16), 'not at right angles'),
        (dict(mean='none'), 'mean'),
    ):
        (tmp_path / 'whole' / 'pipeline' / 'model_index.json').write_text(
            json.dumps({**index, 'preconditioning': {**noted, **change}})
        )
        with pytest.raises(InputError, match=message) as error:
            open_pipeline(tmp_path / 'whole')
        assert 'model_index.json' in str(error.value) and '\n' not in str(error.value)


def test_generators_of_before_are_opened_and_draw_the_same(cells, tmp_path):
    pipe = train_generator(cells, tmp_path, config(preconditioning='none', weighting='snr_plus_one', sigma_min=0))
    expected, name = draw(pipe), generator_hash(pipe)
    path = tmp_path / 'pipeline' / 'model_index.json'
    index = json.loads(path.read_text())
    for key in ('preconditioning', 'sigma_min', 'prediction_type', 'noise_schedule'):
        index.pop(key)
    path.write_text(json.dumps(index))
    old = open_pipeline(tmp_path)
    assert torch.equal(draw(old), expected) and generator_hash(old) == name
    old.register_to_config(sigma_min=0.03)
    assert generator_hash(old) != name and not torch.equal(draw(old), expected)


@pytest.mark.parametrize(
    'objective,message',
    [
        (dict(preconditioning='edm', prediction_type='epsilon'), 'use prediction_type sample, not epsilon'),
        (dict(preconditioning='components', prediction_type='flow'), 'use prediction_type sample, not flow'),
        (dict(preconditioning='component'), 'preconditioning'),
        (dict(prediction_type='flow', rescale_betas_zero_snr=True), 'leave out rescale_betas_zero_snr'),
        (dict(prediction_type='flow', sigma_min=0.1), 'leave out sigma_min'),
        (dict(prediction_type='flow', num_train_timesteps=30), 'at least 100 num_train_timesteps, not 30'),
        (dict(sigma_min=-1), 'sigma_min'),
        (dict(sigma_min=50, beta_schedule='linear', num_train_timesteps=300), 'leaves no noise level'),
    ],
)
def test_objectives_that_cannot_be(objective, message):
    with pytest.raises(InputError, match=message) as error:
        read_config(GeneratorConfig, dict(objective=objective))
    assert '\n' not in str(error.value)


def test_patches_that_are_too_large(tmp_path):
    store = simulate_store(tmp_path / 'store', dict(train=4), size=64, classes=CLASSES)
    settings = GeneratorConfig(unet=dict(patch_size=32, widths=(16,)), objective=OBJECTIVES['components'])
    with pytest.raises(InputError, match='at most 1024 values, these have 4096'):
        train_generator(store, tmp_path / 'generator', settings)
    assert not (tmp_path / 'generator').exists()


def test_statistics_of_another_training_are_refused(cells, tmp_path, monkeypatch):
    settings = config(**OBJECTIVES['components'])
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr('protloc.diffusion.train._train', lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        train_generator(cells, tmp_path, settings)
    noted = json.loads((tmp_path / 'statistics.json').read_text())
    for other in (some_statistics().model_dump(), {**noted, 'skip_spread': 1.0}):
        (tmp_path / 'statistics.json').write_text(json.dumps(other))
        with pytest.raises(InputError, match='statistics.json is not of this training'):
            train_generator(cells, tmp_path, settings)


@pytest.mark.parametrize('target', ['epsilon', 'flow'])
def test_a_pipeline_is_not_made_with_what_does_not_fit(target):
    def made(**options):
        trained = make_scheduler(ObjectiveConfig(prediction_type=target if 'scheduler' not in options else 'sample'))
        options.pop('scheduler', None)
        return LabelConditionedPipeline(Linear(), LabelEncoder(3, 8), trained, CLASSES, STAINS, 2, **options)

    statistics = some_statistics(16).model_dump()
    for options, message in (
        (dict(preconditioning=statistics), f"no preconditioning for a model that predicts '{target}'"),
        (dict(preconditioning=some_statistics().model_dump(), scheduler=1), 'is of 4 values, the images need 16'),
        (dict(preconditioning={}), 'preconditioning'),
        (dict(preconditioning=[1]), 'preconditioning'),
        (dict(sigma_min=-1), 'from 0 to 100, not -1'),
        (dict(sigma_min='x'), "from 0 to 100, not 'x'"),
        (dict(sigma_min=float('nan')), 'from 0 to 100, not nan'),
    ):
        with pytest.raises(InputError, match=message) as error:
            made(**options)
        assert '\n' not in str(error.value)
    assert made(preconditioning=statistics, scheduler=1).config.preconditioning


def test_a_short_edit_with_pndm_begins_anew():
    "The shortened scheduler of an edit is not tried as if it drew whole images"
    pipe = exact('PNDMScheduler', 'epsilon', 'linear')
    images = torch.full((1, 4, 32, 32), 150, dtype=torch.uint8)
    options = dict(generator=generators_for(0, [0]), images=images, output_type='signal')
    assert pipe('Cytosol', 1, 100, strength=0.05, **options).isfinite().all()
    with pytest.raises(InputError, match='needs at least 4 solver steps'):
        pipe('Cytosol', 1, 20, strength=0.05, **options)


@pytest.mark.parametrize('name', FLOWS)
def test_flow_solvers_draw_rightly_and_lead_to_one_another(name):
    scheduler = make_scheduler(ObjectiveConfig(prediction_type='flow'))
    solver = with_scheduler(scheduler, name)
    assert type(solver).__name__ == name
    assert _draw_values(solver, scheduler, 0.2, 50).std().item() / 0.2 == pytest.approx(1, abs=0.06)
    assert type(with_scheduler(solver, 'euler')).__name__ == 'FlowMatchEulerDiscreteScheduler'


def test_flow_and_diffusion_do_not_mix(cells, tmp_path):
    flow, diffusion = (make_scheduler(ObjectiveConfig(prediction_type=target)) for target in ('flow', 'sample'))
    with pytest.raises(
        InputError, match="'ddim' draws from models of diffusion only, and this is one of flow matching"
    ):
        with_scheduler(flow, 'ddim')
    with pytest.raises(InputError, match='of flow matching only, and this is one of diffusion: choose one of ddpm'):
        with_scheduler(diffusion, 'FlowMatchEulerDiscreteScheduler')
    pipe = train_generator(cells, tmp_path / 'flow', config(**OBJECTIVES['flow']))
    pipe.scheduler = with_scheduler(diffusion, 'dpm++')
    with pytest.raises(InputError, match="takes the model's answers for 'sample', but it predicts 'flow'"):
        draw(pipe)
    for scheduler, message in (('ddim', 'of diffusion only'), ('LCMScheduler', 'made for distilled models')):
        pipe.scheduler = flow
        with pytest.raises((InputError, ValueError), match=message):
            generate(pipe, tmp_path / 'drawn', np.eye(3, dtype=np.float32), GenerateConfig(scheduler=scheduler))
    drawn = generate(pipe, tmp_path / 'drawn', np.eye(3, dtype=np.float32), GenerateConfig(num_inference_steps=3))
    assert len(drawn) == 3 and drawn.images[:].std() > 0


def test_a_scheduler_with_another_noise_schedule_is_refused(cells, tmp_path):
    "Also after it was saved with the pipeline, where nothing else knows what the training had"
    pipe = train_generator(cells, tmp_path / 'a', config(**OBJECTIVES['components']))
    first, solver = draw(pipe), diffusers.DPMSolverMultistepScheduler
    trained = pipe.scheduler
    for wrong in (
        solver(prediction_type='sample'),
        solver.from_config(trained.config, beta_schedule='linear'),
        solver.from_config(trained.config, num_train_timesteps=500),
    ):
        pipe.scheduler = wrong
        pipe.save_pretrained(tmp_path / 'b')
        for one in (pipe, open_pipeline(tmp_path / 'b')):
            with pytest.raises(InputError, match='its noise schedule is not that of the training'):
                draw(one)
    pipe.scheduler = solver.from_config(trained.config)
    pipe.save_pretrained(tmp_path / 'b')
    assert torch.equal(draw(open_pipeline(tmp_path / 'b')), first)


def test_a_flow_scheduler_with_other_timesteps_is_refused(cells, tmp_path):
    pipe = train_generator(cells, tmp_path, config(**OBJECTIVES['flow']))
    pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(500)
    with pytest.raises(InputError, match='its noise schedule is not that of the training'):
        draw(pipe)


@pytest.mark.parametrize(
    'change',
    [dict(num_train_timesteps='x'), dict(num_train_timesteps=0), dict(beta_end=float('nan')), dict(other=1), 1],
)
def test_a_damaged_noise_schedule_is_one_sentence(cells, tmp_path, change):
    train_generator(cells, tmp_path, config(**OBJECTIVES['components']))
    path = tmp_path / 'pipeline' / 'model_index.json'
    index = json.loads(path.read_text())
    index['noise_schedule'] = {**index['noise_schedule'], **change} if isinstance(change, dict) else change
    path.write_text(json.dumps(index))
    with pytest.raises(InputError, match='noise_schedule') as error:
        open_pipeline(tmp_path)
    assert '\n' not in str(error.value)


@pytest.mark.parametrize('timesteps', [300, 2000, 10_000])
def test_long_trainings_are_tried_too(timesteps):
    "A class that takes the target for another one is found at any length"
    trained = make_scheduler(ObjectiveConfig(num_train_timesteps=timesteps, sigma_min=0))
    for name in ('dpm++', 'ddim', 'ddpm', 'euler', 'heun', 'unipc'):
        assert with_scheduler(trained, name).config.num_train_timesteps == timesteps
    with pytest.raises(InputError, match="that predicts 'sample'"):
        with_scheduler(trained, 'EulerAncestralDiscreteScheduler')


def test_a_scheduler_for_another_target_is_refused(cells, tmp_path):
    pipe = train_generator(cells, tmp_path, config(**OBJECTIVES['components']))
    pipe.scheduler = with_scheduler(make_scheduler(ObjectiveConfig(prediction_type='epsilon')), 'ddim')
    with pytest.raises(InputError, match="answers for 'epsilon', but it predicts 'sample'"):
        draw(pipe)


@pytest.mark.parametrize('beta_schedule', ['linear', 'squaredcos_cap_v2'])
@pytest.mark.parametrize('name', SOLVERS)
def test_the_last_noise_level(name, beta_schedule):
    "It is what is asked for, where a scheduler lets its timesteps be chosen; else its own timesteps are left"
    trained = make_scheduler(ObjectiveConfig(prediction_type='v_prediction', beta_schedule=beta_schedule))
    solver = with_scheduler(trained, name)
    timesteps = spaced_timesteps(solver, 15, 0.05)
    if 'timesteps' not in inspect.signature(solver.set_timesteps).parameters:
        assert timesteps == []
        return
    image, noise = image_and_noise(trained, torch.tensor(timesteps))
    assert timesteps[0] == 999 and len(set(timesteps)) == 15 and sorted(timesteps)[::-1] == timesteps
    assert noise[-1] >= 0.05 * image[-1] and timesteps[-1] < 40
    assert spaced_timesteps(solver, 1000, 0.05) == [] == spaced_timesteps(solver, 15, 0)
    with pytest.raises(InputError, match='leaves no noise level to draw from, the largest is'):
        spaced_timesteps(solver, 15, 1e6)


def usual_options(kind):
    "What users of diffusers set, one at a time"
    known = inspect.signature(kind.__init__).parameters
    for name, values in dict(
        use_karras_sigmas=[True],
        use_exponential_sigmas=[True],
        use_beta_sigmas=[True],
        use_lu_lambdas=[True],
        timestep_spacing=['linspace', 'leading', 'trailing'],
        solver_order=[1, 2, 3],
        solver_type=['midpoint', 'heun', 'bh1', 'bh2', 'logrho'],
        algorithm_type=['dpmsolver', 'dpmsolver++', 'sde-dpmsolver++', 'deis'],
        final_sigmas_type=['zero', 'sigma_min'],
        interpolation_type=['linear', 'log_linear'],
        steps_offset=[1],
        euler_at_final=[True],
        thresholding=[True],
        clip_sample=[True, False],
        lower_order_final=[True, False],
        rescale_betas_zero_snr=[True],
    ).items():
        if name in known:
            yield from (dict({name: value}) for value in values)


@pytest.mark.parametrize('beta_schedule', ['linear', 'squaredcos_cap_v2'])
@pytest.mark.parametrize('name', SOLVERS)
def test_every_scheduler_with_its_usual_options(name, beta_schedule):
    "It draws the right images, or refuses in one sentence; with an option that diffusers itself refuses, so does it"
    pipe = exact(name, 'v_prediction', beta_schedule)
    kind, settings = type(pipe.scheduler), pipe.scheduler.config
    drew = set()
    for options in usual_options(kind):
        try:
            pipe.scheduler = kind.from_config(settings, **options)
        except (NotImplementedError, ValueError, ImportError):
            continue
        try:
            drawn = pipe('Cytosol', 1, 50, generators_for(0, [0]), output_type='signal')
        except InputError as error:
            assert '\n' not in str(error) and 'use_karras_sigmas' not in options
            continue
        drew |= {*options}
        assert drawn.mean().item() == pytest.approx(pipe.unet.MEAN, abs=0.03), options
        assert 0.65 < drawn.std().item() / pipe.unet.SPREAD < 1.4, options
    assert drew or name in ('PNDMScheduler',)


def test_a_training_of_before_goes_on(cells, tmp_path):
    "Settings that a folder of protloc 0.2.0 does not have mean what that version did"
    settings = config(preconditioning='none', sigma_min=0)
    unet = settings.unet.model_copy(update=dict(resnet_time_scale_shift='default'))
    settings = settings.model_copy(update=dict(unet=unet))
    train_generator(cells, tmp_path, settings)
    noted = json.loads((tmp_path / 'settings.json').read_text())
    for section, name in (
        ('objective', 'preconditioning'),
        ('objective', 'sigma_min'),
        ('unet', 'resnet_time_scale_shift'),
    ):
        noted['config'][section].pop(name)
    (tmp_path / 'settings.json').write_text(json.dumps(noted))
    assert train_generator(cells, tmp_path, settings).config.sigma_min == 0
    with pytest.raises(InputError, match='was begun with other settings'):
        train_generator(cells, tmp_path, config(**OBJECTIVES['components']))
