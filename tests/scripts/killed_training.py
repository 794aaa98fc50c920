"""FOLDER: kill a training six times at random moments, continue it, and compare it with one that was left alone."""

import json
import multiprocessing
import os
import random
import sys
import time
from pathlib import Path

from torch import nn

from noisy_training import Noise, build, loss
from protloc.core import sha256
from protloc.training import LoopConfig, fit


def train(folder, config):
    os.nice(5)

    def evaluate(model, step):
        return dict(score=-sum(p.abs().sum() for p in model.parameters()))

    model = build(nn.BatchNorm2d(8), nn.Dropout(0.2))
    fit(model, loss, Noise(), config, folder, evaluate=evaluate, score='score')


def newest(folder):
    return max((int(path.name[5:]) for path in (folder / 'checkpoints').glob('step-*')), default=0)


def start(folder, config):
    process = multiprocessing.get_context('fork').Process(target=train, args=(folder, config))
    process.start()
    return process


def kill(folder, config, goal, pause):
    "Train until a checkpoint of step `goal` is there, wait a little, and send SIGKILL"
    process = start(folder, config)
    while newest(folder) < goal:
        assert process.is_alive() or process.exitcode == 0
        time.sleep(0.0005)
    time.sleep(pause)
    process.kill()
    process.join()
    assert process.exitcode == -9, process.exitcode


def log(folder):
    lines = [json.loads(line) for line in (folder / 'log.jsonl').read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != 'images_per_second'} for line in lines]


def main():
    common = dict(steps=60, batch_size=16, lr=0.01, evaluate_every=15, checkpoint_steps=1)
    configs = dict(
        decay=LoopConfig(ema_decay=0.9, **common),
        length=LoopConfig(ema_length=0.1, accumulate=2, keep_checkpoints=3, **common),
    )
    for name, config in configs.items():
        whole = Path(sys.argv[1]) / name / 'whole'
        cut = Path(sys.argv[1]) / name / 'cut'
        rng = random.Random(name)
        killed_at = [0]
        start(whole, config).join()
        for _ in range(6):
            goal = killed_at[-1] + rng.randint(1, 8)
            kill(cut, config, goal, rng.uniform(0, 0.02))
            killed_at.append(newest(cut))
        start(cut, config).join()
        files = [path.name for path in sorted(whole.glob('*.safetensors'))]
        assert files == ['best.safetensors', 'last.safetensors'], files
        assert all(sha256(whole / file) == sha256(cut / file) for file in files), (name, killed_at)
        assert {path.name for path in cut.iterdir()} == {path.name for path in whole.iterdir()}, sorted(cut.iterdir())
        assert log(whole) == log(cut)
        print(name, killed_at)


if __name__ == '__main__':
    main()
