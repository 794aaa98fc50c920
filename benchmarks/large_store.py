"""Peak memory of everything that reads or writes a large store, with a hard limit where there is one.

    python benchmarks/large_store.py [--fields 13000] [--size 512] [--folder FOLDER] [--cgroup FOLDER]

Prints a JSON line a stage. The fields are simulated cells, each shifted, turned and brightened in its own way, as four
PNGs of the challenge's layout (about 5 GB for the default; kept in FOLDER, so that a second run starts with them).
13,000 of 512 px make a store of 12.7 GiB. `largest process` is the peak of the resident size (what the system noted,
`ru_maxrss`), `all processes` the largest sum of proportional set sizes, read once a second. `mapped` is the named
alternative of `read`: the same rows in the same order from `numpy.load(mmap_mode='r')`.

A limit that the system enforces: make a memory cgroup and name it,

    mkdir /sys/fs/cgroup/memory/protloc
    echo 2G > /sys/fs/cgroup/memory/protloc/memory.limit_in_bytes      # v2: memory.max
    python benchmarks/large_store.py --cgroup /sys/fs/cgroup/memory/protloc

It counts the page cache of what the stages read and write too, as SLURM and Docker do; a stage that needs more is
killed, and has an exit code other than 0."""

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import cv2
import joblib
import numpy as np
import psutil

from protloc.data.simulate.datasets import draw_label_sets
from protloc.data.simulate.photographs import simulate_cell
from protloc.labels import STAINS

PROTLOC = Path(sys.executable).with_name('protloc')
WAYS = ('read', 'read, 2 workers', 'mapped')
READ = """
import sys, time
import numpy as np
from protloc.data.loading import Batches, loader, shuffled_rows
from protloc.data.store import ImageStore
way, path, batch = sys.argv[1], sys.argv[2], int(sys.argv[3])
store = ImageStore(path)
rows = store.rows('train')
steps = len(rows) // batch
start = time.perf_counter()
if way == 'mapped':
    shards = [np.load(file, mmap_mode='r') for file in store.images.shards.paths]
    ends = np.cumsum([len(shard) for shard in shards])
    for step in range(steps):
        some = rows[shuffled_rows(len(rows), step * batch, batch, 0)]
        which = np.searchsorted(ends, some, 'right')
        images = np.stack([shards[k][row - ends[k] + len(shards[k])] for k, row in zip(which, some)])
else:
    for images, labels in loader(Batches(store, rows, batch), 0, steps, 2 if way == 'read, 2 workers' else 0):
        pass
print(steps * batch / (time.perf_counter() - start))
"""
GENERATOR = (
    'unet={widths: [16, 32], layers_per_block: 1}',
    'autoencoder={patch_size: 4, widths: [16, 32]}',
    'autoencoder.loop={steps: 4, batch_size: 4}',
    'loop={steps: 4, batch_size: 8, evaluate_every: 4}',
)


def write_fields(folder, n, size):
    "A challenge's folder of n fields, all different"
    (folder / 'train').mkdir(parents=True, exist_ok=True)
    label_sets = draw_label_sets(64, temper=0.5)
    cells = joblib.Parallel(-1)(
        joblib.delayed(simulate_cell)(labels, index=i, size=size) for i, labels in enumerate(label_sets)
    )

    def write(i):
        rng = np.random.default_rng(i)
        shift, turn, gain = rng.integers(0, size, 2), rng.integers(4), rng.uniform(0.7, 1.3)
        for stain, plane in zip(STAINS, cells[i % len(cells)], strict=True):
            path = folder / 'train' / f'f{i}_{stain}.png'
            if not path.exists():
                changed = (np.rot90(np.roll(plane, shift, (0, 1)), turn) * gain).clip(0, 255).astype(np.uint8)
                cv2.imwrite(f'{path}.png', np.ascontiguousarray(changed), [cv2.IMWRITE_PNG_COMPRESSION, 1])
                os.rename(f'{path}.png', path)

    joblib.Parallel(-1, backend='threading')(joblib.delayed(write)(i) for i in range(n))
    targets = [' '.join(map(str, sorted(labels))) for labels in label_sets]
    lines = [f'f{i},{targets[i % len(targets)]}\n' for i in range(n)]
    (folder / 'train.csv').write_text('Id,Target\n' + ''.join(lines))


