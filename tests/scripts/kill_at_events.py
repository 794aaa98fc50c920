"Kills a tiny training at each of its changes of files, continues it, and compares; prints how often"

import os
import sys
from pathlib import Path

import torch

from noisy_training import Noise, build, loss
from protloc.core import sha256
from protloc.training import LoopConfig, fit

EVENTS = ('replace', 'rename', 'unlink', 'mkdir', 'rmdir')
KILLED = 77


def train(folder):
    config = LoopConfig(steps=6, batch_size=16, lr=0.01, ema_decay=0.9, evaluate_every=3, checkpoint_steps=2)
    fit(build(), loss, Noise(), config, folder, evaluate=lambda model, step: dict(score=step), score='score')


def in_a_fork(work):
    "The exit code of work() in a forked process"
    child = os.fork()
    if not child:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killed_at(number, work):
    "Do work, and end without a word at the change of files of this number, before it is made"
    left = [number]

    def dying(change):
        def call(*args, **options):
            left[0] -= 1
            if left[0] < 0:
                os._exit(KILLED)
            return change(*args, **options)

        return call

    for name in EVENTS:
        setattr(os, name, dying(getattr(os, name)))
    work()


def found(folder):
    "Hashes of the files in and beside a folder of a training; the log has times in it"
    files = [path for path in folder.parent.rglob('*') if path.is_file() or not any(path.iterdir())]
    return {str(path.relative_to(folder.parent)): path.suffix == '.safetensors' and sha256(path) for path in files}


def main(folder):
    torch.set_num_threads(1)
    whole = folder / 'whole' / 'run'
    assert in_a_fork(lambda: train(whole)) == 0
    number = 0
    while True:
        run = folder / str(number) / 'run'
        code = in_a_fork(lambda at=number, run=run: killed_at(at, lambda: train(run)))
        if code == 0:
            break
        assert code == KILLED, (number, code)
        assert in_a_fork(lambda run=run: train(run)) == 0, f'a kill at change {number} needs a human'
        assert found(run) == found(whole), (number, found(run), found(whole))
        number += 1
    print(number)


if __name__ == '__main__':
    main(Path(sys.argv[1]))
