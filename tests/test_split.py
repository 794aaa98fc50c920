import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from protloc.core import InputError
from protloc.data import resplit
from protloc.data.duplicates import Likeness, fingerprints, near_duplicates
from protloc.data.prepare import prepare
from protloc.data.simulate.datasets import simulate_store
from protloc.data.split import Fractions, assign_folds, assign_splits, share_table
from protloc.data.store import ImageStore, write_store
from protloc.labels import HPA, STAINS


def noisy(images, sd, seed=0):
    noise = np.random.default_rng(seed).normal(0, sd, images.shape)
    return np.clip(np.asarray(images) + noise, 0, 255).round().astype(np.uint8)


@pytest.fixture(scope='module')
def planted(tmp_path_factory):
    "120 simulated cells; then a noisy copy of ten of them and a turned noisy copy of five, all in another split"
    folder = tmp_path_factory.mktemp('planted')
    cells = simulate_store(
        folder / 'cells', dict(train=80, val=20, test=20), classes=['Nucleoli', 'Plasma membrane', 'Cytosol']
    )
    rows = cells.rows('train')
    copies = noisy(cells.images[rows[:10]], 3)
    turned = noisy(np.rot90(cells.images[rows[10:15]], 1, (2, 3)), 3)
    more = cells.table.iloc[rows[:15]].assign(
        id=[f'copy{i:03}' for i in range(15)], group=[f'{i:03}' for i in range(15)], split='test'
    )
    plate = [f'{k // 3:02}' for k in pd.factorize(cells.table.group)[0]] + [''] * 15
    table = pd.concat([cells.table, more], ignore_index=True).assign(plate=plate)
    return write_store(folder / 'planted', np.concatenate([cells.images, copies, turned]), table, STAINS, cells.vocab)


@pytest.fixture
def store(planted, tmp_path):
    return ImageStore(shutil.copytree(planted.path, tmp_path / 'store'))


def pairs_of(table):
    return set(zip(table['first'], table.second, strict=True))


def test_noisy_copies_are_found_and_turned_ones_where_asked(planted):
    rows = planted.rows('train')
    plain = {(rows[i], 120 + i) for i in range(10)}
    turned = {(rows[i], 120 + i) for i in range(10, 15)}
    assert pairs_of(near_duplicates(planted)) == plain
    assert pairs_of(near_duplicates(planted, Likeness(symmetries=True))) == plain | turned


def test_blank_images_are_no_copies_of_each_other(tmp_path):
    images = np.full((5, 4, 16, 16), 7, np.uint8)
    blank = write_store(tmp_path / 'blank', images, pd.DataFrame(dict(id=list('abcde'), target='0')), STAINS, HPA)
    assert not fingerprints(blank.images).any() and len(near_duplicates(blank)) == 0


def test_a_store_of_nothing_but_copies_is_refused(tmp_path, monkeypatch):
    cell = np.random.default_rng(0).integers(0, 256, (1, 1, 32, 32), dtype=np.uint8)
    table = pd.DataFrame(dict(id=[f'i{k}' for k in range(200)], target='0', group=[f'g{k}' for k in range(200)]))
    store = write_store(tmp_path / 'copies', np.repeat(cell, 200, 0), table, ['green'], HPA)
    assert len(near_duplicates(store)) == 200 * 199 // 2
    monkeypatch.setattr('protloc.data.duplicates.MOST_PAIRS', 10000)
    said = "more than 10,000 pairs of near-duplicates: its images hardly differ in the channel 'green'"
    with pytest.raises(InputError, match=said):
        near_duplicates(store)


def test_any_channels_and_sizes(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (3, 1, 5, 5), dtype=np.uint8)
    table = pd.DataFrame(dict(id=list('abcd'), target='0'))
    one = write_store(tmp_path / 'one', image[[0, 1, 2, 0]], table, ['gfp'], HPA)
    assert pairs_of(near_duplicates(one)) == {(0, 3)}


