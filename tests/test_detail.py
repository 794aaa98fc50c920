"Power by spatial frequency, against numpy, and in a study's results"

import numpy as np
import pandas as pd
import pytest

from protloc.core import InputError
from protloc.evaluate.detail import band_ratios, radial_power


@pytest.mark.parametrize('size', [7, 32])
def test_power_is_that_of_numpy(size):
    images = np.random.default_rng(0).integers(0, 256, (5, 2, size, size), dtype=np.uint8)
    power = np.abs(np.fft.fft2(images / 255)) ** 2
    rows, columns = np.meshgrid(np.fft.fftfreq(size), np.fft.fftfreq(size), indexing='ij')
    radius = np.hypot(rows, columns)
    found = radial_power(images)
    for band in range(4):
        low, high = band / 8, (band + 1) / 8 if band < 3 else 1
        inside = (radius >= low) & (radius < high) & (radius > 0)
        expected = power[..., inside].mean(-1) if inside.any() else np.zeros((5, 2))
        assert np.allclose(found[..., band], expected)


def test_intervals_hold_the_truth_as_often_as_they_say():
    "Two halves of the same noise, whose strength differs from image to image"
    rng = np.random.default_rng(0)
    held = []
    for _ in range(150):
        noise = rng.normal(size=(80, 1, 16, 16)) * rng.uniform(10, 40, (80, 1, 1, 1)) + 128
        images = noise.clip(0, 255).astype(np.uint8)
        table = band_ratios(images[:40], images[40:], ['red'])
        held.append((table.low < 1) & (table.high > 1))
    assert 0.91 < pd.concat(held).mean() < 0.99


def test_a_stain_that_is_empty_has_no_ratio():
    rng = np.random.default_rng(0)
    real, synthetic = rng.integers(0, 256, (2, 6, 2, 16, 16), dtype=np.uint8)
    real[:, 1] = 0
    table = band_ratios(real, synthetic, ['red', 'green'])
    assert table.loc['green'].isna().to_numpy().any(1).all() and table.loc['red'].notna().to_numpy().all()
    assert list(table.index.names) == ['channel', 'band'] and len(table) == 8


@pytest.mark.parametrize(
    'shape,names', [((6, 2, 8, 8), 'ab'), ((6, 1, 16, 16), 'ab'), ((1, 2, 16, 16), 'ab'), ((6, 2, 16, 16), 'abc')]
)
def test_images_that_cannot_be_compared(shape, names):
    rng = np.random.default_rng(0)
    real, synthetic = rng.integers(0, 256, (6, 2, 16, 16), np.uint8), rng.integers(0, 256, shape, np.uint8)
    with pytest.raises(InputError, match='cannot be compared: two or more of the same kind'):
        band_ratios(real, synthetic, list(names))
