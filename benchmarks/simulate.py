"""What does a simulated cell, or a field of cells, cost on one core?

    python benchmarks/simulate.py [--images 200]

Prints JSON. Beside it the named alternative: reading a field's four 512 x 512 PNGs with Pillow and shrinking them by
area average, which is what an image costs when it is made from a field on disk each time."""

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

PICTURES = ((32, 1), (64, 1), (128, 1), (512, 1), (512, 16))  # size, cells


def per_call(work, n):
    "Milliseconds of a call, mean of `n`"
    work(0)
    start = time.perf_counter()
    for i in range(n):
        work(i)
    return (time.perf_counter() - start) / n * 1000


def measure(folder, label_sets, size, cells):
    "Milliseconds to simulate one picture, and to make one of the same size from a field on disk"

    def simulate(i):
        simulate_cell(label_sets[i], cell_line=i % 18, antibody=i, index=i, size=size, cells=cells)

    def decode(i):
        resize_area(read_field([folder / f'a_{stain}.png' for stain in STAINS]), size)

    n = len(label_sets) if size < 512 else len(label_sets) // 10
    return per_call(simulate, n), per_call(decode, 20)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--images', type=int, default=200)
    n = parser.parse_args().images
    label_sets = draw_label_sets(n, temper=0.5)
    with tempfile.TemporaryDirectory() as folder:
        for image, stain in zip(simulate_cell((0,), size=512), STAINS, strict=True):
            Image.fromarray(image).save(f'{folder}/a_{stain}.png')
        for size, cells in PICTURES:
            ours, pillow = measure(folder, label_sets, size, cells)
            result = dict(
                benchmark='simulate',
                size=size,
                cells=cells,
                ms_per_image=round(ours, 2),
                pillow_ms_per_field=round(pillow, 2),
                ratio=round(ours / pillow, 3),
            )
            print(json.dumps(result))


if __name__ == '__main__':
    main()
