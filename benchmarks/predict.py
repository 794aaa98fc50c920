"""Images a second of `probabilities`, beside a bare forward pass.

    python benchmarks/predict.py [--backbone resnet10] [--size 32] [--images 2048] [--batch 256] [--rounds 7] [--tta]

Prints JSON. `probabilities` reads a store on disk and gives an array; the bare pass calls the network on the same images
in the same batches, which are already on the device in the right memory order, and leaves its logits there. Both run in
eval mode without gradients. They take turns: `ratio` is the median over the rounds, each of which compares two neighbours
in time. With `--tta` both see each image eight times."""

import argparse
import json
import statistics
import tempfile
import time

import torch

from protloc.classify.backbone import Classifier
from protloc.classify.predict import probabilities, symmetries
from protloc.data.loading import in_order
from protloc.data.simulate.datasets import simulate_store
from protloc.training import seeded, this_process


def rate(work, images, device):
    "Images a second of one call"
    start = time.perf_counter()
    work()
    if device.type == 'cuda':
        torch.cuda.synchronize()
    return images / (time.perf_counter() - start)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--backbone', default='resnet10')
    parser.add_argument('--size', type=int, default=32)
    parser.add_argument('--images', type=int, default=2048, help='in the store')
    parser.add_argument('--batch', type=int, default=256)
    parser.add_argument('--rounds', type=int, default=7)
    parser.add_argument('--tta', action='store_true')
    a = parser.parse_args()
    device = this_process().device
    with tempfile.TemporaryDirectory() as folder:
        store = simulate_store(f'{folder}/store', dict(train=a.images), size=a.size)
        with seeded(0, 'benchmark'):
            classifier = (
                Classifier(a.backbone, len(store.channels), len(store.vocab), a.size)
                .to(device, memory_format=torch.channels_last)
                .eval()
            )
        batches = [
            images.to(device).contiguous(memory_format=torch.channels_last)
            for images, _ in in_order(store, store.rows(), a.batch)
        ]

        def bare():
            with torch.no_grad():
                return [classifier(view) for images in batches for view in (symmetries(images) if a.tta else [images])]

        ways = dict(bare=bare, probabilities=lambda: probabilities(classifier, store, store.rows(), a.batch, tta=a.tta))
        for work in ways.values():
            work()
        rounds = [{name: rate(work, a.images, device) for name, work in ways.items()} for _ in range(a.rounds)]
    for name in ways:
        print(
            json.dumps(
                dict(
                    benchmark='predict',
                    way=name,
                    backbone=a.backbone,
                    size=a.size,
                    batch=a.batch,
                    tta=a.tta,
                    images_per_second=round(statistics.median(r[name] for r in rounds), 1),
                    ratio=round(statistics.median(r[name] / r['bare'] for r in rounds), 3),
                    device=device.type,
                    threads=torch.get_num_threads(),
                )
            )
        )


if __name__ == '__main__':
    main()