def proportional(process):
    "Proportional set sizes of a process and its children, in bytes"
    total = 0
    with contextlib.suppress(psutil.Error):
        for each in (process, *process.children(recursive=True)):
            with contextlib.suppress(psutil.Error):
                total += each.memory_full_info().pss
    return total


def measured(words, cgroup):
    "Run a stage: exit code, seconds, peaks in MB, what it printed last"

    def enter():
        if cgroup:
            (cgroup / 'cgroup.procs').write_text(str(os.getpid()))

    began, peak = time.perf_counter(), 0
    env = {**os.environ, 'TQDM_DISABLE': '1'}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    process = psutil.Popen(words, env=env, preexec_fn=enter, **pipes)
    said = []
    reader = threading.Thread(target=lambda: said.extend(process.stdout.read().splitlines()))
    reader.start()
    ended = 0
    while not ended:
        peak = max(peak, proportional(process))
        time.sleep(1)
        ended, status, usage = os.wait4(process.pid, os.WNOHANG)
    reader.join()
    print('\n'.join(said[-3:]), file=sys.stderr)
    return dict(
        returncode=os.waitstatus_to_exitcode(status),
        seconds=round(time.perf_counter() - began, 1),
        largest_process_mb=round(usage.ru_maxrss / 1024),
        all_processes_mb=round(peak / 2**20),
    ), (said or [''])[-1]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--fields', type=int, default=13_000)
    parser.add_argument('--size', type=int, default=512)
    parser.add_argument('--batch', type=int, default=16)
    parser.add_argument('--folder', type=Path)
    parser.add_argument('--cgroup', type=Path)
    parser.add_argument('--stage', action='append', help='only this one; may be repeated')
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        store = folder / 'store'
        write_fields(folder / 'fields', args.fields, args.size)
        settings = [word for setting in GENERATOR for word in ('--set', setting)]
        small = ['--set', 'backbone=resnet10', '--set', 'weights=none', '--set', 'loop={steps: 10, batch_size: 8}']
        stages = {
            'prepare': [PROTLOC, 'prepare', folder / 'fields', store, '--size', args.size],
            'verify': [PROTLOC, 'info', store, '--verify'],
            'split': [PROTLOC, 'split', store],
            **{way: [sys.executable, '-c', READ, way, store, args.batch] for way in WAYS},
            'train-classifier': [PROTLOC, 'train-classifier', store, folder / 'classifier', *small],
            'train-generator': [PROTLOC, 'train-generator', store, folder / 'generator', *settings],
        }
        for stage, words in stages.items():
            if stage == 'prepare' and store.exists() or args.stage and stage not in args.stage:
                continue
            for trained in ('classifier', 'generator'):
                shutil.rmtree(folder / trained, ignore_errors=True)
            found, last = measured([*map(str, words)], args.cgroup)
            size = sum(path.stat().st_size for path in store.glob('images*.npy'))
            held = json.loads((store / 'manifest.json').read_text()) if store.exists() else {}
            line = dict(benchmark='large_store', stage=stage, fields=held.get('n'), size=held.get('size'))
            line['store_mb'] = size >> 20
            line |= dict(memory_mb=psutil.virtual_memory().total >> 20, limit_mb=limit_of(args.cgroup), **found)
            if stage in WAYS and not found['returncode']:
                line['images_per_second'] = round(float(last))
            print(json.dumps(line), flush=True)


def limit_of(cgroup):
    "Of a memory cgroup, v1 or v2; None where there is none"
    names = ('memory.limit_in_bytes', 'memory.max')
    limits = [(cgroup / name).read_text() for name in names if (cgroup / name).exists()] if cgroup else []
    return int(limits[0]) >> 20 if limits else None


if __name__ == '__main__':
    main()
