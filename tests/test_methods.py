"What a report says for a paper: thresholds, calibration, the method in words, references, cost, links"

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from bs4 import BeautifulSoup
from sklearn.metrics import precision_recall_fscore_support

from build import page_of
from protloc.core import versions
from protloc.files import read_json, read_yaml, write_json, write_yaml
from protloc.pages import NARROW, WIDE, fitted
from protloc.study import details, methods
from protloc.study.arms import study_config
from protloc.study.figures import Results
from protloc.study.folder import RunFolder
from protloc.study.runner import hardware

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope='module')
def results(finished):
    return Results(finished)


@pytest.fixture
def copied(finished, tmp_path):
    "A run that may be changed"
    return RunFolder(shutil.copytree(finished, tmp_path / 'apart' / 'run'))


@pytest.mark.parametrize('arm', ['real', 'concat'])
def test_thresholds_give_what_scikit_learn_counts(results, arm):
    study, table = results.study, details.table_thresholds(results, arm)
    labels = study.labels('test')
    expected = []
    for number in study.compared_replicates:
        said = study.probabilities(arm, number, 'test') > 0.5
        expected.append(precision_recall_fscore_support(labels, said, average=None, zero_division=0)[:3])
    at_half = table['threshold .5'].iloc[:-1].astype(float)
    assert at_half.to_numpy() == pytest.approx(np.mean(expected, 0).T, abs=0.0051)
    assert list(table.index) == [*study.real.vocab, details.COUNTED]
    matched = results.scores.query('arm == @arm and split == "test"').matched_f1.mean()
    assert float(table.loc[details.COUNTED, ('matched to prevalence', 'F1')]) == pytest.approx(matched, abs=0.0051)


def test_a_diagram_has_a_panel_for_each_arm_at_any_width(results):
    arms = [arm for arm in results.study.compared_arms if arm != 'real']
    for width in (WIDE, NARROW):
        fig = fitted(lambda width: details.fig_calibration(results, width), width)
        panels = [ax for ax in fig.axes if ax.get_title()]
        assert [ax.get_title() for ax in panels] == arms
        assert min(ax.get_position().width * fig.get_figwidth() for ax in panels) > 1  # inches
    said = details.calibration_in_numbers(results)
    for arm, error in details.calibration_errors(results).items():
        assert f'{arm} {error:.3f}' in said and 0 <= error <= 1


def numbers_of(section):
    "Every number in settings that changes what is trained or drawn, by its name"
    idle = ('workers', 'checkpoint', 'keep_', 'lr_', 'plateau', 'batch_size', 'strength', 'best_of', 'norm_groups')
    idle += ('evaluate_every',)  # a generator has no validation; the classifiers' is looked for by itself
    for name, value in section.items():
        if isinstance(value, dict):
            yield from numbers_of(value)
        elif type(value) in (int, float) and value and not name.startswith(idle):
            yield name, value


@pytest.mark.parametrize('section', ['generator', 'generate', 'classifier'])
def test_the_paragraph_has_every_number_of_the_settings(results, section):
    text = methods.methods_paragraph(results)
    settings = results.run.read_settings()[section]
    for name, value in numbers_of(settings):
        shown = f'{value:,}' if isinstance(value, int) else f'{value:g}'
        assert re.search(rf'(?<![\d.]){re.escape(shown)}(?![\d]|[.,]\d)', text), name
    if 'loop' in settings:
        assert f'{settings["loop"]["steps"]} optimizer steps of {settings["loop"]["batch_size"]} images' in text


def test_the_paragraph_has_data_rule_and_versions(results):
    text = methods.methods_paragraph(results)
    for part in (
        '120 training images',
        '40 test images',
        'within 0.02 of 0',
        'level 0.05',
        '2 replicates',
        'Holm over 2',
    ):
        assert part in text, part
    for name in (*results.study.real.vocab, *results.study.real.channels, *results.study.arms):
        assert name in text
    assert f'numpy {versions()["numpy"]}' in text
    assert f'cores: {hardware()["cores"]}' in text


def test_simulated_images_are_never_called_real(results):
    text = re.sub(r"'[\w.-]+'", '', methods.methods_paragraph(results))  # without the names of arms
    assert 'real' not in text
    assert '200 simulated images' in text


def test_settings_that_nobody_describes_are_listed():
    config = study_config('demo', overrides=['generator.unet.norm_groups=4', 'generate.batch_size=7'])
    changed = methods.changed_settings(config)
    assert (changed['generator.unet.norm_groups'], changed['generate.batch_size']) == ('4', '7')


