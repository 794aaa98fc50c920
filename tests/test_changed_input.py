"""A reading that was stopped, over a folder that has changed since: nothing is refused, and nothing old stays."""

import os
import re
import shutil
import time

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from protloc.core import InputError
from protloc.data import prepare as room
from protloc.data.store import ImageStore, ResumableWriter
from protloc.labels import STAINS
from protloc.study.arms import study_config
from protloc.study.runner import claim_folder, claim_inputs

OPTIONS = ('--size', 32, '--workers', 1)


class Stop(BaseException):
    "Ends a reading as a kill does, between two fields"


def stopped(protloc, monkeypatch, folder, out, fields, *options):
    "Stop a reading after so many fields"
    commit = ResumableWriter.commit
    made = []

    def committing(self, **note):
        commit(self, **note)
        made.append(note)
        if len(made) == fields:
            raise Stop

    with monkeypatch.context() as patched:
        patched.setattr(ResumableWriter, 'commit', committing)
        with pytest.raises(Stop):
            protloc('prepare', folder, out, *OPTIONS, *options)
    assert not out.exists() and (out.parent / f'.{out.name}.protloc-partial').is_dir()


def goes_on_to_the_same(protloc, folder, out, *options):
    "The same command again, and one that was never stopped, make the same bytes; what the first one says"
    code, _, err = protloc('prepare', folder, out, *OPTIONS, *options)
    assert code == 0, err
    fresh = out.parent / 'fresh'
    assert protloc('prepare', folder, fresh, *OPTIONS, *options)[0] == 0
    for name in ('images.npy', 'table.csv'):
        assert (out / name).read_bytes() == (fresh / name).read_bytes(), name
    made, of_fresh = (ImageStore(path).manifest['made'] for path in (out, fresh))
    assert {**made, 'command': ''} == {**of_fresh, 'command': ''} and ImageStore(out).verify()
    assert not [path for path in out.parent.iterdir() if 'protloc' in path.name]
    return err


def repaint(path, value=7):
    Image.fromarray(np.full((64, 64), value, np.uint8)).save(path)


def test_replaced_images_are_read(protloc, challenge, tmp_path, monkeypatch):
    stopped(protloc, monkeypatch, challenge, tmp_path / 'store', 6)
    for i in (2, 4):
        repaint(challenge / 'train' / f'f{i}_green.png')
    err = goes_on_to_the_same(protloc, challenge, tmp_path / 'store')
    assert '2 of the 6 fields that were read before are others now (the first: f2: its files changed' in err
    assert 'all from field 3 on are read again' in err
    assert (ImageStore(tmp_path / 'store').images[2, 1] == 7).all()


def test_an_image_of_the_same_size_and_another_time(protloc, challenge, tmp_path, monkeypatch):
    path = challenge / 'train' / 'f0_red.png'
    stopped(protloc, monkeypatch, challenge, tmp_path / 'store', 3)
    status = path.stat()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert 'the first: f0: its files changed' in goes_on_to_the_same(protloc, challenge, tmp_path / 'store')


def test_corrected_labels(protloc, challenge, tmp_path, monkeypatch):
    stopped(protloc, monkeypatch, challenge, tmp_path / 'store', 8)
    table = (challenge / 'train.csv').read_text()
    (challenge / 'train.csv').write_text(table.replace('f3,0 25', 'f3,1 2 25'))
    err = goes_on_to_the_same(protloc, challenge, tmp_path / 'store')
    assert 'labels, group, split or channels are others' in err
    assert ImageStore(tmp_path / 'store').table.set_index('id').target['f3'] == '1 2 25'


@pytest.mark.parametrize('change', ['added', 'removed', 'renamed'])
def test_fields_that_come_and_go(protloc, tmp_path, monkeypatch, change):
    folder = tmp_path / 'classes'
    for i in range(12):
        (folder / f'class{i % 2}').mkdir(parents=True, exist_ok=True)
        repaint(folder / f'class{i % 2}' / f'{i:02}.png', 10 * i)
    stopped(protloc, monkeypatch, folder, tmp_path / 'store', 12)
    if change == 'added':
        repaint(folder / 'class0' / '03b.png', 200)
    if change == 'removed':
        (folder / 'class1' / '11.png').unlink()
    if change == 'renamed':
        (folder / 'class0').rename(folder / 'class2')
    goes_on_to_the_same(protloc, folder, tmp_path / 'store')


