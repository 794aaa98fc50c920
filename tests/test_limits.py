"""Sizes are read before pixels, numbers have bounds, disks have room, and no helping process outlives its parent."""

import io
import os
import signal
import struct
import subprocess
import sys
import time
import uuid
import zlib

import imagecodecs
import numpy as np
import pandas as pd
import pytest
import tifffile
from PIL import Image
from pydantic import BaseModel

from protloc.core import Config, InputError
from protloc.data.fields import read_mask
from protloc.data.helpers import MOST_WORKERS
from protloc.data.layouts import FolderConfig, labelled_fields
from protloc.data.readers.images import READERS, read_channel, read_image
from protloc.data.simulate.datasets import simulate_store
from protloc.labels import STAINS


def png(width, height):
    "A PNG that states a size, and holds no pixels"
    data = b'\x89PNG\r\n\x1a\n'
    header = struct.pack('>IIBBBBB', width, height, 8, 0, 0, 0, 0)
    for kind, content in ((b'IHDR', header), (b'IDAT', zlib.compress(b'')), (b'IEND', b'')):
        data += struct.pack('>I', len(content)) + kind + content + struct.pack('>I', zlib.crc32(kind + content))
    return data


def jpeg(width, height):
    picture = io.BytesIO()
    Image.new('L', (8, 8)).save(picture, 'JPEG')
    data = picture.getvalue()
    return data.replace(struct.pack('>BHH', 8, 8, 8), struct.pack('>BHH', 8, height, width), 1)


def bmp(width, height):
    picture = io.BytesIO()
    Image.new('L', (8, 8)).save(picture, 'BMP')
    data = bytearray(picture.getvalue())
    struct.pack_into('<ii', data, 18, width, height)
    return bytes(data)


def jp2(width, height):
    data = bytearray(imagecodecs.jpeg2k_encode(np.zeros((8, 8), np.uint8), level=0, codecformat='j2k'))
    struct.pack_into('>II', data, data.find(b'\xff\x4f\xff\x51') + 8, width, height)
    return bytes(data)


def tiff(width, height):
    data = io.BytesIO()
    with tifffile.TiffWriter(data) as writer:
        writer.write(np.zeros((16, 16), np.uint8), photometric='minisblack', metadata=None)
    with tifffile.TiffFile(io.BytesIO(data.getvalue())) as file:
        page = file.pages.first
        places = {name: page.tags[name].valueoffset for name in ('ImageWidth', 'ImageLength')}
    changed = bytearray(data.getvalue())
    struct.pack_into('<I', changed, places['ImageWidth'], width)
    struct.pack_into('<I', changed, places['ImageLength'], height)
    return bytes(changed)


MAKERS = {'.png': png, '.jpg': jpeg, '.bmp': bmp, '.jp2': jp2, '.tif': tiff}


@pytest.mark.parametrize('ending', MAKERS)
def test_sizes_are_read_before_pixels(tmp_path, ending):
    path = tmp_path / f'a{ending}'
    path.write_bytes(MAKERS[ending](60_000, 50_000))
    began = time.monotonic()
    for read in (read_image, read_channel, read_mask):
        with pytest.raises(InputError, match='60000 x 50000 pixels, more than 400 megapixels: cut it into smaller'):
            read(path)
    with pytest.raises(InputError, match='allow it with --max-megapixels 3000'):
        read_image(path, max_megapixels=2999)
    assert time.monotonic() - began < 2


@pytest.mark.parametrize('ending', MAKERS)
def test_a_limit_that_is_raised_lets_pass(tmp_path, ending):
    "The same image under both limits; and the limit of one reading does not stay for the next one"
    path = tmp_path / f'a{ending}'
    Image.fromarray(np.zeros((1010, 1000), np.uint8)).save(path)
    with pytest.raises(InputError, match='1000 x 1010 pixels, more than 1 megapixels'):
        read_image(path, max_megapixels=1)
    assert read_image(path, max_megapixels=2).shape == (1, 1010, 1000)
    assert read_image(path).shape == (1, 1010, 1000)


