"""Classifiers on the command line: presets and strategies, thresholds, averages, export; a study with a teacher."""

import json

import numpy as np
import pandas as pd
import pytest
import torch

from protloc.classify.export import open_exported
from protloc.data.simulate.datasets import simulate_store
from protloc.data.store import ImageStore
from protloc.study.arms import study_config
from protloc.study.folder import RunFolder
from protloc.study.runner import run_study

QUICK_SETTINGS = ('backbone=resnet10', 'weights=none', 'loop={steps: 4, batch_size: 8, evaluate_every: 2}')
QUICK = [word for setting in QUICK_SETTINGS for word in ('--set', setting)]


@pytest.fixture(scope='module')
def cells(tmp_path_factory):
    "Two stores of simulated cells"
    folder = tmp_path_factory.mktemp('cells')
    counts = dict(train=32, val=16, test=16)
    classes = ['Nucleoli', 'Plasma membrane', 'Cytosol']
    return [simulate_store(folder / f'{i}', counts, size=32, classes=classes, seed=i).path for i in range(2)]


def test_a_preset_and_its_arm(protloc, cells, tmp_path):
    train = ('train-classifier', cells[0], tmp_path / 'model', '--preset', 'paper/mix_loss', *QUICK)
    code, _, err = protloc(*train)
    assert code == 2
    assert 'needs synthetic images: name a store with --synthetic' in err
    assert protloc(*train, '--synthetic', cells[1])[0] == 0
    noted = json.loads((tmp_path / 'model' / 'settings.json').read_text())
    assert (noted['strategy'], noted['options'], noted['config']['keep']) == ('mix_loss', {'as_released': True}, 'last')
    code, _, err = protloc(*train, '--synthetic', cells[1], '--option', 'as_released=false')
    assert code == 2
    assert 'other settings' in err


@pytest.mark.parametrize(
    'words,message',
    [
        (('--strategy', 'mixloss'), "did you mean 'mix_loss'?"),
        (('--strategy', 'soft_labels'), 'needs a teacher'),
        (('--strategy', 'concat', '--option', 'gamma=2'), "there is no setting 'gamma'"),
        (('--strategy', 'concat', '--option', 'name=1'), "there is no setting 'name'"),
        (('--strategy', 'concat', '--option', 'align=['), 'is not a value in YAML'),
        (('--set', 'backbone.x=1'), 'has no parts'),
        ((), 'leave out --synthetic'),
        (('--strategy', 'concat', '--set', 'criterion=arcface'), 'use the head cosine'),
        (('--strategy', 'concat', '--set', 'loop={schedule: plateau, patience: 3}'), 'make plateau_patience smaller'),
        (('--strategy', 'pretrain_finetune', '--set', 'loop={steps: 4, patience: 2}'), 'leave out patience'),
        (('--strategy', 'concat', '--set', 'criterion_options.name=x'), 'does not take name'),
        (('--strategy', 'concat', '--ratio', '0'), 'must be above 0'),
        (
            ('--strategy', 'mix_representation', '--set', 'criterion=arcface', '--set', 'head=cosine'),
            'defined for labels of 0 and 1 only',
        ),
        (('--set', 'backbone=resnet81'), "did you mean 'resnet18'?"),
        (('--strategy', 'concat', '--set', 'backbone=vit_b_16', '--set', 'pooling=max'), 'vit_b_16'),
        (('--strategy', 'concat', '--set', 'weights=nowhere.pth'), 'nowhere.pth'),
        (('--preset', 'paper/generator_original'), 'has no classifier'),
    ],
)
def test_mistakes(protloc, cells, tmp_path, words, message):
    code, _, err = protloc('train-classifier', cells[0], tmp_path / 'model', '--synthetic', cells[1], *QUICK, *words)
    assert code == 2
    assert message in err
    assert err.count('\n') == 1
    assert not (tmp_path / 'model').exists()


@pytest.mark.slow
def test_from_training_to_one_file(protloc, cells, tmp_path):
    "Two seeds, averaged; thresholds; scores with them; one of the two exported with its thresholds inside"
    one, other = tmp_path / '0', tmp_path / '1'
    for seed, folder in enumerate((one, other)):
        assert protloc('train-classifier', cells[0], folder, *QUICK, '--seed', seed)[0] == 0

    both = ('--also', other, '--tta')
    code, out, err = protloc('thresholds', one, cells[0], *both)
    assert code == 2
    assert 'name a file for them with --out' in err
    of_both = tmp_path / 'both.csv'
    assert protloc('thresholds', one, cells[0], *both, '--rule', 'prevalence', '--out', of_both)[0] == 0
    at_half, at_chosen = (protloc('evaluate', one, cells[0], *both, '--threshold', t)[1] for t in ('0.5', of_both))
    assert 'macro_f1' in at_half
    assert at_half != at_chosen

    assert protloc('thresholds', one, cells[0])[0] == 0
    limits = json.loads((one / 'thresholds.json').read_text())
    assert protloc('export', one, tmp_path / 'model.onnx')[0] == 0
    predict, card = open_exported(tmp_path / 'model.onnx')
    assert card['thresholds'] == pytest.approx(limits)
    images = torch.from_numpy(np.array(ImageStore(cells[0]).images[:3]))
    assert predict(images).shape == (3, 3)

    code, _, err = protloc('export', one, tmp_path / 'model.x', '--kind', 'onyx')
    assert code == 2
    assert "did you mean 'onnx'?" in err
    (tmp_path / 'other.csv').write_text('class,threshold\nNucleoli,0.5\nGolgi,0.5\n')
    code, _, err = protloc('evaluate', one, cells[0], '--threshold', tmp_path / 'other.csv')
    assert code == 2
    assert 'another vocabulary' in err


