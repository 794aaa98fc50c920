"""Every mistake in the input: one sentence, exit code 2, and nothing half-written."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from protloc.data.store import ImageStore, StoreWriter
from protloc.labels import HPA, STAINS, Vocabulary


def refused(result, *expected):
    code, out, err = result
    assert code == 2, (code, out, err)
    lines = [line for line in err.strip().splitlines() if line.startswith('protloc: ')]
    assert len(lines) == 1 and 'Traceback' not in err, err
    for text in expected:
        assert text in lines[0], lines[0]


def rewrite(challenge, text):
    (challenge / 'train.csv').write_text(text)


def stain(challenge, name):
    return challenge / 'train' / f'{name}.png'


TABLES = {
    'empty': ('', 'is empty'),
    'header alone': ('Id,Target\n', 'no row'),
    'no Id column': ('Name,Target\nf0,1\n', 'has no column Id'),
    'Id missing': ('Id,Target\n,1\n', 'line 2: the Id is missing'),
    'Id twice': ('Id,Target\nf0,1\nf1,2\nf0,1\n', "line 4: Id 'f0' occurs twice"),
    'class 28': ('Id,Target\nf0,1\nf1,28\n', "line 3 (Id 'f1'): there is no class number 28"),
    'not a number': ('Id,Target\nf0,abc\n', "'abc' is not a class number"),
    'no target': ('Id,Target\nf0,\n', 'the Target is empty'),
    'Id without images': ('Id,Target\nf0,1\nf1,1\nf2,1\nghost,2\n', 'ghost_red.png is missing'),
}


@pytest.mark.parametrize('text,expected', TABLES.values(), ids=TABLES.keys())
def test_label_table(protloc, challenge, tmp_path, text, expected):
    rewrite(challenge, text)
    refused(protloc('prepare', challenge, tmp_path / 'store', '--size', 32, '--workers', 1), expected)
    assert not (tmp_path / 'store').exists() and not list(tmp_path.glob('.*partial'))


def test_table_with_bom_and_windows_line_ends_is_fine(protloc, challenge, tmp_path):
    text = (challenge / 'train.csv').read_text()
    (challenge / 'train.csv').write_bytes(b'\xef\xbb\xbf' + text.replace('\n', '\r\n').encode())
    assert protloc('prepare', challenge, tmp_path / 'store', '--size', 32, '--workers', 1)[0] == 0
    assert len(ImageStore(tmp_path / 'store')) == 8


def missing(c):
    stain(c, 'f3_blue').unlink()


def truncated(c):
    stain(c, 'f3_blue').write_bytes(stain(c, 'f3_blue').read_bytes()[:900])


def not_an_image(c):
    stain(c, 'f3_blue').write_text('hello')


def other_size(c):
    Image.fromarray(np.zeros((32, 64), np.uint8)).save(stain(c, 'f3_blue'))


def rgb(c):
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(stain(c, 'f3_blue'))


def rgb16(c):
    stain(c, 'f3_blue').write_bytes(png16())


def gray16(c):
    Image.fromarray(np.zeros((64, 64), np.uint16)).save(stain(c, 'f3_blue'))


def png16():
    "A 16-bit RGB PNG of 64 x 64 pixels, which Pillow does not write"
    import struct
    import zlib

    def chunk(kind, data):
        return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))

    header = chunk(b'IHDR', struct.pack('>IIBBBBB', 64, 64, 16, 2, 0, 0, 0))
    rows = chunk(b'IDAT', zlib.compress((b'\0' + bytes(64 * 6)) * 64))
    return b'\x89PNG\r\n\x1a\n' + header + rows + chunk(b'IEND', b'')


@pytest.mark.parametrize(
    'damage,expected',
    [
        (missing, 'is missing'),
        (truncated, 'cannot be decoded'),
        (not_an_image, 'cannot be decoded'),
        (other_size, 'is 64 x 32 pixels'),
        (rgb, 'is RGB, not 8-bit gray'),
        (rgb16, 'is RGB, not 8-bit gray'),
        (gray16, 'f3_blue.png is uint16, f3_red.png is uint8'),
    ],
)
@pytest.mark.parametrize('workers', [1, 2])
def test_images(protloc, challenge, tmp_path, damage, expected, workers):
    damage(challenge)
    result = protloc('prepare', challenge, tmp_path / 'store', '--size', 32, '--workers', workers)
    refused(result, 'f3_blue.png', expected)
    assert not (tmp_path / 'store').exists() and not list(tmp_path.glob('.*partial'))


COMMANDS = {
    'missing folder': (['prepare', '{tmp}/nowhere', '{tmp}/store'], 'there is no folder'),
    'missing data': (['run', 'tiny', '--data', '{tmp}/nowhere', '--out', '{tmp}/run'], 'there is no folder'),
    'no data': (['run', 'tiny', '--out', '{tmp}/run'], '--data'),
    'preset': (['run', 'dmeo'], "there is no preset 'dmeo': did you mean 'demo'?"),
    'preset file': (['run', '{tmp}/mine.yaml'], 'there is no file'),
    'arm': (['run', 'demo', '--set', 'arms=[real, mixloss]'], "did you mean 'mix_loss'?"),
    'no baseline': (['run', 'demo', '--set', 'arms=[concat]'], "needs the arm 'real'"),
    'nothing to compare': (['run', 'demo', '--set', 'arms=[real]'], "at least one arm besides 'real'"),
    'backbone': (['run', 'demo', '--set', 'classifier.backbone=resnet81'], "did you mean 'resnet18'?"),
    'scheduler': (['run', 'demo', '--set', 'generate.scheduler=unpic'], "did you mean 'unipc'?"),
    'setting': (['run', 'demo', '--set', 'generator.loop.step=3'], "did you mean 'steps'?"),
    'value': (['run', 'demo', '--set', 'replicates=0'], "'replicates' is wrong"),
    'override': (['run', 'demo', '--set', 'seed'], 'is not of the form'),
    'no store': (['info', '{tmp}'], 'is not an image store'),
    'no generator': (['generate', '{tmp}/none', '{tmp}/synthetic', '--like', '{store}'], 'holds no trained generator'),
    'no classifier': (['predict', '{tmp}/none', '{tmp}/fields', '{tmp}/p.csv'], 'holds no trained classifier'),
    'no study': (['report', '{tmp}'], 'holds no study'),
    'strategy': (['train-classifier', '{store}', '{tmp}/c', '--strategy', 'mixloss'], "did you mean 'mix_loss'?"),
    'no synthetic': (['train-classifier', '{store}', '{tmp}/c', '--strategy', 'concat'], 'needs synthetic images'),
    'other channels': (
        ['train-classifier', '{store}', '{tmp}/c', '--strategy', 'concat', '--synthetic', '{two}'],
        '/two has channels dapi, gfp, ',
    ),
    'other classes': (
        ['train-classifier', '{store}', '{tmp}/c', '--strategy', 'concat', '--synthetic', '{three}'],
        '/three has classes a, b, ',
    ),
    'other store': (['run', 'demo', '--data', '{damaged}', '--out', '{tmp}/run'], 'is not as it was written'),
    'exists': (['simulate', '{store}', '--train', '28', '--val', '28', '--test', '28'], 'exists already'),
    'class': (['simulate', '{tmp}/s', '--classes', 'Golgi aparatus'], "did you mean 'Golgi apparatus'?"),
}


@pytest.fixture(scope='module')
def stores(tmp_path_factory):
    folder = tmp_path_factory.mktemp('stores')

    def write(name, channels=STAINS, vocab=HPA):
        with StoreWriter(folder / name, channels, vocab, 32) as writer:
            for i in range(9):
                image = np.full((len(channels), 32, 32), i, np.uint8)
                writer.add(image, id=i, target=i % 2, split=('train', 'val', 'test')[i % 3])

    write('store')
    write('two', ('dapi', 'gfp'))
    write('three', vocab=Vocabulary(['a', 'b']))
    shutil.copytree(folder / 'store', folder / 'damaged')
    with open(folder / 'damaged' / 'images.npy', 'r+b') as f:
        f.seek(-1, 2)
        f.write(b'\xff')
    return {name: folder / name for name in ('store', 'two', 'three', 'damaged')}


@pytest.mark.parametrize('words,expected', COMMANDS.values(), ids=COMMANDS.keys())
def test_commands(protloc, stores, tmp_path, words, expected):
    refused(protloc(*[w.format(tmp=tmp_path, **stores) for w in words]), expected)
    left = {p.name for p in tmp_path.rglob('*') if p.is_file()}
    assert left <= ({'config.yaml', 'versions.json'} if '{damaged}' in words else set())


def test_store_that_does_not_match_its_manifest(protloc, stores, tmp_path):
    copy = shutil.copytree(stores['store'], tmp_path / 'copy')
    with open(copy / 'images.npy', 'r+b') as f:
        f.truncate(2000)
    refused(protloc('info', copy), 'images.npy is no array')
    copy = shutil.copytree(stores['store'], tmp_path / 'copy2')
    (copy / 'table.csv').write_text((copy / 'table.csv').read_text().replace('train', 'test'))
    refused(protloc('info', copy), 'table.csv does not match its manifest')
    copy = shutil.copytree(stores['store'], tmp_path / 'copy3')
    manifest = json.loads((copy / 'manifest.json').read_text())
    (copy / 'manifest.json').write_text(json.dumps({**manifest, 'n': 10}))
    refused(protloc('info', copy), 'its manifest says uint8 (10, 4, 32, 32)')
    refused(protloc('info', stores['damaged'], '--verify'), 'is not as it was written')


def test_run_folder_with_another_config(protloc, finished):
    refused(protloc('run', 'demo', '--out', finished), 'was begun with other settings', 'choose another folder')


def test_full_disk(protloc, tmp_path):
    disk = tmp_path / 'disk'
    disk.mkdir()
    mount = ['mount', '-t', 'tmpfs', '-o', 'size=300k', 'tmpfs', disk]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip('a small disk can be mounted by root alone')
    try:
        result = protloc('simulate', disk / 'cells', '--train', 100, '--val', 30, '--test', 30)
        refused(result, 'its disk has 0.3 MB free', 'free some space')
        assert list(disk.iterdir()) == []
    finally:
        subprocess.run(['umount', disk], check=True)


def test_exit_code_of_the_installed_command(tmp_path):
    import sys

    command = Path(sys.executable).parent / 'protloc'
    done = subprocess.run([command, 'info', tmp_path], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith('protloc: ') and done.stderr.count('\n') == 1