def test_every_format_has_a_limit():
    "A format that is added has to be asked here as well"
    others = {'.jpeg', '.jfif', '.tiff', '.ome.tif', '.ome.tiff', '.j2k', '.czi', '.lif', '.nd2', '.zarr', '.ome.zarr'}
    assert set(READERS) == others | set(MAKERS)


def test_many_planes(tmp_path):
    path = tmp_path / 'a.tif'
    tifffile.imwrite(path, np.zeros((20, 700, 1000), np.uint8), photometric='minisblack', metadata={'axes': 'CYX'})
    with pytest.raises(InputError, match='20 planes of 1000 x 700 pixels, more than 1 megapixels for each of 8 planes'):
        read_image(path, max_megapixels=1)
    assert read_image(path, max_megapixels=2).shape == (20, 700, 1000)


@pytest.mark.parametrize('compression, forge', [('jpeg', jpeg), ('png', png), ('jpeg2000', jp2)])
def test_a_strip_that_states_more_than_its_page(tmp_path, compression, forge):
    path = tmp_path / 'a.tif'
    plane = np.zeros((64, 64), np.uint8)
    tifffile.imwrite(path, plane, photometric='minisblack', compression=compression, tile=(64, 64))
    with tifffile.TiffFile(path) as file:
        place = file.pages.first.dataoffsets[0]
    path.write_bytes(path.read_bytes()[:place] + forge(65_000, 65_000) + bytes(9999))
    with pytest.raises(InputError, match='65000 x 65000 pixels, more than 400 megapixels'):
        read_image(path)


def test_tiles_that_are_larger_than_allowed(tmp_path):
    path = tmp_path / 'a.tif'
    tifffile.imwrite(path, np.zeros((64, 64), np.uint8), tile=(64, 64), photometric='minisblack')
    with tifffile.TiffFile(path) as file:
        tags = file.pages.first.tags
        places = [(tags[name].valueoffset, tags[name].dtype) for name in ('TileWidth', 'TileLength')]
    data = bytearray(path.read_bytes())
    for place, dtype in places:
        struct.pack_into('<I' if dtype == 4 else '<H', data, place, 65_520)
    path.write_bytes(data)
    with pytest.raises(InputError, match='65520 x 65520 pixels, more than 400 megapixels'):
        read_image(path)


def test_chunks_that_are_larger_than_allowed(tmp_path):
    from protloc.data.readers.images import _check_chunks

    (tmp_path / 'a.zarr' / '0').mkdir(parents=True)
    for name, text in (
        ('.zarray', '{"shape": [1, 8, 8], "chunks": [1, 60000, 60000]}'),
        ('zarr.json', '{"chunk_grid": {"configuration": {"chunk_shape": [1, 60000, 60000]}}}'),
    ):
        (tmp_path / 'a.zarr' / '0' / name).write_text(text)
        with pytest.raises(InputError, match='60000 x 60000 pixels, more than 400'):
            _check_chunks(tmp_path / 'a.zarr')
        (tmp_path / 'a.zarr' / '0' / name).unlink()


def test_a_file_of_many_gigabytes(tmp_path):
    path = tmp_path / 'a.png'
    path.write_bytes(png(8, 8))
    os.truncate(path, 100 * 10**9)  # sparse
    with pytest.raises(InputError, match='100.0 GB, more than an image of 400 megapixels can have'):
        read_image(path)


def test_large_fields_are_listed_and_the_option_reads_them(protloc, challenge, tmp_path):
    for stain in STAINS:
        Image.fromarray(np.zeros((1010, 1000), np.uint8)).save(challenge / 'train' / f'f1_{stain}.png')
    options = ('--size', 32, '--workers', 1, '--max-megapixels')
    code, _, err = protloc('prepare', challenge, tmp_path / 'store', *options, 1)
    assert code == 2 and 'f1_red.png is 1000 x 1010 pixels, more than 1 megapixels' in err
    assert pd.read_csv(tmp_path / 'store.bad.csv').Id.tolist() == ['f1']
    assert protloc('prepare', challenge, tmp_path / 'store', *options, 2)[0] == 0
    assert not (tmp_path / 'store.bad.csv').exists()


