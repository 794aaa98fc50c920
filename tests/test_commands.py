"""Classifiers on the command line: presets and strategies, thresholds, averages, export; a study with a teacher."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from PIL import Image

from protloc.classify.export import open_exported
from protloc.core import InputError
from protloc.data.simulate.datasets import simulate_store
from protloc.data.store import ImageStore
from protloc.files import read_yaml
from protloc.study.arms import study_config
from protloc.study.folder import RunFolder
from protloc.study.runner import claim_folder, run_study

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
        (('--strategy', 'concat', '--option', 'align=['), 'is not valid YAML'),
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
            'replicates=2',
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


# --- the options of `prepare`, and the same as settings of a study


def test_options_of_prepare_are_noted(protloc, challenge, tmp_path):
    shares = ('--train', 0.5, '--val', 0.25, '--test', 0.25)
    how = ('--fit', 'pad', '--enlarge', '--group-from', r'^(f\d)', *shares)
    code, _, err = protloc('prepare', challenge, tmp_path / 'store', '--size', 32, '--workers', 1, *how)
    assert code == 0, err
    made = ImageStore(tmp_path / 'store').manifest['made']
    assert (made['fit'], made['enlarge'], made['group_from']) == ('pad', True, r'^(f\d)')
    assert made['fractions'] == dict(train=0.5, val=0.25, test=0.25)


@pytest.mark.parametrize(
    'words,message',
    [
        (('--train', 0.5), '--train, --val and --test: the shares of train, val and test must add up to 1'),
        (('--fit', 'pda'), "'fit' is wrong: Input should be 'crop', 'pad' or 'stretch', got 'pda'"),
        (('--size', 1000), 'would have to be enlarged to 1000'),
        (('--exclude', '*'), 'has no image'),
        (('--group-from', 'plate'), "--group-from 'plate' is not"),
    ],
)
def test_mistakes_of_prepare(protloc, challenge, tmp_path, words, message):
    code, _, err = protloc('prepare', challenge, tmp_path / 'store', '--workers', 1, *words)
    assert code == 2
    assert message in err.strip().splitlines()[-1]
    assert not (tmp_path / 'store').exists()


def test_helps_are_whole_and_name_the_formats(protloc):
    whole = protloc('--help')[1]
    assert '...' not in whole.replace('[ARGS]...', '')
    assert max(map(len, whole.splitlines())) <= 80
    for command in ('prepare', 'predict'):
        shown = ' '.join(protloc(command, '--help')[1].split())
        assert 'Formats: png, jpg, ' in shown and ' tif, ' in shown and 'FORMATS' not in shown


TINY = [
    '--set',
    'generator={unet: {widths: [8, 16]}, loop: {steps: 2, batch_size: 4}}',
    '--set',
    'generate={images: 4, num_inference_steps: 2}',
    '--set',
    'classifier={backbone: resnet10, loop: {steps: 2, batch_size: 4}}',
    '--set',
    'arms=[real, concat]',
    '--set',
    'replicates=2',
]


def test_a_study_refuses_what_prepare_refuses_and_leaves_the_list_alone(protloc, challenge, tmp_path):
    "In its own words: `run` has no --size. The same command with a mend works in the same folder"
    (challenge / 'train' / 'f3_blue.png').write_text('hello')
    run = ('run', 'tiny', '--data', challenge, '--out', tmp_path / 'run', *TINY)
    code, _, err = protloc(*run, '--set', 'data.prepare={size: 1000}')
    assert code == 2
    sentence = err.strip().splitlines()[-1]
    assert '8 of 8 fields cannot be used' in sentence
    assert 'or allow it with --set data.prepare.enlarge=true)' in sentence
    code, _, err = protloc(*run, '--set', 'data.prepare={size: 32}')
    assert code == 2
    sentence = err.strip().splitlines()[-1]
    assert '1 of 8 fields cannot be used' in sentence and 'f3_blue.png cannot be decoded' in sentence
    assert sentence.endswith('leave them out with --skip-bad')
    assert sorted(path.name for path in tmp_path.iterdir()) == ['challenge', 'run.bad.csv']
    code, _, err = protloc(*run, '--set', 'data.prepare.chanels=[a]')
    assert code == 2
    assert "there is no setting 'data.prepare.chanels': did you mean 'channels'?" in err
    assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize('how', [['--skip-bad'], ['--set', 'data.prepare.size=16'], ['--set', 'data.prepare={}']])
def test_a_store_is_not_prepared_again(protloc, challenge, tmp_path, how):
    assert protloc('prepare', challenge, tmp_path / 'store', '--size', 32, '--workers', 1)[0] == 0
    code, _, err = protloc('run', 'tiny', '--data', tmp_path / 'store', '--out', tmp_path / 'run', *how)
    assert code == 2 and 'is a store, its images are read as they are: leave out --skip-bad' in err
    assert not (tmp_path / 'run').exists()


@pytest.mark.slow
def test_a_study_reads_a_folder_as_prepare_would(protloc, tmp_path):
    rng = np.random.default_rng(0)
    for name in ('Golgi apparatus', 'Nucleoli'):
        (tmp_path / 'images' / name).mkdir(parents=True)
        for i in range(8):
            for channel in ('dapi', 'gfp'):
                plane = rng.integers(0, 256, (40, 48), dtype=np.uint8)
                Image.fromarray(plane).save(tmp_path / 'images' / name / f'cell{i}_{channel}.png')
    Image.fromarray(plane).convert('RGBA').save(tmp_path / 'images' / name / 'cell5_gfp.png')
    how = ('--set', 'data.prepare={size: 32, channels: [gfp, dapi], normalise: true}')
    code, _, err = protloc(
        'run', 'tiny', '--data', tmp_path / 'images', '--out', tmp_path / 'run', *TINY, *how, '--skip-bad'
    )
    assert code == 0, err
    run = RunFolder(tmp_path / 'run')
    real = run.open_real()
    assert (real.channels, len(real)) == (('gfp', 'dapi'), 15)
    assert real.manifest['made']['normalise'] is True and real.manifest['made']['bad_left_out'] == 1
    assert run.read_settings()['data']['prepare']['skip_bad'] is True
    assert len(pd.read_csv(tmp_path / 'run.bad.csv')) == 1


def test_a_run_that_was_begun_before_a_setting_existed_goes_on(tmp_path):
    config = study_config('tiny', data=tmp_path, overrides=['data.prepare={size: 32}'])
    run = claim_folder(tmp_path / 'run', config)
    run.real.mkdir()
    noted = read_yaml(run.config)
    del noted['filter'], noted['data']['prepare']['fit'], noted['data']['prepare']['fractions']
    run.config.write_text(yaml.safe_dump(noted))
    claim_folder(run.path, config)
    assert read_yaml(run.config) == noted
    with pytest.raises(InputError, match='data.prepare.fit is crop there and pad now'):
        claim_folder(run.path, study_config('tiny', tmp_path, ['data.prepare={size: 32, fit: pad}']))
    run.config.write_text(yaml.safe_dump({**noted, 'knobs': 1}))
    with pytest.raises(InputError, match="version does not take .config.yaml: there is no setting 'knobs'"):
        claim_folder(run.path, config)


# --- the usual mistakes


@pytest.mark.parametrize(
    'words,message',
    [
        (('evaluate', '{cells}', '{tmp}'), 'the order is `protloc evaluate CLASSIFIER STORE`'),
        (('info', '{model}'), 'is a trained classifier, and protloc info wants a store of images there'),
        (('train-generator', '{tmp}/new', '{cells}'), 'the order is `protloc train-generator STORE OUT`'),
        (('train-classifier', '{cells}', '{cells}'), 'wants a trained classifier there'),
        (('prepare', '{cells}', '{tmp}/new'), 'is a store of images, and protloc prepare wants a folder of images'),
        (('prepare', '{model}/classifier.json', '{tmp}/new'), 'is a file, and protloc prepare wants a folder'),
        (('predict', '{model}', '{cells}', '{tmp}/p.csv'), 'the order is `protloc predict CLASSIFIER FOLDER OUT`'),
        (('predict', '{model}', '{tmp}', '{tmp}'), 'is a folder: name the file to write'),
        (('export', '{model}', '{tmp}'), 'is a folder: name the file to write'),
        (('run', '{cells}'), 'is a folder: name a preset first (see `protloc presets`), and the folder with --data'),
        (('run', 'tiny', '--data', '{model}'), 'and --data wants a folder of images or a store there'),
        (('train-classifier', '{cells}', '{tmp}/c', '--synthetic', '{model}'), 'and --synthetic wants a store'),
        (('generate', '{tmp}', '{tmp}/g', '--like', '{model}'), 'and --like wants a store of images there'),
        (('generate', '{tmp}', '{tmp}/g', '--like', '{cells}', '--classifier', '{cells}'), '--classifier wants'),
        (('generate', '{tmp}', '{tmp}/g', '--like', '{cells}', '--best-of', 2), 'name a trained one with --classifier'),
        (('generate', '{tmp}', '{tmp}/g', '--like', '{cells}', '--steps', 2), 'it is called --num-inference-steps'),
        (('evaluate', '{model}', '{cells}', '--part=val'), 'it is called --split'),
    ],
)
def test_one_thing_for_another(protloc, cells, tmp_path, words, message):
    model = tmp_path / 'a model'
    model.mkdir()
    (model / 'classifier.json').write_text('{}')
    words = [str(word).format(cells=cells[0], model=model, tmp=tmp_path) for word in words]
    code, _, err = protloc(*words)
    assert code == 2
    assert message in err
    assert err.count('\n') == 1
    assert [path.name for path in tmp_path.iterdir()] == ['a model']


def test_refusals_name_the_folder_and_a_mend(protloc, cells, challenge, tmp_path):
    assert protloc('prepare', challenge, tmp_path / 'fields', '--size', 32, '--workers', 1)[0] == 0
    assert protloc('train-classifier', tmp_path / 'fields', tmp_path / 'model', *QUICK)[0] == 0
    train = ('train-classifier', cells[0], tmp_path / 'c', *QUICK)
    for words, message in (
        (('--strategy', 'concat', '--synthetic', tmp_path / 'fields'), 'such as `protloc generate` makes'),
        (
            ('--strategy', 'soft_labels', '--synthetic', cells[1], '--teacher', tmp_path / 'model'),
            'choose a --teacher that was trained on images like these',
        ),
        (('--strategy', 'soft_labels', '--synthetic', cells[1]), 'trained on real images with --teacher'),
    ):
        code, _, err = protloc(*train, *words)
        assert code == 2
        sentence = err.strip().splitlines()[-1]
        assert message in sentence
        assert '--teacher' not in words or str(tmp_path / 'model') in sentence
        assert tmp_path / 'fields' not in words or str(tmp_path / 'fields') in sentence
        assert not (tmp_path / 'c').exists()
