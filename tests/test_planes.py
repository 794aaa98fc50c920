"""Reading one image file: every writer's pixels come back equal or are refused, and each reason is told."""

import io
import json
import logging
import os
import struct
import subprocess
import sys
import zlib

import imagecodecs
import numpy as np
import pytest
import tifffile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from protloc.core import InputError
from protloc.data.readers import images
from protloc.data.readers.images import READERS, channel_names, ending_of, read_channel, read_image

rng = np.random.default_rng(0)


def noise(*shape, kind=np.uint8):
    return rng.integers(0, np.iinfo(kind).max, shape, dtype=kind, endpoint=True)


def smooth(*shape):
    "What a lossy format keeps nearly as it is"
    down, right = np.mgrid[: shape[0], : shape[1]]
    plane = (2 * down + right).astype(np.uint8)
    return plane if len(shape) == 2 else np.stack([plane, plane // 2, 200 - plane], -1)


def refused(path, read=read_image):
    with pytest.raises(InputError) as e:
        read(path)
    said = str(e.value)
    assert said.startswith(str(path)) and '\n' not in said and len(said) < len(str(path)) + 330
    return said.removeprefix(str(path)).strip()


def encoded(pixels, kind, **options):
    file = io.BytesIO()
    # some writers leave their settings in the image
    image = pixels.copy() if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(file, kind, **options)
    return file.getvalue()


@pytest.fixture
def write(tmp_path):
    "write('a.png', bytes) -> its path"

    def write(name, data):
        (tmp_path / name).write_bytes(data)
        return tmp_path / name

    return write


# --- written by others: equal, or refused


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_tiff_of_any_kind_is_equal_or_refused(tmp_path, data):
    n = data.draw(st.integers(1, 5))
    kind = data.draw(st.sampled_from([np.uint8, np.uint16, np.uint32]))
    photometric = data.draw(st.sampled_from(['minisblack', 'miniswhite', 'rgb', None]))
    planar = data.draw(st.sampled_from([None, 'contig', 'separate']))
    is_last = data.draw(st.booleans())
    dialect = data.draw(st.sampled_from(['plain', 'shaped', 'ome', 'imagej', 'named']))
    planes = noise(n, 37, 41, kind=kind)
    stored = np.iinfo(kind).max - planes if photometric == 'miniswhite' else planes
    stored = np.moveaxis(stored, 0, -1) if is_last else stored
    stored = np.ascontiguousarray(stored.squeeze())
    channel = 'S' if photometric == 'rgb' or planar else 'C'
    axes = 'YX' if n == 1 else f'YX{channel}' if is_last else f'{channel}YX'
    options = {'plain': dict(metadata=None), 'ome': dict(ome=True), 'imagej': dict(imagej=True), 'shaped': {}}
    options['named'] = dict(metadata={'axes': axes})
    path = tmp_path / 'a.tif'
    try:
        tifffile.imwrite(
            path,
            stored,
            photometric=photometric,
            planarconfig=planar,
            byteorder=data.draw(st.sampled_from('<>')),
            compression=data.draw(st.sampled_from([None, 'zlib', 'lzw', 'zstd', 'packbits'])),
            tile=data.draw(st.sampled_from([None, (16, 16)])),
            bigtiff=dialect != 'imagej' and data.draw(st.booleans()),
            **options[dialect],
        )
    except (ValueError, tifffile.OmeXmlError):
        return  # what tifffile does not write
    with tifffile.TiffFile(path) as tiff:
        is_white_0 = tiff.pages.first.photometric == 0
    try:
        found = read_image(path)
    except InputError as e:
        is_plain = photometric in ('minisblack', 'miniswhite') and not planar and (not is_last or n == 1)
        assert not is_plain, e
        return
    assert found.dtype == kind
    expected = planes if is_white_0 or photometric != 'miniswhite' else np.iinfo(kind).max - planes
    assert np.array_equal(found, expected)


@pytest.mark.parametrize('planar', ['contig', 'separate'])
@pytest.mark.parametrize('kind', [np.uint8, np.uint16])
def test_samples_without_a_meaning_are_channels_and_colours_are_colours(tmp_path, planar, kind):
    pixels = noise(20, 30, 3, kind=kind)
    stored = pixels if planar == 'contig' else np.moveaxis(pixels, -1, 0)
    for photometric in ('rgb', 'minisblack'):
        tifffile.imwrite(tmp_path / 'a.tif', stored, photometric=photometric, planarconfig=planar)
        assert np.array_equal(read_image(tmp_path / 'a.tif'), np.moveaxis(pixels, -1, 0))


@pytest.mark.parametrize('extra', [['unassalpha'], ['assocalpha'], ['unspecified']])
@pytest.mark.parametrize('planar', ['contig', 'separate'])
@pytest.mark.parametrize('photometric', ['rgb', 'minisblack'])
def test_a_sample_beyond_the_colours(tmp_path, extra, planar, photometric):
    n = 4 if photometric == 'rgb' else 2
    pixels = noise(20, 30, n)
    pixels[..., -1] = 255
    stored = pixels if planar == 'contig' else np.moveaxis(pixels, -1, 0)
    path = tmp_path / 'a.tif'
    tifffile.imwrite(path, stored, photometric=photometric, planarconfig=planar, extrasamples=extra)
    if photometric == 'minisblack' and extra == ['unspecified']:
        assert np.array_equal(read_image(path), np.moveaxis(pixels, -1, 0))
    else:
        said = refused(path)
        assert 'not gray or RGB' in said and ("photometric='minisblack'" in said) == (planar == 'separate')


def test_four_planes_that_tifffile_took_for_colours(tmp_path):
    "tifffile writes an array (4, H, W) as colours and transparency unless told otherwise"
    tifffile.imwrite(tmp_path / 'a.tif', noise(4, 20, 30))
    assert "save them with tifffile.imwrite(path, planes, photometric='minisblack')" in refused(tmp_path / 'a.tif')


@pytest.mark.parametrize('mode', ['1', 'L', 'LA', 'P', 'PA', 'RGB', 'RGBA', 'CMYK', 'YCbCr', 'LAB', 'I;16', 'I', 'F'])
@pytest.mark.parametrize('ending', ['.png', '.tif', '.bmp', '.jpg', '.jp2'])
def test_pillow_in_any_mode(tmp_path, mode, ending):
    rgb = Image.fromarray(smooth(24, 30, 3))
    path = tmp_path / f'a{ending}'
    if mode == 'I;16':
        image = Image.fromarray(noise(24, 30, kind=np.uint16))
    elif mode == 'LAB':
        image = Image.frombytes('LAB', (30, 24), noise(24, 30, 3).tobytes())
    elif mode == 'PA':
        image = rgb.convert('P').convert('PA')
    else:
        image = rgb.convert(mode)
    try:
        image.save(path, **({'quality': 100, 'subsampling': 0} if ending == '.jpg' else {}))
    except (OSError, KeyError, ValueError):
        return  # Pillow writes no such file
    # what Pillow writes as something else: a mask as gray, luma as colours, a fourth byte without a meaning
    written_as = {('1', '.jpg'): 'L', ('YCbCr', '.jpg'): 'RGB', ('RGBA', '.bmp'): 'RGB'}.get((mode, ending))
    if mode in ('L', 'RGB', 'I;16') or written_as:
        image = image.convert(written_as) if written_as else image
        planes = np.asarray(image)
        planes = planes[None] if planes.ndim == 2 else np.moveaxis(planes, -1, 0)
        found = read_image(path)
        assert found.dtype == planes.dtype and found.shape == planes.shape
        assert np.abs(found.astype(int) - planes).max() <= (4 if ending == '.jpg' else 0)
    elif mode == 'YCbCr' and ending == '.jp2' or mode == 'I' and ending in ('.png', '.jp2'):
        # Pillow converts to colours, or to 16 bits, when it writes
        with Image.open(path) as back:
            expected = np.asarray(back)
        try:
            found = read_image(path)
        except InputError:
            return
        found = found[0] if len(found) == 1 else np.moveaxis(found, 0, -1)
        assert np.array_equal(found, expected)
    else:
        refused(path)


@pytest.mark.parametrize('bits', [8, 16])
@pytest.mark.parametrize('colours', ['gray', 'rgb'])
@pytest.mark.parametrize('is_interlaced', [False, True])
def test_png_by_its_specification(write, bits, colours, is_interlaced):
    "Written byte by byte: 16 bits are big-endian"
    n = 3 if colours == 'rgb' else 1
    pixels = noise(9, 10, n, kind=np.uint8 if bits == 8 else np.uint16)
    big = pixels.astype(pixels.dtype.newbyteorder('>'))
    passes = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)]
    if not is_interlaced:
        passes = [(0, 0, 1, 1)]
    rows = b''
    for left, top, right, down in passes:
        if is_interlaced:
            part = big[top::down, left::right]
        else:
            part = big
        rows += b''.join(b'\0' + row.tobytes() for row in part) if part.size else b''

    data = b'\x89PNG\r\n\x1a\n'
    header = struct.pack('>IIBBBBB', 10, 9, bits, 2 if n == 3 else 0, 0, 0, int(is_interlaced))
    for kind, content in ((b'IHDR', header), (b'IDAT', zlib.compress(rows)), (b'IEND', b'')):
        data += struct.pack('>I', len(content)) + kind + content + struct.pack('>I', zlib.crc32(kind + content))
    found = read_image(write('a.png', data))
    assert found.dtype == pixels.dtype and np.array_equal(found, np.moveaxis(pixels, -1, 0))


