"""Classifiers: every strategy trains, what decides a result is held, bad input is told in one sentence."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from protloc.classify import train
from protloc.classify.losses import CRITERIA
from protloc.classify.mixing import STRATEGIES, build_strategy
from protloc.classify.predict import load_classifier, probabilities
from protloc.classify.train import ClassifierConfig, strategy_batches, teacher_labels, train_classifier
from protloc.core import InputError, read_config, sha256
from protloc.data.simulate.datasets import simulate_store
from protloc.data.store import write_store
from protloc.labels import Vocabulary

NAMES = ['Nucleoli', 'Plasma membrane', 'Cytosol']
SCRIPTS = Path(__file__).parent / 'scripts'
LOOP = dict(steps=4, batch_size=8, lr=2e-3, evaluate_every=2)


def config(loop=None, **how):
    return ClassifierConfig(backbone='resnet10', loop={**LOOP, **(loop or {})}, **how)


@pytest.fixture(scope='module')
def stores(tmp_path_factory):
    folder = tmp_path_factory.mktemp('stores')
    return tuple(
        simulate_store(folder / name, dict(train=48, val=16), classes=NAMES, seed=seed)
        for name, seed in (('real', 0), ('synthetic', 1))
    )


def store(path, labels, split=None, images=None, names=NAMES):
    "A small store with these labels"
    labels, rng = np.asarray(labels, np.float32), np.random.default_rng(0)
    images = rng.integers(0, 256, (len(labels), 4, 16, 16), dtype=np.uint8) if images is None else images
    vocab = Vocabulary(names)
    table = pd.DataFrame(
        dict(
            id=[f'i{k}' for k in range(len(labels))],
            target=[vocab.decode(row) for row in labels],
            split=split or ['train', 'val'] * (len(labels) // 2),
        )
    )
    return write_store(path, images, table, ['red', 'green', 'blue', 'yellow'], vocab)


@pytest.fixture(scope='module')
def teacher(stores, tmp_path_factory):
    folder = tmp_path_factory.mktemp('teacher')
    train_classifier(stores[0], folder, config())
    return folder


def options_of(name, teacher):
    "What a strategy cannot be trained here without"
    options = dict(below=0.5) if name == 'tail_only' else {}
    return {**options, 'teacher': teacher} if STRATEGIES[name].needs_teacher else options


@pytest.mark.slow
@pytest.mark.parametrize('aux_bn', [False, True])
@pytest.mark.parametrize('name', STRATEGIES)
def test_every_strategy_trains_and_opens(stores, teacher, tmp_path, name, aux_bn):
    real, synthetic = stores
    if aux_bn and name in ('real', 'synthetic', 'duplicate_real'):
        with pytest.raises(InputError, match='aux_bn'):
            train_classifier(real, tmp_path / 'run', config(), name, synthetic, aux_bn=True)
        return
    if name in ('real', 'duplicate_real'):
        with pytest.raises(InputError, match='uses no synthetic images'):
            train_classifier(real, tmp_path / 'run', config(), name, synthetic)
        synthetic = None
    options = options_of(name, teacher)
    if aux_bn:
        options['aux_bn'] = True
    trained = train_classifier(real, tmp_path / 'run', config(), name, synthetic, **options)
    loaded, _ = load_classifier(tmp_path / 'run')
    again = train_classifier(real, tmp_path / 'run', config(), name, synthetic, **options)
    predicted = probabilities(trained, real, real.rows('val'))
    assert np.isfinite(predicted).all()
    assert (predicted == probabilities(loaded, real, real.rows('val'))).all()
    assert (predicted == probabilities(again, real, real.rows('val'))).all()
    assert not any('.aux.' in k for k in again.state_dict())


@pytest.mark.slow
@pytest.mark.parametrize('name', ['pretrain_finetune', 'soft_labels'])
def test_killed_and_continued_bit_for_bit(stores, teacher, tmp_path, monkeypatch, name):
    "With averaged weights, a rate that follows the score, and images drawn by weights"
    loop = dict(steps=12, schedule='plateau', plateau_patience=1, swa_start=0.5, checkpoint_steps=3)

    def train_in(folder, balance=1.0):
        options = dict(aux_bn=True, **options_of(name, teacher))
        train_classifier(stores[0], tmp_path / folder, config(loop, balance=balance), name, stores[1], **options)

    train_in('whole')
    kind, calls = STRATEGIES[name], []
    loss = kind.loss

    def dies(self, *args):
        calls.append(0)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return loss(self, *args)

    with monkeypatch.context() as patches:
        patches.setattr(kind, 'loss', dies)
        with pytest.raises(KeyboardInterrupt):
            train_in('cut')
    assert not (tmp_path / 'cut' / 'classifier.json').exists()
    train_in('cut')
    for file in ('best.safetensors', 'last.safetensors', 'classifier.safetensors'):
        assert sha256(tmp_path / 'whole' / file) == sha256(tmp_path / 'cut' / file)
    with pytest.raises(InputError, match='begun with other settings'):
        train_in('cut', balance=0.5)


@pytest.mark.parametrize('keep', ['best', 'last'])
def test_best_or_last_weights(stores, tmp_path, monkeypatch, keep):
    "The scores fall, so the first validation is the best; both sets of weights stay on disk"
    falling = iter([0.9, 0.5, 0.3])
    monkeypatch.setattr(train, 'scores', lambda predicted, labels: dict(macro_f1=next(falling)))
    train_classifier(stores[0], tmp_path, config(dict(steps=6), keep=keep))
    best, last, kept = (sha256(tmp_path / f'{name}.safetensors') for name in ('best', 'last', 'classifier'))
    assert best != last and kept == dict(best=best, last=last)[keep]


def test_early_stopping_goes_by_the_macro_f1(stores, tmp_path, monkeypatch):
    rising = iter([0.1, 0.5, 0.4, 0.5, 0.6])
    monkeypatch.setattr(train, 'scores', lambda predicted, labels: dict(macro_f1=next(rising)))
    train_classifier(stores[0], tmp_path, config(dict(steps=40, patience=2)))
    assert [json.loads(line)['step'] for line in (tmp_path / 'log.jsonl').read_text().splitlines()][-1] == 8


def test_balance_shows_rare_classes_more_often(tmp_path, monkeypatch):
    rare = store(tmp_path / 's', [[1, 0, 0]] * 180 + [[1, 0, 1]] * 18 + [[0, 1, 0]] * 2, split=['train'] * 200)

    def shares(balance):
        "How often the images of both sources show each class"
        settings = config(dict(batch_size=20000), balance=balance)
        batches = strategy_batches(build_strategy('concat'), rare, rare, settings, 0)
        return [rare.labels[source.rows_at(0)].mean(0) for source in batches.sources.values()]

    for shown in shares(1):
        assert shown == pytest.approx([2 / 3, 1 / 3, 1 / 3], abs=0.05)
    weights = np.array([180 * 198**-0.5, 18 * 18**-0.5, 2 * 2**-0.5])
    for shown in shares(0.5):
        assert shown[1:] == pytest.approx((weights / weights.sum())[[2, 1]], abs=0.02)
    monkeypatch.setattr(train, 'balance_weights', None)
    for shown in shares(0):
        assert shown == pytest.approx([0.99, 0.01, 0.09], abs=1e-6)


def test_sources_left_out_are_not_read(stores, monkeypatch):
    real, synthetic = stores
    batches = strategy_batches(build_strategy('pretrain_finetune'), real, synthetic, config(dict(steps=10)), 0)
    monkeypatch.setattr(batches.sources['real'], 'images', None)
    assert list(batches[0]) == ['synthetic', 'progress']
    assert batches[0]['progress'] == 0 and batches[0]['progress'].dtype == torch.float32
    with pytest.raises(TypeError):
        batches[9]


def test_duplicate_real_needs_no_synthetic_images_and_shows_other_real_ones(stores):
    batches = strategy_batches(build_strategy('duplicate_real'), stores[0], None, config(), 0, ratio=0.5)
    first, second = (batches.sources[source].rows_at(0) for source in ('real', 'synthetic'))
    assert len(second) == 4 and set(second) <= set(stores[0].rows('train')) and (first[:4] != second).any()


def test_teacher_is_asked_once(stores, teacher, tmp_path, monkeypatch):
    labels = teacher_labels(teacher, stores[1], tmp_path)
    assert labels.numpy() == pytest.approx(probabilities(load_classifier(teacher)[0], stores[1], stores[1].rows()))
    monkeypatch.setattr(train, 'probabilities', None)
    assert (teacher_labels(teacher, stores[1], tmp_path) == labels).all()


def test_weights_of_another_classifier(stores, teacher, tmp_path):
    unchanged = config(dict(steps=1, lr=1e-12, weight_decay=0), weights=str(teacher), keep='last')
    same = train_classifier(stores[0], tmp_path / 'same', unchanged)
    expected = load_classifier(teacher)[0].head.weight.detach().numpy()
    assert same.head.weight.detach().numpy() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize('name', CRITERIA)
def test_criteria_and_heads(stores, tmp_path, name):
    head = 'cosine' if name == 'arcface' else 'mlp'
    settings = config(criterion=name, head=head, pooling='avg+max')
    model = train_classifier(stores[0], tmp_path / 'run', settings)
    loaded, card = load_classifier(tmp_path / 'run')
    assert (card['backbone'], card['pooling'], card['head']) == ('resnet10', 'avg+max', head)
    val = stores[0].rows('val')
    assert (probabilities(model, stores[0], val) == probabilities(loaded, stores[0], val)).all()


@pytest.mark.parametrize('name', [name for name, kind in STRATEGIES.items() if kind.makes_soft_targets])
def test_soft_targets_are_refused_where_they_are_not_defined(stores, teacher, tmp_path, name):
    arcface = config(criterion='arcface', head='cosine')
    with pytest.raises(InputError, match="'arcface' is defined for labels of 0 and 1 only"):
        train_classifier(stores[0], tmp_path / 'run', arcface, name, stores[1], **options_of(name, teacher))
    assert not (tmp_path / 'run').exists()


@pytest.fixture
def refused(stores, tmp_path):
    "Call it with a piece of the sentence that a training must end with, and what differs from an ordinary one"

    def call(sentence, real=stores[0], settings=None, name='real', synthetic=None, **options):
        with pytest.raises(InputError, match=sentence):
            train_classifier(real, tmp_path / 'run', settings or config(), name, synthetic, **options)
        assert not (tmp_path / 'run').exists()

    return call


@pytest.mark.filterwarnings('ignore:no training image shows')
def test_bad_real_images_are_told_before_anything_is_written(refused, tmp_path):
    without_labels = store(tmp_path / 'none', [[0, 0, 0], [1, 0, 0]] * 4)
    refused('no training image of .* has a label: fill the column target', without_labels)
    val_without_labels = store(tmp_path / 'val', [[1, 0, 0], [0, 0, 0]] * 4)
    refused("no image in the split 'val' of .* has a label", val_without_labels)
    constant = store(tmp_path / 'flat', [[1, 0, 0]] * 8, images=np.full((8, 4, 16, 16), 7, np.uint8))
    refused('are constant, there is nothing to see', constant)
    small = store(tmp_path / 'deep', [[1, 0, 0]] * 8)
    refused('too deep for images of 16 px', small, ClassifierConfig(backbone='densenet121'))
    refused("there are no weights 'imagenett'", settings=config(weights='imagenett'))


def test_bad_synthetic_images_are_told_before_anything_is_written(refused, stores, teacher, tmp_path):
    empty = store(tmp_path / 'empty', np.zeros((0, 3)))
    refused('holds no image: make some with `protloc generate`', name='concat', synthetic=empty)
    val_only = simulate_store(tmp_path / 'val only', dict(val=4), classes=NAMES)
    refused("has no image in its split 'train'", name='concat', synthetic=val_only)
    other_classes = simulate_store(tmp_path / 'other', dict(train=4), classes=NAMES[:2])
    differing = 'other has classes Nucleoli, Plasma membrane, .*real has Nucleoli, Plasma membrane, Cytosol'
    refused(differing, name='concat', synthetic=other_classes)
    refused('must be above 0, not 0', name='concat', synthetic=stores[1], ratio=0)
    refused('needs a teacher', name='soft_labels', synthetic=stores[1])
    refused('takes no teacher', name='concat', synthetic=stores[1], teacher=teacher)


def test_teacher_of_another_vocabulary(refused, stores, teacher, tmp_path):
    (tmp_path / 'teacher').mkdir()
    card = json.loads((teacher / 'classifier.json').read_text())
    (tmp_path / 'teacher' / 'classifier.json').write_text(json.dumps({**card, 'classes': NAMES[::-1]}))
    (tmp_path / 'teacher' / 'classifier.safetensors').write_bytes((teacher / 'classifier.safetensors').read_bytes())
    sentence = 'has classes Nucleoli, .* the teacher .* has Cytosol'
    refused(sentence, name='soft_labels', synthetic=stores[1], teacher=tmp_path / 'teacher')


def test_classes_and_channels_without_anything_to_learn_are_named(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (8, 4, 16, 16), dtype=np.uint8)
    images[:, 2] = 3
    with pytest.warns(UserWarning) as caught:
        train_classifier(store(tmp_path / 'some', [[1, 0, 0]] * 8, images=images), tmp_path / 'run', config())
    warned = ' '.join(str(w.message) for w in caught)
    assert 'no training image shows Plasma membrane, Cytosol' in warned and 'the channel blue is constant' in warned


@pytest.mark.parametrize(
    'values,sentence',
    [
        (dict(backbone='resnet11'), "did you mean 'resnet1"),
        (dict(pooling='mean'), 'there is no pooling'),
        (dict(head='cosin'), "did you mean 'cosine'"),
        (dict(criterion='bce', criterion_options=dict(gama=2)), 'does not take gama'),
        (dict(criterion='arcface'), 'use the head cosine'),
        (dict(balance=-1), "'balance' is wrong"),
        (dict(sampler='tail'), "there is no setting 'sampler'"),
        (dict(loop=dict(schedule='plato')), "'loop.schedule' is wrong"),
    ],
)
def test_settings_are_validated(values, sentence):
    with pytest.raises(InputError, match=sentence):
        read_config(ClassifierConfig, values)


@pytest.mark.slow
def test_two_processes_train_every_kind_of_step(stores, teacher, tmp_path):
    "Steps without real or without synthetic images, BatchNorm of its own, a teacher that one of them asks"
    torchrun, script = Path(sys.executable).parent / 'torchrun', SCRIPTS / 'train_two_strategies.py'
    command = [torchrun, '--nproc_per_node', '2', script, stores[0].path.parent, tmp_path, teacher]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, 'OMP_NUM_THREADS': '1'})
    assert done.returncode == 0, done.stderr[-3000:]
    for name in ('pretrain_finetune', 'soft_labels'):
        model, _ = load_classifier(tmp_path / name)
        assert np.isfinite(probabilities(model, stores[0], stores[0].rows('val'))).all()
