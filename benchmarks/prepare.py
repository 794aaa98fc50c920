"""Fields prepared per second beside bare Pillow decoding of the same files; peak memory for few and many fields.

    python benchmarks/prepare.py [--fields 500 5000] [--size 128] [--tile T] [--images FOLDER]

Prints JSON. The fields are hard links to a few 512 x 512 fields of four PNGs in a temporary folder: simulated cells,
or real ones of FOLDER (in the challenge's layout). Decoding is timed before and after, on one core and on all cores
at once: where the two disagree, other programs were at work. Memory is the largest sum of the proportional set sizes
of prepare's processes, read once a second, for reading it more often slows them. The rate leaves out the start, which
both runs have in common."""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time

os.environ['OMP_NUM_THREADS'] = '1'
from pathlib import Path

import joblib
import psutil
from PIL import Image

from protloc.data.simulate.datasets import draw_label_sets
from protloc.data.simulate.photographs import simulate_cell
from protloc.labels import STAINS

DIFFERENT = 20


def real_fields(images):
    "The first fields of a folder in the challenge's layout; the paths of their stains"
    first = sorted(Path(images, 'train').glob('*_red.png'))[:DIFFERENT]
    return [[path.with_name(path.name.replace('_red', f'_{stain}')) for stain in STAINS] for path in first]


def simulated_fields(folder):
    "A few fields of 512 px; the paths of their stains"
    fields = [[folder / f'{i}_{stain}.png' for stain in STAINS] for i in range(DIFFERENT)]
    for i, labels in enumerate(draw_label_sets(DIFFERENT, temper=0.5)):
        for path, plane in zip(fields[i], simulate_cell(labels, index=i, size=512), strict=True):
            Image.fromarray(plane).save(path)
    return fields


def link(folder, fields, n):
    "A challenge's folder of n fields"
    (folder / 'train').mkdir(parents=True)
    for i in range(n):
        for stain, path in zip(STAINS, fields[i % len(fields)], strict=True):
            os.link(path, folder / 'train' / f'f{i}_{stain}.png')
    (folder / 'train.csv').write_text('Id,Target\n' + ''.join(f'f{i},{i % 28}\n' for i in range(n)))


def decode(fields, seconds=5):
    "Fields decoded per second by Pillow alone on one core"
    n = 0
    start = time.perf_counter()
    while time.perf_counter() - start < seconds:
        for path in fields[n % len(fields)]:
            with Image.open(path) as image:
                image.load()
        n += 1
    return n / (time.perf_counter() - start)


def rates(fields, cores):
    "Fields decoded per second on one core, and on all of them at the same time"
    alone = decode(fields)
    together = joblib.Parallel(cores)(joblib.delayed(decode)(fields) for _ in range(cores))
    return alone, sum(together)


def watched(words):
    "Seconds of a command, and the peak memory of its processes in MB"
    process = psutil.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    peak = 0
    said = []
    reader = threading.Thread(target=lambda: said.extend(process.stderr), daemon=True)
    start = time.perf_counter()
    reader.start()
    while process.poll() is None:
        try:
            peak = max(peak, sum(p.memory_full_info().pss for p in [process, *process.children(recursive=True)]))
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            pass
        time.sleep(1)
    assert process.returncode == 0, said
    return time.perf_counter() - start, peak / 1e6


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--fields', type=int, nargs='+', default=[500, 5000])
    parser.add_argument('--size', type=int, default=128)
    parser.add_argument('--tile', type=int)
    parser.add_argument('--images')
    args = parser.parse_args()
    command = [Path(sys.executable).parent / 'protloc', 'prepare']
    options = ['--size', str(args.size), *(['--tile', str(args.tile)] if args.tile else [])]
    with tempfile.TemporaryDirectory(dir=None if not args.images else Path(args.images).parent) as scratch:
        fields = real_fields(args.images) if args.images else simulated_fields(Path(scratch))
        runs = {}
        cores = joblib.cpu_count()
        before = rates(fields, cores)
        for n in args.fields:
            folder = Path(scratch, f'fields{n}')
            link(folder, fields, n)
            runs[n] = watched([*command, folder, Path(scratch, f'store{n}'), *options])
        one, all_cores = ((a + b) / 2 for a, b in zip(before, rates(fields, cores), strict=True))
    few, many = min(runs), max(runs)
    seconds = runs[many][0]
    steady = (many - few) / (seconds - runs[few][0]) if many > few else many / seconds
    print(
        json.dumps(
            dict(
                benchmark='prepare',
                size=args.size,
                tile=args.tile,
                images='real' if args.images else 'simulated',
                cores=cores,
                fields=list(runs),
                seconds=[round(s, 1) for s, _ in runs.values()],
                peak_mb=[round(m) for _, m in runs.values()],
                fields_per_s=round(steady, 1),
                fields_per_s_with_start=round(many / seconds, 1),
                pillow_one_core=round(one, 1),
                pillow_all_cores=round(all_cores, 1),
                ratio_to_cores_times_one=round(steady / (one * cores), 3),
                ratio_to_all_cores=round(steady / all_cores, 3),
            )
        )
    )


if __name__ == '__main__':
    main()