def test_gray_is_decoded_into_the_array_that_waits_for_it(write):
    plane = noise(20, 30)
    path = write('a.png', encoded(plane, 'PNG'))
    out = np.zeros((20, 30), np.uint8)
    assert np.may_share_memory(read_channel(path, out), out) and np.array_equal(out, plane)
    other = np.zeros((20, 30), np.uint16)
    assert np.array_equal(read_channel(path, other), plane) and not other.any()


# --- what a plane is


@pytest.mark.parametrize('axes', ['ZYX', 'TYX', 'ZCYX', 'TCYX', 'TZCYX'])
@pytest.mark.parametrize('dialect', ['imagej', 'ome', 'shaped'])
def test_slices_and_times_are_no_stains(tmp_path, axes, dialect):
    stack = noise(*[2] * (len(axes) - 2), 20, 30)
    path = tmp_path / ('a.ome.tif' if dialect == 'ome' else 'a.tif')
    tifffile.imwrite(
        path, stack, photometric='minisblack', metadata={'axes': axes}, imagej=dialect == 'imagej', ome=dialect == 'ome'
    )
    what = 'times' if axes[0] == 'T' and dialect != 'ome' else 'slices' if 'Z' in axes else 'times'
    for read in (read_image, read_channel):
        said = refused(path, read)
        assert said.startswith(f'holds 2 {what}, which are not stains') and 'maximum projection' in said


@pytest.mark.parametrize('dialect', ['imagej', 'ome', 'shaped'])
def test_axes_of_length_one_do_not_matter(tmp_path, dialect):
    planes = noise(1, 1, 3, 20, 30)
    path = tmp_path / ('a.ome.tif' if dialect == 'ome' else 'a.tif')
    tifffile.imwrite(
        path,
        planes,
        photometric='minisblack',
        metadata={'axes': 'TZCYX'},
        imagej=dialect == 'imagej',
        ome=dialect == 'ome',
    )
    assert np.array_equal(read_image(path), planes[0, 0])


def test_channels_that_come_last(tmp_path):
    planes = noise(2, 40, 40)
    last = np.ascontiguousarray(np.moveaxis(planes, 0, -1))
    path = tmp_path / 'a.tif'
    for options in (
        dict(metadata={'axes': 'YXC'}),
        dict(photometric='minisblack', planarconfig='contig'),
        dict(photometric='minisblack', planarconfig='contig', metadata=None),
    ):
        tifffile.imwrite(path, last, **options)
        assert np.array_equal(read_image(path), planes)
    for metadata in ({}, None):
        tifffile.imwrite(path, last, metadata=metadata)
        assert 'holds 40 planes of 2 x 40 pixels, so its axes are named wrongly or not at all' in refused(path)


