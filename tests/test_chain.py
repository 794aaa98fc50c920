"""The links together: a study from the command line, killed and continued, on simulated and on real cells."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from protloc.core import sha256
from protloc.data.store import ImageStore
from protloc.labels import STAINS

PROTLOC = Path(sys.executable).parent / 'protloc'


def results(folder):
    "What must be equal in two runs: every number and every image"
    tables = {p.name: p.read_text() for p in sorted((folder / 'results').glob('*'))}
    weights = {str(p.relative_to(folder)): sha256(p) for p in sorted(folder.rglob('*.safetensors'))}
    return tables, weights, ImageStore(folder / 'synthetic').manifest['sha256']


def test_report_is_one_whole_file(finished):
    text = (finished / 'report.html').read_text()
    assert not re.findall(r'(?:src|href)="(?!data:|#)[^"]*"', text) and '@import' not in text
    assert 'Traceback' not in text and 'class="card ' in text
    assert len(list((finished / 'figures').glob('*.png'))) == 6
    assert (finished / 'report.ipynb').exists()


def test_results_are_complete(finished):
    scores = pd.read_csv(finished / 'results' / 'scores.csv')
    assert len(scores) == 3 * 2 * 2 and scores.macro_f1.between(0, 1).all()
    verdict = pd.read_csv(finished / 'results' / 'verdict.csv')
    assert list(verdict.arm) == ['concat', 'mix_representation']
    assert (verdict.low < verdict.difference).all() and (verdict.difference < verdict.high).all()
    real = scores[(scores.arm == 'real') & (scores.part == 'test')].set_index('seed').macro_f1
    concat = scores[(scores.arm == 'concat') & (scores.part == 'test')].set_index('seed').macro_f1
    assert verdict.difference[0] == pytest.approx((concat - real).mean(), abs=1e-5)


def test_arms_see_the_same_real_images_for_the_same_number_of_steps(finished):
    from protloc.classify.mixing import build_strategy
    from protloc.classify.train import ClassifierConfig, strategy_batches
    from protloc.training import LoopConfig

    real, synthetic = ImageStore(finished / 'real'), ImageStore(finished / 'synthetic')
    c = ClassifierConfig(loop=LoopConfig(batch_size=16), augment=dict(crop_scale=(0.8, 1), jitter=0.2))
    alone, both = (
        strategy_batches(build_strategy(name), real, other, c, seed=3)
        for name, other in (('real', None), ('concat', synthetic))
    )
    for step in (0, 7, 40):
        assert (alone.augmented(alone[step], step)['real'][0] == both.augmented(both[step], step)['real'][0]).all()
        assert (alone[step]['real'][0] == both[step]['real'][0]).all() and (
            alone[step]['real'][1] == both[step]['real'][1]
        ).all()
    assert (alone[0]['real'][0] != alone[7]['real'][0]).any()
    logs = [
        (finished / 'classifiers' / a / 'seed-0' / 'log.jsonl').read_text().splitlines()
        for a in ('real', 'concat', 'mix_representation')
    ]
    assert [json.loads(lines[-1])['step'] for lines in logs] == [60, 60, 60]


def test_synthetic_store_carries_its_provenance(finished):
    made = ImageStore(finished / 'synthetic').manifest['made']
    assert (
        made['kind'] == 'synthetic'
        and made['scheduler'] == 'dpm++'
        and made['num_inference_steps'] == 3
        and len(made['generator']) == 16
    )


def test_finished_run_says_so(protloc, finished, small):
    code, out, _ = protloc('run', 'demo', '--out', finished, *small)
    assert code == 0 and 'is finished' in out and f'Report: {finished}/report.html' in out


def kill_when(path, command):
    "Start a command and kill -9 it as soon as a path exists"
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.time() + 120
    while not list(path[0].glob(path[1])) and time.time() < deadline and process.poll() is None:
        time.sleep(0.01)
    assert process.poll() is None, 'it ended before it could be killed'
    process.send_signal(signal.SIGKILL)
    process.wait()


def test_killed_twice_and_continued_to_the_same_numbers(finished, small, tmp_path):
    folder = tmp_path / 'run'
    command = [PROTLOC, 'run', 'demo', '--out', folder, *small]
    kill_when((folder / 'generator', 'checkpoints/step-*'), command)
    assert not (folder / 'generator' / 'pipeline').exists()
    kill_when((folder / 'classifiers', 'concat/seed-0/checkpoints/step-*'), command)
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert results(folder) == results(finished)


def test_predict_writes_a_submission(protloc, finished, challenge, tmp_path):
    fields = tmp_path / 'fields'
    fields.mkdir()
    rng = np.random.default_rng(0)
    for i in range(3):
        for stain in STAINS:
            Image.fromarray(rng.integers(0, 60, (64, 64), dtype=np.uint8)).save(fields / f'new {i}_{stain}.png')
    out = tmp_path / 'submission.csv'
    code, _, err = protloc(
        'predict', finished / 'classifiers' / 'real' / 'seed-0', fields, out, '--probabilities', tmp_path / 'p.csv'
    )
    assert code == 0, err
    table, p = pd.read_csv(out, dtype=str), pd.read_csv(tmp_path / 'p.csv', index_col='Id')
    assert list(table.columns) == ['Id', 'Predicted'] and list(table.Id) == ['new 0', 'new 1', 'new 2']
    assert protloc('predict', finished / 'classifiers' / 'real' / 'seed-0', challenge, tmp_path / 'again.csv')[0] == 0
    assert len(pd.read_csv(tmp_path / 'again.csv')) == 8
    for said, row in zip(table.Predicted, p.to_numpy()):
        assert list(map(int, said.split())) == ([k for k, v in enumerate(row) if v > 0.5] or [row.argmax()])


def test_stage_commands_make_the_same_chain(protloc, tmp_path):
    cells, synthetic, model = tmp_path / 'cells', tmp_path / 'synthetic', tmp_path / 'model'
    loop = '{steps: 10, batch_size: 8}'
    for words in (
        ['simulate', cells, '--train', 30, '--val', 10, '--test', 10, '--classes', 'Nucleoli,Cytosol'],
        ['info', cells, '--verify'],
        ['train-generator', cells, tmp_path / 'generator', '--set', f'loop={loop}', '--set', 'unet.widths=[16, 32]'],
        ['generate', tmp_path / 'generator', synthetic, '--like', cells, '--images', 12, '--steps', 2],
        [
            'train-classifier',
            cells,
            model,
            '--strategy',
            'mix_loss',
            '--synthetic',
            synthetic,
            '--set',
            f'loop={loop}',
            '--set',
            'backbone=resnet10',
        ],
        ['evaluate', model, cells],
    ):
        code, out, err = protloc(*words)
        assert code == 0, (words, err)
    assert 'macro_f1' in out and len(ImageStore(synthetic)) == 12


def test_classifier_learns_and_generalises_to_unseen_cell_lines(tmp_path):
    from protloc.classify.predict import probabilities
    from protloc.classify.train import ClassifierConfig, train_classifier
    from protloc.data.simulate import simulate_store
    from protloc.metrics import scores
    from protloc.training import LoopConfig

    classes = ['Nucleoplasm', 'Nuclear membrane', 'Nucleoli', 'Plasma membrane', 'Mitochondria', 'Cytosol']
    store = simulate_store(tmp_path / 'cells', dict(train=800, val=100, test=300), classes=classes)
    c = ClassifierConfig(
        backbone='resnet10', loop=LoopConfig(steps=80, batch_size=64, lr=3e-3, warmup=10, evaluate_every=40)
    )
    model = train_classifier(store, tmp_path / 'model', c)
    rows = store.rows('test')
    assert scores(probabilities(model, store, rows), store.labels[rows])['macro_f1'] > 0.5


def test_real_fields_become_tiles(protloc, hpa, tmp_path):
    code, _, err = protloc('prepare', hpa / 'sample', tmp_path / 'store', '--size', 64, '--tile', 256)
    assert code == 0, err
    store = ImageStore(tmp_path / 'store')
    table = pd.read_csv(hpa / 'sample' / 'train.csv', dtype=str).set_index('Id').Target
    assert len(store) == 4 * len(table) and store.table.groupby('group').split.nunique().max() == 1
    assert all(set(t.split()) == set(table[g].split()) for t, g in zip(store.table.target, store.table.group))
    i = 4 * 7 + 3
    id = store.table.group[i]
    for c, stain in enumerate(STAINS):
        field = np.asarray(Image.open(hpa / 'sample' / 'train' / f'{id}_{stain}.png'), np.float64)
        assert np.abs(field[256:, 256:].reshape(64, 4, 64, 4).mean((1, 3)) - store.images[i, c]).max() <= 0.51


def test_label_sets_are_hpas(hpa):
    from protloc.data.simulate import hpa_sets

    table = pd.read_csv(hpa / 'labels_31072.csv', dtype=str)
    counts = table.Target.map(lambda t: tuple(sorted(map(int, t.split())))).value_counts()
    assert counts.to_dict() == hpa_sets() and counts.sum() == 31072


TWO_PROCESSES = '''
import sys, torch
from accelerate.utils import gather
from protloc.classify.train import ClassifierConfig, train_classifier
from protloc.data.store import ImageStore
from protloc.training import LoopConfig
store = ImageStore(sys.argv[1])
loop = LoopConfig(steps=8, batch_size=16, lr=1e-3, ema_decay=.9, evaluate_every=4)
model = train_classifier(store, sys.argv[2], ClassifierConfig(backbone='resnet10', loop=loop), 'mix_loss', store)
sums = gather(torch.stack([p.detach().abs().sum() for p in model.parameters()])[None])
assert len(sums) == 2 and (sums[0] == sums[1]).all(), sums
'''


def test_two_processes_train_one_classifier(finished, tmp_path):
    "Both processes must train one model, each on its half of every batch, and one of them must write the files"
    script = tmp_path / 'train.py'
    script.write_text(TWO_PROCESSES)
    command = [
        Path(sys.executable).parent / 'torchrun',
        '--nproc_per_node',
        '2',
        script,
        finished / 'real',
        tmp_path / 'model',
    ]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, 'OMP_NUM_THREADS': '1'})
    assert done.returncode == 0, done.stderr[-3000:]
    log = [json.loads(line) for line in (tmp_path / 'model' / 'log.jsonl').read_text().splitlines()]
    assert [line['step'] for line in log] == [4, 8] and (tmp_path / 'model' / 'classifier.safetensors').exists()


def test_one_seed_and_several_jobs(protloc, small, tmp_path):
    "Two processes train the arms; with a single seed there is no interval, and the verdict says so"
    code, out, err = protloc('run', 'demo', '--out', tmp_path / 'run', *small, '--set', 'seeds=1', '--jobs', 2)
    assert code == 0, err
    assert out.count('one seed gives no interval') == 2 and (tmp_path / 'run' / 'report.html').exists()


def test_training_folder_refuses_other_settings(protloc, finished, tmp_path):
    train = [
        'train-classifier',
        finished / 'real',
        tmp_path / 'model',
        '--set',
        'loop={steps: 4, batch_size: 8}',
        '--set',
        'backbone=resnet10',
    ]
    assert protloc(*train)[0] == 0 and protloc(*train)[0] == 0
    code, _, err = protloc(*train, '--strategy', 'concat', '--synthetic', finished / 'synthetic')
    assert code == 2 and 'was begun with other settings' in err
