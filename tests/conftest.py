import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock
from PIL import Image

from protloc import cli
from protloc.labels import STAINS

# minutes each: with several processes they come first, so that none of them is left alone with one in the end
LONGEST = (
    'faults',
    'clusters',
    'chain',
    'ending',
    'kills',
    'study',
    'site',
    'training',
    'reading',
    'interrupt',
    'denoisers',
)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    "Tests of the finished study count as slow: making it takes half a minute; thorough ones wait to be asked for"
    left_out = pytest.mark.skip(reason='`make thorough` has more cases')
    for item in items:
        if item.get_closest_marker('thorough') and 'PROTLOC_THOROUGH' not in os.environ:
            item.add_marker(left_out)
        if 'finished' in item.fixturenames:
            item.add_marker(pytest.mark.slow)
    place = {f'test_{name}.py': number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.name, len(place)))


@pytest.fixture(scope='session')
def hpa():
    "The folder with real HPA images; tests that need it are skipped where there is none"
    folder = os.environ.get('PROTLOC_HPA')
    if not folder:
        pytest.skip('PROTLOC_HPA names no folder with real HPA images')
    return Path(folder)


@pytest.fixture
def protloc(monkeypatch, capsys):
    "Call the command line in this process: protloc('run', 'demo') -> exit code, stdout, stderr"

    def call(*words):
        monkeypatch.setattr('sys.argv', ['protloc', *map(str, words)])
        capsys.readouterr()
        try:
            cli.main()
            code = 0
        except SystemExit as ending:
            code = ending.code or 0
        out, err = capsys.readouterr()
        return code, out, err

    return call


@pytest.fixture
def challenge(tmp_path):
    "A folder in the challenge's layout: 8 fields of 64 px"
    folder = tmp_path / 'challenge'
    (folder / 'train').mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(8):
        for stain in STAINS:
            Image.fromarray(rng.integers(0, 256, (64, 64), dtype=np.uint8)).save(folder / 'train' / f'f{i}_{stain}.png')
    (folder / 'train.csv').write_text('Id,Target\n' + ''.join(f'f{i},{i % 3} 25\n' for i in range(8)))
    return folder


SMALL = [
    'data.simulate.counts={train: 120, val: 40, test: 40}',
    'data.simulate.classes=[Nucleoli, Plasma membrane, Cytosol]',
    'generator.loop={steps: 50, batch_size: 16, lr: 0.002, ema_decay: 0.9, checkpoint_seconds: 0}',
    'generator.unet={widths: [16, 32], patch_size: 2}',
    'generate={images: 64, num_inference_steps: 3}',
    'arms=[real, concat, mix_representation]',
    'replicates=2',
    'classifier.loop={steps: 30, batch_size: 16, lr: 0.003, evaluate_every: 10, checkpoint_seconds: 0}',
]


@pytest.fixture(scope='session')
def small():
    "Options that turn the demo into a study of seconds"
    return [word for setting in SMALL for word in ('--set', setting)]


@pytest.fixture(scope='session')
def finished(tmp_path_factory, worker_id):
    "The folder of a finished small study, made once for all processes that test"
    from protloc.study.arms import study_config
    from protloc.study.report import write_report
    from protloc.study.runner import run_study

    shared = tmp_path_factory.getbasetemp() if worker_id == 'master' else tmp_path_factory.getbasetemp().parent
    folder = shared / 'finished' / 'run'
    with FileLock(shared / 'finished.lock'):
        if not folder.exists():
            run_study(study_config('demo', overrides=SMALL), folder)
            write_report(folder)
    return folder


BROWSER = shutil.which('chromium') or shutil.which('chromium-browser') or shutil.which('google-chrome')


@pytest.fixture(scope='session')
def browser():
    "A headless browser; skips where there is none"
    if not BROWSER:
        pytest.skip('there is no Chromium: install it with `apt-get install chromium`')
    from playwright.sync_api import sync_playwright

    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=BROWSER, args=['--no-sandbox'])
        yield browser
        browser.close()
