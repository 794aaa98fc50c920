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
from protloc.classify.mixing import STRATEGIES, strategy
from protloc.classify.predict import load_classifier, probabilities
from protloc.classify.train import SAMPLERS, ClassifierConfig, sources, teacher_labels, train_classifier
from protloc.core import InputError, read_config, sha256
from protloc.data.simulate import simulate_store
from protloc.data.store import write_store
from protloc.labels import Vocabulary
from protloc.training import LoopConfig

NAMES = ['Nucleoli', 'Plasma membrane', 'Cytosol']
LOOP = dict(steps=4, batch_size=8, lr=2e-3, evaluate_every=2)


def config(loop={}, **how):
    return ClassifierConfig(backbone='resnet10', loop={**LOOP, **loop}, **how)


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
            target=[vocab.decode(y) for y in labels],
            split=split or ['train', 'val'] * (len(labels) // 2),
        )
    )
    return write_store(path, images, table, ['red', 'green', 'blue', 'yellow'], vocab)


@pytest.fixture(scope='module')
def teacher(stores, tmp_path_factory):
    folder = tmp_path_factory.mktemp('teacher')
    train_classifier(stores[0], folder, config())
    return folder


OPTIONS = {'tail_only': dict(below=0.5)}


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
    how = dict(
        OPTIONS.get(name, {}),
        **dict(aux_bn=True) if aux_bn else {},
        **dict(teacher=teacher) if STRATEGIES[name].teacher else {},
    )
    model = train_classifier(real, tmp_path / 'run', config(), name, synthetic, **how)
    said = probabilities(model, real, real.rows('val'))
    assert (
        np.isfinite(said).all()
        and (said == probabilities(load_classifier(tmp_path / 'run')[0], real, real.rows('val'))).all()
    )
    again = train_classifier(real, tmp_path / 'run', config(), name, synthetic, **how)
    assert (said == probabilities(again, real, real.rows('val'))).all()
    assert not any('.aux.' in k for k in again.state_dict())


@pytest.mark.parametrize('name', ['pretrain_finetune', 'soft_labels'])
def test_killed_and_continued_bit_for_bit(stores, teacher, tmp_path, monkeypatch, name):
    "With averaged weights, a rate that follows the score, and images drawn by weights"
    c = config(
        dict(steps=12, schedule='plateau', plateau_patience=1, swa_start=0.5, checkpoint_steps=3), sampler='balanced'
    )
    how = dict(aux_bn=True, **dict(teacher=teacher) if STRATEGIES[name].teacher else {})
    train_classifier(stores[0], tmp_path / 'whole', c, name, stores[1], **how)
    kind, calls = STRATEGIES[name], []

    def dies(self, *args, _real=kind.loss):
        calls.append(0)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return _real(self, *args)

    with monkeypatch.context() as m:
        m.setattr(kind, 'loss', dies)
        with pytest.raises(KeyboardInterrupt):
            train_classifier(stores[0], tmp_path / 'cut', c, name, stores[1], **how)
    assert not (tmp_path / 'cut' / 'classifier.json').exists()
    train_classifier(stores[0], tmp_path / 'cut', c, name, stores[1], **how)
    for f in ('best.safetensors', 'last.safetensors', 'classifier.safetensors'):
        assert sha256(tmp_path / 'whole' / f) == sha256(tmp_path / 'cut' / f)
    with pytest.raises(InputError, match='begun with other settings'):
        train_classifier(stores[0], tmp_path / 'cut', c.model_copy(update=dict(sampler='tail')), name, stores[1], **how)


@pytest.mark.parametrize('keep', ['best', 'last'])
def test_best_or_last_weights(stores, tmp_path, monkeypatch, keep):
    "The scores fall, so the first validation is the best; both sets of weights stay on disk"
    falling = iter([0.9, 0.5, 0.3])
    monkeypatch.setattr(train, 'scores', lambda p, y: dict(macro_f1=next(falling)))
    train_classifier(stores[0], tmp_path, config(dict(steps=6), keep=keep))
    best, last, kept = (sha256(tmp_path / f'{name}.safetensors') for name in ('best', 'last', 'classifier'))
    assert best != last and kept == dict(best=best, last=last)[keep]


def test_early_stopping_goes_by_the_macro_f1(stores, tmp_path, monkeypatch):
    found = iter([0.1, 0.5, 0.4, 0.5, 0.6])
    monkeypatch.setattr(train, 'scores', lambda p, y: dict(macro_f1=next(found)))
    train_classifier(stores[0], tmp_path, config(dict(steps=40, patience=2)))
    assert [json.loads(line)['step'] for line in (tmp_path / 'log.jsonl').read_text().splitlines()][-1] == 8


