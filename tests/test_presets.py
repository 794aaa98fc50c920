"""Every preset, trained for a few steps; and what is refused."""

import numpy as np
import pytest

from protloc.classify.predict import load_classifier, probabilities
from protloc.classify.train import train_classifier
from protloc.core import InputError
from protloc.data.simulate.datasets import simulate_store
from protloc.diffusion.generate import GenerateConfig, generate
from protloc.diffusion.train import train_generator
from protloc.study.arms import arm_of, commands_of, presets, read_preset, section_config, study_config

FEW = ['loop.steps=2', 'loop.batch_size=4', 'loop.warmup=1']


@pytest.fixture(scope='module')
def cells(tmp_path_factory):
    folder, parts = tmp_path_factory.mktemp('cells'), dict(train=24, val=8, test=8)
    return [
        simulate_store(folder / f'{i}', parts, size=32, classes=['Nucleoli', 'Plasma membrane', 'Cytosol'], seed=i)
        for i in range(2)
    ]


@pytest.mark.parametrize('name', [n for n, p in presets().items() if 'generator' in p])
def test_generators(name, cells, tmp_path):
    pipe = train_generator(cells[0], tmp_path / 'generator', section_config('generator', name, FEW))
    how = GenerateConfig.model_validate({**read_preset(name)['generate'], 'images': 2, 'num_inference_steps': 2})
    drawn = generate(pipe, tmp_path / 'drawn', np.eye(3, dtype=np.float32)[:2], how)
    assert drawn.images.shape == (2, 4, 32, 32) and drawn.images.std() > 0


@pytest.mark.parametrize('name', [n for n, p in presets().items() if 'classifier' in p])
def test_classifiers(name, cells, tmp_path):
    config = section_config('classifier', name, [*FEW, 'weights=none', 'loop.evaluate_every=2'])
    arms = study_config(name).arms if 'run' in commands_of(read_preset(name)) else [arm_of(name)]
    for arm in arms[-1:]:
        train_classifier(
            cells[0],
            tmp_path,
            config,
            arm.kind,
            cells[1] if 'synthetic' in arm.uses else None,
            0,
            arm.partners,
            arm.ratio,
            **arm.options,
        )
    model, card = load_classifier(tmp_path)
    found = probabilities(model, cells[0], cells[0].rows('test'))
    assert card['backbone'] == config.backbone and found.shape == (8, 3) and ((found > 0) & (found < 1)).all()


@pytest.mark.parametrize('name', [n for n, p in presets().items() if 'run' in commands_of(p)])
def test_studies_are_valid(name):
    assert 'real' in [a.name for a in study_config(name, overrides=['data.folder=somewhere']).arms]


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
    for name, p in presets().items():
        assert p['about'].endswith('.') and '\n' not in p['about'] and commands_of(p), name


def test_as_released_and_corrected_differ_where_they_say():
    for name in ('mix_loss', 'mix_representation'):
        released, mended = (section_config('classifier', f'{kind}/{name}') for kind in ('paper', 'corrected'))
        assert (released.keep, released.loop.plateau_mode, mended.keep, mended.loop.plateau_mode) == (
            'last',
            'min',
            'best',
            'max',
        )
        assert arm_of(f'corrected/{name}').options['aux_bn'] and not arm_of(f'paper/{name}').options.get('aux_bn')
    assert arm_of('paper/mix_loss').options == {'as_released': True}


@pytest.mark.parametrize(
    'act,said',
    [
        (lambda: read_preset('paper/mixloss'), "did you mean 'paper/mix_loss'?"),
        (lambda: study_config('paper/mix_loss'), 'train-classifier --preset paper/mix_loss'),
        (lambda: section_config('generator', 'paper/resnet18_bce'), 'has no generator'),
        (lambda: section_config('classifier', 'paper/resnet18_bce', ['lop.steps=3']), "did you mean 'loop'?"),
        (lambda: section_config('classifier', 'paper/resnet18_bce', ['criterion_options.gama=3']), 'does not take'),
        (lambda: arm_of('demo'), 'choose one with --strategy'),
    ],
)
def test_mistakes(act, said):
    with pytest.raises(InputError) as e:
        act()
    assert said in str(e.value) and '\n' not in str(e.value)


def test_a_copied_preset_works(tmp_path):
    from importlib.resources import files

    mine = tmp_path / 'mine.yaml'
    mine.write_text(
        (files('protloc') / 'assets' / 'presets' / 'paper' / 'mix_loss.yaml')
        .read_text()
        .replace('resnet34', 'resnet10')
    )
    assert section_config('classifier', str(mine)).backbone == 'resnet10' and arm_of(str(mine)).kind == 'mix_loss'
    mine.write_text('classifier: {backbone: resnet10')
    with pytest.raises(InputError, match='mine.yaml'):
        section_config('classifier', str(mine))
