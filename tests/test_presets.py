"""Every preset, trained for a few steps; and what is refused."""

from importlib.resources import files

import numpy as np
import pytest

from protloc.classify.predict import load_classifier, probabilities
from protloc.classify.train import train_classifier
from protloc.core import InputError
from protloc.data.simulate.datasets import simulate_store
from protloc.diffusion.generate import GenerateConfig, generate
from protloc.diffusion.train import train_generator
from protloc.study.arms import arm_of, commands_of, presets, read_preset, section_config, study_config

FEW = ['loop.steps=2', 'loop.batch_size=4', 'loop.accumulate=1', 'loop.warmup=1', 'loop.workers=0']


@pytest.fixture(scope='module')
def cells(tmp_path_factory):
    "Two stores, real and synthetic"
    folder, counts = tmp_path_factory.mktemp('cells'), dict(train=24, val=8, test=8)
    classes = ['Nucleoli', 'Plasma membrane', 'Cytosol']
    return [simulate_store(folder / str(seed), counts, size=32, classes=classes, seed=seed) for seed in (0, 1)]


@pytest.mark.slow
@pytest.mark.parametrize('name', [name for name, preset in presets().items() if 'generator' in preset])
def test_generators(name, cells, tmp_path):
    few = [*FEW, *(f'autoencoder.{one}' for one in FEW if 'autoencoder' in read_preset(name)['generator'])]
    pipe = train_generator(cells[0], tmp_path / 'generator', section_config('generator', name, few))
    few = {**read_preset(name)['generate'], 'images': 2, 'num_inference_steps': 2}
    drawn = generate(pipe, tmp_path / 'drawn', np.eye(3, dtype=np.float32)[:2], GenerateConfig.model_validate(few))
    assert drawn.images.shape == (2, 4, 32, 32) and drawn.images.std() > 0


LARGE = ('paper/swin_b_focal', 'paper/vit_b_16_focal')  # networks of 90 million parameters


def classifier_presets():
    "Names of presets with a classifier; those of large networks are slow"
    for name, preset in presets().items():
        if 'classifier' in preset:
            yield pytest.param(name, marks=pytest.mark.slow) if name in LARGE else name


@pytest.mark.slow
@pytest.mark.parametrize('name', classifier_presets())
def test_classifiers(name, cells, tmp_path):
    config = section_config('classifier', name, [*FEW, 'weights=none', 'loop.evaluate_every=2'])
    arm = study_config(name).arms[-2] if 'run' in commands_of(read_preset(name)) else arm_of(name)
    real, synthetic = cells
    wanted = synthetic if 'synthetic' in arm.sources else None
    train_classifier(real, tmp_path, config, arm.kind, wanted, 0, arm.partners, arm.ratio, **arm.options)
    model, card = load_classifier(tmp_path)
    predicted = probabilities(model, real, real.rows('test'))
    assert card['backbone'] == config.backbone
    assert predicted.shape == (8, 3) and ((predicted > 0) & (predicted < 1)).all()


@pytest.mark.parametrize('name', [name for name, preset in presets().items() if 'run' in commands_of(preset)])
def test_studies_are_valid(name):
    study = study_config(name, overrides=['data.folder=somewhere'])
    assert 'real' in [arm.name for arm in study.arms]


def test_names_and_lines():
    names = set(presets())
    assert {
        'demo',
        'paper/mix_loss',
        'paper/mix_representation',
        'paper/generator_simplified',
        'paper/generator_original',
        'corrected/mix_loss',
        'corrected/mix_representation',
    } <= names
    for name, preset in presets().items():
        assert preset['about'].endswith('.') and '\n' not in preset['about'] and commands_of(preset), name


def test_as_released_and_corrected_differ_where_they_say():
    for name in ('mix_loss', 'mix_representation'):
        released = section_config('classifier', f'paper/{name}')
        corrected = section_config('classifier', f'corrected/{name}')
        assert (released.keep, released.loop.plateau_mode) == ('last', 'min')
        assert (corrected.keep, corrected.loop.plateau_mode) == ('best', 'max')
        assert arm_of(f'corrected/{name}').options['aux_bn'] and not arm_of(f'paper/{name}').options.get('aux_bn')
    assert arm_of('paper/mix_loss').options == {'as_released': True}


@pytest.mark.parametrize(
    'act,sentence',
    [
        (lambda: read_preset('paper/mixloss'), "did you mean 'paper/mix_loss'?"),
        (lambda: study_config('paper/mix_loss'), 'train-classifier --preset paper/mix_loss'),
        (lambda: section_config('generator', 'paper/resnet18_bce'), 'has no generator'),
        (lambda: section_config('classifier', 'paper/resnet18_bce', ['lop.steps=3']), "did you mean 'loop'?"),
        (lambda: section_config('classifier', 'paper/resnet18_bce', ['criterion_options.gama=3']), 'does not take'),
        (lambda: arm_of('demo'), 'choose one with --strategy'),
    ],
)
def test_mistakes(act, sentence):
    with pytest.raises(InputError) as e:
        act()
    assert sentence in str(e.value) and '\n' not in str(e.value)


def test_a_copied_preset_works(tmp_path):
    mine = tmp_path / 'mine.yaml'
    preset = files('protloc') / 'assets' / 'presets' / 'paper' / 'mix_loss.yaml'
    mine.write_text(preset.read_text().replace('resnet34', 'resnet10'))
    assert section_config('classifier', str(mine)).backbone == 'resnet10' and arm_of(str(mine)).kind == 'mix_loss'
    mine.write_text('classifier: {backbone: resnet10')
    with pytest.raises(InputError, match='mine.yaml'):
        section_config('classifier', str(mine))
