"""killed_at_events.py FOLDER: begin a study and die at each event on the disk; the same again must go on.

The libraries are imported once; each beginning is a forked process that kills itself at its n-th event.
"""

import os
import shutil
import signal
import sys
from pathlib import Path

from protloc.files import exclusive, sweep_within
from protloc.study.arms import study_config
from protloc.study.folder import RunFolder
from protloc.study.runner import check_folder, claim_folder, claim_inputs

EVENTS = ('replace', 'rename', 'unlink', 'mkdir', 'rmdir', 'open')


def begin(folder):
    "What `run_study` does before its first stage"
    run = RunFolder(folder)
    check_folder(run)
    run.path.mkdir(parents=True, exist_ok=True)
    with exclusive(run.path):
        sweep_within(run.path, folders=False)
        claim_folder(run.path, config)
        claim_inputs(config, run)


def die_at(number, folder):
    "Begin in a child that kills itself before its event of this number; whether it lived"
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1] == 0
    left = [number]

    def counted(event):
        def call(*args, **options):
            writes = event != 'open' or len(args) > 1 and args[1] & (os.O_WRONLY | os.O_RDWR)
            left[0] -= bool(writes)
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return before[event](*args, **options)

        return call

    before = {event: getattr(os, event) for event in EVENTS}
    for event in EVENTS:
        setattr(os, event, counted(event))
    begin(folder)
    os._exit(0)


config = study_config('demo')
folder = Path(sys.argv[1])
number = 0
while not die_at(number, folder / 'run'):
    begin(folder / 'run')
    assert sorted(path.name for path in folder.iterdir()) == ['run'], list(folder.iterdir())
    there = sorted(path.name for path in (folder / 'run').iterdir())
    assert there == ['config.yaml', 'inputs.json', 'versions.json'], (number, there)
    assert RunFolder(folder / 'run').read_settings() == config.model_dump(mode='json')
    shutil.rmtree(folder / 'run')
    number += 1
print(number)
