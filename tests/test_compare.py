"""Runs side by side, what is refused and what the page says; and a report on paper."""

import os
import re
import shutil

import numpy as np
import pandas as pd
import pytest
from bs4 import BeautifulSoup
from test_bad_input import refused

from protloc.core import sha256
from protloc.files import read_json, read_text, read_yaml, write_json, write_yaml
from protloc.study.folder import RunFolder
from protloc.study.report import BROWSERS, print_pdf


@pytest.fixture
def two(finished, tmp_path):
    "The finished study, and a copy of the same name that was trained longer, has another verdict and an arm less"
    one = RunFolder(shutil.copytree(finished, tmp_path / 'one' / 'a&b'))
    other = RunFolder(shutil.copytree(finished, tmp_path / 'other' / 'a&b'))
    settings = read_yaml(other.config)
    settings['classifier']['loop']['steps'] = 77
    write_yaml(other.config, settings)
    verdict = pd.read_csv(other.table('verdict'))
    verdict.loc[0, ['difference', 'low', 'high', 'verdict']] = [0.1234, 0.1111, 0.1357, 'helps']
    verdict[:1].to_csv(other.table('verdict'), index=False)
    return one, other


def tables_of(page):
    "The tables of a page by their captions: row -> cells"
    found = {}
    for frame in BeautifulSoup(read_text(page), 'html.parser').select('div.table'):
        rows = [[cell.get_text() for cell in row.select('th, td')] for row in frame.select('tr')]
        found[frame.p.get_text()] = {name: cells for name, *cells in rows}
    return found