def test_two_unnamed_axes(tmp_path):
    tifffile.imwrite(tmp_path / 'a.tif', noise(2, 3, 20, 30), photometric='minisblack')
    assert 'has the axes QQYX (2 x 3 x 20 x 30)' in refused(tmp_path / 'a.tif')


def test_colours_in_several_pages(tmp_path):
    tifffile.imwrite(tmp_path / 'a.tif', noise(2, 20, 30, 3), photometric='rgb', metadata=None)
    assert 'has the axes IYXS' in refused(tmp_path / 'a.tif')


@pytest.mark.parametrize('kind', [np.uint8, np.uint16])
def test_white_that_is_0(tmp_path, kind):
    planes = noise(2, 20, 30, kind=kind)
    top = np.iinfo(kind).max
    tifffile.imwrite(tmp_path / 'black.tif', planes, photometric='minisblack')
    for options in ({}, dict(compression='zlib', tile=(16, 16)), dict(byteorder='>')):
        tifffile.imwrite(tmp_path / 'white.tif', top - planes, photometric='miniswhite', **options)
        assert np.array_equal(read_image(tmp_path / 'white.tif'), read_image(tmp_path / 'black.tif'))


@pytest.mark.parametrize('bits', [1, 2, 4, 10, 12, 14])
@pytest.mark.parametrize('photometric', [0, 1])
def test_packed_bits(write, bits, photometric):
    "Written byte by byte: pixels of fewer than 8 bits are a mask, of 9 to 15 they are exact"
    pixels = rng.integers(0, 2**bits, (6, 16), dtype=np.uint16)
    row_bits = (pixels[..., None] >> np.arange(bits - 1, -1, -1)) & 1
    data = np.packbits(row_bits.astype(np.uint8).reshape(6, -1), axis=1).tobytes()
    tags = [(256, 16), (257, 6), (258, bits), (259, 1), (262, photometric), (273, 8), (277, 1), (278, 6)]
    tags.append((279, len(data)))
    page = struct.pack('<H', len(tags))
    page += b''.join(struct.pack('<HHII', tag, 4, 1, value) for tag, value in tags) + struct.pack('<I', 0)
    path = write('a.tif', b'II*\0' + struct.pack('<I', 8 + len(data)) + data + page)
    if bits < 8:
        assert f'has {bits} bits a pixel: export it with 8 or 16 bits' in refused(path)
    else:
        expected = pixels if photometric else 2**bits - 1 - pixels
        assert np.array_equal(read_image(path)[0], expected)


@pytest.mark.parametrize('kind', [np.int8, np.int16, np.int32, np.float16, np.float32, np.float64, np.uint64])
def test_numbers_that_are_no_photograph(tmp_path, kind):
    tifffile.imwrite(tmp_path / 'a.tif', noise(20, 30).astype(kind))
    assert 'not unsigned numbers: export it with 8 or 16 bits' in refused(tmp_path / 'a.tif')


def test_jpeg_in_tiff_becomes_rgb(tmp_path):
    "Luma and chroma come back as colours"
    rgb = smooth(64, 64, 3)
    Image.fromarray(rgb).save(tmp_path / 'a.tif', compression='jpeg', quality=95)
    assert np.abs(read_image(tmp_path / 'a.tif').astype(int) - np.moveaxis(rgb, -1, 0)).max() < 8
    tifffile.imwrite(tmp_path / 'b.tif', rgb, photometric='rgb', compression='jpeg', compressionargs={'level': 95})
    with tifffile.TiffFile(tmp_path / 'b.tif') as tiff:
        assert tiff.pages.first.photometric == tifffile.PHOTOMETRIC.YCBCR
    assert np.abs(read_image(tmp_path / 'b.tif').astype(int) - np.moveaxis(rgb, -1, 0)).max() < 8
    tifffile.imwrite(tmp_path / 'c.tif', rgb, photometric='ycbcr')
    assert 'is YCBCR, not gray or RGB' in refused(tmp_path / 'c.tif')


@pytest.mark.parametrize('photometric', ['separated', 'cielab', 'icclab', 'cfa', 'linear_raw', 'mask', 'depth_map'])
def test_other_colours_of_tiff(tmp_path, photometric):
    n = {'separated': 4, 'cielab': 3, 'icclab': 3, 'linear_raw': 3}.get(photometric, 1)
    tifffile.imwrite(tmp_path / 'a.tif', noise(20, 30, n).squeeze(), photometric=photometric, planarconfig='contig')
    name = 'CMYK' if photometric == 'separated' else photometric.upper()
    assert f'is {name}, not gray or RGB' in refused(tmp_path / 'a.tif')


@pytest.mark.parametrize('ending', ['.png', '.tif', '.bmp'])
def test_palettes(tmp_path, ending):
    "Of grays, in order or not, and of colours"
    index = noise(20, 30)
    grays = rng.permutation(256).astype(np.uint8)
    for palette in (np.arange(256, dtype=np.uint8), grays):
        image = Image.fromarray(index, 'L').convert('L')
        image = Image.frombytes('P', (30, 20), index.tobytes())
        image.putpalette(np.repeat(palette, 3).tobytes())
        image.save(tmp_path / f'a{ending}')
        assert np.array_equal(read_image(tmp_path / f'a{ending}')[0], palette[index])
    image.putpalette(noise(256, 3).tobytes())
    image.save(tmp_path / f'a{ending}')
    assert 'is a palette image: export it as gray' in refused(tmp_path / f'a{ending}')


@pytest.mark.parametrize(
    ('image', 'options', 'what'),
    [
        (Image.fromarray(noise(9, 9)), dict(transparency=118), 'is gray with transparency'),
        (Image.fromarray(noise(9, 9, 3)), dict(transparency=(1, 2, 3)), 'is RGB with transparency'),
        (Image.fromarray(noise(9, 9)).convert('P'), dict(transparency=0), 'is a palette image with transparency'),
        (Image.fromarray(np.dstack([noise(9, 9), np.full((9, 9), 255, np.uint8)])), {}, 'is gray with transparency'),
        (Image.fromarray(np.dstack([noise(9, 9, 3), np.full((9, 9), 255, np.uint8)])), {}, 'is RGBA'),
    ],
    ids=['gray tRNS', 'RGB tRNS', 'palette', 'opaque LA', 'opaque RGBA'],
)
def test_transparency_of_png(write, image, options, what):
    assert refused(write('a.png', encoded(image, 'PNG', **options))).startswith(what)


