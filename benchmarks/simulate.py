"""Milliseconds to simulate a cell, or a field of cells, on one core, beside decoding and shrinking one real-sized field with Pillow.

    python benchmarks/simulate.py [--images 200]

Prints JSON. The named alternative: read four 512 x 512 PNGs and shrink them by area average, which is what an image costs
when it is made from a field on disk each time."""

import argparse
import json
import os
import tempfile
import time

os.environ['OMP_NUM_THREADS'] = '1'
from PIL import Image

from protloc.data.fields import read_field, resize_area
from protloc.data.simulate.datasets import draw_label_sets
from protloc.data.simulate.photographs import simulate_cell
from protloc.labels import STAINS


def per_call(work, n):
    work(0)
    start = time.perf_counter()
    for i in range(n):
        work(i)
    return (time.perf_counter() - start) / n * 1000


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--images', type=int, default=200)
    n = parser.parse_args().images
    sets = draw_label_sets(n, temper=0.5)
    with tempfile.TemporaryDirectory() as folder:
        big = simulate_cell((0,), size=512)
        for image, stain in zip(big, STAINS):
            Image.fromarray(image).save(f'{folder}/a_{stain}.png')
        for size, cells in ((32, 1), (64, 1), (128, 1), (512, 1), (512, 16)):
            ours = per_call(
                lambda i: simulate_cell(sets[i], cell_line=i % 18, antibody=i, index=i, size=size, cells=cells),
                n if size < 512 else n // 10,
            )
            decode = per_call(lambda i: resize_area(read_field(folder, 'a'), size), 20)
            print(
                json.dumps(
                    dict(
                        benchmark='simulate',
                        size=size,
                        cells=cells,
                        ms_per_image=round(ours, 2),
                        pillow_ms_per_field=round(decode, 2),
                        ratio=round(ours / decode, 3),
                    )
                )
            )


if __name__ == '__main__':
    main()