def test_the_page_says_what_the_runs_say(protloc, two, tmp_path):
    one, other = two
    page = tmp_path / 'compare.html'
    code, out, err = protloc('compare', one.path, other.path, '--out', tmp_path)
    assert code == 0, err
    assert f'Comparison: {page}' in out and re.search(r'concat +other/a&b +0\.123 +0\.111 +0\.136 +helps', out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ['compare.html', 'one', 'other']

    tables = tables_of(page)
    verdicts = next(table for caption, table in tables.items() if caption.startswith('Change of test'))
    assert verdicts[''] == ['one/a&b', 'other/a&b']
    for row in pd.read_csv(one.table('verdict')).itertuples():
        assert verdicts[row.arm][0] == f'{row.difference:+.3f} ({row.low:+.3f} to {row.high:+.3f}), {row.verdict}'
    assert verdicts['concat'][1] == '+0.123 (+0.111 to +0.136), helps'
    assert verdicts['mix_representation'][1] == '–'
    assert tables['As in config.yaml; all others are equal.'] == {
        '': ['one/a&b', 'other/a&b'],
        'classifier.loop.steps': ['30', '77'],
    }
    scores = next(table for caption, table in tables.items() if caption.startswith('Test macro-F1'))
    for row in pd.read_csv(one.table('score_intervals')).itertuples():
        assert scores[row.arm][0] == f'{row.difference:.3f} ({row.low:.3f} to {row.high:.3f})'


def test_the_page_answers_and_leads_to_the_reports(protloc, two, tmp_path):
    page = tmp_path / 'pages' / 'both.html'
    assert protloc('compare', *(run.path for run in two), '--out', page)[0] == 0
    text = read_text(page)
    soup = BeautifulSoup(text, 'html.parser')
    said = soup.select_one('.answer').get_text()
    assert 'help in 1 of 2 studies; the best arm is concat of other/a&b' in said and '+0.123' in said
    assert 'The studies have the same simulated images and splits, so their scores, too, can' in soup.get_text()
    assert 'Differences between studies were not tested' in soup.get_text()
    links = [link['href'] for link in soup.select('a')]
    assert links == ['../one/a%26b/report.html', '../other/a%26b/report.html']
    assert not re.findall(r'src(?:set)?="(?!data:)', text) and '@import' not in text
    assert 'concat of other/a&b +0.123' in soup.select_one('figure img')['alt']


def test_other_test_images_are_not_comparable(protloc, two, tmp_path):
    "One label of one test image is enough; a label of a training image is not"
    one, other = two
    for split, comparable in (('train', True), ('test', False)):
        table = pd.read_csv(other.real / 'table.csv', dtype=str)
        row = np.flatnonzero(table.split == split)[0]
        table.loc[row, 'target'] = next(str(k) for k in range(3) if str(k) != table.target[row])
        table.to_csv(other.real / 'table.csv', index=False)
        put_hash(other)
        assert protloc('compare', one.path, other.path, '--out', tmp_path, '--overwrite')[0] == 0
        text = read_text(tmp_path / 'compare.html')
        assert ('were tested on the same images, so their scores, too, can' in text) == comparable
        assert ('their scores are not comparable: only the changes' in text) != comparable
        assert ('<h2>Scores</h2>' in text) == comparable
        grounds = tables_of(tmp_path / 'compare.html').popitem()[1]
        assert grounds['store of simulated images'] == ['store 1', 'store 2']
        assert grounds['test images and classes'] == ['test set 1', 'test set 1' if comparable else 'test set 2']


def put_hash(run):
    "Let a store's manifest say what its table is now"
    manifest = read_json(run.real / 'manifest.json')
    manifest['sha256']['table'] = sha256(run.real / 'table.csv')
    write_json(run.real / 'manifest.json', manifest)


def test_what_cannot_be_compared_is_refused(protloc, two, tmp_path):
    one, other = (run.path for run in two)
    out = ('--out', tmp_path / 'new.html')
    refused(protloc('compare', one, *out), 'needs two runs or more, not 1')
    refused(protloc('compare', one, tmp_path / 'other' / '..' / 'one' / 'a&b', *out), 'is there more than once')
    refused(protloc('compare', one, tmp_path / 'other', *out), 'holds no study')
    refused(protloc('compare', one, two[0].real, *out), 'is a store of images')
    refused(protloc('compare', one, other, '--out', one / 'new.html'), '(--out) lies in RUNS')
    refused(protloc('compare', one, other, '--out', tmp_path / 'new.txt'), 'name a file that ends in .html')
    (tmp_path / 'new.html').write_text('mine')
    refused(protloc('compare', one, other, *out), 'exists already')
    assert (tmp_path / 'new.html').read_text() == 'mine'
    two[1].report.write_text('half a page')
    refused(protloc('compare', one, other, *out, '--overwrite'), 'is not finished, its report is missing')
    shutil.copy(two[0].report, two[1].report)
    table = read_text(two[1].table('verdict'))
    two[1].table('verdict').write_text(table + table.splitlines()[1] + '\n')
    refused(protloc('compare', one, other, *out, '--overwrite'), 'verdict.csv is damaged')
    assert (tmp_path / 'new.html').read_text() == 'mine'
    assert sorted(path.name for path in tmp_path.iterdir()) == ['new.html', 'one', 'other']


# --- on paper


@pytest.fixture
def browser():
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if not found:
        pytest.skip('there is no Chromium, Chrome or Edge')
    return found


def pages_in(pdf):
    "How many pages a whole PDF has"
    content = pdf.read_bytes()
    assert content.startswith(b'%PDF-') and content.rstrip().endswith(b'%%EOF')
    return len(re.findall(rb'/Type\s*/Page\b', content))


def test_a_report_is_printed_whole(protloc, browser, finished, tmp_path, monkeypatch):
    "What is folded on the screen takes room on paper"
    monkeypatch.delenv('PROTLOC_BROWSER', raising=False)
    run = RunFolder(shutil.copytree(finished, tmp_path / 'run'))
    monkeypatch.setattr('protloc.study.report.write_report', lambda folder, palette: run.report)  # it is there
    code, out, err = protloc('report', run.path, '--pdf')
    assert code == 0, err
    assert out.splitlines()[-1] == f'PDF: {run.pdf}'
    unfolded = pages_in(run.pdf)
    assert not [path.name for path in run.path.iterdir() if path.name.startswith('.')]

    text = re.sub('<details>.*?</details>', '', read_text(run.report), flags=re.DOTALL)
    without = tmp_path / 'without.html'
    without.write_text(text, encoding='utf-8')
    print_pdf(without, tmp_path / 'without.pdf')
    assert unfolded >= pages_in(tmp_path / 'without.pdf') + 2 > 2


def test_without_a_browser_there_is_a_page_and_a_sentence(protloc, finished, tmp_path, monkeypatch):
    "An older PDF does not stay beside a newer page"
    run = RunFolder(shutil.copytree(finished, tmp_path / 'run'))
    run.pdf.write_bytes(b'an older one')
    empty = tmp_path / 'empty'
    empty.mkdir()
    monkeypatch.setenv('PATH', str(empty))
    monkeypatch.delenv('PROTLOC_BROWSER', raising=False)
    result = protloc('report', run.path, '--pdf')
    refused(result, f'{run.report} was made, and no PDF of it', 'apt install chromium', 'PROTLOC_BROWSER')
    assert f'Report: {run.report}' in result[1]
    assert run.reported and not run.pdf.exists()
    assert not [name for name in os.listdir(run.path) if name.startswith('.')]