# --- numbers


def test_numbers_of_the_settings_here_have_bounds_on_both_sides():
    from protloc.data import duplicates, fields, layouts, prepare, split
    from protloc.data.simulate import datasets

    found = 0
    for module in (duplicates, fields, layouts, prepare, split, datasets):
        for kind in vars(module).values():
            if not (isinstance(kind, type) and issubclass(kind, BaseModel)) or kind is Config:
                continue
            for name in kind.model_fields:
                for value in (-(10**30), 10**30):
                    found += 1
                    with pytest.raises((InputError, ValueError)):
                        kind(**{name: value})
    assert found > 40


@pytest.mark.parametrize(
    'words, expected',
    [
        (('--train', 10**12), 'train'),
        (('--train', -1), 'train'),
        (('--train', 0, '--val', 0, '--test', 0), 'no image'),
        (('--size', 10**6), 'size'),
        (('--size', -5), 'size'),
        (('--cells', 10**9), 'cells'),
        (('--cells', 0), 'cells'),
        (('--workers', 100_000), 'workers'),
        (('--workers', 0), 'workers'),
        (('--temper', 'nan'), 'temper'),
        (('--temper', 1e9), 'temper'),
        (('--temper', -1), 'temper'),
        (('--shift', 'inf'), 'shift'),
        (('--shift', -0.1), 'shift'),
        (('--seed', -1), 'seed'),
        (('--seed', 2**70), 'seed'),
        (('--least', 0), 'least'),
        (('--classes', '9' * 5000), 'class'),
    ],
)
def test_numbers_of_simulate(protloc, tmp_path, words, expected):
    began = time.monotonic()
    code, _, err = protloc('simulate', tmp_path / 'store', *words)
    assert code == 2 and expected in err and 'Traceback' not in err and 'Aborted' not in err
    assert not list(tmp_path.iterdir()) and time.monotonic() - began < 5


@pytest.mark.parametrize(
    'options',
    [
        {'size': 0},
        {'size': 10**9},
        {'tile': -1},
        {'workers': 0},
        {'workers': MOST_WORKERS + 1},
        {'seed': -1},
        {'seed': 2**63},
        {'percentiles': (0, float('nan'))},
        {'percentiles': (-1, 50)},
        {'min_foreground': 1.5},
        {'max_megapixels': 10**9},
        {'group_from': 'a{99999999999}(b)'},
        {'group_from': '(' * 5000},
    ],
)
def test_numbers_of_prepare(challenge, tmp_path, options):
    from protloc.data.prepare import prepare

    with pytest.raises(InputError):
        prepare(challenge, tmp_path / 'store', **{'size': 32, 'workers': 1, **options})
    assert [path.name for path in tmp_path.iterdir()] == ['challenge']


def test_a_disk_without_room(protloc, challenge, tmp_path, monkeypatch):
    import shutil

    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, 'disk_usage', lambda path: usage._replace(free=30_000))
    for words in (('prepare', challenge, tmp_path / 'a', '--size', 32), ('simulate', tmp_path / 'a', '--train', 1000)):
        code, _, err = protloc(*words)
        assert code == 2 and 'MB free: free some space, ' in err, err
        assert [path.name for path in tmp_path.iterdir()] == ['challenge']
    assert protloc('prepare', challenge, tmp_path / 'b', '--size', 30, '--workers', 1)[0] == 0  # 28,800 bytes


# --- odd folders