def entries_of(text):
    "Key -> fields of BibTeX; fails where a brace is not closed"
    found = {}
    for chunk in re.split(r'\n+(?=@)', text.strip()):
        opened = np.cumsum([(letter == '{') - (letter == '}') for letter in chunk])
        assert opened.min() == 0 and opened[-1] == 0 and (opened[:-1][chunk.index('{') :] > 0).all(), chunk
        key = re.match(r'@\w+\{(\w+),', chunk)[1]
        assert key not in found
        found[key] = dict(re.findall(r'^  (\w+) = \{(.*)\},?$', chunk, re.MULTILINE))
    return found


def test_references_can_be_read_and_each_is_cited_for_something():
    known = entries_of('\n\n'.join(methods.entries().values()))
    assert set(known) == set(methods.CITED)
    assert all({'title', 'author', 'year'} <= set(fields) for fields in known.values())
    cited = yaml.safe_load((ROOT / 'CITATION.cff').read_text())
    ours = known['protloc']
    assert (ours['title'], ours['url']) == (cited['title'], cited['repository-code'])
    assert ours['author'] == f'{{{cited["authors"][0]["name"]}}}'
    paper = known['lin2025']
    assert paper['title'] == cited['references'][0]['title'] and paper['eprint'] in cited['references'][0]['url']


def test_references_are_those_of_the_settings(copied):
    used = entries_of(methods.bibtex(Results(copied.path)))
    assert used['protloc']['version'] == versions()['protloc']
    assert {'ho2020', 'karras2022', 'ho2022', 'lu2022', 'he2016', 'verma2019', 'holm1979'} <= set(used)
    assert not {'yun2019', 'lin2017', 'ravuri2019', 'song2021', 'lipman2023'} & set(used)
    settings = read_yaml(copied.config)
    settings['generate'].update(guidance_scale=1, scheduler='ddim')
    settings['classifier'].update(criterion='focal', backbone='densenet121')
    settings['arms'].append(dict(name='pasted', strategy='cutmix'))
    write_yaml(copied.config, settings)
    changed = set(entries_of(methods.bibtex(Results(copied.path))))
    assert {'song2021', 'lin2017', 'huang2017', 'yun2019'} <= changed
    assert not {'ho2022', 'lu2022', 'he2016'} & changed


def test_settings_of_another_version_are_not_put_in_words(copied):
    write_yaml(copied.config, {**read_yaml(copied.config), 'of_next_year': 1})
    results = Results(copied.path)
    assert methods.methods_paragraph(results).startswith('config.yaml has settings that this version')
    assert 'holm1979' in methods.bibtex(results) and 'ho2020' not in methods.bibtex(results)


def test_cost_counts_every_task_once(results):
    table, stages = details.stage_times(results), results.run.read_stages()
    assert table.tasks.iloc[:-1].sum() == table.tasks['together'] == len(stages)
    assert table.tasks['classifiers: concat'] == table.tasks['generators'] == 2
    assert table.time['together'] == details.duration(stages.seconds.sum())
    shown = BeautifulSoup(details.cost(results).data, 'html.parser').get_text()
    assert stages.finished.max()[:10] in shown and f'memory: {hardware()["memory"]}' in shown


def test_a_run_that_noted_no_machine_and_no_stages_says_so(copied):
    noted = read_json(copied.versions)
    write_json(copied.versions, {name: value for name, value in noted.items() if name != 'hardware'})
    copied.log.unlink()
    text = details.cost(Results(copied.path)).data
    assert 'not noted. The machine is not noted.' in text and '<table' not in text


def test_links_lead_to_files_and_pages(results):
    page = BeautifulSoup(details.links(results).data, 'html.parser')
    addresses = [link['href'] for link in page.find_all('a')]
    here = [address for address in addresses if not address.startswith(details.SITE)]
    assert len(here) > 10 and all((results.run.path / address).is_file() for address in here)
    pages = {
        page_of(path.relative_to(ROOT / 'nbs')).with_suffix('.html').as_posix() for path in ROOT.glob('nbs/**/*.ipynb')
    }
    assert set(details.PAGES) <= pages


def test_names_of_users_are_escaped(results, monkeypatch):
    monkeypatch.setattr(results, 'budgets', results.budgets.assign(arm='<i>', rise=0.1, rising='yes'))
    assert '&lt;i&gt; (+0.100)' in details.rising_in_words(results).data
    assert '<i>' not in details.rising_in_words(results).data + details.to_copy('<i>').data
