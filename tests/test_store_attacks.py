"""What damaged stores, folders of others and writers at the same time do to each other: nothing."""

import json
import multiprocessing
import os
import signal

import numpy as np
import pandas as pd
import pytest
import torch

from protloc.core import InputError
from protloc.data import resplit
from protloc.data.loading import loader
from protloc.data.store import ImageStore, ResumableWriter, StoreWriter, write_store
from protloc.files import exclusive, partial_of
from protloc.labels import HPA

CHANNELS = ('red', 'green', 'blue', 'yellow')


def make(path, n=8):
    images = np.random.default_rng(0).integers(0, 256, (n, 4, 8, 8), np.uint8)
    table = pd.DataFrame(dict(id=[f'i{i}' for i in range(n)], target=[str(i % 2) for i in range(n)]))
    return write_store(path, images, table, CHANNELS, HPA)


def write_six(path, stop=None):
    with ResumableWriter(path, CHANNELS, HPA, 8, settings=dict(seed=0)) as writer:
        for i in range(len(writer.done), 6):
            if i == stop:
                raise OSError(28, 'No space left on device')
            writer.add(np.full((4, 8, 8), i, np.uint8), id=f'i{i}', target=str(i % 2))
            writer.commit(number=i)


@pytest.mark.parametrize('writer_class', [StoreWriter, ResumableWriter])
def test_a_folder_of_others_with_our_names_keeps_its_files(tmp_path, writer_class):
    theirs = dict.fromkeys(('manifest.json', 'settings.json', 'log.jsonl'), 'mine')
    (tmp_path / 'extension').mkdir()
    for name, text in theirs.items():
        (tmp_path / 'extension' / name).write_text(text)
    with pytest.raises(InputError, match='exists already'):
        writer_class(tmp_path / 'extension', CHANNELS, HPA, 8)
    assert {path.name: path.read_text() for path in (tmp_path / 'extension').iterdir()} == theirs


LOGS = {
    'another target': lambda data: data.replace(b'target\\": \\"0', b'target\\": \\"1').replace(
        b'target": "0', b'target": "1'
    ),
    'another id': lambda data: data.replace(b'i1', b'zz'),
    'no bytes of text': lambda data: bytes(range(128, 256)),
    'a byte of another encoding': lambda data: data[: len(data) // 2] + b'\xff' + data[len(data) // 2 + 1 :],
    'UTF-16': lambda data: data.decode().encode('utf-16'),
}


@pytest.mark.parametrize('change', LOGS.values(), ids=LOGS.keys())
def test_a_changed_log_is_not_gone_on_with(tmp_path, change):
    write_six(tmp_path / 'whole')
    with pytest.raises(OSError):
        write_six(tmp_path / 'store', 4)
    log = partial_of(tmp_path / 'store') / 'log.jsonl'
    changed = change(log.read_bytes())
    assert changed != log.read_bytes()
    log.write_bytes(changed)
    write_six(tmp_path / 'store')
    for name in ('images.npy', 'table.csv', 'checksums.npy'):
        assert (tmp_path / 'store' / name).read_bytes() == (tmp_path / 'whole' / name).read_bytes(), name


def test_a_link_with_the_name_of_the_partial_folder_is_not_followed(tmp_path):
    (tmp_path / 'elsewhere').mkdir()
    (tmp_path / 'elsewhere' / 'thesis.txt').write_text('mine')
    partial_of(tmp_path / 'store').symlink_to(tmp_path / 'elsewhere')
    write_six(tmp_path / 'store')
    assert not (tmp_path / 'store').is_symlink() and len(ImageStore(tmp_path / 'store')) == 6
    assert [path.name for path in (tmp_path / 'elsewhere').iterdir()] == ['thesis.txt']


@pytest.mark.parametrize('change', [dict(n='8'), dict(n=8.0), dict(size='8'), dict(schema_version=True)], ids=str)
def test_numbers_of_a_manifest_are_numbers(tmp_path, change):
    store = make(tmp_path / 'store')
    (store.path / 'manifest.json').write_text(json.dumps({**store.manifest, **change}))
    with pytest.raises(InputError, match=f"'{next(iter(change))}' is wrong"):
        ImageStore(store.path)


def test_a_manifest_that_does_not_say_how_it_was_made(tmp_path):
    store = make(tmp_path / 'store')
    (store.path / 'manifest.json').write_text(json.dumps({k: v for k, v in store.manifest.items() if k != 'made'}))
    assert ImageStore(store.path).manifest['made'] == {} and ImageStore(store.path)._repr_html_()


@pytest.mark.parametrize('what', ['pipe', 'folder'])
def test_a_table_that_is_no_file(tmp_path, what):
    store = make(tmp_path / 'store')
    (store.path / 'table.csv').unlink()
    dict(pipe=os.mkfifo, folder=os.mkdir)[what](store.path / 'table.csv')
    with pytest.raises(InputError, match=f'table.csv is a {what}'):
        ImageStore(store.path)


def put_aside(path, ready, done):
    with exclusive(path):
        os.rename(path, path.parent / f'.{path.name}.protloc-before')
        ready.set()
        done.wait(1)
        os.rename(path.parent / f'.{path.name}.protloc-before', path)


def test_a_store_is_not_taken_from_who_changes_its_name(tmp_path):
    make(tmp_path / 'store')
    context = multiprocessing.get_context('fork')
    ready, done = context.Event(), context.Event()
    holder = context.Process(target=put_aside, args=(tmp_path / 'store', ready, done))
    holder.start()
    assert ready.wait(20)
    assert resplit.reopen(tmp_path / 'store').verify()
    holder.join()
    assert holder.exitcode == 0


def test_a_store_is_put_back_through_a_link_too(tmp_path):
    make(tmp_path / 'store')
    (tmp_path / 'alias').symlink_to(tmp_path / 'store')
    (tmp_path / 'store').rename(tmp_path / '.store.protloc-before')
    assert resplit.reopen(tmp_path / 'alias').verify()


def test_a_table_has_one_writer(tmp_path, monkeypatch):
    store = make(tmp_path / 'store')
    held = []
    exchange = resplit._exchange
    monkeypatch.setattr(
        resplit, '_exchange', lambda *names: held.append(resplit.is_held(store.path)) or exchange(*names)
    )
    resplit.replace_table(store, resplit.table_as_written(store).assign(slide='1'))
    assert held == [True] and ImageStore(store.path).table.slide.eq('1').all()


class Ends(torch.utils.data.Dataset):
    def __init__(self, how):
        self.how = how

    def __getitem__(self, i):
        if i == 1 and self.how == 'killed':
            os.kill(os.getpid(), signal.SIGKILL)
        if i == 1:
            raise self.how
        return torch.zeros(1)


def test_how_loaders_processes_end_is_one_sentence():
    cases = [
        (Ends(OSError(28, 'No space left on device')), 2, 'No space left'),
        (Ends(InputError('it says InputError: twice')), 2, 'it says InputError: twice'),
        (Ends(InputError('it says InputError: twice')), 0, 'it says InputError: twice'),
        (Ends('killed'), 2, 'ended from outside'),
    ]
    for batches, workers, sentence in cases:
        with pytest.raises(InputError, match=sentence) as caught:
            list(loader(batches, 0, 4, workers))
        assert '\n' not in str(caught.value) and 'Traceback' not in str(caught.value)
