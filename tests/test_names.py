"""Names from tables and settings: none leads out of its folder, ends a line of a table, or is taken for a value."""

import csv
import os
import shutil

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from test_bad_input import refused

from protloc.core import InputError
from protloc.data.store import ImageStore, write_store
from protloc.files import check_name
from protloc.labels import STAINS, Vocabulary

ODD = [
    'NA',
    'None',
    'nan',
    'true',
    '1e5',
    '007',
    '=1+1',
    '-x',
    '@x',
    "'",
    'a, b',
    '<script>',
    '$\\frac',
    'é',
    '|',
    '日本',
]


@pytest.fixture
def outside(challenge):
    "Whole fields beside the challenge's folder, which no Id may reach"
    folder = challenge.parent / 'outside'
    shutil.copytree(challenge / 'train', folder)
    return folder


@pytest.mark.parametrize('path', ['../../outside/f0', '{outside}/f0', '../train/f0', './../train/../../outside/f0'])
def test_an_id_reads_no_image_outside_the_folder(protloc, challenge, outside, tmp_path, path):
    (challenge / 'train.csv').write_text(f'Id,Target\n{path.format(outside=outside)},0\nf1,1\nf2,1\nf3,0\n')
    result = protloc('prepare', challenge, tmp_path / 'store', '--size', 32, '--workers', 1)
    refused(result)
    assert not (tmp_path / 'store').exists()


def test_an_id_of_a_folder_of_images_reads_none_outside(protloc, challenge, outside, tmp_path):
    folder = tmp_path / 'cells'
    folder.mkdir()
    for i in range(4):
        Image.fromarray(np.full((32, 32), 10 * i, np.uint8)).save(folder / f'c{i}.png')
    for name in ('../outside/f0_red', str(outside / 'f0_red'), 'c0/../../outside/f0_red.png'):
        (folder / 'labels.csv').write_text(f'Id,Target\nc0,0\nc1,1\nc2,0\n{name},1\n')
        refused(protloc('prepare', folder, tmp_path / 'store', '--size', 32, '--workers', 1), 'f0_red')


@pytest.mark.parametrize('name', ['a\rb', 'a\nb', 'x' * 300, '../a', '=a', 'a\x1b[2J'])
def test_an_id_without_an_image_is_named_in_one_line(protloc, challenge, tmp_path, name):
    with open(challenge / 'train.csv', 'a', newline='') as file:
        csv.writer(file).writerow([name, '1'])
    code, out, err = protloc('prepare', challenge, tmp_path / 'store', '--size', 32, '--workers', 1)
    refused((code, out, err))
    sentence = err[err.index('protloc: ') :].rstrip('\n')
    assert sentence.isprintable() and len(sentence) < 1500


def test_odd_names_survive_every_read_and_write(tmp_path):
    n = len(ODD)
    images = np.arange(n, dtype=np.uint8)[:, None, None, None] * np.ones((1, 1, 8, 8), np.uint8)
    table = pd.DataFrame(dict(id=ODD, target=[str(i) for i in range(n)], group=ODD[::-1], split='train'), dtype=object)
    write_store(tmp_path / 'odd', images, table, ODD[:1], Vocabulary(ODD))
    store = ImageStore(tmp_path / 'odd')
    assert store.table.id.tolist() == ODD and store.table.group.tolist() == ODD[::-1]
    assert list(store.vocab.names) == ODD and store.channels == ('NA',)
    assert np.array_equal(store.labels, np.eye(n, dtype=np.float32))


def test_a_folder_with_an_odd_name_is_a_class_of_that_name(protloc, tmp_path):
    classes = [name for name in ODD if '/' not in name]
    for number, name in enumerate(classes):
        (tmp_path / 'in' / name).mkdir(parents=True)
        for i in range(3):
            Image.fromarray(np.full((16, 16), 3 * number + i, np.uint8)).save(tmp_path / 'in' / name / f'{i}.png')
    result = protloc('prepare', tmp_path / 'in', tmp_path / 'out', '--size', 16, '--workers', 1)
    assert result[0] == 0, result
    store = ImageStore(tmp_path / 'out')
    assert sorted(store.vocab.names) == sorted(classes)
    for image, label in zip(store.images, store.labels, strict=True):
        assert store.vocab.names[label.argmax()] == classes[int(image[0, 0, 0]) // 3]


@pytest.mark.skipif(os.name != 'posix', reason='other systems have no such names')
def test_a_folder_whose_name_ends_a_line_is_no_class(protloc, tmp_path):
    for name in ('a', 'b\rc'):
        (tmp_path / 'in' / name).mkdir(parents=True)
        for i in range(3):
            Image.fromarray(np.full((16, 16), i, np.uint8)).save(tmp_path / 'in' / name / f'{i}.png')
    refused(protloc('prepare', tmp_path / 'in', tmp_path / 'out', '--size', 16, '--workers', 1), 'control characters')


def test_names_of_folders():
    for name in ('real', 'mix_loss (λ = 0.5)', 'NA', '=1+1', STAINS[0]):
        check_name('arm', name)
    for name in ('', '.', '..', 'a/b', '/a', 'a\\b', 'a\0', 'a\r', 'a' * 300, 'é' * 60, ' a', 'a ', '.hidden', 'a.'):
        with pytest.raises(InputError, match='cannot be the name of a folder'):
            check_name('arm', name)