def test_samplers_show_rare_classes_more_often(tmp_path):
    rare = store(tmp_path / 's', [[1, 0, 0]] * 180 + [[1, 0, 1]] * 18 + [[0, 1, 0]] * 2, split=['train'] * 200)

    def shares(sampler):
        batches = sources(strategy('concat'), rare, rare, config(dict(batch_size=20000), sampler=sampler), 0)
        return [rare.labels[b.rows_at(0)].mean(0) for b in batches.sources.values()]

    for found in shares('balanced'):
        assert found == pytest.approx([2 / 3, 1 / 3, 1 / 3], abs=0.05)
    weights = np.array([180 * 198**-0.5, 18 * 18**-0.5, 2 * 2**-0.5])
    for found in shares('tail'):
        assert found[1:] == pytest.approx((weights / weights.sum())[[2, 1]], abs=0.02)
    for found in shares('uniform'):
        assert found == pytest.approx([0.99, 0.01, 0.09], abs=1e-6)
    assert set(SAMPLERS) == {'uniform', 'balanced', 'tail'}


def test_sources_left_out_are_not_read(stores, monkeypatch):
    real, synthetic = stores
    batches = sources(strategy('pretrain_finetune'), real, synthetic, config(dict(steps=10)), 0)
    monkeypatch.setattr(batches.sources['real'], 'images', None)
    assert (
        list(batches[0]) == ['synthetic', 'progress']
        and batches[0]['progress'] == 0
        and batches[0]['progress'].dtype == torch.float32
    )
    with pytest.raises(TypeError):
        batches[9]


def test_duplicate_real_needs_no_synthetic_images_and_shows_other_real_ones(stores):
    batches = sources(strategy('duplicate_real'), stores[0], None, config(), 0, ratio=0.5)
    one, two = (batches.sources[k].rows_at(0) for k in ('real', 'synthetic'))
    assert len(two) == 4 and set(two) <= set(stores[0].rows('train')) and (one[:4] != two).any()


def test_teacher_is_asked_once(stores, teacher, tmp_path, monkeypatch):
    said = teacher_labels(teacher, stores[1], tmp_path)
    assert said.numpy() == pytest.approx(probabilities(load_classifier(teacher)[0], stores[1], stores[1].rows()))
    monkeypatch.setattr(train, 'probabilities', None)
    assert (teacher_labels(teacher, stores[1], tmp_path) == said).all()


def test_weights_of_another_classifier(stores, teacher, tmp_path):
    same = train_classifier(
        stores[0], tmp_path / 'same', config(dict(steps=1, lr=1e-12, weight_decay=0), weights=str(teacher), keep='last')
    )
    assert same.head.weight.detach().numpy() == pytest.approx(
        load_classifier(teacher)[0].head.weight.detach().numpy(), abs=1e-6
    )


@pytest.mark.parametrize('name', CRITERIA)
def test_criteria_and_heads(stores, tmp_path, name):
    head = 'cosine' if name == 'arcface' else 'mlp'
    c = config(criterion=name, head=head, pooling='avg+max')
    model = train_classifier(stores[0], tmp_path / 'run', c)
    card = json.loads((tmp_path / 'run' / 'classifier.json').read_text())
    assert (card['backbone'], card['pooling'], card['head']) == ('resnet10', 'avg+max', head)
    val = stores[0].rows('val')
    assert (
        probabilities(model, stores[0], val) == probabilities(load_classifier(tmp_path / 'run')[0], stores[0], val)
    ).all()


@pytest.mark.parametrize('name', [n for n, s in STRATEGIES.items() if s.soft])
def test_soft_targets_are_refused_where_they_are_not_defined(stores, teacher, tmp_path, name):
    c = config(criterion='arcface', head='cosine')
    with pytest.raises(InputError, match="'arcface' is defined for labels of 0 and 1 only"):
        train_classifier(
            stores[0], tmp_path / 'run', c, name, stores[1], **dict(teacher=teacher) if STRATEGIES[name].teacher else {}
        )
    assert not (tmp_path / 'run').exists()


def refused(match, *args, **how):
    with pytest.raises(InputError, match=match):
        train_classifier(*args, **how)
    assert not Path(args[1]).exists()