def test_report_says_a_leak_and_split_mends_it(protloc, store):
    before = {p.name: p.read_bytes() for p in store.path.iterdir()}
    code, out, err = protloc('split', store.path, '--report')
    assert code == 2 and 'near-duplicate pairs across splits: 10' in out
    assert err.count('\n') == 1 and 'leaks' in err and 'protloc split' in err
    assert before == {p.name: p.read_bytes() for p in store.path.iterdir()}
    assert protloc('split', store.path)[0] == 0
    code, out, err = protloc('split', store.path, '--report')
    assert code == 0 and 'leaks' not in err and 'groups in two splits: 0' in out
    assert protloc('split', store.path, '--report', '--symmetries')[0] == 2
    assert protloc('split', store.path, '--symmetries')[0] == 0
    assert protloc('split', store.path, '--report', '--symmetries')[0] == 0


def test_split_touches_no_image_and_says_how(protloc, store):
    inode = (store.path / 'images.npy').stat().st_ino
    table = resplit.table_as_written(store)
    assert protloc('split', store.path, '--seed', 3, '--train', 0.5, '--val', 0.25, '--test', 0.25)[0] == 0
    again = ImageStore(store.path)
    made = again.manifest['made']['split']
    assert again.verify() and (again.path / 'images.npy').stat().st_ino == inode
    assert made['fractions'] == dict(train=0.5, val=0.25, test=0.25)
    assert made['seed'] == 3 and made['likeness']['distance'] == 8
    assert made['near_duplicate_pairs'] == 10 and made['groups_before'] - made['groups_after'] == 10
    kept = resplit.table_as_written(again)
    assert kept.own_group.tolist() == table.group.tolist() and kept.plate.tolist() == table.plate.tolist()
    assert [p.name for p in store.path.parent.iterdir()] == ['store']


def test_test_images_that_are_no_longer_from_other_cell_lines(protloc, tmp_path):
    counts = ['--train', 80, '--val', 20, '--test', 40]
    assert protloc('simulate', tmp_path / 'cells', *counts, '--classes', 'Nucleoli,Cytosol')[0] == 0
    code, out, _ = protloc('split', tmp_path / 'cells')
    assert code == 0 and "Note: the test images had values of 'cell_line' that no other image had" in out
    assert 'Note' not in protloc('split', tmp_path / 'cells')[1]


def test_split_twice_is_split_once(protloc, store):
    protloc('split', store.path)
    first = {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in store.path.iterdir()}
    assert protloc('split', store.path)[0] == 0
    assert first == {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in store.path.iterdir()}
    protloc('split', store.path, '--no-duplicates')
    assert ImageStore(store.path).table.group.tolist() == resplit.table_as_written(store).own_group.tolist()
    protloc('split', store.path)
    assert first['table.csv'][0] == (store.path / 'table.csv').read_bytes()


def test_folds_and_columns_that_tie(protloc, store):
    assert protloc('split', store.path, '--folds', 4, '--test-fold', 1, '--group', 'plate')[0] == 0
    table = ImageStore(store.path).table
    assert (table[table.plate != ''].groupby('plate').fold.nunique() == 1).all()
    assert (table.groupby('group').fold.nunique() == 1).all()
    assert set(table.fold) == {0, 1, 2, 3}
    assert (table.fold[table.split == 'test'] == 1).all()
    assert (table.fold[table.split == 'val'] == 2).all()
    protloc('split', store.path)
    assert 'fold' not in ImageStore(store.path).table


@pytest.mark.parametrize(
    'words, sentence',
    [
        (['--train=0.9'], 'must add up to 1'),
        (['--folds=2'], "'folds' is wrong"),
        (['--folds=5', '--test-fold=5'], 'there is no fold 5'),
        (['--folds=5', '--val=0.2'], 'leave out'),
        (['--group=slide'], "no column 'slide'"),
        (['--channel=gfp'], "no channel 'gfp'"),
        (['--distance=99'], "'--distance'"),
        (['--folds=100'], 'choose fewer folds'),
    ],
)
def test_mistakes_are_one_sentence(protloc, store, words, sentence):
    before = (store.path / 'manifest.json').read_bytes()
    code, _, err = protloc('split', store.path, *words)
    assert code == 2 and sentence in err and err.count('\n') == 1
    assert before == (store.path / 'manifest.json').read_bytes()
    assert [p.name for p in store.path.parent.iterdir()] == ['store']


