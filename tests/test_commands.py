"""Classifiers on the command line: presets and strategies, thresholds, averages, export; a study with a teacher."""

import json

import numpy as np
import pandas as pd
import pytest

from protloc.classify.export import open_exported
from protloc.data.simulate import simulate_store
from protloc.data.store import ImageStore
from protloc.study.arms import study_config
from protloc.study.runner import run_folder, run_study

QUICK = (
    '--set',
    'backbone=resnet10',
    '--set',
    'weights=none',
    '--set',
    'loop={steps: 4, batch_size: 8, evaluate_every: 2}',
)


@pytest.fixture(scope='module')
def cells(tmp_path_factory):
    folder, parts = tmp_path_factory.mktemp('cells'), dict(train=32, val=16, test=16)
    return [
        simulate_store(folder / f'{i}', parts, size=32, classes=['Nucleoli', 'Plasma membrane', 'Cytosol'], seed=i).path
        for i in range(2)
    ]


def test_a_preset_and_its_arm(protloc, cells, tmp_path):
    train = ('train-classifier', cells[0], tmp_path / 'model', '--preset', 'paper/mix_loss', *QUICK)
    code, _, err = protloc(*train)
    assert code == 2 and 'needs synthetic images: name a store with --synthetic' in err
    assert protloc(*train, '--synthetic', cells[1])[0] == 0
    held = json.loads((tmp_path / 'model' / 'settings.json').read_text())
    assert (held['strategy'], held['options'], held['config']['keep']) == ('mix_loss', {'as_released': True}, 'last')
    code, _, err = protloc(*train, '--synthetic', cells[1], '--option', 'as_released=false')
    assert code == 2 and 'other settings' in err