@pytest.mark.filterwarnings('ignore:no training image shows')
def test_bad_input_is_told_before_anything_is_written(stores, teacher, tmp_path):
    real, synthetic = stores
    run = tmp_path / 'run'
    refused(
        'no training image of .* has a label: fill the column target',
        store(tmp_path / 'none', [[0, 0, 0], [1, 0, 0]] * 4),
        run,
        config(),
    )
    refused(
        "no image in the part 'val' of .* has a label",
        store(tmp_path / 'val', [[1, 0, 0], [0, 0, 0]] * 4),
        run,
        config(),
    )
    refused(
        'are constant, there is nothing to see',
        store(tmp_path / 'flat', [[1, 0, 0]] * 8, images=np.full((8, 4, 16, 16), 7, np.uint8)),
        run,
        config(),
    )
    refused(
        'holds no image: make some with `protloc generate`',
        real,
        run,
        config(),
        'concat',
        store(tmp_path / 'empty', np.zeros((0, 3))),
    )
    refused(
        "has no image in its split 'train'",
        real,
        run,
        config(),
        'concat',
        simulate_store(tmp_path / 'val only', dict(val=4), classes=NAMES),
    )
    refused('must be above 0, not 0', real, run, config(), 'concat', synthetic, ratio=0)
    refused(
        'different classes',
        real,
        run,
        config(),
        'concat',
        simulate_store(tmp_path / 'other', dict(train=4), classes=NAMES[:2]),
    )
    refused('needs a teacher', real, run, config(), 'soft_labels', synthetic)
    refused('takes no teacher', real, run, config(), 'concat', synthetic, teacher=teacher)
    refused(
        'too deep for images of 16 px',
        store(tmp_path / 'deep', [[1, 0, 0]] * 8),
        run,
        ClassifierConfig(backbone='densenet121'),
    )
    refused("there are no weights 'imagenett'", real, run, config(weights='imagenett'))


def test_teacher_of_another_vocabulary(stores, teacher, tmp_path):
    (tmp_path / 'teacher').mkdir()
    card = json.loads((teacher / 'classifier.json').read_text())
    (tmp_path / 'teacher' / 'classifier.json').write_text(json.dumps({**card, 'classes': NAMES[::-1]}))
    (tmp_path / 'teacher' / 'classifier.safetensors').write_bytes((teacher / 'classifier.safetensors').read_bytes())
    refused(
        'has classes Nucleoli, .* the classifier was trained with Cytosol',
        stores[0],
        tmp_path / 'run',
        config(),
        'soft_labels',
        stores[1],
        teacher=tmp_path / 'teacher',
    )


def test_classes_and_channels_without_anything_to_learn_are_named(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (8, 4, 16, 16), dtype=np.uint8)
    images[:, 2] = 3
    with pytest.warns(UserWarning) as told:
        train_classifier(store(tmp_path / 'some', [[1, 0, 0]] * 8, images=images), tmp_path / 'run', config())
    said = ' '.join(str(w.message) for w in told)
    assert 'no training image shows Plasma membrane, Cytosol' in said and 'the channel blue is constant' in said


@pytest.mark.parametrize(
    'values,sentence',
    [
        (dict(backbone='resnet11'), "did you mean 'resnet1"),
        (dict(pooling='mean'), 'there is no pooling'),
        (dict(head='cosin'), "did you mean 'cosine'"),
        (dict(criterion='bce', criterion_options=dict(gama=2)), 'does not take gama'),
        (dict(criterion='arcface'), 'use the head cosine'),
        (dict(sampler='rare'), "'sampler' is wrong"),
        (dict(loop=dict(schedule='plato')), "'loop.schedule' is wrong"),
    ],
)
def test_settings_are_validated(values, sentence):
    with pytest.raises(InputError, match=sentence):
        read_config(ClassifierConfig, values)


TWO = '''
import sys, torch
from pathlib import Path
from protloc.classify.train import ClassifierConfig, train_classifier
from protloc.data.store import ImageStore
folder = Path(sys.argv[1])
real, synthetic = ImageStore(folder/'real'), ImageStore(folder/'synthetic')
loop = dict(steps=6, batch_size=8, lr=2e-3, evaluate_every=2, swa_start=.5, schedule='plateau', plateau_patience=1)
for name, teacher in (('pretrain_finetune', None), ('soft_labels', sys.argv[3])):
    train_classifier(real, Path(sys.argv[2])/name, ClassifierConfig(backbone='resnet10', loop=loop), name, synthetic, teacher=teacher, aux_bn=True)
'''


def test_two_processes_train_every_kind_of_step(stores, teacher, tmp_path):
    "Steps without real or without synthetic images, BatchNorm of its own, a teacher that one of them asks"
    (tmp_path / 'two.py').write_text(TWO)
    command = [
        Path(sys.executable).parent / 'torchrun',
        '--nproc_per_node',
        '2',
        tmp_path / 'two.py',
        stores[0].path.parent,
        tmp_path,
        teacher,
    ]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, 'OMP_NUM_THREADS': '1'})
    assert done.returncode == 0, done.stderr[-3000:]
    for name in ('pretrain_finetune', 'soft_labels'):
        model, _ = load_classifier(tmp_path / name)
        assert np.isfinite(probabilities(model, stores[0], stores[0].rows('val'))).all()
