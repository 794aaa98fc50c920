"""Training, drawing and reading beside other work: the waiting policy of OpenMP's threads.

    python benchmarks/contention.py [--busy 0 1 2 8] [--works training drawing prepare] [--rounds 5] [--seconds 5]
    python benchmarks/contention.py --settings default passive spin-3000
    python benchmarks/contention.py --works training --busy 0 --copies 2

Prints JSON lines: of each work and number of busy processes, the rate with each setting, and its ratio to the default
of PyTorch (the median over the rounds, each of which compares neighbours in time, with the smallest and the largest).
A setting is what the environment says before PyTorch is loaded: how long a thread of OpenMP that waits for another one
turns in a loop before it sleeps; `protloc` is what `import protloc` chooses where it is started. Every process is
started and warmed up beside the busy ones, which count in a loop, and works only in its turns. With `--copies` so many
processes of a setting work in the same turn, as studies on one machine, and their rates are added.
`training` is a step of ResNet-18 with AdamW, 64 images; `drawing` a step of a U-Net as the demo's, 50 images;
`prepare` the reading of PNG fields of 512 px by as many processes as there are cores.
"""

import argparse
import contextlib
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import joblib

SETTINGS = {  # name -> what the environment says
    'default': {},
    'protloc': {},
    'passive': {'OMP_WAIT_POLICY': 'PASSIVE'},
    **{f'spin-{count}': {'GOMP_SPINCOUNT': str(count)} for count in (10000, 3000, 2000, 1500, 1000, 500, 300, 100, 0)},
}
SPOKEN = ('OMP_WAIT_POLICY', 'GOMP_SPINCOUNT')
BUSY = 'while True: pass'


def training(size):
    "A step of a classifier"
    import torch

    from protloc.classify.backbone import Classifier
    from protloc.training import seeded

    with seeded(0, 'contention'):
        model = Classifier('resnet18', 4, 28, size).to(memory_format=torch.channels_last).train()
        images = torch.randint(256, (64, 4, size, size), dtype=torch.uint8)
        labels = torch.randint(2, (64, 28)).float()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)

    def step():
        torch.nn.functional.binary_cross_entropy_with_logits(model(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def drawing(size):
    "A step of a generator's solver"
    import torch

    from protloc.diffusion.denoiser import UNetConfig, build_denoiser
    from protloc.training import seeded

    with seeded(0, 'contention'):
        denoiser = build_denoiser(4, 8, size, UNetConfig(widths=(32, 64, 64), patch_size=2)).eval()
        images, labels = torch.randn(50, 16, size // 2, size // 2), torch.randint(2, (50, 8)).float()

    @torch.no_grad()
    def step():
        denoiser(images, torch.full((50,), 500), labels)

    return step


def prepare(size):
    "The reading of some fields"
    from PIL import Image

    from protloc.data.prepare import prepare as read
    from protloc.data.simulate.photographs import simulate_cell
    from protloc.labels import STAINS

    folder = Path(tempfile.mkdtemp())
    (folder / 'in' / 'train').mkdir(parents=True)
    for i in range(40):
        if i < 4:
            for stain, plane in zip(STAINS, simulate_cell([i], index=i, size=512), strict=True):
                Image.fromarray(plane).save(folder / 'in' / 'train' / f'f{i}_{stain}.png')
        else:
            for stain in STAINS:
                os.link(*(folder / 'in' / 'train' / f'f{k}_{stain}.png' for k in (i % 4, i)))
    (folder / 'in' / 'train.csv').write_text('Id,Target\n' + ''.join(f'f{i},{i % 28}\n' for i in range(40)))
    numbers = itertools.count()

    def step():
        read(folder / 'in', folder / f'store{next(numbers)}', size=size)

    return step


def serve(work, setting, size):
    "Work in turns: for so many seconds whenever a number is read; answers with steps a second"
    if setting == 'protloc':
        import protloc as protloc
    import torch as torch  # now its threads know how to wait

    turns = os.environ.get('GOMP_SPINCOUNT', '')
    step = dict(training=training, drawing=drawing, prepare=prepare)[work](size)
    step()
    print('ready', turns, flush=True)
    for line in sys.stdin:
        times, end = [], time.perf_counter() + float(line)
        while not times or time.perf_counter() < end:
            start = time.perf_counter()
            step()
            times.append(time.perf_counter() - start)
        print(len(times) / sum(times), flush=True)


@contextlib.contextmanager
def busy(count):
    "Inside the block so many processes count"
    processes = [subprocess.Popen([sys.executable, '-c', BUSY]) for _ in range(count)]
    try:
        time.sleep(0.5)
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


@contextlib.contextmanager
def served(work, setting, size):
    "A process that works in turns"
    environment = {name: value for name, value in os.environ.items() if name not in SPOKEN} | SETTINGS[setting]
    words = [sys.executable, __file__, '--serve', work, setting, '--size', str(size)]
    with tempfile.TemporaryDirectory() as scratch:
        environment['TMPDIR'] = scratch
        process = subprocess.Popen(words, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        try:
            said = ['']
            while said[:1] != ['ready']:
                assert process.poll() is None, f'{work} with {setting} ended'
                said = process.stdout.readline().split()
            process.turns = ''.join(said[1:])
            yield process
        finally:
            process.kill()
            process.wait()


def turn(processes, seconds):
    "Steps a second of a turn, of all processes of a setting"
    for process in processes:
        process.stdin.write(f'{seconds}\n')
        process.stdin.flush()
    return sum(float(process.stdout.readline()) for process in processes)


def measure(work, count, settings, args):
    "A line of results for each setting"
    with contextlib.ExitStack() as stack:
        stack.enter_context(busy(count))
        several = {
            name: [stack.enter_context(served(work, name, args.size)) for _ in range(args.copies)] for name in settings
        }
        rounds = [
            {name: turn(processes, args.seconds) for name, processes in several.items()} for _ in range(args.rounds)
        ]
    for name in settings:
        rates = [one[name] for one in rounds]
        ratios = [one[name] / one['default'] for one in rounds]
        yield dict(
            benchmark='contention',
            work=work,
            busy=count,
            copies=args.copies,
            setting=name,
            turns=several[name][0].turns,
            steps_per_second=round(statistics.median(rates), 3),
            ratio=round(statistics.median(ratios), 2),
            lowest=round(min(ratios), 2),
            highest=round(max(ratios), 2),
            rounds=args.rounds,
            cores=joblib.cpu_count(),
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--busy', type=int, nargs='+', default=[0, 1, 2, 8], help='processes beside the work')
    parser.add_argument('--works', nargs='+', default=['training', 'drawing', 'prepare'])
    parser.add_argument(
        '--settings', nargs='+', default=['default', 'protloc', 'spin-3000', 'spin-0'], choices=list(SETTINGS)
    )
    parser.add_argument('--rounds', type=int, default=5)
    parser.add_argument('--seconds', type=float, default=5, help='of a turn')
    parser.add_argument('--copies', type=int, default=1, help='processes of a setting that work at once')
    parser.add_argument('--size', type=int, default=32, help='of the images, pixels')
    parser.add_argument('--serve', nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        return serve(*args.serve, args.size)
    settings = list(dict.fromkeys(['default', *args.settings]))
    for work, count in itertools.product(args.works, args.busy):
        for line in measure(work, count, settings, args):
            print(json.dumps(line), flush=True)


if __name__ == '__main__':
    main()