def test_several_images_in_a_file(write):
    first, second = Image.fromarray(noise(20, 30)), Image.fromarray(noise(20, 30))
    many = dict(save_all=True, append_images=[second])
    found = read_image(write('a.tif', encoded(first, 'TIFF', **many)))
    assert np.array_equal(found, [np.asarray(first), np.asarray(second)])
    assert 'is an animation' in refused(write('a.png', encoded(first, 'PNG', **many)))
    assert 'holds 2 images' in refused(write('a.jpg', encoded(first.convert('RGB'), 'MPO', **many)))
    assert 'is a GIF' in refused(write('gif.png', encoded(first, 'GIF', **many)))
    assert 'WebP' in refused(write('webp.png', encoded(first, 'WEBP')))


def test_an_orientation_is_not_applied(write):
    plane = smooth(20, 30)
    image = Image.fromarray(plane)
    exif = Image.Exif()
    exif[274] = 6
    expected = {'PNG': plane, 'TIFF': plane, 'JPEG': None}
    for kind, pixels in expected.items():
        data = encoded(image, kind, exif=exif)
        found = read_image(write('a.tif', data))[0]
        assert found.shape == (20, 30) and (pixels is None or np.array_equal(found, pixels))


# --- a stain in a false colour

TINTS = {
    'red': (1, 0, 0),
    'green': (0, 1, 0),
    'blue': (0, 0, 1),
    'yellow': (1, 1, 0),
    'cyan': (0, 1, 1),
    'gray': (1, 1, 1),
}


def cells(height, width):
    "Bright spots on a dark ground, as a stain is"
    down, right = np.mgrid[:height, :width]
    plane = np.zeros((height, width))
    for y, x in rng.uniform(0, 1, (12, 2)) * (height, width):
        plane += rng.uniform(40, 220) * np.exp(-((down - y) ** 2 + (right - x) ** 2) / 30)
    return np.minimum(plane + rng.normal(8, 3, plane.shape), 250).clip(0).astype(np.uint8)


@pytest.mark.parametrize('tint', TINTS)
@pytest.mark.parametrize('kind', ['PNG', 'TIFF', 'BMP'])
def test_a_stain_in_a_false_colour_without_loss(write, tint, kind):
    plane = noise(45, 50)
    coloured = plane[..., None] * np.array(TINTS[tint], np.uint8)
    path = write(f'a_{tint}.{kind.lower()}', encoded(coloured, kind))
    assert np.array_equal(read_channel(path), plane)
    assert np.array_equal(read_image(path), np.moveaxis(coloured, -1, 0))
    coloured[-1, -1, TINTS[tint].index(0) if 0 in TINTS[tint] else 0] ^= 1
    said = refused(write(f'b_{tint}.{kind.lower()}', encoded(coloured, kind)), read_channel)
    assert said.startswith('is RGB, not 8-bit gray')


