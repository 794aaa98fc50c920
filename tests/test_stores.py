"""Stores: no changed image is used, each has one writer, and nothing that has taken its name is replaced."""

import errno
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
import zlib

import numpy as np
import pandas as pd
import pytest
import torch
from test_bad_input import refused

from protloc.core import InputError, sha256
from protloc.data.loading import Batches, loader
from protloc.data.resplit import replace_table, split_store, table_as_written
from protloc.data.simulate.datasets import simulate_store
from protloc.data.store import HASHED, ImageStore, ResumableWriter, StoreWriter, write_store
from protloc.files import PARTIAL, exclusive, lock_of, partial_of, write_json
from protloc.labels import Vocabulary

CLASSES = Vocabulary(['Nucleoli', 'Cytosol'])


def make(path, n=300, size=16):
    rng = np.random.default_rng(0)
    splits = np.array(['train', 'train', 'val', 'test'])[np.arange(n) % 4]
    table = pd.DataFrame(dict(id=[f'i{i}' for i in range(n)], target=[str(i // 2 % 2) for i in range(n)], split=splits))
    images = rng.integers(0, 256, (n, 4, size, size), dtype=np.uint8)
    return write_store(path, images, table, ('red', 'green', 'blue', 'yellow'), CLASSES)


def flip(path, image):
    "Change a byte of one image and keep the file's size"
    array = np.load(path / 'images.npy', mmap_mode='r+')
    array[image, 1, 3, 3] ^= 1
    array.flush()


@pytest.fixture
def damaged(tmp_path):
    "A store with one changed image in each split, none of them among those that are looked at on opening"
    make(tmp_path / 'store')
    for image in (29, 50, 51):  # train, val, test
        flip(tmp_path / 'store', image)
    ImageStore(tmp_path / 'store')
    return tmp_path / 'store'


SETTINGS = ('backbone=resnet10', 'weights=none', 'loop={steps: 20, batch_size: 32, evaluate_every: 20}')


def test_a_changed_image_is_never_trained_on(protloc, damaged, tmp_path):
    options = [word for setting in SETTINGS for word in ('--set', setting)]
    refused(protloc('train-classifier', damaged, tmp_path / 'c', *options), 'is not as it was written')
    options = ['--set', 'loop={steps: 20, batch_size: 32}', '--set', 'unet.widths=[16, 32]']
    refused(protloc('train-generator', damaged, tmp_path / 'g', *options), 'image 29 is not as it was written')


def test_a_changed_image_is_neither_split_nor_counted(protloc, damaged):
    before = sorted((path.name, path.stat().st_mtime_ns) for path in damaged.iterdir())
    refused(protloc('split', damaged), 'image 29 is not as it was written')
    refused(protloc('info', damaged), 'image 29 is not as it was written')
    refused(protloc('info', damaged, '--verify'), 'does not match the hash')
    assert sorted((path.name, path.stat().st_mtime_ns) for path in damaged.iterdir()) == before


def test_a_loaders_process_says_one_sentence(damaged):
    store = ImageStore(damaged)
    batches = Batches(store, store.rows('train'), 32, seed=0)
    for workers in (0, 2):
        with pytest.raises(InputError) as caught:
            list(loader(batches, 0, 20, workers))
        assert str(caught.value).startswith(str(damaged)) and 'Traceback' not in str(caught.value)


@pytest.mark.parametrize('where', ['first', 'last', 'everywhere'])
def test_large_damage_is_noticed_on_opening(tmp_path, where):
    make(tmp_path / 'store')
    array = np.load(tmp_path / 'store' / 'images.npy', mmap_mode='r+')
    rows = dict(first=slice(150), last=slice(150, None), everywhere=slice(None, None, 2))[where]
    array[rows] = np.random.default_rng(1).integers(0, 256, array[rows].shape, dtype=np.uint8)
    array.flush()
    with pytest.raises(InputError, match='is not as it was written'):
        ImageStore(tmp_path / 'store')


def test_what_was_checked_is_remembered_until_the_file_changes(tmp_path, monkeypatch):
    store = make(tmp_path / 'store')
    checked = []
    crc32 = zlib.crc32
    monkeypatch.setattr('protloc.data.store.zlib.crc32', lambda data: checked.append(1) or crc32(data))
    assert store.images[:100].shape == (100, 4, 16, 16) and len(checked) > 80
    checked.clear()
    again = ImageStore(tmp_path / 'store')
    again.images[:100]
    assert len(checked) == 1  # the checksums themselves
    flip(tmp_path / 'store', 29)
    with pytest.raises(InputError, match='image 29'):
        ImageStore(tmp_path / 'store').images[20:40]


def test_images_are_read_as_from_an_array(tmp_path):
    store = make(tmp_path / 'store', 8)
    plain = np.load(tmp_path / 'store' / 'images.npy')
    keys = (3, -1, slice(2, 5), [4, 1], np.array([True, False] * 4), (slice(None), 0), (2, 1), ..., (..., 0))
    for key in (*keys, (0, slice(None), [0, 1]), plain > 9, (plain[:, :, 0, 0] > 9, 0), (slice(2), None), range(3)):
        assert np.array_equal(store.images[key], plain[key])
    assert (store.images == plain).all() and store.images.mean() == plain.mean() and len(store.images) == 8
    assert np.array_equal(np.asarray(store.images, float), plain) and store.images.shape == plain.shape
    with pytest.raises(IndexError):
        store.images[8]
    assert torch.equal(torch.from_numpy(store.images[[1, 2]]), torch.from_numpy(plain[[1, 2]]))


@pytest.fixture
def in_shards(tmp_path, monkeypatch):
    "The store of `make` in five files, beside one in a single file"
    whole = make(tmp_path / 'whole')
    monkeypatch.setattr('protloc.data.shards.SHARD_BYTES', 70 * 4 * 16**2)
    return make(tmp_path / 'store'), whole


def test_a_store_in_several_files_is_the_same_store(in_shards):
    store, whole = in_shards
    assert [len(np.load(path, mmap_mode='r')) for path in store.images.shards.paths] == [70, 70, 70, 70, 20]
    assert store.manifest['sha256'] == whole.manifest['sha256'] and store.verify()
    assert (store.images == np.asarray(whole.images)).all() and store.table.equals(whole.table)
    for workers in (0, 2):
        batches = [Batches(each, each.rows('train'), 32, seed=0) for each in in_shards]
        for (images, labels), (same, too) in zip(*(loader(each, 0, 8, workers) for each in batches), strict=True):
            assert torch.equal(images, same) and torch.equal(labels, too)


def test_a_store_in_several_files_is_split_without_copying_them(in_shards):
    store, whole = in_shards
    inodes = [path.stat().st_ino for path in store.images.shards.paths]
    again = split_store(store)
    assert [path.stat().st_ino for path in again.images.shards.paths] == inodes and again.verify()
    assert again.table.equals(split_store(whole).table)


def test_damage_in_one_of_several_files_is_named(protloc, in_shards):
    store, _ = in_shards
    array = np.load(store.path / 'images-00002.npy', mmap_mode='r+')
    array[5, 1, 3, 3] ^= 1
    array.flush()
    with pytest.raises(InputError, match=r'images-00002\.npy: image 145 is not as it was written'):
        np.asarray(ImageStore(store.path).images)
    refused(protloc('info', store.path, '--verify'), 'images-*.npy does not match the hash')
    os.rename(store.path / 'images-00002.npy', store.path / 'gone')
    refused(protloc('info', store.path), 'images-*.npy: uint8 (140, 4, 16, 16) is there, its manifest says uint8 (300,')
    os.rename(store.path / 'images-00000.npy', store.path / 'gone')
    refused(protloc('info', store.path), 'is not an image store, it has no images.npy or images-00000.npy')


def go_on(path, n=9, stop=None, shard=3, value=0):
    "Write or go on with n images alike, a process that ends after some"
    import protloc.data.shards as shards

    usual, shards.SHARD_BYTES = shards.SHARD_BYTES, shard * 64
    try:
        with ResumableWriter(path, 'x', CLASSES, 8) as writer:
            for i in range(len(writer.done), n):
                if i == stop:
                    raise KeyboardInterrupt
                writer.add(np.full((1, 8, 8), value, np.uint8), id=f'i{i}', target='0')
                writer.commit()
    except KeyboardInterrupt:
        return partial_of(path)
    finally:
        shards.SHARD_BYTES = usual
    return ImageStore(path)


def test_files_of_another_length_are_gone_on_with(tmp_path):
    go_on(tmp_path / 'store', stop=7, shard=4)
    store = go_on(tmp_path / 'store', shard=2)
    assert store.verify() and [len(np.load(path)) for path in store.images.shards.paths] == [2, 2, 2, 2, 1]


@pytest.mark.parametrize('foreign', ['file', 'folder', 'link', 'dangling link', 'bytes behind', 'another file'])
def test_what_others_put_beside_unfinished_images_goes(tmp_path, foreign):
    partial = go_on(tmp_path / 'store', stop=7)
    single = partial / 'images.npy'
    np.save(tmp_path / 'mine.npy', np.full((3, 1, 8, 8), 7, np.uint8))
    mine = (tmp_path / 'mine.npy').read_bytes()
    dict(
        file=lambda: single.write_bytes(mine),
        folder=lambda: (single / 'a').mkdir(parents=True),
        link=lambda: single.symlink_to(tmp_path / 'mine.npy'),
    ).get(foreign, lambda: None)()
    if foreign == 'dangling link':
        single.symlink_to(tmp_path / 'nowhere')
    if foreign == 'bytes behind':
        with open(partial / 'images-00001.npy', 'ab') as file:
            file.write(b'z')
    if foreign == 'another file':
        (partial / 'images-00007.npy').write_bytes(mine)
    store = go_on(tmp_path / 'store')
    assert store.verify() and not np.asarray(store.images).any() and len(store.images.shards.paths) == 3
    assert not single.exists() and not (store.path / 'images-00007.npy').exists()
    assert (tmp_path / 'mine.npy').read_bytes() == mine


def test_a_file_that_is_cut_off_while_it_is_read_is_one_sentence(tmp_path):
    store = make(tmp_path / 'store')
    os.truncate(tmp_path / 'store' / 'images.npy', 100_000)
    with pytest.raises(InputError, match='is shorter than it was when it was opened'):
        list(loader(Batches(store, store.rows('train'), 32, seed=0), 0, 10))


def test_memory_does_not_grow_with_what_is_read(tmp_path):
    "An epoch over 256 MB raises the resident size by a few batches"
    script = f"""
import numpy as np
from protloc.data.loading import Batches, loader
from protloc.data.store import ImageStore, StoreWriter
from protloc.labels import Vocabulary
import protloc.data.shards as shards

def resident(name):
    return int(next(line for line in open('/proc/self/status') if line.startswith(name)).split()[1]) / 1024

shards.SHARD_BYTES = 50 * 2**20
image = np.random.default_rng(0).integers(0, 256, (4, 512, 512), dtype=np.uint8)
with StoreWriter({str(tmp_path / 'store')!r}, 'abcd', Vocabulary(['k']), 512) as writer:
    for i in range(256):
        writer.add(np.roll(image, i), id=i, target='0', split='train')
store = ImageStore({str(tmp_path / 'store')!r})
batches = Batches(store, store.rows('train'), 8)
next(iter(loader(batches, 0, 1)))
before = resident('VmRSS')
for images, _ in loader(batches, 0, 32):
    pass
store.verify()
print(resident('VmHWM') - before)
"""
    ended = subprocess.run([sys.executable, '-c', script], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert float(ended.stdout) < 64, f'{ended.stdout} MB more'


def test_images_cannot_be_changed_in_place(tmp_path):
    store = make(tmp_path / 'store', 8)
    with pytest.raises(InputError, match='cannot be changed: work on a copy'):
        store.images += 1
    with pytest.raises(InputError, match='cannot be changed'):
        np.add.at(store.images, 0, 1)
    with pytest.raises(ValueError, match='read-only'):
        store.images.fill(0)
    mine = np.empty_like(np.asarray(store.images))
    assert np.add(store.images, 1, out=mine) is mine and store.images.nbytes == mine.nbytes == store.images.size


def test_new_splits_keep_who_may_read_them(tmp_path):
    store = make(tmp_path / 'store', 40)
    for name in ('table.csv', 'manifest.json'):
        (store.path / name).chmod(0o640)
    replace_table(store, table_as_written(store))
    assert {(store.path / name).stat().st_mode & 0o777 for name in ('table.csv', 'manifest.json')} == {0o640}


def test_a_full_disk_names_the_store(tmp_path):
    with pytest.raises(OSError) as caught:
        with StoreWriter(tmp_path / 'store', ('r', 'g', 'b', 'y'), CLASSES, 16):
            raise OSError(28, 'No space left on device')
    assert caught.value.filename == str(tmp_path / 'store')


def test_stores_without_checksums_open(tmp_path):
    store = make(tmp_path / 'store', 8)
    manifest = dict(store.manifest, sha256={k: v for k, v in store.manifest['sha256'].items() if k != 'checksums'})
    write_json(store.path / 'manifest.json', manifest)
    (store.path / 'checksums.npy').unlink()
    assert ImageStore(store.path).verify() and ImageStore(store.path).images[3].shape == (4, 16, 16)


MANIFESTS = {
    'empty': b'',
    'a list': b'[]',
    'binary': b'\x80\x04\x95',
    'deep': b'[' * 100_000,
    'no hash': {'sha256': {}},
    'n is text': {'n': 'many'},
    'n is huge': {'n': 10**30},
    'n is negative': {'n': -1},
    'size is 0': {'size': 0},
    'no class': {'classes': []},
    'classes are one text': {'classes': 'Nucleoli'},
    'a class ends a line': {'classes': ['a\r', 'b']},
    'channels are numbers': {'channels': [1, 2, 3, 4]},
    'another version': {'schema_version': 99},
    'no version': {'schema_version': None},
    'one class too few': {'classes': ['Nucleoli']},
    'another size': {'size': 8},
    'another hash': {'sha256': {'images': '', 'table': 'x', 'checksums': 'x'}},
}


@pytest.mark.parametrize('change', MANIFESTS.values(), ids=MANIFESTS.keys())
def test_damaged_manifests(protloc, tmp_path, change):
    store = make(tmp_path / 'store', 8)
    path = store.path / 'manifest.json'
    path.write_bytes(change if isinstance(change, bytes) else json.dumps({**store.manifest, **change}).encode())
    refused(protloc('info', store.path), str(store.path))


@pytest.mark.parametrize('name', ['images.npy', 'checksums.npy', 'table.csv'])
@pytest.mark.parametrize('content', [b'', b'PK\x03\x04', b'\x93NUMPY\x01\x00', b'\0' * 100, None])
def test_damaged_files(protloc, tmp_path, name, content):
    store = make(tmp_path / 'store', 8)
    path = store.path / name
    path.unlink() if content is None else path.write_bytes(content)
    refused(protloc('info', store.path), name)


def simulate(path, seed, start, told):
    start.wait()
    try:
        simulate_store(path, dict(train=60, val=20, test=20), 32, ['Nucleoli', 'Cytosol'], seed=seed)
        told.put((seed, ''))
    except InputError as error:
        told.put((seed, str(error)))


def test_two_writers_make_one_store(tmp_path):
    context = multiprocessing.get_context('fork')
    start, told = context.Event(), context.Queue()
    path = tmp_path / 'cells'
    writers = [context.Process(target=simulate, args=(path, seed, start, told)) for seed in (1, 2)]
    for writer in writers:
        writer.start()
    start.set()
    said = dict(told.get(timeout=60) for _ in writers)
    for writer in writers:
        writer.join()
    (winner,) = [seed for seed, sentence in said.items() if not sentence]
    assert any(text in said[3 - winner] for text in ('is being written by process', 'exists already'))
    alone = simulate_store(
        tmp_path / 'alone', dict(train=60, val=20, test=20), 32, ['Nucleoli', 'Cytosol'], seed=winner
    )
    store = ImageStore(path)
    assert store.verify() and np.array_equal(store.images, alone.images) and store.table.equals(alone.table)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ['alone', 'cells']


@pytest.mark.parametrize('writer_class', [StoreWriter, ResumableWriter])
def test_what_has_taken_the_name_is_not_replaced(tmp_path, writer_class):
    path = tmp_path / 'store'
    image = np.zeros((4, 16, 16), np.uint8)
    with pytest.raises(InputError, match='has appeared while the store was made'):
        with writer_class(path, ('r', 'g', 'b', 'y'), CLASSES, 16) as writer:
            writer.add(image, id='a', target='0')
            if writer_class is ResumableWriter:
                writer.commit()
            path.mkdir()
            (path / 'thesis.txt').write_text('mine')
    assert (path / 'thesis.txt').read_text() == 'mine'
    shutil.rmtree(path)
    (tmp_path / f'.store{PARTIAL}').rename(path)
    assert np.array_equal(ImageStore(path).images[0], image)


def write_ten(path, stop=None, error=None):
    with ResumableWriter(path, ('r', 'g', 'b', 'y'), CLASSES, 16, settings=dict(seed=0)) as writer:
        first = len(writer.done)
        for i in range(first, 10):
            if i == stop:
                raise error
            writer.add(np.full((4, 16, 16), i, np.uint8), id=f'i{i}', target='0')
            writer.commit(number=i)
    return first


def test_a_full_disk_keeps_what_was_done(tmp_path):
    with pytest.raises(OSError, match='No space'):
        write_ten(tmp_path / 'store', 6, OSError(28, 'No space left on device'))
    assert write_ten(tmp_path / 'store') == 6
    write_ten(tmp_path / 'whole')
    for name in ('images.npy', 'table.csv', 'checksums.npy'):
        assert (tmp_path / 'store' / name).read_bytes() == (tmp_path / 'whole' / name).read_bytes()
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ['store', 'whole']


def test_a_torn_image_or_log_is_written_again(tmp_path):
    write_ten(tmp_path / 'whole')
    partial = partial_of(tmp_path / 'store')
    changes = {
        'images.npy': lambda data: data[:-2000] + b'\7' + data[-1999:],
        'log.jsonl': lambda data: data[: len(data) // 2] + b'{' + data[len(data) // 2 :],
    }
    for name, change in changes.items():
        with pytest.raises(OSError):
            write_ten(tmp_path / 'store', 6, OSError(5, 'Input/output error'))
        (partial / name).write_bytes(change((partial / name).read_bytes()))
        assert 0 < write_ten(tmp_path / 'store') < 6
        for file in ('images.npy', 'table.csv', 'checksums.npy'):
            assert (tmp_path / 'store' / file).read_bytes() == (tmp_path / 'whole' / file).read_bytes(), (name, file)
        shutil.rmtree(tmp_path / 'store')


def test_what_was_cut_is_written_anew(tmp_path):
    with pytest.raises(OSError):
        write_ten(tmp_path / 'store', 6, OSError(5, 'Input/output error'))
    with ResumableWriter(tmp_path / 'store', ('r', 'g', 'b', 'y'), CLASSES, 16, settings=dict(seed=0)) as writer:
        assert [note['number'] for note in writer.done] == list(range(6))
        writer.cut(2)
        assert len(writer.done) == 2
        for i in range(2, 4):
            writer.add(np.full((4, 16, 16), 10 * i, np.uint8), id=f'new{i}', target='1')
            writer.commit(number=i)
    store = ImageStore(tmp_path / 'store')
    assert store.images[:, 0, 0, 0].tolist() == [0, 1, 20, 30] and store.verify()
    assert store.table.id.tolist() == ['i0', 'i1', 'new2', 'new3']


def hold(path, seconds, told):
    try:
        with exclusive(path, wait=0.2):
            told.send('held')
            time.sleep(seconds)
    except InputError as error:
        told.send(str(error))


def test_one_writer_where_the_file_system_knows_no_locks(tmp_path, monkeypatch):
    "There a file stands for the lock, and goes with it; that of a killed process is no hindrance"

    def no_locks(*arguments):
        raise OSError(errno.ENOSYS, 'Function not implemented')

    monkeypatch.setattr('fcntl.flock', no_locks)
    context = multiprocessing.get_context('fork')

    def said(seconds):
        told, telling = context.Pipe(duplex=False)
        process = context.Process(target=hold, args=(tmp_path / 'cells', seconds, telling), daemon=True)
        process.start()
        assert told.poll(20)
        return process, told.recv()

    first, held = said(60)
    assert held == 'held' and 'cells is being written by' in said(0)[1]
    first.kill()
    first.join()
    third, held = said(0)
    third.join()
    assert held == 'held'
    assert list(tmp_path.iterdir()) == []


def test_notes_that_a_kill_left_in_a_whole_store_go(tmp_path):
    "The lock shows that they were left; files of these names that somebody else put there stay"
    write_ten(tmp_path / 'store')
    for name in ('log.jsonl', 'settings.json'):
        (tmp_path / 'store' / name).write_text('{}')
    with pytest.raises(InputError, match='exists already'):
        write_ten(tmp_path / 'store')
    assert (tmp_path / 'store' / 'log.jsonl').exists() and (tmp_path / 'store' / 'settings.json').exists()
    lock_of(tmp_path / 'store').touch()
    with pytest.raises(InputError, match='exists already'):
        write_ten(tmp_path / 'store')
    assert sorted(os.listdir(tmp_path / 'store')) == ['checksums.npy', 'images.npy', 'manifest.json', 'table.csv']


def test_a_large_store_opens_in_less_than_a_second(tmp_path):
    "10 GB of black images, which the disk need not hold"
    n, shape = 10_000, (4, 512, 512)
    store = make(tmp_path / 'store', 8)
    with open(store.path / 'images.npy', 'wb') as file:
        np.lib.format.write_array_header_1_0(file, dict(descr='|u1', fortran_order=False, shape=(n, *shape)))
        file.truncate(file.tell() + n * int(np.prod(shape)))
    rows = ['id,target,group,split,source', *(f'i{i},0,i{i},train,real' for i in range(n))]
    (store.path / 'table.csv').write_text('\n'.join(rows) + '\n')
    np.save(store.path / 'checksums.npy', np.full(n, zlib.crc32(np.zeros(shape, np.uint8)), np.uint32))
    hashes = {name: sha256(store.path / file) for name, file in HASHED.items()}
    write_json(
        store.path / 'manifest.json', dict(store.manifest, n=n, size=512, sha256=dict(images='0' * 64, **hashes))
    )
    began = time.perf_counter()
    large = ImageStore(store.path)
    seconds = time.perf_counter() - began
    assert seconds < 1 and large.images[9_999].shape == shape, seconds
