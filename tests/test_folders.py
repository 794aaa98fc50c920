"""Folders as users have them: every image is read with the right labels, or said not to be; nothing is lost."""

import os
import shutil

import numpy as np
import pytest
from PIL import Image

from protloc.core import InputError
from protloc.data.layouts import FolderConfig, labelled_fields, unlabelled_fields
from protloc.data.prepare import prepare
from protloc.data.store import ImageStore
from protloc.labels import STAINS

rng = np.random.default_rng(0)


def noise(*shape, kind=np.uint8):
    return rng.integers(0, np.iinfo(kind).max, shape, dtype=kind)


def save(path, pixels=None, **options):
    "An image of any format; returns its pixels"
    pixels = noise(32, 32) if pixels is None else pixels
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)
    return pixels


def prepared(protloc, folder, path, *options):
    "The store, and what was said on the way"
    code, out, err = protloc('prepare', folder, path, '--size', 32, '--workers', 1, *options)
    assert code == 0, err
    return ImageStore(path), err


def refused(protloc, folder, path, *options):
    code, out, err = protloc('prepare', folder, path, '--size', 32, '--workers', 1, *options)
    assert code == 2 and 'Traceback' not in err, err
    assert not path.exists() and not list(path.parent.glob('.*partial'))
    return err.strip().splitlines()[-1]


def labels_of(store):
    "id -> class names"
    return {id: store.vocab.names_of(target) for id, target in zip(store.table.id, store.table.target, strict=True)}


def images_of(store):
    return dict(zip(store.table.id, store.images, strict=True))


# --- names of classes are names


@pytest.mark.parametrize(
    'names', [[str(i) for i in range(11)], ['1', '2', '3'], ['01', '1', '1.0'], ['NA', 'None', '']]
)
def test_classes_have_the_names_of_their_folders(protloc, tmp_path, names):
    names = [name or 'nan' for name in names]
    pixels = {f'{name}/cell{i}': save(tmp_path / 'in' / name / f'cell{i}.png') for name in names for i in range(3)}
    store, _ = prepared(protloc, tmp_path / 'in', tmp_path / 'store')
    assert list(store.vocab) == sorted(names)
    assert labels_of(store) == {id: [id.split('/')[0]] for id in pixels}
    assert all(np.array_equal(image[0], pixels[id]) for id, image in images_of(store).items())
    assert store.labels.sum(0).tolist() == [3] * len(names)


# --- every file is read, or counted and named


@pytest.mark.parametrize('separator', ['_', '-', ' ', '.'])
def test_channels_are_found_in_any_case_and_with_any_ending(protloc, tmp_path, separator):
    planes = {}
    endings = {('Golgi', 'dapi'): ('DAPI', '.TIF'), ('Golgi', 'gfp'): ('Gfp', '.png')}
    for name in ('Golgi', 'Cytosol'):
        for i in range(3):
            for channel in ('dapi', 'gfp'):
                written, ending = endings.get((name, channel), (channel, '.tif'))
                file = tmp_path / 'in' / name / f'cell{i}{separator}{written}{ending}'
                planes[f'{name}/cell{i}', channel] = save(file)
    store, _ = prepared(protloc, tmp_path / 'in', tmp_path / 'store', '--channels', 'gfp,dapi')
    assert len(store) == 6 and store.labels.sum(0).tolist() == [3, 3]
    for id, image in images_of(store).items():
        assert np.array_equal(image, [planes[id, 'gfp'], planes[id, 'dapi']])


def test_images_of_every_ending_are_read(protloc, tmp_path):
    pixels = {}
    for name, ending in (('a', '.png'), ('a', '.PNG'), ('b', '.bmp'), ('b', '.BMP'), ('b', '.jp2'), ('a', '.Tiff')):
        id = f'{name}/cell{len(pixels)}'
        pixels[id] = save(tmp_path / 'in' / f'{id}{ending}', **({'irreversible': False} if ending == '.jp2' else {}))
    (tmp_path / 'in' / 'b' / 'notes.txt').touch()
    store, err = prepared(protloc, tmp_path / 'in', tmp_path / 'store')
    assert all(np.array_equal(image[0], pixels[id]) for id, image in images_of(store).items()) and len(store) == 6
    assert '1 file not read: 1 b/notes.txt' in err
    assert store.manifest['made']['files_not_read'] == '1 file not read: 1 b/notes.txt'


def test_a_class_of_which_nothing_is_read_is_refused(protloc, tmp_path):
    for i in range(3):
        save(tmp_path / 'in' / 'a' / f'{i}.png')
        save(tmp_path / 'in' / 'c' / f'{i}.png')
    (tmp_path / 'in' / 'b').mkdir()
    for i in range(3):
        np.save(tmp_path / 'in' / 'b' / f'{i}.npy', noise(9, 9))
    said = refused(protloc, tmp_path / 'in', tmp_path / 'store')
    assert "no image of the folder 'b' is read" in said and '3 b/*.npy' in said
    for file in (tmp_path / 'in' / 'b').iterdir():
        file.unlink()
    store, err = prepared(protloc, tmp_path / 'in', tmp_path / 'store')
    assert list(store.vocab) == ['a', 'c'] and 'empty folders: b' in err


