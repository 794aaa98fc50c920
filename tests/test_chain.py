"""The links together: a study from the command line, killed and continued, on simulated and on real cells."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import SMALL
from PIL import Image

from protloc.core import sha256
from protloc.data.store import ImageStore
from protloc.labels import STAINS
from protloc.study.arms import study_config
from protloc.study.folder import RunFolder
from protloc.study.runner import run_study
from protloc.study.scores import Study
from protloc.study.verdict import write_results
from protloc.study.workers import Workers
from protloc.threads import cores

PROTLOC = Path(sys.executable).parent / 'protloc'
TORCHRUN = Path(sys.executable).parent / 'torchrun'
SCRIPTS = Path(__file__).parent / 'scripts'


def numbers_and_images(folder):
    "What must be equal in two runs: every number and every image"
    run = RunFolder(folder)
    tables = {path.name: path.read_text() for path in [*sorted(run.results.glob('*.csv')), run.verdict]}
    weights = {str(path.relative_to(folder)): sha256(path) for path in sorted(folder.rglob('*.safetensors'))}
    return tables, weights, run.open_synthetic().manifest['sha256']


def test_report_is_one_whole_file(finished):
    run = RunFolder(finished)
    text = run.report.read_text()
    assert not re.findall(r'(?:src|srcset)="(?!data:)[^"]*"|<(?:link|iframe)\b|url\((?!["\']?data:)|@import', text)
    assert 'Traceback' not in text
    assert 'class="card ' in text
    assert {'verdict', 'scores', 'calibration'} <= {path.stem for path in run.figures.glob('*.png')}
    assert run.notebook.exists()


def test_results_are_complete(finished):
    tables = RunFolder(finished).read_results()
    scores, verdict = tables['scores'], tables['verdict']
    assert len(scores) == 5 * 2 * 2
    assert scores.macro_f1.between(0, 1).all()
    assert list(verdict.arm) == ['concat', 'mix_representation']
    assert (verdict.low < verdict.difference).all()
    assert (verdict.difference < verdict.high).all()
    by_arm = scores[scores.split == 'test'].set_index(['arm', 'replicate']).matched_f1
    assert verdict.difference[0] == pytest.approx((by_arm['concat'] - by_arm['real']).mean(), abs=1e-5)


def test_a_finished_study_opens_without_torch(finished):
    command = [sys.executable, SCRIPTS / 'open_a_study.py', finished]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert 'mix_representation' in done.stdout


def test_a_run_without_the_judges_answers_is_continued(protloc, finished, small, tmp_path):
    run = RunFolder(shutil.copytree(finished, tmp_path / 'run'))
    answers = run.predictions('real', 0, 'synthetic')
    before = answers.read_bytes()
    answers.unlink()
    code, _, err = protloc('report', run.path)
    assert code == 2
    assert 'what real of replicate 0 says about the synthetic images is missing: continue it' in err
    assert protloc('run', 'demo', '--out', run.path, *small)[0] == 0
    assert answers.read_bytes() == before
    assert run.read_stages().stage.iloc[-1] == 'judgement of replicate 0'


def test_arms_see_the_same_real_images_for_the_same_number_of_steps(finished):
    from protloc.classify.mixing import build_strategy
    from protloc.classify.train import ClassifierConfig, strategy_batches
    from protloc.training import LoopConfig

    run = RunFolder(finished)
    real, synthetic = run.open_real(), run.open_synthetic()
    config = ClassifierConfig(loop=LoopConfig(batch_size=16), augment=dict(crop_scale=(0.8, 1), jitter=0.2))
    alone = strategy_batches(build_strategy('real'), real, None, config, seed=3)
    both = strategy_batches(build_strategy('concat'), real, synthetic, config, seed=3)
    for step in (0, 7, 40):
        images, labels = alone[step]['real']
        assert (alone.augmented(alone[step], step)['real'][0] == both.augmented(both[step], step)['real'][0]).all()
        assert (images == both[step]['real'][0]).all()
        assert (labels == both[step]['real'][1]).all()
    assert (alone[0]['real'][0] != alone[7]['real'][0]).any()
    last_steps = [run.read_training(arm, 0).step.iloc[-1] for arm in ('real', 'concat', 'mix_representation')]
    assert last_steps == [30, 30, 30]


def test_synthetic_store_carries_its_provenance(finished):
    made = RunFolder(finished).open_synthetic().manifest['made']
    assert (made['kind'], made['scheduler'], made['num_inference_steps']) == ('synthetic', 'dpm++', 3)
    assert len(made['generator']) == 16


def test_finished_run_says_so(protloc, finished, small):
    code, out, _ = protloc('run', 'demo', '--out', finished, *small)
    assert code == 0
    assert 'is finished' in out
    assert f'Report: {RunFolder(finished).report}' in out


def kill_when(folder, pattern, command):
    "Start a command and kill -9 it as soon as a path in a folder exists"
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.time() + 120
    while not list(folder.glob(pattern)) and time.time() < deadline and process.poll() is None:
        time.sleep(0.01)
    assert process.poll() is None, 'it ended before it could be killed'
    process.send_signal(signal.SIGKILL)
    process.wait()


def test_killed_twice_and_continued_to_the_same_numbers(finished, small, tmp_path):
    run = RunFolder(tmp_path / 'run')
    command = [PROTLOC, 'run', 'demo', '--out', run.path, *small]
    kill_when(run.generator(1), 'checkpoints/step-*', command)
    assert not (run.generator(1) / 'pipeline').exists()
    kill_when(run.replicate(1), 'classifiers/concat/checkpoints/step-*', command)
    run_study(study_config('demo', overrides=SMALL), run.path)
    write_results(Study(run.path))
    assert numbers_and_images(run.path) == numbers_and_images(finished)


def test_predict_writes_a_submission(protloc, finished, challenge, tmp_path):
    fields = tmp_path / 'fields'
    fields.mkdir()
    rng = np.random.default_rng(0)
    for i in range(3):
        for stain in STAINS:
            Image.fromarray(rng.integers(0, 60, (64, 64), dtype=np.uint8)).save(fields / f'new {i}_{stain}.png')
    classifier = RunFolder(finished).classifier('real', 0)
    out = tmp_path / 'submission.csv'
    code, _, err = protloc('predict', classifier, fields, out, '--probabilities', tmp_path / 'p.csv')
    assert code == 0, err
    table = pd.read_csv(out, dtype=str)
    probabilities = pd.read_csv(tmp_path / 'p.csv', index_col='Id')
    assert list(table.columns) == ['Id', 'Predicted']
    assert list(table.Id) == ['new 0', 'new 1', 'new 2']
    for predicted, row in zip(table.Predicted, probabilities.to_numpy(), strict=True):
        above = [k for k, value in enumerate(row) if value > 0.5]
        assert list(map(int, predicted.split())) == (above or [row.argmax()])
    assert protloc('predict', classifier, challenge, tmp_path / 'again.csv')[0] == 0
    assert len(pd.read_csv(tmp_path / 'again.csv')) == 8


def test_stage_commands_make_the_same_chain(protloc, tmp_path):
    cells, generator, synthetic, model = (tmp_path / name for name in ('cells', 'generator', 'synthetic', 'model'))
    loop = ('--set', 'loop={steps: 10, batch_size: 8}')
    counts = ('--train', 30, '--val', 10, '--test', 10)
    commands = [
        ('simulate', cells, *counts, '--classes', 'Nucleoli,Cytosol'),
        ('info', cells, '--verify'),
        ('train-generator', cells, generator, *loop, '--set', 'unet.widths=[16, 32]'),
        ('generate', generator, synthetic, '--like', cells, '--images', 12, '--num-inference-steps', 2),
        ('train-classifier', cells, model, *loop, '--set', 'backbone=resnet10')
        + ('--strategy', 'mix_loss', '--synthetic', synthetic),
        ('evaluate', model, cells, '--split', 'val'),
        ('evaluate', model, cells),
    ]
    for words in commands:
        code, out, err = protloc(*words)
        assert code == 0, (words, err)
    assert 'macro_f1' in out
    assert len(ImageStore(synthetic)) == 12


@pytest.mark.slow
def test_classifier_learns_and_generalises_to_unseen_cell_lines(tmp_path):
    from protloc.classify.predict import probabilities
    from protloc.classify.train import ClassifierConfig, train_classifier
    from protloc.data.simulate.datasets import simulate_store
    from protloc.metrics import scores
    from protloc.training import LoopConfig

    classes = ['Nucleoplasm', 'Nuclear membrane', 'Nucleoli', 'Plasma membrane', 'Mitochondria', 'Cytosol']
    store = simulate_store(tmp_path / 'cells', dict(train=800, val=100, test=300), classes=classes)
    loop = LoopConfig(steps=80, batch_size=64, lr=3e-3, warmup=10, evaluate_every=40)
    model = train_classifier(store, tmp_path / 'model', ClassifierConfig(backbone='resnet10', loop=loop))
    rows = store.rows('test')
    assert scores(probabilities(model, store, rows), store.labels[rows])['macro_f1'] > 0.5


def test_real_fields_become_tiles(protloc, hpa, tmp_path):
    code, _, err = protloc('prepare', hpa / 'sample', tmp_path / 'store', '--size', 64, '--tile', 256)
    assert code == 0, err
    store = ImageStore(tmp_path / 'store')
    table = pd.read_csv(hpa / 'sample' / 'train.csv', dtype=str).set_index('Id').Target
    assert len(store) == 4 * len(table)
    assert store.table.groupby('group').split.nunique().max() == 1
    for target, field_id in zip(store.table.target, store.table.group, strict=True):
        assert set(target.split()) == set(table[field_id].split())
    lower_right = 4 * 7 + 3  # the last of the four tiles of the eighth field
    field_id = store.table.group[lower_right]
    for tile, stain in zip(store.images[lower_right], STAINS, strict=True):
        field = np.asarray(Image.open(hpa / 'sample' / 'train' / f'{field_id}_{stain}.png'), np.float64)
        means = field[256:, 256:].reshape(64, 4, 64, 4).mean((1, 3))
        assert np.abs(means - tile).max() <= 0.51


def test_label_sets_are_hpas(hpa):
    from protloc.data.simulate.datasets import hpa_sets

    targets = pd.read_csv(hpa / 'labels_31072.csv', dtype=str).Target
    counts = targets.map(lambda target: tuple(sorted(map(int, target.split())))).value_counts()
    assert counts.to_dict() == hpa_sets()
    assert counts.sum() == 31072


def test_two_processes_train_one_classifier(finished, tmp_path):
    "Both processes must train one model, each on its half of every batch, and one of them must write the files"
    model = tmp_path / 'model'
    command = [
        TORCHRUN,
        '--nproc_per_node',
        '2',
        SCRIPTS / 'two_processes_classify.py',
        RunFolder(finished).real,
        model,
    ]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, 'OMP_NUM_THREADS': '1'})
    assert done.returncode == 0, done.stderr[-3000:]
    assert pd.read_json(model / 'log.jsonl', lines=True).step.tolist() == [4, 8]
    assert (model / 'classifier.safetensors').exists()


@pytest.mark.slow
def test_several_jobs_give_the_same_numbers(finished, monkeypatch, tmp_path):
    "Two processes make the parts of the study, each with as many threads as the one had"
    monkeypatch.setenv('OMP_NUM_THREADS', str(cores()))
    run = RunFolder(tmp_path / 'apart' / 'run')
    run_study(study_config('demo', overrides=SMALL), run.path, Workers(jobs=2))
    write_results(Study(run.path))
    assert numbers_and_images(run.path) == numbers_and_images(finished)


def test_training_folder_refuses_other_settings(protloc, finished, tmp_path):
    run = RunFolder(finished)
    settings = ('--set', 'loop={steps: 4, batch_size: 8}', '--set', 'backbone=resnet10')
    train = ('train-classifier', run.real, tmp_path / 'model', *settings)
    assert protloc(*train)[0] == 0
    assert protloc(*train)[0] == 0
    code, _, err = protloc(*train, '--strategy', 'concat', '--synthetic', run.synthetic())
    assert code == 2
    assert 'was begun with other settings' in err
