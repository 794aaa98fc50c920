"""What is published: the wheel with its package data, and the citation."""

import configparser
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

pytestmark = pytest.mark.slow  # the whole file
ROOT = Path(__file__).resolve().parent.parent


def settings():
    ini = configparser.ConfigParser(delimiters=['='])
    ini.read(ROOT / 'settings.ini', encoding='utf-8')
    return ini['DEFAULT']


@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp('wheel')
    shutil.copytree(
        ROOT / 'protloc',
        folder / 'source' / 'protloc',
        ignore=shutil.ignore_patterns('__pycache__', '.ipynb_checkpoints'),
    )
    for name in ('setup.py', 'settings.ini', 'pyproject.toml', 'MANIFEST.in', 'README.md', 'LICENSE'):
        shutil.copy2(ROOT / name, folder / 'source')
    command = [sys.executable, '-m', 'pip', 'wheel', '--quiet', '--no-deps', '--wheel-dir', folder, folder / 'source']
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return next(folder.glob('*.whl'))


def test_the_wheel_holds_all_that_the_repository_has(wheel):
    tracked = {
        p.relative_to(ROOT).as_posix()
        for p in (ROOT / 'protloc').rglob('*')
        if p.suffix in ('.py', '.yaml', '.csv', '.ipynb', '.css', '.md', '.bib') and '.ipynb_checkpoints' not in p.parts
    }
    held = {n for n in zipfile.ZipFile(wheel).namelist() if n.startswith('protloc/')}
    assert held == tracked and 'protloc/assets/report.ipynb' in held


def test_the_wheel_runs_outside_the_repository(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path / 'installed')
    code = 'import protloc.cli, sys; print(protloc.__file__); sys.argv = ["protloc", *sys.argv[1:]]; protloc.cli.main()'

    def run(*words):
        return subprocess.run(
            [sys.executable, '-c', code, *words],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env={**os.environ, 'PYTHONPATH': str(tmp_path / 'installed')},
        )

    presets, cells = (
        run('presets'),
        run('simulate', 'cells', '--train=4', '--val=2', '--test=2', '--classes=Nucleoli,Cytosol'),
    )
    assert presets.stdout.startswith(str(tmp_path)) and 'demo ' in presets.stdout, presets.stderr
    assert cells.returncode == 0 and (tmp_path / 'cells' / 'images.npy').exists(), cells.stderr


def test_the_citation_is_of_this_version():
    cited, cfg = yaml.safe_load((ROOT / 'CITATION.cff').read_text()), settings()
    assert (cited['version'], cited['title'], cited['repository-code']) == (
        cfg['version'],
        cfg['title'],
        cfg['git_url'],
    )