def test_other_channels(protloc, tmp_path, monkeypatch):
    "Planes that the files name, and then other ones: what was written has another shape"
    import tifffile

    def write(names):
        for i in range(6):
            (tmp_path / 'classes' / f'class{i % 2}').mkdir(parents=True, exist_ok=True)
            planes = np.full((len(names), 64, 64), i, np.uint8)
            path = tmp_path / 'classes' / f'class{i % 2}' / f'{i}.ome.tif'
            tifffile.imwrite(path, planes, metadata={'axes': 'CYX', 'Channel': {'Name': names}})

    write(['DAPI', 'GFP'])
    stopped(protloc, monkeypatch, tmp_path / 'classes', tmp_path / 'store', 4)
    write(['DAPI', 'GFP', 'actin'])
    goes_on_to_the_same(protloc, tmp_path / 'classes', tmp_path / 'store')
    assert ImageStore(tmp_path / 'store').channels == ('DAPI', 'GFP', 'actin')


def test_a_mended_field_is_read(protloc, challenge, tmp_path, monkeypatch):
    path = challenge / 'train' / 'f1_blue.png'
    whole = path.read_bytes()
    path.write_bytes(whole[:900])
    stopped(protloc, monkeypatch, challenge, tmp_path / 'store', 5)
    path.write_bytes(whole)
    err = goes_on_to_the_same(protloc, challenge, tmp_path / 'store')
    assert 'the first: f1: it could not be read then, and can be now' in err
    assert len(ImageStore(tmp_path / 'store')) == 8


def test_a_field_that_stays_bad_costs_no_other(protloc, challenge, tmp_path, monkeypatch):
    (challenge / 'train' / 'f1_blue.png').write_bytes(b'hello')
    stopped(protloc, monkeypatch, challenge, tmp_path / 'store', 5, '--skip-bad')
    err = goes_on_to_the_same(protloc, challenge, tmp_path / 'store', '--skip-bad')
    assert 'are read again' not in err
    assert pd.read_csv(tmp_path / 'store.bad.csv').Id.tolist() == ['f1']


def test_a_limit_that_was_raised(protloc, challenge, tmp_path, monkeypatch):
    "What is bad for a limit is tried again under another one, and what was read stays"
    Image.fromarray(np.zeros((1100, 1100), np.uint8)).save(challenge / 'train' / 'f2_red.png')
    for stain in STAINS[1:]:
        shutil.copy(challenge / 'train' / 'f2_red.png', challenge / 'train' / f'f2_{stain}.png')
    stopped(protloc, monkeypatch, challenge, tmp_path / 'store', 5, '--max-megapixels', 1)
    err = goes_on_to_the_same(protloc, challenge, tmp_path / 'store', '--max-megapixels', 2)
    assert 'the first: f2: it could not be read then' in err


def test_a_replaced_mask(protloc, tmp_path, monkeypatch):
    folder = tmp_path / 'classes'
    for i in range(6):
        (folder / f'class{i % 2}').mkdir(parents=True, exist_ok=True)
        repaint(folder / f'class{i % 2}' / f'{i}.png', 9)
        repaint(folder / f'class{i % 2}' / f'{i}_Mask.png', 255)
    stopped(protloc, monkeypatch, folder, tmp_path / 'store', 6, '--mask-ending', '_Mask')
    repaint(folder / 'class1' / '3_Mask.png', 0)
    goes_on_to_the_same(protloc, folder, tmp_path / 'store', '--mask-ending', '_Mask')
    assert ImageStore(tmp_path / 'store').images[:].max((1, 2, 3)).tolist() == [9, 9, 9, 9, 0, 9]


def test_a_file_that_changes_while_it_is_read(protloc, challenge, tmp_path, monkeypatch):
    read = room.read_field

    def reading(paths, *others):
        field = read(paths, *others)
        if 'f3_' in paths[0].name:
            repaint(paths[0], time.time_ns() % 256)
        return field

    monkeypatch.setattr(room, 'read_field', reading)
    code, _, err = protloc('prepare', challenge, tmp_path / 'store', *OPTIONS)
    assert code == 2 and 'it was changed while it was read: wait until nobody writes there' in err
    assert pd.read_csv(tmp_path / 'store.bad.csv').Id.tolist() == ['f3']


