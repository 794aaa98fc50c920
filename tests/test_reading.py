"""Reading folders: layouts, depths, empty tiles, bad files listed together, and a killed process that is continued."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tifffile
from PIL import Image

from protloc.core import sha256
from protloc.data.layouts import HPA_2021
from protloc.data.store import ImageStore, write_store
from protloc.labels import STAINS, Vocabulary

PROTLOC = Path(sys.executable).parent / 'protloc'
rng = np.random.default_rng(0)


def noise(*shape, kind=np.uint8):
    return rng.integers(0, np.iinfo(kind).max, shape, dtype=kind)


def prepared(protloc, folder, path, *options):
    code, out, err = protloc('prepare', folder, path, '--size', 32, '--workers', 1, *options)
    assert code == 0, err
    return ImageStore(path)


def refused(protloc, folder, path, *options):
    code, out, err = protloc('prepare', folder, path, '--size', 32, '--workers', 1, *options)
    assert code == 2 and 'Traceback' not in err, err
    assert not path.exists() and not list(path.parent.glob('.*partial'))
    return err.strip().splitlines()[-1]


@pytest.fixture
def classes(tmp_path):
    "A folder per class: three stacked 16-bit TIFF images in each"
    for name in ('Golgi apparatus', 'Cytosol'):
        (tmp_path / 'images' / name).mkdir(parents=True)
        for i in range(3):
            tifffile.imwrite(
                tmp_path / 'images' / name / f'cell {i}.tif',
                noise(2, 64, 64, kind=np.uint16) // 16,
                photometric='minisblack',
            )
    return tmp_path / 'images'


def stretched(plane, low=0.1, high=99.9):
    "The stated rule for more than 8 bits, written down a second time"
    a, b = np.percentile(plane, [low, high])
    return np.rint(np.clip((plane - a) / (b - a), 0, 1) * 255)


# --- layouts


def test_folder_per_class_of_stacked_tiff(protloc, classes, tmp_path):
    store = prepared(protloc, classes, tmp_path / 'store', '--channels', 'dapi,gfp')
    assert store.channels == ('dapi', 'gfp') and list(store.vocab) == ['Cytosol', 'Golgi apparatus']
    assert list(store.table.id) == [f'{c}/cell {i}' for c in store.vocab for i in range(3)]
    assert store.labels.argmax(1).tolist() == [0, 0, 0, 1, 1, 1]
    whole = prepared(protloc, classes, tmp_path / 'whole', '--size', 64)
    assert whole.channels == ('channel0', 'channel1') and whole.manifest['made']['depths'] == {'uint16': 6}
    for image, id in zip(whole.images, whole.table.id, strict=True):
        for plane, raw in zip(image, tifffile.imread(classes / f'{id}.tif'), strict=True):
            assert np.array_equal(plane, stretched(raw))


def test_percentiles_are_an_option_and_noted(protloc, classes, tmp_path):
    store = prepared(protloc, classes, tmp_path / 'store', '--size', 64, '--percentiles', '5,95')
    assert store.manifest['made']['percentiles'] == [5, 95]
    assert np.array_equal(store.images[0, 1], stretched(tifffile.imread(classes / 'Cytosol' / 'cell 0.tif')[1], 5, 95))
    assert 'must ascend' in refused(protloc, classes, tmp_path / 'bad', '--percentiles', '95,5')
    assert 'two numbers' in refused(protloc, classes, tmp_path / 'bad', '--percentiles', '5')


def write_pages(path, planes, **options):
    "A TIFF of Pillow's, a page a plane"
    first, *others = map(Image.fromarray, planes)
    first.save(path, save_all=True, append_images=others, **options)


@pytest.mark.parametrize(
    'write',
    [
        lambda path, planes: tifffile.imwrite(path, planes, photometric='minisblack', compression='zlib'),
        lambda path, planes: tifffile.imwrite(path, planes, imagej=True, metadata={'axes': 'CYX'}),
        lambda path, planes: tifffile.imwrite(path, planes, photometric='minisblack', byteorder='>'),
        write_pages,
        lambda path, planes: write_pages(path, planes, compression='tiff_lzw'),
    ],
    ids=['compressed', 'ImageJ', 'big-endian', 'pages', 'LZW'],
)
@pytest.mark.parametrize('kind', [np.uint8, np.uint16])
def test_dialects_of_tiff(write, kind, tmp_path):
    from protloc.data.fields import read_image

    planes = noise(3, 40, 50, kind=kind)
    write(tmp_path / 'a.tif', planes)
    found = read_image(tmp_path / 'a.tif')
    assert found.dtype == kind and np.array_equal(found, planes)


def test_channels_in_files_side_by_side(protloc, tmp_path):
    planes = {}
    for name in ('a', 'b'):
        (tmp_path / 'images' / name).mkdir(parents=True)
        for i in range(2):
            for c in ('dapi', 'gfp'):
                planes[f'{name}/my cell_{i}', c] = noise(32, 32)
                tifffile.imwrite(tmp_path / 'images' / name / f'my cell_{i}_{c}.tif', planes[f'{name}/my cell_{i}', c])
    store = prepared(protloc, tmp_path / 'images', tmp_path / 'store', '--channels', 'gfp,dapi')
    assert len(store) == 4
    for image, id in zip(store.images, store.table.id, strict=True):
        assert np.array_equal(image, [planes[id, 'gfp'], planes[id, 'dapi']])
    (tmp_path / 'images' / 'b' / 'my cell_1_gfp.tif').unlink()
    said = refused(protloc, tmp_path / 'images', tmp_path / 'bad', '--channels', 'gfp,dapi')
    assert 'my cell_1_gfp.tif is missing' in said


def test_colour_png_jpeg_and_gray_in_one_folder(protloc, tmp_path):
    for name in ('a', 'b'):
        (tmp_path / 'images' / name).mkdir(parents=True)
        Image.fromarray(noise(32, 32, 3)).save(tmp_path / 'images' / name / 'one.png')
        Image.fromarray(noise(32, 32, 3)).save(tmp_path / 'images' / name / 'two.JPG')
    store = prepared(protloc, tmp_path / 'images', tmp_path / 'store')
    colour = np.asarray(Image.open(tmp_path / 'images' / 'a' / 'one.png'))
    assert store.images.shape == (4, 3, 32, 32)
    assert np.array_equal(store.images[0], np.moveaxis(colour, -1, 0))
    Image.fromarray(noise(32, 32)).save(tmp_path / 'images' / 'b' / 'three.png')
    assert 'three.png has 1 channels, 3 are expected' in refused(protloc, tmp_path / 'images', tmp_path / 'bad')
    shutil.copy(tmp_path / 'images' / 'b' / 'one.png', tmp_path / 'images' / 'b' / 'two.png')
    assert 'b/two stands for several files' in refused(protloc, tmp_path / 'images', tmp_path / 'bad')


def test_layout_of_2021(protloc, challenge, tmp_path):
    (challenge / 'train.csv').write_bytes(
        b'\xef\xbb\xbfID,Label\r\n' + b''.join(b'f%d,%d|18\r\n' % (i, i % 2 * 7) for i in range(8))
    )
    store = prepared(protloc, challenge, tmp_path / 'store')
    assert store.vocab == HPA_2021 and store.manifest['made']['layout'] == 'hpa2021'
    assert store.vocab.names_of(store.table.target[7]) == ['Golgi apparatus', 'Negative']
    (challenge / 'train.csv').write_text('ID,Label\nf0,1|19\n')
    assert "line 2 (Id 'f0'): there is no class number 19" in refused(protloc, challenge, tmp_path / 'bad')


def test_layout_is_said_and_can_be_named(protloc, challenge, tmp_path):
    code, out, err = protloc('prepare', challenge, tmp_path / 'a', '--size', 32, '--workers', 1)
    assert 'the 2018 challenge, 8 fields of 4 channels' in err
    assert 'no column ID' in refused(protloc, challenge, tmp_path / 'b', '--layout', 'hpa2021')
    assert 'no sub-folders with images' in refused(protloc, challenge, tmp_path / 'b', '--layout', 'classes')
    assert "there is no layout 'hpa2019'" in refused(protloc, challenge, tmp_path / 'b', '--layout', 'hpa2019')
    (challenge / 'train.csv').unlink()
    assert 'has no train.csv, no labels.csv and no folder per class' in refused(protloc, challenge, tmp_path / 'b')


def test_names_with_spaces(protloc, challenge, tmp_path):
    for p in (challenge / 'train').iterdir():
        p.rename(p.with_name(p.name.replace('f', 'my field ')))
    table = (challenge / 'train.csv').read_text().replace('f', 'my field ')
    (challenge / 'train.csv').write_bytes(b'\xef\xbb\xbf' + table.replace('\n', '\r\n').encode())
    store = prepared(protloc, challenge, tmp_path / 'a store')
    assert list(store.table.id) == [f'my field {i}' for i in range(8)]
    assert list(store.table.target) == [f'{i % 3} 25' for i in range(8)]


# --- depth, normalisation, empty tiles


def test_16_bit_stains_of_the_challenge(protloc, challenge, tmp_path):
    raw = {c: noise(32, 32, kind=np.uint16) for c in STAINS}
    for c in STAINS:
        Image.fromarray(raw[c]).save(challenge / 'train' / f'f3_{c}.png')
    store = prepared(protloc, challenge, tmp_path / 'store')
    assert store.manifest['made']['depths'] == {'uint8': 7, 'uint16': 1}
    assert np.array_equal(store.images[3], [stretched(raw[c]) for c in STAINS])


def test_8_bits_stay_unless_normalised(protloc, challenge, tmp_path):
    faint = {c: noise(32, 32) // 4 for c in STAINS}
    for c in STAINS:
        Image.fromarray(faint[c]).save(challenge / 'train' / f'f3_{c}.png')
    assert np.array_equal(prepared(protloc, challenge, tmp_path / 'as is').images[3], list(faint.values()))
    store = prepared(protloc, challenge, tmp_path / 'normalised', '--normalise')
    assert store.manifest['made']['normalise'] is True
    assert np.array_equal(store.images[3], [stretched(faint[c]) for c in STAINS])


def test_tiles_without_nuclei_are_dropped(protloc, challenge, tmp_path):
    for i in range(8):
        nucleus = noise(64, 64) // 16
        # an eighth of a tile for each step, the right tile from the ninth column on
        nucleus[:8, : (i + 1) * 4] += 180
        Image.fromarray(nucleus).save(challenge / 'train' / f'f{i}_blue.png')
    share = {i: [min(32, (i + 1) * 4) * 8 / 1024, max(0, (i + 1) * 4 - 32) * 8 / 1024, 0, 0] for i in range(8)}
    store = prepared(protloc, challenge, tmp_path / 'store', '--tile', 32, '--min-foreground', 0.1)
    names = ('_y0x0', '_y0x32', '_y32x0', '_y32x32')
    kept = [f'f{i}{name}' for i in range(8) for name, x in zip(names, share[i], strict=True) if x >= 0.1]
    assert list(store.table.id) == kept and 0 < len(kept) < 8
    assert store.manifest['made']['tiles_dropped'] == 32 - len(kept) and store.manifest['made']['min_foreground'] == 0.1
    said = refused(protloc, challenge, tmp_path / 'bad', '--tile', 32, '--min-foreground', 0.9)
    assert 'lower --min-foreground' in said
    assert "'dapi'" in refused(protloc, challenge, tmp_path / 'bad', '--min-foreground', 0.1, '--nucleus', 'dapi')


@pytest.mark.parametrize('stacked', [True, False])
def test_images_without_labels(tmp_path, stacked):
    "What a classifier trained on a folder per class is asked to predict"
    from protloc.data.prepare import prepare

    folder = tmp_path / 'new'
    folder.mkdir()
    planes = {f'cell {i}': noise(2, 32, 32) for i in range(2)}
    for name, two in planes.items():
        if stacked:
            tifffile.imwrite(folder / f'{name}.tif', two, photometric='minisblack')
        else:
            for channel, plane in zip(('dapi', 'gfp'), two, strict=True):
                Image.fromarray(plane).save(folder / f'{name}_{channel}.png')
    store = prepare(folder, tmp_path / 'store', size=32, labelled=False, channels=['dapi', 'gfp'], workers=1)
    assert list(store.table.id) == list(planes)
    assert np.array_equal(store.images, list(planes.values()))
    assert set(store.table.split) == {''}


# --- what info says


def test_info(protloc, tmp_path):
    images = np.zeros((40, 2, 16, 16), np.uint8)
    images[:, 0, :4] = 255
    images[:, 1] = np.arange(256).reshape(16, 16)
    table = pd.DataFrame(
        dict(id=range(40), target=['0', '0 1', '1', '0 1'] * 10, group=[i // 4 for i in range(40)], split='train')
    )
    write_store(tmp_path / 'store', images, table, ['dapi', 'gfp'], Vocabulary(['Golgi', 'Cytosol', 'Nothing']))
    code, out, err = protloc('info', tmp_path / 'store', '--sheet', tmp_path / 'sheet.png', '--most', 2)
    lines = [' '.join(line.split()) for line in out.splitlines()]
    assert code == 0, err
    for line in (
        'Label sets: 3, the most frequent',
        'Golgi + Cytosol 20',
        'Pairs of classes: 1, the most frequent',
        'Intensities of all images',
        'dapi 63.75 0 0 255 0.250',
        'gfp 127.50 2 127 253 0.004',
        'Groups: 10, of 4 to 4 images',
        'Golgi 30',
        '(images) 40',
    ):
        assert line in lines, (line, out)
    assert ('Golgi 10' in lines) != ('Cytosol 10' in lines), 'two label sets were asked for'
    with Image.open(tmp_path / 'sheet.png') as sheet:
        assert sheet.format == 'PNG' and min(sheet.size) > 200


def test_info_reads_few_images_of_a_large_store(protloc, tmp_path):
    images = np.full((1500, 1, 4, 4), 9, np.uint8)
    table = pd.DataFrame(dict(id=range(1500), target='0'))
    write_store(tmp_path / 'store', images, table, ['gfp'], Vocabulary(['Golgi']))
    assert 'Intensities of 1000 evenly spaced images of 1500' in protloc('info', tmp_path / 'store')[1]


# --- bad files


def damage(challenge):
    "Five bad fields; what is wrong with each"

    def stain(name):
        return challenge / 'train' / f'{name}.png'

    stain('f1_blue').write_bytes(stain('f1_blue').read_bytes()[:900])
    Image.fromarray(noise(64, 64, 4)).save(stain('f2_red'))
    Image.fromarray(noise(32, 64)).save(stain('f4_yellow'))
    stain('f5_green').unlink()
    stain('f6_green').write_text('hello')
    return {
        'f1': 'f1_blue.png cannot be decoded',
        'f2': 'f2_red.png is RGBA',
        'f4': 'f4_yellow.png is 64 x 32 pixels',
        'f5': 'f5_green.png is missing',
        'f6': 'f6_green.png cannot be decoded',
    }


@pytest.mark.slow
@pytest.mark.parametrize('workers', [1, 2])
def test_all_bad_files_are_listed_at_once(protloc, challenge, tmp_path, workers):
    expected = damage(challenge)
    said = refused(protloc, challenge, tmp_path / 'store', '--workers', workers)
    assert '5 of 8 fields cannot be used' in said and f'{tmp_path}/store.bad.csv' in said and '--skip-bad' in said
    listed = pd.read_csv(tmp_path / 'store.bad.csv').set_index('Id').reason
    assert list(listed.index) == list(expected) and all(text in listed[id] for id, text in expected.items())


def test_bad_files_can_be_left_out(protloc, challenge, tmp_path):
    bad = damage(challenge)
    store = prepared(protloc, challenge, tmp_path / 'store', '--skip-bad')
    assert list(store.table.id) == ['f0', 'f3', 'f7'] and store.manifest['made']['bad_left_out'] == 5
    assert list(pd.read_csv(tmp_path / 'store.bad.csv').Id) == list(bad)
    for i in (0, 3, 7):
        (challenge / 'train' / f'f{i}_red.png').unlink()
    assert '8 of 8 fields cannot be used' in refused(protloc, challenge, tmp_path / 'none', '--skip-bad')


def test_a_mended_folder_leaves_no_list(protloc, challenge, tmp_path):
    kept = shutil.copytree(challenge, tmp_path / 'kept')
    damage(challenge)
    refused(protloc, challenge, tmp_path / 'store')
    shutil.rmtree(challenge)
    shutil.copytree(kept, challenge)
    prepared(protloc, challenge, tmp_path / 'store')
    assert not (tmp_path / 'store.bad.csv').exists()


def test_a_file_that_may_not_be_read(protloc, challenge, tmp_path):
    if not os.geteuid():
        pytest.skip('root may read everything')
    (challenge / 'train' / 'f3_blue.png').chmod(0)
    assert 'f3_blue.png may not be read' in refused(protloc, challenge, tmp_path / 'store')


def test_damaged_tiff(protloc, classes, tmp_path):
    whole = (classes / 'Cytosol' / 'cell 1.tif').read_bytes()
    (classes / 'Cytosol' / 'cell 1.tif').write_bytes(whole[: len(whole) * 2 // 3])
    tifffile.imwrite(classes / 'Cytosol' / 'cell 2.tif', noise(2, 64, 64).astype(np.float32), photometric='minisblack')
    refused(protloc, classes, tmp_path / 'store')
    reasons = list(pd.read_csv(tmp_path / 'store.bad.csv').reason)
    assert 'cut off' in reasons[0] and 'holds float32' in reasons[1]


# --- kill -9, and the same command again


@pytest.fixture(scope='module')
def many(tmp_path_factory):
    "300 fields of 128 px that share four files' worth of pixels; one of them is bad"
    folder = tmp_path_factory.mktemp('many') / 'fields'
    (folder / 'train').mkdir(parents=True)
    for i in range(7):
        for c in STAINS:
            Image.fromarray(noise(128, 128)).save(folder / f'{i}_{c}.png')
    for i in range(300):
        for c in STAINS:
            os.link(folder / f'{i % 7}_{c}.png', folder / 'train' / f'f{i}_{c}.png')
    (folder / 'train' / 'f5_red.png').unlink()
    (folder / 'train.csv').write_text('Id,Target\n' + ''.join(f'f{i},{i % 3} 25\n' for i in range(300)))
    return folder


def command(many, path, workers):
    return [PROTLOC, 'prepare', many, path, '--size', '64', '--tile', '64', '--skip-bad', '--workers', str(workers)]


def finished(log):
    return log.read_text().count('\n') if log.exists() else 0


def kill_at(fields, words, path):
    "Start, and kill -9 as soon as so many fields are finished"
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    log, deadline = path.parent / f'.{path.name}.protloc-partial' / 'log.jsonl', time.time() + 60
    while finished(log) < fields and process.poll() is None and time.time() < deadline:
        time.sleep(0.002)
    assert process.poll() is None, 'it ended before it could be killed'
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not path.exists() and fields <= finished(log) < 300
    return log.parent


def same(a, b):
    equal = all(sha256(a / name) == sha256(b / name) for name in ('images.npy', 'table.csv'))
    return equal and sorted(p.name for p in a.iterdir()) == sorted(p.name for p in b.iterdir())


@pytest.fixture(scope='module')
def uninterrupted(many):
    subprocess.run(command(many, many.parent / 'store', 1), check=True, capture_output=True)
    assert len(ImageStore(many.parent / 'store')) == 299 * 4
    return many.parent / 'store'


@pytest.mark.slow
@pytest.mark.parametrize('workers', [pytest.param(1, marks=pytest.mark.thorough), 2])
def test_killed_twice_and_continued_to_the_same_store(many, uninterrupted, tmp_path, workers):
    path, words = tmp_path / 'store', command(many, tmp_path / 'store', workers)
    partial = kill_at(10, words, path)
    inode = (partial / 'images.npy').stat().st_ino
    kill_at(120, words, path)
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (path / 'images.npy').stat().st_ino == inode, 'it began again instead of going on'
    assert same(path, uninterrupted) and ImageStore(path).verify()
    made = ImageStore(path).manifest['made']
    assert made['fields'] == 299 and made['bad_left_out'] == 1 and not partial.exists()


@pytest.mark.slow
@pytest.mark.parametrize('tear', ['half a log line', 'images ahead of the log', 'log ahead of the images', 'no images'])
def test_what_the_log_does_not_vouch_for_is_cut_off(many, uninterrupted, tmp_path, tear):
    path = tmp_path / 'store'
    partial = kill_at(50, command(many, path, 1), path)
    images, log = partial / 'images.npy', partial / 'log.jsonl'
    if tear == 'half a log line':
        log.write_text(log.read_text()[:-20])
    if tear == 'images ahead of the log':
        os.truncate(images, 200_000_000)  # beyond the finished store's end
    if tear == 'log ahead of the images':
        os.truncate(images, 300000)
    if tear == 'no images':
        images.unlink()
    subprocess.run(command(many, path, 1), check=True, capture_output=True)
    assert same(path, uninterrupted) and ImageStore(path).verify()


@pytest.mark.slow
def test_no_process_outlives_a_killed_one(many, tmp_path):
    import psutil

    words = command(many, tmp_path / 'store', 2)
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not finished(tmp_path / '.store.protloc-partial' / 'log.jsonl'):
        time.sleep(0.002)
    children = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    assert len(children) >= 2 and not psutil.wait_procs(children, timeout=20)[1]


@pytest.mark.slow
def test_joblib_works_after_reading():
    "A study prepares images and then trains with joblib in one process"
    import joblib

    from protloc.data.helpers import ordered_map

    assert list(ordered_map(abs, range(-5, 0), 2)) == [5, 4, 3, 2, 1]
    assert joblib.Parallel(2)(joblib.delayed(abs)(i) for i in range(-5, 0)) == [5, 4, 3, 2, 1]


@pytest.mark.slow
def test_no_process_outlives_the_reading():
    "Whether it is read to the end, given up or ended by an error"
    import psutil

    from protloc.data.helpers import ordered_map

    def pool():
        mine = psutil.Process().children(recursive=True)
        return [p for p in mine if 'resource_tracker' not in ' '.join(p.cmdline())]

    others = pool()
    assert list(ordered_map(abs, range(-9, 0), 2)) == [9, 8, 7, 6, 5, 4, 3, 2, 1]
    assert not psutil.wait_procs([p for p in pool() if p not in others], timeout=20)[1]
    given_up = ordered_map(abs, range(100), 2)
    assert next(given_up) == 0
    given_up.close()
    with pytest.raises(TypeError, match='bad operand type'):
        list(ordered_map(abs, [1, 2, 'three', *range(100)], 2))
    assert not psutil.wait_procs([p for p in pool() if p not in others], timeout=20)[1]


@pytest.mark.slow
def test_the_reading_waits_for_a_slow_writer():
    from protloc.data.helpers import ordered_map

    begun = []

    def items():
        for i in range(40):
            begun.append(i)
            yield -i

    for i, result in enumerate(ordered_map(abs, items(), 2)):
        assert result == i and len(begun) - i <= 4
        if i < 12:
            time.sleep(0.05)


@pytest.mark.slow
def test_other_settings_are_refused(many, uninterrupted, tmp_path):
    "What is half written stays as it is, to the byte, for the settings that it was begun with"
    path = tmp_path / 'store'
    partial = kill_at(50, [*command(many, path, 1), '--normalise'], path)
    half_written = {p.name: p.read_bytes() for p in partial.iterdir()}
    done = subprocess.run(command(many, path, 1), capture_output=True, text=True)
    said = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 2 and 'normalise is True there and False now' in said
    assert 'repeat those settings' in said and f'remove {partial}' in said
    assert half_written == {p.name: p.read_bytes() for p in partial.iterdir()} and not path.exists()
    shutil.rmtree(partial)
    subprocess.run(command(many, path, 1), check=True, capture_output=True)
    assert same(path, uninterrupted)


@pytest.mark.slow
@pytest.mark.parametrize('change', ['exclude', 'protloc'])
def test_long_settings_are_told_in_short(many, tmp_path, change):
    "Of a long list the sentence says what it is, and no more; what the folder decides is no setting"
    import json

    path = tmp_path / 'store'
    partial = kill_at(10, command(many, path, 1), path)
    noted = json.loads((partial / 'settings.json').read_text())
    assert noted['size'] == 64 and not {'fields', 'layout'}.intersection(filter(noted.get, noted))
    (partial / 'settings.json').write_text(json.dumps(noted | {change: 'other ones'}))
    done = subprocess.run(command(many, path, 1), capture_output=True, text=True)
    said = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 2 and f'{change} is other ones there and ' in said
    assert len(said.replace(str(tmp_path), '')) < 400


@pytest.mark.slow
def test_two_at_once(many, tmp_path):
    path = tmp_path / 'store'
    first = subprocess.Popen(command(many, path, 1), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not finished(tmp_path / '.store.protloc-partial' / 'log.jsonl'):
        time.sleep(0.002)
    first.send_signal(signal.SIGSTOP)
    second = subprocess.run(command(many, path, 1), capture_output=True, text=True)
    first.send_signal(signal.SIGCONT)
    assert second.returncode == 2 and 'is being written by process' in second.stderr
    assert first.wait() == 0 and len(ImageStore(path)) == 299 * 4


@pytest.mark.slow
def test_a_full_disk_keeps_what_was_done(protloc, many, uninterrupted, tmp_path):
    "300 fields of one tile each would fit, and they have four; with more room the same command goes on"
    disk = tmp_path / 'disk'
    disk.mkdir()
    mount = ['mount', '-t', 'tmpfs', '-o', 'size=6m', 'tmpfs', disk]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip('a small disk can be mounted by root alone')
    words = ('prepare', many, disk / 'store', '--size', 64, '--tile', 64, '--skip-bad', '--workers', 1)
    try:
        code, _, err = protloc(*words)
        assert code == 2 and 'No space left on device' in err and 'Traceback' not in err
        assert 50 < finished(disk / '.store.protloc-partial' / 'log.jsonl') < 300 and not (disk / 'store').exists()
        subprocess.run(['mount', '-o', 'remount,size=60m', disk], check=True)
        assert protloc(*words)[0] == 0 and same(disk / 'store', uninterrupted)
        assert sorted(path.name for path in disk.iterdir()) == ['store', 'store.bad.csv']
    finally:
        subprocess.run(['umount', disk], check=True)


# --- real images


@pytest.mark.slow
def test_real_fields_prepared_in_one_and_in_two_processes(protloc, hpa, tmp_path):
    options = ['--size', 64, '--tile', 256, '--min-foreground', 0.02]
    for n in (1, 2):
        assert protloc('prepare', hpa / 'sample', tmp_path / f's{n}', *options, '--workers', n)[0] == 0
    assert same(tmp_path / 's1', tmp_path / 's2')
    store = ImageStore(tmp_path / 's1')
    made = store.manifest['made']
    assert made['tiles_dropped'] == 240 - len(store) and len(store) > 200 and made['depths'] == {'uint8': 60}