def test_hidden_files_and_folders_are_skipped(protloc, tmp_path):
    for name in ('a/1.png', 'a/2.png', 'b/1.png', 'a/.ipynb_checkpoints/1-checkpoint.png', '.thumbnails/1.png'):
        save(tmp_path / 'in' / name)
    (tmp_path / 'in' / 'b' / '._1.png').write_bytes(b'Mac OS X')
    store, err = prepared(protloc, tmp_path / 'in', tmp_path / 'store')
    assert list(store.table.id) == ['a/1', 'a/2', 'b/1'] and 'not read' not in err


def test_links_that_point_to_nothing_are_named(protloc, tmp_path):
    for i in range(3):
        save(tmp_path / 'in' / 'a' / f'{i}.png')
        save(tmp_path / 'in' / 'b' / f'{i}.png')
    (tmp_path / 'in' / 'b' / '3.png').symlink_to('../.git/annex/objects/x')
    said = refused(protloc, tmp_path / 'in', tmp_path / 'store')
    assert '1 of 7 images are links that point to nothing' in said and 'b/3.png' in said and 'git annex get' in said
    store, err = prepared(protloc, tmp_path / 'in', tmp_path / 'store', '--exclude', 'b/3.*')
    assert len(store) == 6 and '1 b/3.png' in err
    os.remove(tmp_path / 'in' / 'b' / '3.png')
    (tmp_path / 'in' / 'b' / '3.png').symlink_to(tmp_path / 'in' / 'a' / '0.png')
    assert len(prepared(protloc, tmp_path / 'in', tmp_path / 'linked')[0]) == 7


def test_plates_inside_a_class_are_groups(protloc, tmp_path):
    pixels = {}
    for name in ('Golgi/0', 'Golgi/p2/day 1/1', 'Golgi/p2/day 1/2', 'Cytosol/p2/day 1/0', 'Cytosol/p3/0', 'Cytosol/1'):
        pixels[name] = save(tmp_path / 'in' / f'{name}.png')
    store, _ = prepared(protloc, tmp_path / 'in', tmp_path / 'store')
    assert labels_of(store) == {name: [name.split('/')[0]] for name in sorted(pixels, key=lambda n: n.split('/'))}
    groups = dict(zip(store.table.id, store.table.group, strict=True))
    assert groups['Golgi/0'] == 'Golgi/0' and groups['Cytosol/p3/0'] == 'p3'
    assert groups['Golgi/p2/day 1/1'] == groups['Cytosol/p2/day 1/0'] == 'p2/day 1'
    assert store.table.groupby('group').split.nunique().max() == 1
    assert all(np.array_equal(image[0], pixels[id]) for id, image in images_of(store).items())


def test_patterns_say_what_is_meant(protloc, tmp_path):
    for name in ('a/1_raw.png', 'a/2_raw.png', 'b/1_raw.png', 'b/plate/2_raw.png', 'a/1_view.png', 'b/old/1_raw.png'):
        save(tmp_path / 'in' / name)
    store, err = prepared(
        protloc,
        tmp_path / 'in',
        tmp_path / 'store',
        '--match',
        '*_raw.png',
        '--exclude',
        'b/old/*',
        '--exclude',
        '1_v*',
    )
    assert list(store.table.id) == ['a/1_raw', 'a/2_raw', 'b/1_raw', 'b/plate/2_raw']
    assert '2 files not read' in err
    assert store.manifest['made']['match'] == ['*_raw.png'] and store.manifest['made']['exclude'] == ['b/old/*', '1_v*']


@pytest.mark.parametrize('option', ['--match', '--exclude'])
@pytest.mark.parametrize('pattern', ['*_RAW.png', 'a', 'a/', 'in/a/*', '*_raw.png,*_view.png'])
def test_a_pattern_that_fits_nothing_is_refused(protloc, tmp_path, option, pattern):
    for name in ('a/1_raw.png', 'a/2_raw.png', 'b/1_raw.png', 'b/2_view.png'):
        save(tmp_path / 'in' / name)
    said = refused(protloc, tmp_path / 'in', tmp_path / 'none', option, pattern)
    assert f"fits {option} '{pattern}'" in said and 'a/1_raw.png' in said