@pytest.mark.parametrize('what', ['pipe', 'socket', 'folder', 'loop', 'annexed'])
def test_odd_things_among_the_images(protloc, challenge, tmp_path, what):
    "What is no file is listed as a bad field, or named; nothing waits for it"
    import socket

    path = challenge / 'train' / 'f2_green.png'
    path.unlink()
    if what == 'pipe':
        os.mkfifo(path)
    if what == 'socket':
        here = os.getcwd()
        os.chdir(path.parent)  # names of sockets are short
        socket.socket(socket.AF_UNIX).bind(path.name)
        os.chdir(here)
    if what == 'folder':
        path.mkdir()
    if what == 'loop':
        path.symlink_to(path.name)
    if what == 'annexed':
        path.symlink_to('../.git/annex/objects/x')
    code, _, err = protloc('prepare', challenge, tmp_path / 'store', '--size', 32, '--workers', 1)
    assert code == 2 and 'Traceback' not in err and 'f2_green.png' in err
    assert not (tmp_path / 'store').exists()


@pytest.mark.parametrize('name', ['train.csv', 'labels.csv'])
@pytest.mark.parametrize('what', ['pipe', 'folder', 'empty', 'binary', 'loop'])
def test_odd_label_tables(protloc, challenge, tmp_path, name, what):
    (challenge / 'train.csv').unlink()
    path = challenge / name
    if what == 'pipe':
        os.mkfifo(path)
    if what == 'folder':
        path.mkdir()
    if what == 'empty':
        path.touch()
    if what == 'binary':
        path.write_bytes(bytes(range(256)))
    if what == 'loop':
        path.symlink_to(name)
    code, _, err = protloc('prepare', challenge, tmp_path / 'store', '--size', 32, '--workers', 1)
    assert code == 2 and 'Traceback' not in err and not (tmp_path / 'store').exists()


def test_a_folder_that_cannot_be_listed(tmp_path, monkeypatch):
    (tmp_path / 'classes' / 'a').mkdir(parents=True)

    def scandir(path, *others):
        raise PermissionError(13, 'Permission denied', str(path))

    monkeypatch.setattr(os, 'scandir', scandir)
    with pytest.raises(InputError, match='Permission denied: change its permissions'):
        labelled_fields(tmp_path / 'classes', FolderConfig())


# --- helpers


def of_the_same_mark(mark):
    "Living processes that inherited a variable"
    found = []
    for name in os.listdir('/proc'):
        if name.isdigit():
            try:
                environment = open(f'/proc/{name}/environ', 'rb').read()
                state = open(f'/proc/{name}/stat').read().rpartition(')')[2].split()[0]
            except OSError:
                continue
            if mark.encode() in environment and state != 'Z':
                found.append(int(name))
    return found


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists('/proc/self/environ'), reason='asks /proc')
@pytest.mark.parametrize('command', ['simulate', 'prepare'])
def test_no_process_outlives_a_killed_parent(tmp_path, command):
    words = ['simulate', tmp_path / 'out', '--train', 5000, '--size', 128]
    if command == 'prepare':
        for i in range(60):
            (tmp_path / 'classes' / f'class{i % 3}').mkdir(parents=True, exist_ok=True)
            pixels = np.random.default_rng(i).integers(0, 256, (1500, 1500), np.uint8)
            Image.fromarray(pixels).save(tmp_path / 'classes' / f'class{i % 3}' / f'{i}.png', compress_level=1)
        words = ['prepare', tmp_path / 'classes', tmp_path / 'out', '--normalise']
    mark = f'PROTLOC_TEST_MARK={uuid.uuid4().hex}'
    parent = subprocess.Popen(
        [sys.executable, '-m', 'protloc', *map(str, words), '--workers', '2'],
        env={**os.environ, **dict([mark.split('=')])},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 60
    while len(of_the_same_mark(mark)) < 4 and parent.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.5)
    helpers = set(of_the_same_mark(mark)) - {parent.pid}
    assert len(helpers) >= 3 and parent.poll() is None  # two workers and a tracker, at least
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    deadline = time.monotonic() + 3
    while of_the_same_mark(mark) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert of_the_same_mark(mark) == []


def test_helpers_are_no_more_than_there_is_work(tmp_path):
    store = simulate_store(tmp_path / 'a', dict(train=28), workers=MOST_WORKERS)  # one batch
    assert len(store) == 28