@pytest.mark.parametrize('tint', TINTS)
@pytest.mark.parametrize('quality', [50, 75, 95])
@pytest.mark.parametrize('subsampling', [0, 2])
def test_a_stain_in_a_false_colour_as_jpeg(write, tint, quality, subsampling):
    options = dict(quality=quality, subsampling=subsampling)
    for plane in (cells(90, 75), noise(48, 64) // 2):
        coloured = plane[..., None] * np.array(TINTS[tint], np.uint8)
        path = write('a.jpg', encoded(coloured, 'JPEG', **options))
        found = read_channel(path)
        carried = read_image(path)[[i for i in range(3) if TINTS[tint][i]]]
        assert found.dtype == np.uint8 and np.array_equal(found, np.rint(carried.mean(0)))
        # of noise a JPEG keeps little
        assert len(plane) == 48 or np.corrcoef(found.ravel(), plane.ravel())[0, 1] > 0.95


def test_black_shows_no_colour(write):
    for kind in ('PNG', 'JPEG'):
        path = write('a.png', encoded(np.zeros((20, 30, 3), np.uint8), kind))
        assert refused(path, read_channel).startswith('is RGB, not 8-bit gray')


@pytest.mark.parametrize('quality', [50, 75, 95])
def test_two_stains_are_not_one(write, quality):
    "The second is faint, sparse, or a spot in the last corner"
    first = cells(90, 75)
    spot = np.zeros_like(first)
    spot[-8:, -8:] = 120
    for second in (first[::-1] // 2, cells(90, 75)[:, ::-1] // 3, spot):
        rgb = np.stack([first, second, np.zeros_like(first)], -1)
        said = refused(write('a.jpg', encoded(rgb, 'JPEG', quality=quality)), read_channel)
        assert said.startswith('is RGB, not 8-bit gray or 16-bit gray')


# --- TIFF of several pages, pyramids, sets


def test_a_thumbnail_and_a_pyramid_are_left_out(tmp_path):
    planes = noise(2, 64, 64)
    for ome in (False, True):
        path = tmp_path / ('a.ome.tif' if ome else 'a.tif')
        with tifffile.TiffWriter(path, ome=ome) as tiff:
            tiff.write(planes, subifds=1, photometric='minisblack', metadata={'axes': 'CYX'})
            tiff.write(planes[:, ::2, ::2], subfiletype=1, photometric='minisblack')
        assert np.array_equal(read_image(path), planes)
    with tifffile.TiffWriter(tmp_path / 'b.tif') as tiff:
        tiff.write(planes[0], photometric='minisblack', metadata=None)
        tiff.write(planes[0, ::4, ::4], subfiletype=1, photometric='minisblack', metadata=None)
    assert np.array_equal(read_image(tmp_path / 'b.tif')[0], planes[0])
    with tifffile.TiffWriter(tmp_path / 'c.tif') as tiff:
        tiff.write(planes[0], photometric='minisblack', metadata=None)
        tiff.write(planes[0, :50, :40], photometric='minisblack', metadata=None)
    assert 'has pages of different sizes or kinds' in refused(tmp_path / 'c.tif')


def ome_xml(files, here, sizes=None, names=('DAPI', 'GFP'), images=1, has_files=True):
    "OME-XML of planes in files, a page each"
    sizes = dict(C=len(files), Z=1, T=1) | (sizes or {})
    data = ''.join(
        f'<TiffData FirstC="{i}" IFD="{0 if has_files else i}" PlaneCount="1">'
        + (f'<UUID FileName="{name}">urn:uuid:{i}</UUID>' if has_files else '')
        + '</TiffData>'
        for i, name in enumerate(files)
    )
    channels = ''.join(f'<Channel ID="Channel:0:{i}" Name="{name}"/>' for i, name in enumerate(names))
    pixels = (
        f'<Pixels ID="Pixels:0" DimensionOrder="XYCZT" Type="uint8" SizeX="30" SizeY="20" SizeC="{sizes["C"]}"'
        f' SizeZ="{sizes["Z"]}" SizeT="{sizes["T"]}">{channels}{data}</Pixels>'
    )
    image = ''.join(f'<Image ID="Image:{i}" Name="well {i}">{pixels}</Image>' for i in range(images))
    return (
        '<?xml version="1.0"?><OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06"'
        f' UUID="urn:uuid:{here}">{image}</OME>'
    )


def write_ome(path, planes, description):
    tifffile.imwrite(path, planes, photometric='minisblack', description=description, metadata=None)


def test_one_file_of_an_ome_set(tmp_path):
    "Its own page, never the other file's, whether that is there or not"
    planes = noise(2, 20, 30)
    files = ['a_dapi.tif', 'a_gfp.tif']
    for i in range(2):
        write_ome(tmp_path / files[i], planes[i], ome_xml(files, i))
    for i in range(2):
        assert np.array_equal(read_channel(tmp_path / files[i]), planes[i])
        said = refused(tmp_path / files[i])
        assert said.startswith('holds 1 of the 2 planes') and f'should be in {files[1 - i]}' in said
        assert channel_names(tmp_path / files[i]) == ()
    (tmp_path / files[0]).unlink()
    assert np.array_equal(read_channel(tmp_path / files[1]), planes[1])
    assert 'should be in a_dapi.tif' in refused(tmp_path / files[1])


@pytest.mark.parametrize('n', [1, 3])
def test_an_aborted_acquisition(tmp_path, n):
    path = tmp_path / 'a.ome.tif'
    write_ome(path, noise(n, 20, 30), ome_xml(['a.ome.tif'] * 4, 0, names='ABCD', has_files=False))
    for read in (read_image, read_channel):
        assert f'holds {n} of the 4 planes that its OME metadata name, the others were never written' in refused(
            path, read
        )


def test_planes_in_the_order_of_the_metadata(tmp_path):
    planes = noise(2, 20, 30)
    description = ome_xml(['a.ome.tif'] * 2, 0, has_files=False).replace('IFD="0"', 'IFD="9"')
    description = description.replace('IFD="1"', 'IFD="0"').replace('IFD="9"', 'IFD="1"')
    write_ome(tmp_path / 'a.ome.tif', planes, description)
    assert np.array_equal(read_image(tmp_path / 'a.ome.tif'), planes[::-1])


def test_ome_that_holds_something_else(tmp_path):
    path = tmp_path / 'a.ome.tif'
    write_ome(path, noise(2, 20, 30), ome_xml(['a.ome.tif'] * 2, 0, images=2, has_files=False))
    assert 'holds 2 images (well 0, well 1): save each as a file' in refused(path)
    write_ome(path, noise(3, 20, 30), ome_xml(['a.ome.tif'] * 2, 0, has_files=False))
    assert 'holds 3 pages, its OME metadata name 2' in refused(path)
    write_ome(path, noise(2, 20, 30), '<OME><Image</OME>')
    assert 'has OME-XML that cannot be read' in refused(path)
    companion = '<OME UUID="urn:uuid:0"><BinaryOnly MetadataFile="a.companion.ome" UUID="urn:uuid:1"/></OME>'
    plane = noise(20, 30)
    write_ome(path, plane, companion)
    assert 'is one file of an OME set' in refused(path)
    assert np.array_equal(read_channel(path), plane)


def test_metadata_that_promise_more_pages(tmp_path):
    path = tmp_path / 'a.tif'
    planes = noise(3, 20, 30)
    for description in (
        'ImageJ=1.54f\nimages=4\nchannels=4\nhyperstack=true\n',
        json.dumps({'shape': [4, 20, 30]}),
    ):
        for compression in (None, 'zlib'):
            tifffile.imwrite(
                path, planes, photometric='minisblack', description=description, metadata=None, compression=compression
            )
            refused(path)


def test_a_chain_of_pages_that_breaks_off(write):
    data = bytearray(
        encoded(Image.fromarray(noise(20, 30)), 'TIFF', save_all=True, append_images=[Image.fromarray(noise(20, 30))])
    )
    with tifffile.TiffFile(io.BytesIO(bytes(data))) as tiff:
        page = tiff.pages[0]
        where = page.offset + 2 + 12 * len(page.tags)
    data[where : where + 4] = struct.pack('<I', 10**6)
    assert 'it is cut off' in refused(write('a.tif', bytes(data)))


def test_strips_that_were_never_written(tmp_path):
    tifffile.imwrite(tmp_path / 'a.tif', noise(64, 64), rowsperstrip=16)
    with tifffile.TiffFile(tmp_path / 'a.tif', mode='r+b') as tiff:
        counts = list(tiff.pages.first.databytecounts)
        tiff.pages.first.tags['StripByteCounts'].overwrite([*counts[:2], 0, 0])
    assert '2 of 4 strips or tiles were never written' in refused(tmp_path / 'a.tif')


# --- damage, and files that are something else

WHOLE = {
    'png': encoded(smooth(40, 50), 'PNG'),
    '16.png': encoded(noise(20, 30, kind=np.uint16), 'PNG'),
    'jpg': encoded(smooth(40, 50), 'JPEG', quality=95),
    'progressive.jpg': encoded(smooth(40, 50, 3), 'JPEG', quality=95, progressive=True),
    'bmp': encoded(smooth(40, 50), 'BMP'),
    'jp2': imagecodecs.jpeg2k_encode(noise(40, 50, kind=np.uint16), level=0, reversible=True, codecformat='jp2'),
    'j2k': imagecodecs.jpeg2k_encode(noise(40, 50), level=0, reversible=True, codecformat='j2k'),
}


def tiff_bytes(planes, **options):
    file = io.BytesIO()
    tifffile.imwrite(file, planes, photometric='minisblack', **options)
    return file.getvalue()


WHOLE |= {
    'strips.tif': tiff_bytes(noise(2, 40, 50), rowsperstrip=8),
    'zlib.tif': tiff_bytes(noise(2, 40, 50), compression='zlib', rowsperstrip=8),
    'tiles.tif': tiff_bytes(noise(2, 40, 50), tile=(16, 16)),
    'lzw.tif': tiff_bytes(noise(2, 40, 50), tile=(16, 16), compression='lzw'),
    'imagej.tif': tiff_bytes(noise(2, 40, 50), imagej=True),
    'pillow.tif': encoded(
        Image.fromarray(noise(40, 50)), 'TIFF', save_all=True, append_images=[Image.fromarray(noise(40, 50))]
    ),
}


@pytest.mark.parametrize('name', WHOLE)
def test_a_file_that_is_cut_anywhere_is_refused_or_whole(write, name):
    data = WHOLE[name]
    whole = read_image(write(f'a.{name}', data))
    n = 0
    for end in [*range(0, len(data), 1 + len(data) // 150), *range(len(data) - 12, len(data))]:
        path = write('cut.' + name, data[:end])
        try:
            assert np.array_equal(read_image(path), whole), end
        except InputError as e:
            n += 1
            assert any(word in str(e) for word in ('cut off', 'empty', 'damaged')), e
            assert 'annot be decoded' in str(e)
    assert n > 100
    middle = refused(write('cut.' + name, data[: len(data) // 2]))
    assert 'it is cut off' in middle


def test_a_png_with_a_flipped_bit_is_refused_or_whole(write):
    data = WHOLE['png']
    whole = read_image(write('a.png', data))
    refusals = 0
    for i in range(0, len(data), 7):
        broken = bytearray(data)
        broken[i] ^= 1 << i % 8
        try:
            assert np.array_equal(read_image(write('b.png', bytes(broken))), whole), i
        except InputError:
            refusals += 1
    assert refusals > 0.9 * len(range(0, len(data), 7))


@pytest.mark.parametrize(
    ('data', 'said'),
    [
        (b'', 'it is empty (0 bytes)'),
        (b'version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n', 'not fetched: run `git lfs pull`'),
        (b'/annex/objects/SHA256E-s1--aa.png\n', 'not fetched: run `git annex get`'),
        (b'<!DOCTYPE html><html>', "it is text ('<!DOCTYPE html><html>')"),
        (b'hello', "it is text ('hello')"),
        (bytes(500), 'begins with zeros'),
        (b'\x93NUMPY\x01\0' + bytes(90), 'no image of a known format'),
        (b'\x89PNG', 'it is cut off (4 bytes)'),
        (b'ZISRAWFILE' + bytes(90), 'name it .czi'),
    ],
)
def test_what_is_no_image(write, data, said):
    for ending in ('png', 'tif', 'JPG', 'bmp', 'jp2'):
        assert said in refused(write(f'a.{ending}', data))


def test_what_is_no_file(tmp_path):
    (tmp_path / 'folder.png').mkdir()
    (tmp_path / 'loop.png').symlink_to('loop.png')
    (tmp_path / 'gone.png').symlink_to('nowhere.png')
    (tmp_path / 'annex.png').symlink_to('../.git/annex/objects/aa/bb/SHA256E-s1--aa.png')
    for read in (read_image, read_channel, channel_names):
        assert refused(tmp_path / 'folder.png', read).startswith('is a folder, not an image file')
        assert 'points to nothing (nowhere.png): fetch the file' in refused(tmp_path / 'gone.png', read)
        assert 'is not fetched: run `git annex get`' in refused(tmp_path / 'annex.png', read)
        assert refused(tmp_path / 'nothing.png', read).startswith('is missing')
    assert 'cannot be read: Too many levels of symbolic links' in refused(tmp_path / 'loop.png')
    if os.geteuid():
        (tmp_path / 'shut.png').touch(0)
        assert 'may not be read' in refused(tmp_path / 'shut.png')


def test_memory_and_mistakes_of_ours_are_told_apart(write, monkeypatch):
    path = write('a.png', WHOLE['png'])
    for error, said in ((MemoryError(), 'does not fit into memory'), (RuntimeError('x'), 'it is damaged (x)')):

        def fail(data, out=None, error=error):
            raise error

        monkeypatch.setattr(images.imagecodecs, 'png_decode', fail)
        assert said in refused(path)
    monkeypatch.delattr(images, '_png_chunks')
    with pytest.raises(NameError):
        read_image(path)


@pytest.mark.parametrize('name', ['a.png', 'a.PNG', 'a.tif', 'a.Tiff', 'a.jpg', 'a.bmp', 'a.jp2'])
@pytest.mark.parametrize('content', ['png', 'bmp', 'jp2', 'strips.tif'])
def test_the_content_counts_not_the_ending(write, name, content):
    whole = read_image(write(f'whole.{content}', WHOLE[content]))
    assert np.array_equal(read_image(write(name, WHOLE[content])), whole)


def test_endings():
    known = {
        'a.png': '.png',
        'a.PNG': '.PNG',
        'f/a.b.Tif': '.Tif',
        'a.ome.tif': '.ome.tif',
        'a.OME.TIFF': '.OME.TIFF',
        'a.ome.zarr': '.ome.zarr',
        'a.zarr': '.zarr',
        'a.czi': '.czi',
        'a.jpeg': '.jpeg',
        'a.bmp': '.bmp',
        'a.jp2': '.jp2',
        '.png': '',
        'png': '',
        'a.png.txt': '',
        'a.csv': '',
        'a': '',
    }
    assert {name: ending_of(name) for name in known} == known
    assert all(ending_of(f'a{ending}') == ending for ending in READERS)


def test_jpeg_of_12_bits(write):
    data = imagecodecs.jpeg8_encode(noise(20, 30, kind=np.uint16) >> 4, bitspersample=12)
    assert 'is a JPEG of more than 8 bits: export it as PNG or TIFF' in refused(write('a.jpg', data))


def test_jpeg_2000_of_other_kinds(write):
    deep = noise(20, 30, kind=np.uint16) >> 4
    data = imagecodecs.jpeg2k_encode(deep, level=0, reversible=True, codecformat='jp2', bitspersample=12)
    assert np.array_equal(read_image(write('a.jp2', data))[0], deep)
    signed = imagecodecs.jpeg2k_encode(noise(20, 30).astype(np.int16), level=0, reversible=True, codecformat='jp2')
    assert 'not unsigned numbers' in refused(write('a.jp2', signed))
    rgb = imagecodecs.jpeg2k_encode(noise(20, 30, 3, kind=np.uint16), level=0, reversible=True, codecformat='jp2')
    assert read_image(write('a.jp2', rgb)).shape == (3, 20, 30)
    for n in (2, 4):
        assert f'has {n} components' in refused(write('a.jp2', encoded(noise(20, 30, n), 'JPEG2000')))


def test_bmp_of_few_bits_and_of_16(write):
    for bits, size in ((1, 4), (4, 16), (16, 64)):
        header = struct.pack('<IiiHHIIiiII', 40, 32, 1, 1, bits, 0, size, 0, 0, 0, 0)
        palette = bytes(4 * 2**bits) if bits < 16 else b''
        start = 14 + len(header) + len(palette)
        data = b'BM' + struct.pack('<IHHI', start + size, 0, 0, start) + header + palette + bytes(size)
        assert f'has {bits} bits a pixel' in refused(write('a.bmp', data))


# --- large, quiet, fast


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['PNG', 'JPEG', 'TIFF', 'BMP'])
def test_a_field_of_182_million_pixels(tmp_path, kind):
    plane = np.zeros((13500, 13500), np.uint8)
    plane[::2] = 200
    path = tmp_path / f'a.{kind.lower()}'
    Image.fromarray(plane).save(path, kind)
    found = read_channel(path)
    assert found.shape == plane.shape and abs(int(found[0, 0]) - 200) < 3 and found[1, 1] < 3


def test_a_limit_of_pixels(write):
    header = struct.pack('>IIBBBBB', 200_000, 200_000, 8, 0, 0, 0, 0)
    data = b'\x89PNG\r\n\x1a\n'
    for kind, content in ((b'IHDR', header), (b'IDAT', zlib.compress(b'')), (b'IEND', b'')):
        data += struct.pack('>I', len(content)) + kind + content + struct.pack('>I', zlib.crc32(kind + content))
    assert 'is 200000 x 200000 pixels, more than 400 megapixels: cut it into smaller fields' in refused(
        write('a.png', data)
    )


def test_nothing_is_printed(tmp_path):
    "In a program of its own, where nobody listens to tifffile's log"
    files = ['a.ome.tif', 'b.ome.tif']
    write_ome(tmp_path / 'a.ome.tif', noise(20, 30), ome_xml(files, 0))
    (tmp_path / 'b.tif').write_bytes(WHOLE['pillow.tif'][:-40])
    code = (
        'import sys\nfrom protloc.data.readers.images import read_channel, read_image\n'
        'print(read_channel(sys.argv[1]).shape)\n'
        'for path in sys.argv[1:]:\n    try:\n        read_image(path)\n'
        '    except ValueError as e:\n        print(type(e).__name__)\n'
        'print(sorted({name.split("_")[0] for name in sys.modules} & {"bioio", "zarr", "dask", "xarray"}))\n'
    )
    done = subprocess.run(
        [sys.executable, '-c', code, tmp_path / 'a.ome.tif', tmp_path / 'b.tif'], capture_output=True, text=True
    )
    assert done.stdout.split('\n')[:4] == ['(20, 30)', 'InputError', 'InputError', '[]'] and done.stderr == ''


def test_the_log_stays_open_to_those_who_want_it(write, caplog):
    caplog.set_level(logging.DEBUG, 'tifffile')
    refused(write('a.tif', WHOLE['pillow.tif'][: len(WHOLE['pillow.tif']) // 2]))
    assert any(record.name == 'tifffile' for record in caplog.records)


# --- names of channels


def test_names_that_a_file_states(tmp_path):
    planes = noise(2, 20, 30)
    path = tmp_path / 'a.ome.tif'
    for names, stated in (
        (('DAPI', 'GFP'), ('DAPI', 'GFP')),
        (('DAPI', 'DAPI'), ()),
        (('DAPI', ''), ()),
        (('DAPI',), ()),
        (('Channel:0:0', 'Channel:0:1'), ()),
        (('405 nm', 'µ'), ('405 nm', 'µ')),
    ):
        write_ome(path, planes, ome_xml(['a'] * 2, 0, names=names, has_files=False).encode())
        assert channel_names(path) == stated and len(read_image(path)) == 2
    tifffile.imwrite(path, noise(20, 30, 3), photometric='rgb', metadata={'Channel': {'Name': 'Colours'}})
    assert channel_names(path) == () and len(read_image(path)) == 3
    path = tmp_path / 'a.tif'
    for labels, stated in ((['DAPI', 'GFP'], ('DAPI', 'GFP')), (['c:1/2 - a.nd2', 'c:2/2 - a.nd2'], ())):
        tifffile.imwrite(path, planes, imagej=True, metadata={'axes': 'CYX', 'Labels': labels})
        assert channel_names(path) == stated
    tifffile.imwrite(path, planes, imagej=True, metadata={'axes': 'ZYX', 'Labels': ['A', 'B']})
    assert channel_names(path) == ()


# --- microscopes' own formats


@pytest.fixture
def bioio():
    pytest.importorskip('bioio_ome_zarr')
    pytest.importorskip('bioio_czi')


def write_zarr(path, pixels, axes, version=3, names=()):
    from bioio_ome_zarr.writers import Channel, OMEZarrWriter

    kinds = {'c': 'channel', 't': 'time'}
    channels = [Channel(label=name, color='ffffff') for name in names]
    OMEZarrWriter(
        str(path),
        [pixels.shape],
        pixels.dtype,
        zarr_format=version,
        axes_names=list(axes),
        axes_types=[kinds.get(axis, 'space') for axis in axes],
        channels=channels or None,
    ).write_full_volume(pixels)
    return path


@pytest.mark.parametrize('version', [2, 3])
@pytest.mark.parametrize('kind', [np.uint8, np.uint16])
def test_ome_zarr(tmp_path, bioio, version, kind):
    planes = noise(2, 20, 30, kind=kind)
    path = write_zarr(tmp_path / 'a.ome.zarr', planes, 'cyx', version, ['DAPI', 'GFP'])
    assert np.array_equal(read_image(path), planes) and read_image(path).dtype == kind
    assert channel_names(path) == ('DAPI', 'GFP')
    path = write_zarr(tmp_path / 'b.zarr', planes[None, :, None], 'tczyx', version)
    assert np.array_equal(read_image(path), planes) and channel_names(path) == ()
    path = write_zarr(tmp_path / 'c.zarr', planes[0], 'yx', version)
    assert np.array_equal(read_channel(path), planes[0])


def test_ome_zarr_that_is_refused(tmp_path, bioio):
    path = write_zarr(tmp_path / 'z.zarr', noise(1, 2, 3, 20, 30), 'tczyx')
    assert 'holds 3 slices, which are not stains' in refused(path)
    path = write_zarr(tmp_path / 'float.zarr', noise(2, 20, 30).astype(np.float32), 'cyx')
    assert 'holds float32' in refused(path)
    path = write_zarr(tmp_path / 'empty.zarr', noise(2, 20, 30), 'cyx')
    chunks = [p for p in path.rglob('*') if p.is_file() and p.name != 'zarr.json']
    for chunk in chunks:
        chunk.unlink()
    assert chunks and 'it holds no pixels' in refused(path)
    (tmp_path / 'file.zarr').write_text('hello')
    assert 'is a file, an OME-Zarr is a folder' in refused(tmp_path / 'file.zarr')
    (tmp_path / 'folder.zarr').mkdir()
    assert 'is no OME-Zarr' in refused(tmp_path / 'folder.zarr')
    assert refused(tmp_path / 'nowhere.zarr').startswith('is missing')


def test_ome_zarr_of_bioformats(tmp_path, bioio):
    "A folder of images: read where it is one, else named"
    top = tmp_path / 'a.zarr'
    planes = noise(2, 20, 30)
    write_zarr(top / '0', planes, 'cyx', 2, ['DAPI', 'GFP'])
    (top / '.zgroup').write_text('{"zarr_format": 2}')
    (top / '.zattrs').write_text('{"bioformats2raw.layout": 3}')
    assert np.array_equal(read_image(top), planes) and channel_names(top) == ('DAPI', 'GFP')
    write_zarr(top / '1', planes, 'cyx', 2)
    assert 'holds 2 images (0, 1)' in refused(top)
    (top / '.zattrs').write_text('{"plate": {}}')
    assert 'is a plate' in refused(top)


def write_czi(path, planes, names=(), scenes=1, **where):
    from pylibCZIrw import czi

    with czi.create_czi(str(path), exist_ok=True) as file:
        for i, plane in enumerate(planes):
            pixels = np.ascontiguousarray(plane if plane.ndim == 3 else plane[..., None])
            place = {'C': i} | {axis: i for axis in where} if not where else {'C': 0} | dict.fromkeys(where, i)
            if scenes > 1:
                file.write(pixels, plane={'C': 0}, scene=i, location=(100 * i, 0))
            else:
                file.write(pixels, plane=place)
        file.write_metadata('a', channel_names=dict(enumerate(names)))
    return path


@pytest.mark.parametrize('kind', [np.uint8, np.uint16])
def test_czi(tmp_path, bioio, kind):
    planes = noise(3, 20, 30, kind=kind)
    path = write_czi(tmp_path / 'a.czi', planes, ['DAPI', 'GFP', 'ER'])
    assert np.array_equal(read_image(path), planes) and read_image(path).dtype == kind
    assert channel_names(path) == ('DAPI', 'GFP', 'ER')
    assert channel_names(write_czi(tmp_path / 'b.czi', planes)) == ()
    rgb = noise(20, 30, 3, kind=kind)
    # a CZI stores blue, green, red
    path = write_czi(tmp_path / 'rgb.czi', [rgb[..., ::-1]])
    assert np.array_equal(read_image(path), np.moveaxis(rgb, -1, 0)) and channel_names(path) == ()


def test_czi_that_is_refused(tmp_path, bioio):
    planes = noise(2, 20, 30)
    assert 'holds 2 slices' in refused(write_czi(tmp_path / 'z.czi', planes, Z=True))
    assert 'holds 2 times' in refused(write_czi(tmp_path / 't.czi', planes, T=True))
    assert 'holds 2 scenes (' in refused(write_czi(tmp_path / 's.czi', planes, scenes=2))
    path = write_czi(tmp_path / 'a.czi', planes)
    path.write_bytes(path.read_bytes()[:3000])
    assert 'cannot be decoded' in refused(path)
    path.write_bytes(WHOLE['png'])
    assert 'cannot be decoded' in refused(path)
    for ending in ('.czi', '.lif', '.nd2'):
        assert refused(tmp_path / f'nowhere{ending}').startswith('is missing')


@pytest.mark.parametrize('ending', ['.czi', '.lif', '.nd2', '.zarr'])
def test_without_the_extra(tmp_path, monkeypatch, ending):
    (tmp_path / f'a{ending}').touch()
    monkeypatch.setitem(sys.modules, images.BIOIO[ending], None)
    for read in (read_image, channel_names):
        assert "pip install 'protloc[bioio]'" in refused(tmp_path / f'a{ending}', read)