def test_parquet_and_folders(protloc, challenge, tmp_path):
    pytest.importorskip('pyarrow')
    assert protloc('prepare', challenge, tmp_path / 'store', '--size', 32, '--workers', 1)[0] == 0
    assert protloc('train-classifier', tmp_path / 'store', tmp_path / 'model', *QUICK)[0] == 0
    predict = ('predict', tmp_path / 'model', challenge, tmp_path / 'predicted.csv', '--tta')
    code, _, err = protloc(*predict, '--probabilities', tmp_path / 'p.parquet')
    assert code == 0, err
    assert pd.read_parquet(tmp_path / 'p.parquet').shape == (8, 28)
    assert len(pd.read_csv(tmp_path / 'predicted.csv')) == 8


@pytest.mark.parametrize(
    'content,message',
    [
        ('backbone: resnet18', 'put its settings under `classifier:`'),
        ('classifier: {}\narms: 3', 'must be a list'),
        ('classifier:\narms: [{strategy: mix_loss}]', "'name'"),
        ('classifier: [', 'not valid YAML'),
    ],
)
def test_slips_in_ones_own_preset(protloc, cells, tmp_path, content, message):
    (tmp_path / 'mine.yaml').write_text(content)
    train = ('train-classifier', cells[0], tmp_path / 'model', '--set', 'loop.steps=2')
    code, _, err = protloc(*train, '--preset', tmp_path / 'mine.yaml')
    assert code == 2
    assert message in err
    assert err.count('\n') == 1, err


def test_a_folder_where_a_file_is_wanted(protloc, cells, tmp_path):
    assert protloc('train-classifier', cells[0], tmp_path / 'model', *QUICK)[0] == 0
    for words in (
        ('export', tmp_path / 'model', tmp_path, '--kind', 'torchscript'),
        ('evaluate', tmp_path / 'model', cells[0], '--threshold', tmp_path),
        ('thresholds', tmp_path / 'model', cells[0], '--out', tmp_path / 't.txt'),
    ):
        code, _, err = protloc(*words)
        assert code == 2
        assert err.splitlines()[-1].startswith('protloc: ')
        assert 'Traceback' not in err, err


def test_the_papers_generator_is_drawn_from_as_its_preset_says(protloc, cells, tmp_path):
    generator, drawn = tmp_path / 'generator', tmp_path / 'drawn'
    preset = ('--preset', 'paper/generator_simplified')
    assert protloc('train-generator', cells[0], generator, *preset, '--set', 'loop.steps=2')[0] == 0
    few = ('--images', 7, '--num-inference-steps', 3)
    assert protloc('generate', generator, drawn, '--like', cells[0], *preset, *few)[0] == 0
    store = ImageStore(drawn)
    made = store.manifest['made']
    assert (made['scheduler'], made['guidance_scale']) == ('ddpm', 1)
    assert (made['num_inference_steps'], made['plan']) == (3, 'single')
    assert (store.labels.sum(1) == 1).all()
    assert store.labels.sum(0).tolist() == [3, 2, 2]


def test_presets_are_a_table(protloc):
    lines = protloc('presets')[1].splitlines()
    column = lines[0].index('run')
    assert lines[0].startswith('demo')
    assert all(line[column:].startswith(('run', 'train-')) for line in lines)
    assert len(lines) > 12


@pytest.mark.slow
def test_a_study_with_a_teacher_and_the_new_arms(tmp_path):
    "The taught arm comes last, even where it is named first"
    own_statistics = '{name: own_statistics, strategy: mix_loss, options: {aux_bn: true}}'
    config = study_config(
        'demo',
        overrides=[
            'data.simulate.counts={train: 60, val: 20, test: 20}',
            'data.simulate.classes=[Nucleoli, Cytosol]',
            'seeds=1',
            f'arms=[soft_labels, real, duplicate_real, {own_statistics}, pretrain_finetune]',
            'generator.loop={steps: 4, batch_size: 8}',
            'generator.unet.widths=[16, 32]',
            'generate={images: 16, num_inference_steps: 2}',
            'classifier.loop={steps: 4, batch_size: 8, evaluate_every: 2}',
        ],
    )
    run = RunFolder(tmp_path / 'run')
    run_study(config, run.path)
    assert all(run.trained(arm.name, 0) for arm in config.arms)
    assert list(run.classifier('soft_labels', 0).glob('teacher-*.npy'))