def test_a_tree_of_splits_keeps_them(protloc, tmp_path):
    names = [f'{split}/{name}/{i}' for split in ('Train', 'test') for name in ('Golgi', 'Cytosol') for i in range(4)]
    pixels = {name: save(tmp_path / 'in' / f'{name}.png') for name in names}
    for i in range(3):
        save(tmp_path / 'in' / 'previews' / f'{i}.png')
    store, err = prepared(protloc, tmp_path / 'in', tmp_path / 'store')
    assert list(store.vocab) == ['Cytosol', 'Golgi'] and len(store) == 16
    for id, split in zip(store.table.id, store.table.split, strict=True):
        assert split == id.split('/')[0].lower() and labels_of(store)[id] == [id.split('/')[1]]
        assert np.array_equal(images_of(store)[id][0], pixels[id])
    assert '3 files not read: 3 previews/*.png' in err and 'has no images for val' in err
    shares = ['--train', 0.5, '--val', 0.25, '--test', 0.25]
    store, _ = prepared(protloc, tmp_path / 'in', tmp_path / 'with val', *shares)
    assert store.table.split[store.table.id.str.startswith('test')].eq('test').all()
    trained = store.table.split[store.table.id.str.startswith('Train')].value_counts()
    assert trained.sum() == 8 and trained.val in (2, 3) and trained.train == 8 - trained.val
    for name in ('Golgi', 'Cytosol'):
        save(tmp_path / 'in' / 'valid' / name / '0.png')
    assert 'brings its own splits' in refused(protloc, tmp_path / 'in', tmp_path / 'bad', *shares)
    store, err = prepared(protloc, tmp_path / 'in', tmp_path / 'whole')
    assert store.table.split.value_counts().to_dict() == dict(train=8, test=8, val=2) and 'note' not in err


def test_a_picture_under_two_classes_has_both_labels(protloc, tmp_path):
    for name in ('Golgi', 'Cytosol', 'Nucleoli'):
        for i in range(3):
            save(tmp_path / 'in' / name / f'{i}.tif')
    shutil.copy(tmp_path / 'in' / 'Golgi' / '1.tif', tmp_path / 'in' / 'Nucleoli' / '1.tif')
    shutil.copy(tmp_path / 'in' / 'Golgi' / '2.tif', tmp_path / 'in' / 'Cytosol' / 'copy.tif')
    store, err = prepared(protloc, tmp_path / 'in', tmp_path / 'store')
    assert labels_of(store)['Golgi/1'] == ['Golgi', 'Nucleoli'] and 'Nucleoli/1' not in labels_of(store)
    assert labels_of(store)['Golgi/0'] == ['Golgi'] and len(store) == 9, 'files of one name are no copies'
    assert '1 copies of pictures lie under a further class' in err
    assert '2 fields have the pixels of another one and other labels (the first: Cytosol/copy and Golgi/2)' in err


# --- masks and crops


