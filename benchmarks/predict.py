"""Images a second of `probabilities`, beside a bare forward pass.

    python benchmarks/predict.py [--backbone resnet10] [--size 32] [--images 2048] [--batch 256] [--rounds 7] [--tta]

Prints JSON. `probabilities` reads a store on disk and gives an array; the bare pass calls the network on the same
images in the same batches, which are already on the device in the right memory order, and leaves its logits there. Both
run in eval mode without gradients. They take turns: `ratio` is the median over the rounds, each of which compares two
neighbours in time. With `--tta` both see each image eight times."""

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


def rate(work, num_images, device):
    "Images a second of one call"
    start = time.perf_counter()
    work()
    if device.type == 'cuda':
        torch.cuda.synchronize()
    return num_images / (time.perf_counter() - start)


def build(store, args, device):
    "An untrained classifier for a store"
    with seeded(0, 'benchmark'):
        classifier = Classifier(args.backbone, len(store.channels), len(store.vocab), args.size)
    return classifier.to(device, memory_format=torch.channels_last).eval()


def measure(store, args, device):
    "A dict of images a second, by way, for each round"
    classifier, rows = build(store, args, device), store.rows()
    batches = [
        images.to(device).contiguous(memory_format=torch.channels_last)
        for images, _ in in_order(store, rows, args.batch)
    ]

    @torch.no_grad()
    def bare():
        return [classifier(view) for images in batches for view in (symmetries(images) if args.tta else [images])]

    def full():
        return probabilities(classifier, store, rows, args.batch, tta=args.tta)

    ways = dict(bare=bare, probabilities=full)
    for work in ways.values():
        work()
    return [{way: rate(work, args.images, device) for way, work in ways.items()} for _ in range(args.rounds)]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--backbone', default='resnet10')
    parser.add_argument('--size', type=int, default=32)
    parser.add_argument('--images', type=int, default=2048, help='in the store')
    parser.add_argument('--batch', type=int, default=256)
    parser.add_argument('--rounds', type=int, default=7)
    parser.add_argument('--tta', action='store_true')
    args = parser.parse_args()
    device = this_process().device
    with tempfile.TemporaryDirectory() as folder:
        store = simulate_store(f'{folder}/store', dict(train=args.images), size=args.size)
        rounds = measure(store, args, device)
    for way in rounds[0]:
        result = dict(
            benchmark='predict',
            way=way,
            backbone=args.backbone,
            size=args.size,
            batch=args.batch,
            tta=args.tta,
            images_per_second=round(statistics.median(speeds[way] for speeds in rounds), 1),
            ratio=round(statistics.median(speeds[way] / speeds['bare'] for speeds in rounds), 3),
            device=device.type,
            threads=torch.get_num_threads(),
        )
        print(json.dumps(result))


if __name__ == '__main__':
    main()
