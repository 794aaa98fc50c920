"`import protloc` says how the threads of OpenMP wait, before PyTorch is there, and leaves a user's own word alone"

import contextlib
import os
import subprocess
import sys
import time

import pytest

from protloc.threads import ASLEEP, AWAKE, SPINS

pytestmark = pytest.mark.skipif(sys.platform != 'linux', reason='nothing is measured, and nothing set, elsewhere')
SAY = f'import os; print(os.environ.get({SPINS!r}))'
ENVIRONMENT = {name: value for name, value in os.environ.items() if name not in (SPINS, 'OMP_WAIT_POLICY')}


def said(program, **environment):
    "What a Python prints that starts with these variables"
    environment = ENVIRONMENT | {'OMP_NUM_THREADS': str(os.cpu_count())} | environment
    words = [sys.executable, '-c', program]
    return subprocess.run(words, env=environment, capture_output=True, text=True, check=True).stdout.split()


@contextlib.contextmanager
def busy(count):
    processes = [subprocess.Popen([sys.executable, '-c', 'while True: pass']) for _ in range(count)]
    try:
        time.sleep(1)
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def test_the_choice_comes_before_torch_and_reaches_children():
    child = f'import subprocess, sys; subprocess.run([sys.executable, "-c", {SAY!r}])'
    ours, torch, theirs = said(f'import protloc, sys; {SAY}; print("torch" in sys.modules, flush=True); {child}')
    assert ours in (ASLEEP, AWAKE) and torch == 'False' and theirs == ours


def test_beside_other_work_threads_sleep():
    with busy(2 * os.cpu_count()):
        assert said(f'import protloc; {SAY}') == [ASLEEP]


def test_threads_of_ones_own_are_not_others():
    "Here they count in loops without Python's lock, as those of numpy's library do for a while after its import"
    program = (
        'import numpy as np, threading; a = np.ones((3000, 3000));'
        '[threading.Thread(target=lambda: [np.sin(a) for _ in range(9)], daemon=True).start() for _ in range(3)];'
        'import time; time.sleep(.2);'
        'import protloc.threads as t; print(t._own_at_work(), t.others_at_work(looks=20))'
    )
    own, others = map(int, said(program))
    assert own >= 3 and others <= 2  # others: whatever else runs here, tests beside this one too


@pytest.mark.parametrize(
    'theirs, there',
    [({SPINS: '77'}, '77'), ({'OMP_WAIT_POLICY': 'ACTIVE'}, 'None'), ({'OMP_NUM_THREADS': '1'}, 'None')],
)
def test_what_a_user_says_stays(theirs, there):
    assert said(f'import protloc, protloc.threads as t; t.choose_waiting(); {SAY}', **theirs) == [there]


def test_the_choice_is_made_again_where_work_is_started():
    again = 'import protloc, protloc.threads as t; t.others_at_work = lambda: {}; t.choose_waiting({}); '
    assert said(again.format(99999, 0) + SAY) == [ASLEEP]
    assert said(again.format(0, 0) + SAY) == [AWAKE]
    assert said(again.format(0, 10**6) + SAY) == [ASLEEP]


def test_openmp_reads_it():
    "The library that PyTorch brings says what it was told"
    words = 'import protloc, torch; torch.ones(10**6).sum()'
    shown = subprocess.run(
        [sys.executable, '-c', words],
        env=ENVIRONMENT | {'OMP_NUM_THREADS': '2', 'OMP_DISPLAY_ENV': 'VERBOSE'},
        capture_output=True,
        text=True,
        check=True,
    ).stderr
    assert f"GOMP_SPINCOUNT = '{AWAKE}'" in shown or f"GOMP_SPINCOUNT = '{ASLEEP}'" in shown