@pytest.fixture
def crops(tmp_path):
    "Single cells of mixed sizes with a mask each"
    for i, (height, width) in enumerate([(40, 64), (64, 40), (32, 32), (20, 50)]):
        for name in ('a', 'b'):
            save(tmp_path / 'crops' / name / f'{i:05d}.png', noise(height, width, 3) | 1)
            mask = np.zeros((height, width), bool)
            mask[height // 4 : height // 2] = True
            save(tmp_path / 'crops' / name / f'{i:05d}_Mask.png', mask)
    return tmp_path / 'crops'


def test_masks_beside_images_are_no_images(protloc, crops, tmp_path):
    said = refused(protloc, crops, tmp_path / 'store')
    assert "8 images" in said and "'_Mask'" in said and '--exclude' in said and '--mask-ending _Mask' in said
    store, err = prepared(protloc, crops, tmp_path / 'store', '--exclude', '*_Mask.*', '--enlarge')
    assert len(store) == 8 and '8 files not read: 8 *_Mask.png' in err
    both = ['--match', '*', '--exclude', '*_Mask.*', '--enlarge']
    assert len(prepared(protloc, crops, tmp_path / 'all', *both)[0]) == 8
    shutil.rmtree(crops / 'b')
    for i in range(4):
        (crops / 'a' / f'{i:05d}_Mask.png').rename(crops / 'a' / f'{i:05d}_cp_masks.png')
    assert "'_cp_masks'" in refused(protloc, crops, tmp_path / 'bad')


def test_outside_a_mask_is_black(protloc, crops, tmp_path):
    store, _ = prepared(protloc, crops, tmp_path / 'store', '--mask-ending', '_mask', '--enlarge', '--exclude', '*3*')
    assert len(store) == 6 and store.manifest['made']['mask_ending'] == '_mask'
    raw = np.asarray(Image.open(crops / 'a' / '00002.png'))
    assert np.array_equal(images_of(store)['a/00002'][:, 8:16], np.moveaxis(raw, -1, 0)[:, 8:16])
    assert not images_of(store)['a/00002'][:, 16:].any() and not images_of(store)['a/00002'][:, :8].any()
    (crops / 'b' / '00001_Mask.png').unlink()
    said = refused(protloc, crops, tmp_path / 'bad', '--mask-ending', '_Mask', '--enlarge')
    assert '1 of 8 fields' in said and 'b/00001_Mask.png is missing: every field needs its mask' in said
    assert "ends on '_seg'" in refused(protloc, crops, tmp_path / 'bad', '--mask-ending', '_seg')


def test_crops_of_mixed_sizes_are_fitted(protloc, crops, tmp_path):
    said = refused(protloc, crops, tmp_path / 'store', '--exclude', '*_Mask.*')
    assert 'images of 20 x 20 pixels would have to be enlarged to 32' in said and '--enlarge' in said
    stores = {}
    for fit in ('crop', 'pad', 'stretch'):
        options = ['--exclude', '*_Mask.*', '--enlarge', '--fit', fit]
        stores[fit] = images_of(prepared(protloc, crops, tmp_path / fit, *options)[0])
    raw = np.moveaxis(np.asarray(Image.open(crops / 'a' / '00000.png')), -1, 0).astype(float)
    # 40 x 64: padded to 64 x 64 it shrinks by two, so that the mean of each 2 x 2 block is stored
    padded = np.pad(raw, [(0, 0), (12, 12), (0, 0)])
    assert np.abs(stores['pad']['a/00000'] - padded.reshape(3, 32, 2, 32, 2).mean((2, 4))).max() < 1
    assert not stores['pad']['a/00000'][:, :6].any() and stores['pad']['a/00000'][:, 6:26].all()
    assert stores['stretch']['a/00003'].all() and stores['crop']['a/00000'].all()
    assert all(np.array_equal(stores[fit]['a/00002'], stores['crop']['a/00002']) for fit in stores)
    assert 'tiles are square' in refused(protloc, crops, tmp_path / 'bad', '--tile', 32, '--fit', 'pad')


def test_channels_that_were_not_named_are_no_images(protloc, tmp_path):
    for name in ('a', 'b'):
        for i in range(2):
            for channel in ('w1', 'w2'):
                save(tmp_path / 'in' / name / f'A0{i}_s1_{channel}.tif')
    said = refused(protloc, tmp_path / 'in', tmp_path / 'store')
    assert 'the 8 images' in said and '--channels w1,w2' in said
    assert len(prepared(protloc, tmp_path / 'in', tmp_path / 'store', '--channels', 'w1,w2')[0]) == 4
    assert len(prepared(protloc, tmp_path / 'in', tmp_path / 'each', '--match', '*.tif')[0]) == 8
    save(tmp_path / 'in' / 'b' / 'overview.tif')
    said = refused(protloc, tmp_path / 'in', tmp_path / 'bad', '--channels', 'w1,w2')
    assert '1 of 9 images belong to no field' in said and 'b/overview.tif' in said


def test_the_stains_of_hpa_need_no_names(protloc, tmp_path):
    planes = {}
    for name in ('10', '9'):
        for i in range(2):
            for stain in STAINS:
                planes[f'{name}/{i}', stain] = save(tmp_path / 'in' / name / f'{i}_{stain}.jp2', irreversible=False)
    store, _ = prepared(protloc, tmp_path / 'in', tmp_path / 'store')
    assert store.channels == STAINS and len(store) == 4
    for id, image in images_of(store).items():
        assert np.array_equal(image, [planes[id, stain] for stain in STAINS])


# --- the challenges' layouts


@pytest.mark.parametrize('ending', ['.tif', '.PNG', '.bmp', '.Tiff'])
def test_the_challenge_in_other_endings(protloc, challenge, tmp_path, ending):
    raw = {}
    for file in sorted((challenge / 'train').iterdir()):
        raw[file.stem] = np.asarray(Image.open(file))
        file.unlink()
        save(file.with_suffix(ending), raw[file.stem])
    store, err = prepared(protloc, challenge, tmp_path / 'store', '--size', 64)
    assert list(store.table.id) == [f'f{i}' for i in range(8)] and 'not read' not in err
    for id, image in images_of(store).items():
        assert np.array_equal(image, [raw[f'{id}_{stain}'] for stain in STAINS])


def test_fields_that_the_table_does_not_name_are_counted(protloc, challenge, tmp_path):
    lines = (challenge / 'train.csv').read_text().splitlines()
    (challenge / 'train.csv').write_text('\n'.join([*lines[:-1], 'f9,3']) + '\n')
    save(challenge / 'test' / 'g_red.png')
    said = refused(protloc, challenge, tmp_path / 'store')
    assert '1 of 8 fields' in said and 'train/f9_red.png is missing' in said
    store, err = prepared(protloc, challenge, tmp_path / 'store', '--skip-bad')
    assert list(store.table.id) == [f'f{i}' for i in range(7)]
    assert '5 files not read: 2 *_red.png, 1 train/f7_blue.png' in err


# --- tables with one column a class, and groups


@pytest.fixture
def table(tmp_path):
    "Six wells of three plates and a table with one column a class"
    pixels = {}
    names = [f'p{plate}_A{well}' for plate in range(3) for well in (1, 2)]
    for name in names:
        pixels[name] = save(tmp_path / 'set' / 'images' / f'{name}.png')
    rows = [f'{name}.png,0{i // 2},{i % 2},{int(i > 2)},1,x' for i, name in enumerate(names)]
    (tmp_path / 'set' / 'labels.csv').write_text('\n'.join(['image,plate,Nucleoli,10,Cytosol,remark', *rows]) + '\n')
    return tmp_path / 'set', pixels


def test_one_column_a_class(protloc, table, tmp_path):
    folder, pixels = table
    store, err = prepared(protloc, folder, tmp_path / 'store', '--group-from', 'plate')
    assert list(store.vocab) == ['Nucleoli', '10', 'Cytosol']
    assert labels_of(store)['p1_A2.png'] == ['Nucleoli', '10', 'Cytosol']
    assert labels_of(store)['p0_A1.png'] == ['Cytosol']
    assert list(store.table.group) == ['00', '00', '01', '01', '02', '02']
    assert store.table.groupby('group').split.nunique().max() == 1 and store.table.split.nunique() == 3
    assert all(np.array_equal(image[0], pixels[id.removesuffix('.png')]) for id, image in images_of(store).items())
    assert 'columns of labels.csv not read: remark' in err
    (folder / 'labels.csv').rename(folder / 'mine.csv')
    same, _ = prepared(protloc, folder, tmp_path / 'same', '--labels', 'mine.csv', '--group-from', 'plate')
    assert same.table.equals(store.table)
    assert 'no label table other.csv' in refused(protloc, folder, tmp_path / 'bad', '--labels', 'other.csv')


@pytest.mark.parametrize(
    ['old', 'new', 'sentence'],
    [
        ('p1_A1.png,01,0', 'p1_A1.png,01,yes', "line 4: column 'Nucleoli' holds 'yes'"),
        ('p1_A1.png,01,0', 'p1_A1.png,01,', "line 4: column 'Nucleoli' holds ''"),
        ('p1_A1.png,01,0,0,1', 'p1_A1.png,01,0,0,0', "line 4 (Id 'p1_A1.png'): the image has no class"),
        ('p1_A1.png', 'p1_A2', "line 5: Id 'p1_A2.png' is the image of line 4 again"),
        ('p1_A1.png', 'p1_A2.png', "line 5: Id 'p1_A2.png' occurs twice"),
        ('p1_A1.png', 'P1_A1.png', '1 of 6 fields cannot be used'),
    ],
)
def test_mistakes_in_a_table_name_its_line(protloc, table, tmp_path, old, new, sentence):
    folder, _ = table
    text = (folder / 'labels.csv').read_text()
    assert old in text
    (folder / 'labels.csv').write_text(text.replace(old, new))
    assert sentence in refused(protloc, folder, tmp_path / 'store')


def test_groups_from_names(protloc, tmp_path):
    for i, name in enumerate(('a', 'b', 'a', 'b', 'a', 'b')):
        for site in (1, 2):
            save(tmp_path / 'in' / name / f'2024{i % 3}_A0{i}_{site}.png')
    store, _ = prepared(protloc, tmp_path / 'in', tmp_path / 'store', '--group-from', r'^(\d+_[A-H]\d+)')
    assert set(store.table.group) == {f'2024{i % 3}_A0{i}' for i in range(6)}
    assert store.table.groupby('group').split.nunique().max() == 1
    assert store.manifest['made']['group_from'] == r'^(\d+_[A-H]\d+)'
    assert 'needs one (group)' in refused(protloc, tmp_path / 'in', tmp_path / 'bad', '--group-from', 'plate')
    said = refused(protloc, tmp_path / 'in', tmp_path / 'bad', '--group-from', '^(20240)')
    assert 'fits 4 of 12 names' in said


def test_shares_of_the_splits(protloc, tmp_path):
    for i in range(20):
        save(tmp_path / 'in' / 'ab'[i % 2] / f'{i}.png')
    store, _ = prepared(
        protloc, tmp_path / 'in', tmp_path / 'store', '--train', 0.5, '--val', 0.3, '--test', 0.2, '--seed', 3
    )
    assert store.table.split.value_counts().to_dict() == dict(train=10, val=6, test=4)
    assert store.manifest['made']['fractions'] == dict(train=0.5, val=0.3, test=0.2)
    assert 'must add up to 1' in refused(protloc, tmp_path / 'in', tmp_path / 'bad', '--train', 0.5)


# --- size


@pytest.mark.slow
def test_a_large_folder_is_listed_in_seconds(tmp_path):
    import time

    for name in ('a', 'b'):
        (tmp_path / name).mkdir()
        for i in range(10_000):
            for channel in ('dapi', 'gfp'):
                (tmp_path / name / f'cell {i}_{channel}.tif').touch()
    start = time.time()
    fields = labelled_fields(tmp_path, FolderConfig(channels=('dapi', 'gfp')))
    assert len(fields.table) == 20_000 and time.time() - start < 20
    assert fields.table.set_index('Id').Files['a/cell 1000'] == ('a/cell 1000_dapi.tif', 'a/cell 1000_gfp.tif')


def test_first_reason_is_named(tmp_path):
    for name in ('a', 'b'):
        (tmp_path / 'in' / name).mkdir(parents=True)
        for i in range(3):
            (tmp_path / 'in' / name / f'{i}.png').write_bytes(b'')
    with pytest.raises(ValueError, match='none of the first 6 images can be read, the first: .*0.png .*empty'):
        prepare(tmp_path / 'in', tmp_path / 'store', size=32, workers=1)


def test_a_pattern_that_leaves_out_a_part_of_a_field_is_refused(protloc, tmp_path):
    for name in ('a', 'b'):
        for i in range(2):
            for channel in ('dapi', 'gfp', 'Mask'):
                save(tmp_path / 'in' / name / f'{i}_{channel}.png')
    both = ['--channels', 'dapi,gfp']
    said = refused(protloc, tmp_path / 'in', tmp_path / 'bad', *both, '--match', '*dapi*')
    assert '4 files are left out by --match or --exclude' in said and 'a/0_gfp.png' in said
    masks = ['--mask-ending', '_Mask', '--exclude', 'b/1_Mask.*']
    assert 'b/1_Mask.png' in refused(protloc, tmp_path / 'in', tmp_path / 'bad', *both, *masks)
    store, _ = prepared(protloc, tmp_path / 'in', tmp_path / 'one', '--channels', 'dapi', '--match', '*dapi*')
    assert store.channels == ('dapi',) and len(store) == 4


# --- what a file says of its channels


def test_channels_are_put_in_order_by_their_names(protloc, tmp_path):
    import tifffile

    planes = {}
    for i, names in enumerate((['DAPI', 'GFP'], ['GFP', 'DAPI'], ['DAPI', 'GFP'], ['DAPI', 'GFP'])):
        id = f'{"ab"[i % 2]}/{i}'
        (tmp_path / 'in' / id).parent.mkdir(parents=True, exist_ok=True)
        pixels = noise(2, 32, 32)
        planes[id] = pixels[[names.index('DAPI'), names.index('GFP')]]
        metadata = dict(axes='CYX', Channel=dict(Name=names))
        tifffile.imwrite(tmp_path / 'in' / f'{id}.ome.tif', pixels, photometric='minisblack', metadata=metadata)
    store, _ = prepared(protloc, tmp_path / 'in', tmp_path / 'store')
    assert store.channels == ('DAPI', 'GFP') and set(store.table.id) == set(planes)
    assert all(np.array_equal(image, planes[id]) for id, image in images_of(store).items())
    swapped, _ = prepared(protloc, tmp_path / 'in', tmp_path / 'swapped', '--channels', 'gfp,dapi')
    assert all(np.array_equal(image, planes[id][::-1]) for id, image in images_of(swapped).items())
    renamed, _ = prepared(protloc, tmp_path / 'in', tmp_path / 'renamed', '--channels', 'nucleus,protein')
    assert renamed.channels == ('nucleus', 'protein')
    assert all(np.array_equal(image, planes[id]) for id, image in images_of(renamed).items())
    metadata = dict(axes='CYX', Channel=dict(Name=['DAPI', 'RFP']))
    tifffile.imwrite(tmp_path / 'in' / 'b' / '3.ome.tif', noise(2, 32, 32), photometric='minisblack', metadata=metadata)
    said = refused(protloc, tmp_path / 'in', tmp_path / 'bad')
    assert '1 of 4 fields' in said and 'calls its channels DAPI, RFP, other images DAPI, GFP' in said


def test_a_folder_of_ome_zarr(protloc, tmp_path):
    writers = pytest.importorskip('bioio_ome_zarr.writers')
    planes = {}
    for id in ('a/1', 'a/2', 'b/1', 'b/2'):
        planes[id] = noise(2, 32, 32)
        path = tmp_path / 'in' / f'{id}.ome.zarr'
        path.parent.mkdir(parents=True, exist_ok=True)
        channels = [writers.Channel(label=name, color='ffffff') for name in ('DAPI', 'GFP')]
        types = ['channel', 'space', 'space']
        options = dict(axes_names=list('cyx'), axes_types=types, channels=channels)
        writers.OMEZarrWriter(str(path), [(2, 32, 32)], np.uint8, **options).write_full_volume(planes[id])
    store, err = prepared(protloc, tmp_path / 'in', tmp_path / 'store')
    assert store.channels == ('DAPI', 'GFP') and 'not read' not in err
    assert list(store.table.id) == list(planes)
    assert all(np.array_equal(image, planes[id]) for id, image in images_of(store).items())


# --- links to folders


def test_links_to_folders_are_walked(protloc, tmp_path):
    pixels = {
        f'{place}{i}': save(tmp_path / f'{place}{i}.png') for place in ('in/a/', 'in/b/', 'far/') for i in range(3)
    }
    (tmp_path / 'in' / 'c').symlink_to(tmp_path / 'in' / 'a')
    (tmp_path / 'in' / 'd').symlink_to(tmp_path / 'far')
    (tmp_path / 'in' / 'e').symlink_to(tmp_path / 'far')
    (tmp_path / 'in' / 'b' / 'round').symlink_to(tmp_path / 'in')
    store, err = prepared(protloc, tmp_path / 'in', tmp_path / 'store')
    both = {'a': ['a', 'c'], 'b': ['b'], 'd': ['d', 'e']}
    assert labels_of(store) == {f'{place}/{i}': names for place, names in both.items() for i in range(3)}
    assert np.array_equal(images_of(store)['d/1'][0], pixels['far/1'])
    assert '6 copies of pictures lie under a further class' in err and 'empty' not in err


def test_a_link_to_a_missing_folder_is_named(protloc, tmp_path):
    for i in range(3):
        save(tmp_path / 'in' / 'a' / f'{i}.png')
    (tmp_path / 'in' / 'b').symlink_to('nowhere')
    assert f'{tmp_path}/in/b is a link that points to nothing' in refused(protloc, tmp_path / 'in', tmp_path / 'store')
    assert len(prepared(protloc, tmp_path / 'in', tmp_path / 'store', '--exclude', 'b')[0]) == 3
    (tmp_path / 'in' / 'a' / '1.png').write_text('../../.annex/objects/1.png')
    said = refused(protloc, tmp_path / 'in', tmp_path / 'bad', '--exclude', 'b')
    assert 'a/1.png cannot be decoded, it is a link written as text' in said


# --- names that are nearly the same


@pytest.mark.parametrize(
    'other', ['golgi k\u00f6rper', 'Golgi ko\u0308rper', ' Golgi k\u00f6rper', 'Golgi k\u00f6rper ']
)
@pytest.mark.parametrize('where', ['folders', 'splits', 'columns'])
def test_nearly_the_same_class_is_refused(protloc, tmp_path, other, where):
    names = ['Golgi k\u00f6rper', other]
    places = dict(folders=names, splits=[f'train/{names[0]}', f'test/{names[1]}'], columns=['images'])
    for place in places[where]:
        for i in range(3):
            save(tmp_path / 'in' / place / f'{i}.png')
    if where == 'columns':
        table = f'image,{names[0]},{names[1]}\n0,1,0\n1,0,1\n2,1,1\n'
        (tmp_path / 'in' / 'labels.csv').write_text(table, encoding='utf-8')
    assert 'differ only in case' in refused(protloc, tmp_path / 'in', tmp_path / 'store')


def test_names_of_a_table_that_fit_several_images(protloc, tmp_path):
    names = ['p1/1', 'p1/2', 'p2/1', 'p1/3', 'k\u00f6rper', 'ko\u0308rper']
    pixels = {name: save(tmp_path / 'in' / f'{name}.png') for name in names}
    table = tmp_path / 'in' / 'labels.csv'
    table.write_text('image,x,y\n2,1,0\np2/1,1,1\n1.png,0,1\n')
    assert "labels.csv, line 4: Id '1.png' may be p1/1 or p2/1" in refused(protloc, tmp_path / 'in', tmp_path / 'bad')
    table.write_text('image,x,y\n' + ''.join(f'{name},1,{i % 2}\n' for i, name in enumerate(names)), encoding='utf-8')
    store, _ = prepared(protloc, tmp_path / 'in', tmp_path / 'store')
    assert all(np.array_equal(image[0], pixels[id]) for id, image in images_of(store).items())
    assert len(store) == 6 and labels_of(store)['ko\u0308rper'] == ['x', 'y'] != labels_of(store)['k\u00f6rper']
    table.write_text('image,x,y\nP1/1.png,1,0\n')
    assert "its first Id is 'P1/1.png', the first image would have the Id 'k" in refused(
        protloc, tmp_path / 'in', tmp_path / 'bad'
    )


# --- folders that are no classes


def test_folders_of_masks_inside_classes(protloc, tmp_path):
    for name in ('a', 'b'):
        for i in range(3):
            save(tmp_path / 'in' / name / f'{i}.png')
            save(tmp_path / 'in' / name / 'masks' / f'{i}.png')
    assert "the folder 'a/masks'" in refused(protloc, tmp_path / 'in', tmp_path / 'bad')
    for name in ('a', 'b'):
        (tmp_path / 'in' / name / 'masks').rename(tmp_path / 'in' / name / 'cellpose')
    assert "--exclude 'a/cellpose/*'" in refused(protloc, tmp_path / 'in', tmp_path / 'bad')
    assert len(prepared(protloc, tmp_path / 'in', tmp_path / 'store', '--exclude', '*/cellpose/*')[0]) == 6
    assert len(prepared(protloc, tmp_path / 'in', tmp_path / 'all', '--match', '*')[0]) == 12


def test_two_masks_of_one_image(protloc, crops, tmp_path):
    Image.fromarray(noise(32, 24)).save(crops / 'a' / '00001_mask.tif')
    said = refused(protloc, crops, tmp_path / 'bad', '--mask-ending', '_Mask', '--enlarge')
    assert 'are both the mask of a/00001' in said
    said = refused(protloc, crops, tmp_path / 'bad', '--mask-ending', '_Mask', '--exclude', '*[0-9].png', '--enlarge')
    assert "every image's name ends on '_Mask'" in said


def test_the_folder_above_the_classes(protloc, tmp_path):
    for name in ('data/a', 'data/b', 'data/c'):
        save(tmp_path / 'in' / name / '0.png')
    said = refused(protloc, tmp_path / 'in', tmp_path / 'store')
    assert "would be 'data'" in said and f'give {tmp_path}/in/data as the folder' in said
    assert 'classes: a, b, c' in prepared(protloc, tmp_path / 'in' / 'data', tmp_path / 'store')[1]
    assert list(prepared(protloc, tmp_path / 'in', tmp_path / 'one', '--match', '*')[0].vocab) == ['data']


def test_a_store_within_the_folder_is_no_class(protloc, tmp_path):
    for i in range(3):
        save(tmp_path / 'in' / 'a' / f'{i}.png')
    store, _ = prepared(protloc, tmp_path / 'in', tmp_path / 'store')
    store.path.rename(tmp_path / 'in' / 'store')
    again, err = prepared(protloc, tmp_path / 'in', tmp_path / 'again')
    assert list(again.vocab) == ['a'] and len(again) == 3 and '4 files not read' in err


# --- channels


def test_one_missing_channel_does_not_turn_channels_into_images(protloc, tmp_path):
    for i in range(4):
        for channel in ('w1DAPI', 'w2GFP')[: 1 if i == 2 else 2]:
            save(tmp_path / 'in' / 'a' / f'cell{i}_{channel}.tif')
    said = refused(protloc, tmp_path / 'in', tmp_path / 'store')
    assert '6 of the 7 images' in said and '--channels w1DAPI,w2GFP' in said


@pytest.mark.parametrize('path', ['{channel}_cell{i}.tif', '{channel}/cell{i}.tif', 'cell{i}/{channel}.tif'])
def test_channels_that_stand_elsewhere_than_at_the_end(protloc, tmp_path, path):
    for i in range(4):
        for channel in ('DAPI', 'gfp'):
            save(tmp_path / 'in' / 'a' / path.format(channel=channel, i=i))
    said = refused(protloc, tmp_path / 'in', tmp_path / 'store', '--channels', 'dapi,gfp')
    assert 'the channel stands at the beginning' in said and '<name>_DAPI.tif' in said


# --- what is left out is said


def test_fields_that_are_left_out_are_named(protloc, tmp_path):
    for name in ('a/1', 'a/2', 'a/3', 'b/1'):
        save(tmp_path / 'in' / f'{name}.png')
    save(tmp_path / 'in' / 'a' / '4.png', noise(8, 8))
    (tmp_path / 'in' / 'b' / '1.png').write_text('x')
    assert 'in/a/4.png: images of 8 x 8 pixels' in refused(protloc, tmp_path / 'in', tmp_path / 'store')
    store, err = prepared(protloc, tmp_path / 'in', tmp_path / 'store', '--skip-bad')
    assert list(store.table.id) == ['a/1', 'a/2', 'a/3']
    assert '2 of 5 fields are left out' in err and 'in/a/4.png' in err
    assert "warning: no field of the class 'b' can be used" in err


def test_groups_that_lie_in_several_splits(protloc, tmp_path):
    for split in ('train', 'val', 'test'):
        for plate in (split, 'p1'):
            save(tmp_path / 'in' / split / 'a' / plate / f'{split}.png')
    store, err = prepared(protloc, tmp_path / 'in', tmp_path / 'store')
    assert len(store) == 6 and 'groups with images in several splits' in err and ': p1;' in err


def test_too_few_groups_are_named(protloc, tmp_path):
    for i in range(6):
        for name in ('a', 'b'):
            save(tmp_path / 'in' / name / f'plate{i % 2}' / f'{i}.png')
    said = refused(protloc, tmp_path / 'in', tmp_path / 'store')
    assert '2 groups (plate0, plate1) cannot be shared out' in said and '--group-from' in said
    assert len(prepared(protloc, tmp_path / 'in', tmp_path / 'store', '--group-from', r'(\d)')[0]) == 12


def test_train_in_capitals(protloc, challenge, tmp_path):
    (challenge / 'train').rename(challenge / 'Train')
    store, _ = prepared(protloc, challenge, tmp_path / 'store')
    assert len(store) == 8 and store.labels[:, 25].sum() == 8


# --- without labels


def test_a_table_says_which_images_are_meant(tmp_path):
    for name in ('train/1', 'test/1', 'test/2', 'test/3'):
        save(tmp_path / f'{name}.png')
    (tmp_path / 'some.csv').write_text('image,note\ntest/3.png,x\n2,y\n9,z\n')
    fields = unlabelled_fields(tmp_path, FolderConfig(labels='some.csv'))
    assert fields.table.Id.tolist() == ['test/3.png', '2', '9']
    assert fields.table.Files.tolist() == [('test/3.png',), ('test/2.png',), ()]
    assert fields.not_read == ('test/1.png', 'train/1.png')
    for text, sentence in (
        ('Id\n2\n2\n', 'line 3: the Id is missing'),
        ('Id\n1\n', "'1' may be"),
        ('Id\nx\n', 'no image'),
    ):
        (tmp_path / 'some.csv').write_text(text)
        with pytest.raises(InputError, match=sentence):
            unlabelled_fields(tmp_path, FolderConfig(labels='some.csv'))
    with pytest.raises(InputError, match='there is no label table'):
        unlabelled_fields(tmp_path, FolderConfig(labels='none.csv'))


@pytest.mark.parametrize('names', [('train', 'test'), ('Train', 'TEST')])
def test_of_a_challenge_the_test_images_are_meant(tmp_path, names):
    for place in names:
        save(tmp_path / place / f'{place}.png')
    assert unlabelled_fields(tmp_path).table.Id.tolist() == [names[1]]