def test_without_labels_there_is_nothing_to_split(protloc, tmp_path):
    table = pd.DataFrame(dict(id=list('abc'), target=''))
    write_store(tmp_path / 'new', np.zeros((3, 4, 8, 8), np.uint8), table, STAINS, HPA)
    code, _, err = protloc('split', tmp_path / 'new')
    assert code == 2 and 'has no labels' in err
    code, _, err = protloc('split', tmp_path / 'new', '--report')
    assert code == 2 and 'has no splits yet' in err


def test_a_torn_group_is_a_leak(protloc, store):
    protloc('split', store.path)
    table = resplit.table_as_written(ImageStore(store.path))
    rows = table.index[table.group == table.group.value_counts().index[0]]
    table.loc[rows, 'split'] = ['train'] + ['test'] * (len(rows) - 1)
    resplit.replace_table(ImageStore(store.path), table)
    code, _, err = protloc('split', store.path, '--report', '--no-duplicates')
    assert code == 2 and 'groups in two splits: 1' in err


@pytest.mark.slow
@pytest.mark.parametrize('moment', ['before', 'after', 'between'])
def test_a_killed_split_leaves_a_whole_store(protloc, store, moment):
    script = Path(__file__).parent / 'scripts' / 'killed_split.py'
    done = subprocess.run([sys.executable, script, store.path, moment], env=dict(os.environ, TQDM_DISABLE='1'))
    assert done.returncode == 9
    if moment != 'between':
        assert ImageStore(store.path).verify()
    assert protloc('split', store.path)[0] == 0
    assert ImageStore(store.path).verify() and [p.name for p in store.path.parent.iterdir()] == ['store']


def test_without_links_and_without_exchange(store, monkeypatch):
    def no(*a, **k):
        raise OSError('not here')

    monkeypatch.setattr(resplit.os, 'link', no)
    monkeypatch.setattr(resplit.ctypes, 'CDLL', no)
    assert resplit.split_store(store).verify()
    assert [p.name for p in store.path.parent.iterdir()] == ['store']


def test_a_class_with_enough_groups_is_in_every_split():
    for seed in range(20):
        labels = np.zeros((200, 3), int)
        labels[:3, 0] = labels[3:7, 1] = labels[7:, 2] = 1
        split = assign_splits(labels, range(200), Fractions(train=0.8, val=0.1, test=0.1), seed)
        assert all(labels[split == name].any(0).all() for name in ('train', 'val', 'test'))
        fold = assign_folds(labels[:, 1:], range(200), 4, seed)
        assert all(labels[fold == i, 1:].any(0).all() for i in range(4))


def test_the_challenges_label_table(hpa):
    table = pd.read_csv(hpa / 'labels_31072.csv')
    labels = np.stack([HPA.encode(t) for t in table.Target])
    start = time.time()
    split = assign_splits(labels, table.Id)
    fold = assign_folds(labels, table.Id, 5)
    print(f'{time.time() - start:.1f} s')
    assert time.time() - start < 60
    shares = share_table(labels, table.Id, split, list(HPA))
    print(shares.head(3).to_string())
    assert (shares.note == '').all() and shares.loc['Rods & rings', ['train', 'val', 'test']].sum() == 11
    assert np.abs(shares['test %'] - shares['train %']).max() < 0.5
    assert all(labels[fold == i].any(0).all() for i in range(5))


@pytest.mark.parametrize('size, tile', [(128, None), (32, 128)])
def test_real_images_have_no_false_pairs_and_copies_are_found(hpa, tmp_path, size, tile):
    real = prepare(hpa / 'sample', tmp_path / 'real', size=size, tile=tile, labelled=False, workers=1)
    assert len(near_duplicates(real, Likeness(symmetries=True))) == 0
    some = np.flatnonzero(np.asarray(real.images[:, 1]).std((1, 2)) > 10)[:40]
    table = pd.DataFrame(dict(id=range(2 * len(some)), target='0'))
    images = np.concatenate([real.images[some], noisy(real.images[some], 3)])
    pairs = near_duplicates(write_store(tmp_path / 'doubled', images, table, STAINS, HPA))
    assert (pairs.second - pairs['first'] == len(some)).all() and len(pairs) >= 0.9 * len(some)