@pytest.mark.parametrize(
    'words,said',
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
def test_mistakes(protloc, cells, tmp_path, words, said):
    code, _, err = protloc('train-classifier', cells[0], tmp_path / 'model', '--synthetic', cells[1], *QUICK, *words)
    assert code == 2 and said in err and err.count('\n') == 1 and not (tmp_path / 'model').exists()


def test_from_training_to_one_file(protloc, cells, tmp_path):
    "Two seeds, averaged; thresholds; scores with them; one of the two exported with its thresholds inside"
    for seed in (0, 1):
        assert protloc('train-classifier', cells[0], tmp_path / f'{seed}', *QUICK, '--seed', seed)[0] == 0
    both = ('--also', tmp_path / '1', '--tta')
    code, out, err = protloc('thresholds', tmp_path / '0', cells[0], *both)
    assert code == 2 and 'name a file for them with --out' in err
    assert (
        protloc('thresholds', tmp_path / '0', cells[0], *both, '--rule', 'prevalence', '--out', tmp_path / 'both.csv')[
            0
        ]
        == 0
    )
    told = [
        protloc('evaluate', tmp_path / '0', cells[0], *both, '--threshold', t)[1]
        for t in ('0.5', tmp_path / 'both.csv')
    ]
    assert protloc('thresholds', tmp_path / '0', cells[0])[0] == 0
    limits = json.loads((tmp_path / '0' / 'thresholds.json').read_text())
    assert 'macro_f1' in told[0] and told[0] != told[1]
    assert protloc('export', tmp_path / '0', tmp_path / 'model.onnx')[0] == 0
    predict, card = open_exported(tmp_path / 'model.onnx')
    assert card['thresholds'] == pytest.approx(limits) and predict(np_images(cells[0])).shape == (3, 3)
    code, _, err = protloc('export', tmp_path / '0', tmp_path / 'model.x', '--kind', 'onyx')
    assert code == 2 and "did you mean 'onnx'?" in err
    (tmp_path / 'other.csv').write_text('class,threshold\nNucleoli,0.5\nGolgi,0.5\n')
    code, _, err = protloc('evaluate', tmp_path / '0', cells[0], '--threshold', tmp_path / 'other.csv')
    assert code == 2 and 'another vocabulary' in err


def np_images(store):
    import torch

    return torch.from_numpy(np.array(ImageStore(store).images[:3]))


def test_parquet_and_folders(protloc, challenge, tmp_path):
    pytest.importorskip('pyarrow')
    assert protloc('prepare', challenge, tmp_path / 'store', '--size', 32, '--workers', 1)[0] == 0
    assert protloc('train-classifier', tmp_path / 'store', tmp_path / 'model', *QUICK)[0] == 0
    code, _, err = protloc(
        'predict',
        tmp_path / 'model',
        challenge,
        tmp_path / 'said.csv',
        '--tta',
        '--probabilities',
        tmp_path / 'p.parquet',
    )
    assert code == 0, err
    assert pd.read_parquet(tmp_path / 'p.parquet').shape == (8, 28) and len(pd.read_csv(tmp_path / 'said.csv')) == 8


@pytest.mark.parametrize(
    'content,said',
    [
        ('backbone: resnet18', 'put its settings under `classifier:`'),
        ('classifier: {}\narms: 3', 'must be a list'),
        ('classifier:\narms: [{strategy: mix_loss}]', "'name'"),
        ('classifier: [', 'not valid YAML'),
    ],
)
def test_slips_in_ones_own_preset(protloc, cells, tmp_path, content, said):
    (tmp_path / 'mine.yaml').write_text(content)
    code, _, err = protloc(
        'train-classifier', cells[0], tmp_path / 'model', '--preset', tmp_path / 'mine.yaml', '--set', 'loop.steps=2'
    )
    assert code == 2 and said in err and err.count('\n') == 1, err


def test_a_folder_where_a_file_is_wanted(protloc, cells, tmp_path):
    assert protloc('train-classifier', cells[0], tmp_path / 'model', *QUICK)[0] == 0
    for words in (
        ('export', tmp_path / 'model', tmp_path, '--kind', 'torchscript'),
        ('evaluate', tmp_path / 'model', cells[0], '--threshold', tmp_path),
        ('thresholds', tmp_path / 'model', cells[0], '--out', tmp_path / 't.txt'),
    ):
        code, _, err = protloc(*words)
        assert code == 2 and err.splitlines()[-1].startswith('protloc: ') and 'Traceback' not in err, err


def test_the_papers_generator_is_drawn_from_as_its_preset_says(protloc, cells, tmp_path):
    assert (
        protloc(
            'train-generator',
            cells[0],
            tmp_path / 'generator',
            '--preset',
            'paper/generator_simplified',
            '--set',
            'loop.steps=2',
        )[0]
        == 0
    )
    draw = (
        'generate',
        tmp_path / 'generator',
        tmp_path / 'drawn',
        '--like',
        cells[0],
        '--preset',
        'paper/generator_simplified',
        '--images',
        7,
        '--steps',
        3,
    )
    assert protloc(*draw)[0] == 0
    store = ImageStore(tmp_path / 'drawn')
    made = store.manifest['made']
    assert (made['scheduler'], made['guidance_scale'], made['num_inference_steps'], made['plan']) == (
        'ddpm',
        1,
        3,
        'single',
    )
    assert (store.labels.sum(1) == 1).all() and store.labels.sum(0).tolist() == [3, 2, 2]


def test_presets_are_a_table(protloc):
    lines = protloc('presets')[1].splitlines()
    at = lines[0].index('run')
    assert (
        lines[0].startswith('demo')
        and all(line[at:].startswith(('run', 'train-')) for line in lines)
        and len(lines) > 12
    )


def test_a_study_with_a_teacher_and_the_new_arms(tmp_path):
    "The taught arm comes last, even where it is named first"
    arms = (
        '[soft_labels, real, duplicate_real, {name: own_statistics, strategy: mix_loss, options: {aux_bn: true}},'
        ' pretrain_finetune]'
    )
    c = study_config(
        'demo',
        overrides=[
            'data.simulate.counts={train: 60, val: 20, test: 20}',
            'data.simulate.classes=[Nucleoli, Cytosol]',
            'seeds=1',
            f'arms={arms}',
            'generator.loop={steps: 4, batch_size: 8}',
            'generator.unet.widths=[16, 32]',
            'generate={images: 16, num_inference_steps: 2}',
            'classifier.loop={steps: 4, batch_size: 8, evaluate_every: 2}',
        ],
    )
    run_study(c, tmp_path / 'run')
    for arm in c.arms:
        assert (run_folder(tmp_path / 'run', arm.name, 0) / 'test.npy').exists()
    assert list(run_folder(tmp_path / 'run', 'soft_labels', 0).glob('teacher-*.npy'))