@pytest.mark.parametrize('what', ['a table', 'a folder', 'a link', 'an empty file'])
@pytest.mark.parametrize('words', ['good', 'bad'])
def test_what_is_no_list_of_bad_fields_stays(protloc, challenge, tmp_path, what, words):
    place, kept = tmp_path / 'store.bad.csv', tmp_path / 'kept'
    if words == 'bad':
        (challenge / 'train' / 'f1_blue.png').write_bytes(b'hello')
    if what == 'a table':
        place.write_text('Id,Target\na,1\n')
    if what == 'a folder':
        place.mkdir()
        (place / 'mine.txt').write_text('mine')
    if what == 'a link':
        kept.write_text('Id,reason\n')
        place.symlink_to(kept)
    if what == 'an empty file':
        place.touch()
    before = sorted((path, path.is_file() and path.read_bytes()) for path in tmp_path.glob('[ks]*'))
    code, _, err = protloc('prepare', challenge, tmp_path / 'store', *OPTIONS)
    assert code == 2 and f'{place} is where bad fields would be listed, and is no such list: move it' in err
    assert sorted((path, path.is_file() and path.read_bytes()) for path in tmp_path.glob('[ks]*')) == before


def relabel(challenge, tmp_path):
    table = challenge / 'train.csv'
    table.write_text(table.read_text().replace('f3,0 25', 'f3,5'))


def replace_an_image(challenge, tmp_path):
    (challenge / 'train' / 'f3_green.png').write_bytes(bytes(1000))


def plan_others(challenge, tmp_path):
    (tmp_path / 'plan.csv').write_text('classes,n\nCytosol,33\n')


def weigh_otherwise(challenge, tmp_path):
    (tmp_path / 'begin.pth').write_bytes(b'other weights')


@pytest.mark.parametrize(
    'change,named',
    [
        (relabel, 'challenge (data.folder)'),
        (replace_an_image, 'challenge (data.folder)'),
        (plan_others, 'plan.csv (generate.plan)'),
        (weigh_otherwise, 'begin.pth (classifier.weights)'),
    ],
)
def test_a_study_goes_on_with_what_it_read(challenge, tmp_path, change, named):
    "What a stage has used and somebody changed since is named; what none has used is noted anew"
    (tmp_path / 'plan.csv').write_text('classes,n\nNucleoplasm,20\n')
    (tmp_path / 'begin.pth').write_bytes(b'weights')
    files = [f'generate.plan={tmp_path}/plan.csv', f'classifier.weights={tmp_path}/begin.pth']
    config = study_config('standard', challenge, ['data.prepare.size=32', *files])
    run = claim_folder(tmp_path / 'run', config)
    for _ in range(2):
        claim_inputs(config, run)
        change(challenge, tmp_path)
    claim_inputs(config, run)
    for made in (run.real, run.synthetic(), run.classifier('real')):
        made.mkdir(parents=True)
    claim_inputs(config, run)
    (challenge / 'notes.txt').write_text('no image')
    claim_inputs(config, run)
    if change is relabel:
        (challenge / 'train.csv').write_text((challenge / 'train.csv').read_text().replace('f3,5', 'f3,6'))
    elif change is replace_an_image:
        (challenge / 'train' / 'f3_green.png').write_bytes(bytes(999))
    else:
        (tmp_path / named.split()[0]).write_bytes(b'classes,n\nCytosol,34\n')
    with pytest.raises(InputError, match=re.escape(f'{named} has changed since this study read it')):
        claim_inputs(config, run)


def test_a_copy_of_the_images_or_none_is_no_change(challenge, tmp_path, capsys):
    "Times are another's after a copy, and an unmounted disk is an empty folder"
    config = study_config('standard', challenge, ['data.prepare.size=32', 'generate.plan=match'])
    run = claim_folder(tmp_path / 'run', config)
    claim_inputs(config, run)
    run.real.mkdir()
    for image in (challenge / 'train').iterdir():
        os.utime(image, (1, 1))
    claim_inputs(config, run)
    assert 'were copied or written again since this study read them' in capsys.readouterr().err
    shutil.rmtree(challenge)
    for _ in range(2):
        claim_inputs(config, run)
        challenge.mkdir(exist_ok=True)
    assert capsys.readouterr().err == ''
