"""Training images a second: batches from a store, beside decoding four PNGs again for every image.

    python benchmarks/loading.py [--size 128] [--batch 64]

Prints JSON. The named alternative is how the code of Lin and Cao (2025) loads: for every image of every epoch, Pillow
decodes four 512 x 512 PNGs; they are stacked, turned by a multiple of 90 degrees, cropped at random (scale .8 to 1,
ratio .9 to 1.1) and resized, in two loader processes. The store's images were shrunk once; its batches are read from
the files and turned, with and without the same crop. `read` are such batches without labels and
augmentation, `mapped` the same rows from the memory-mapped file (of a store of one file), `read in order` as many bytes
in their order. Real fields are read where PROTLOC_HPA names a folder, simulated ones otherwise."""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import v2

from protloc.data.fields import read_field, resize_area
from protloc.data.loading import AugmentConfig, Batches, loader
from protloc.data.simulate.photographs import simulate_cell
from protloc.data.store import ImageStore, StoreWriter
from protloc.labels import HPA, STAINS


class Decoded(torch.utils.data.Dataset):
    "An image: four PNGs, decoded each time"

    def __init__(self, fields, size):
        self.fields = fields
        self.crop = v2.RandomResizedCrop(size, scale=(0.8, 1), ratio=(0.9, 1.1), antialias=True)

    def __len__(self):
        return len(self.fields)

    def __getitem__(self, i):
        stains = [np.asarray(Image.open(f'{self.fields[i]}_{s}.png')) for s in STAINS]
        image = torch.rot90(torch.from_numpy(np.stack(stains)), int(torch.randint(4, ())), (1, 2))
        return self.crop(image)


def fields_in(folder):
    "Paths of some 512 px fields, without stain and ending"
    real = os.environ.get('PROTLOC_HPA')
    if real:
        red = (Path(real) / 'sample' / 'train').glob('*_red.png')
        return sorted(str(path).removesuffix('_red.png') for path in red)
    for i in range(24):
        for image, stain in zip(simulate_cell([i], index=i, size=512), STAINS, strict=True):
            Image.fromarray(image).save(f'{folder}/f{i}_{stain}.png')
    return [f'{folder}/f{i}' for i in range(24)]


def rate(batches, size, seconds):
    "Images a second over some seconds, after the first batch"
    batches = iter(batches)
    next(batches)
    images = 0
    start = time.perf_counter()
    for _ in batches:
        images += size
        if time.perf_counter() - start > seconds:
            break
    return images / (time.perf_counter() - start)


def finished(batches, steps, workers):
    # the last of the steps has no batch
    for step, batch in zip(steps, loader(batches, steps[0], steps[-1], workers), strict=False):
        yield batches.augmented(batch, step)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--size', type=int, default=128)
    parser.add_argument('--batch', type=int, default=64)
    parser.add_argument('--images', type=int, default=10000, help='in the store')
    parser.add_argument('--seconds', type=float, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        fields = fields_in(folder)
        decoded = torch.utils.data.DataLoader(
            Decoded(fields * 1000, args.size), args.batch, shuffle=True, num_workers=2
        )
        result = {'pillow, 2 workers': rate(decoded, args.batch, 2 * args.seconds)}
        small = [resize_area(read_field([f'{path}_{stain}.png' for stain in STAINS]), args.size) for path in fields]
        with StoreWriter(f'{folder}/store', STAINS, HPA, args.size) as writer:
            for i in range(args.images):
                writer.add(small[i % len(small)], id=f'i{i}', target='0', split='train')
        store = ImageStore(f'{folder}/store')
        rows = store.rows('train')
        steps = range(10**6)
        # into the page cache
        np.array(store.images).sum()
        for name, augment in (
            ('turned', AugmentConfig()),
            ('turned and cropped', AugmentConfig(crop_scale=(0.8, 1), crop_ratio=(0.9, 1.1))),
        ):
            for workers in (0, 2):
                batches = Batches(store, rows, args.batch, 0, augment)
                stream = finished(batches, steps, workers)
                result[f'store, {name}, {workers} workers'] = rate(stream, args.batch, args.seconds)
        shards = store.images.shards
        batches = np.random.default_rng(0).integers(0, args.images, (args.images // args.batch, args.batch))
        ways = {'read': shards.__getitem__}
        if len(shards.paths) == 1:
            ways['mapped'] = np.load(shards.paths[0], mmap_mode='r').__getitem__
        # twice, for the first time makes the pages of the map
        for name, gather in (*ways.items(), *ways.items()):
            start = time.perf_counter()
            for some in batches:
                gather(some)
            result[name] = batches.size / (time.perf_counter() - start)
        start = time.perf_counter()
        for i in range(0, args.images - args.batch, args.batch):
            shards[i : i + args.batch]
        result['read in order'] = args.images / (time.perf_counter() - start)
    for name, images_per_second in result.items():
        line = dict(
            benchmark='loading',
            way=name,
            size=args.size,
            batch=args.batch,
            images=args.images,
            images_per_second=round(images_per_second),
            ratio=round(images_per_second / result['pillow, 2 workers'], 1),
            threads=torch.get_num_threads(),
        )
        print(json.dumps(line))


if __name__ == '__main__':
    main()
