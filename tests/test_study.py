"A study's design: replicates that are added, parts that fail, one generator, filters, shares, budgets, grids"

import re
import shutil

import pytest

from protloc.classify.mixing import build_strategy
from protloc.classify.train import choose_second_store
from protloc.core import Failure, InputError
from protloc.data.resplit import replace_table, table_as_written
from protloc.data.store import ImageStore
from protloc.study import runner
from protloc.study.arms import study_config
from protloc.study.figures import Results, fig_training
from protloc.study.folder import RunFolder
from protloc.study.grid import study_configs
from protloc.study.parts import Part, is_made, waves_of
from protloc.study.plan import level_of
from protloc.study.report import write_report
from protloc.study.scores import Study
from protloc.study.verdict import write_results

FEW = [
    'data.simulate.counts={train: 48, val: 24, test: 48}',
    'data.simulate.classes=[Nucleoli, Plasma membrane, Cytosol]',
    'generator.loop={steps: 3, batch_size: 8}',
    'generator.unet={widths: [8, 16], patch_size: 4}',
    'generate={images: 24, num_inference_steps: 5}',
    'classifier.loop={steps: 6, batch_size: 8, lr: 0.003, evaluate_every: 1}',
    'arms=[real, concat]',
    'replicates=2',
]


def few(*overrides):
    return study_config('demo', overrides=[*FEW, *overrides])


@pytest.fixture(scope='module')
def base(tmp_path_factory):
    "A finished study of two replicates, with its results; tests that write take a copy"
    run = RunFolder(tmp_path_factory.mktemp('base') / 'study')
    runner.run_study(few(), run.path)
    write_results(Study(run.path))
    return run.path


@pytest.fixture
def run(base, tmp_path):
    return RunFolder(shutil.copytree(base, tmp_path / 'apart' / 'study'))


def made_in(run, before=0):
    "Parts that a call has made, by the log"
    return [stage for stage in run.read_stages().stage[before:] if ' of replicate ' in stage]


def test_replicates_are_added_and_the_look_costs(run):
    before, verdict = len(run.read_stages()), run.read_results()['verdict'].set_index('arm')
    runner.run_study(few('replicates=3'), run.path)
    assert {part.rsplit(' ', 1)[1] for part in made_in(run, before)} == {'2'}
    study = Study(run.path)
    assert study.plan['looks'] == dict(planned=[2], added=[3]) and level_of(study.plan) == 0.025
    again = write_results(study)
    assert (again.replicates == 3).all() and again.difference['concat'] != verdict.difference['concat']
    with pytest.raises(InputError, match='none taken away'):
        runner.run_study(few(), run.path)


def test_planned_looks_share_the_level(tmp_path):
    run = RunFolder(tmp_path / 'study')
    runner.run_study(few('looks=[2, 3]'), run.path)
    write_results(Study(run.path))
    first = level_of(run.read_plan())
    runner.run_study(few('looks=[2, 3]', 'replicates=3'), run.path)
    plan = run.read_plan()
    assert plan['looks'] == dict(planned=[2, 3], added=[])
    assert 0 < first < level_of(plan) and first + level_of(plan) == pytest.approx(0.05)


def test_a_part_that_fails_is_listed_and_the_others_go_on(run, monkeypatch, capsys):
    shutil.rmtree(run.classifier('concat', 1))
    shutil.rmtree(run.results)
    whole = runner._MAKE['classifier']

    def fails(config, there, part):
        if (part.name, part.replicate) in (('concat', 1), ('concat', 2)):
            raise Failure('the loss is not finite at step 3')
        whole(config, there, part)

    monkeypatch.setitem(runner._MAKE, 'classifier', fails)
    config = few('replicates=4')
    runner.run_study(config, run.path)
    assert 'concat of replicate 1 could not be made: the loss is not finite' in capsys.readouterr().err
    assert run.read_failures() == dict.fromkeys(
        ['concat of replicate 1', 'concat of replicate 2'], 'the loss is not finite at step 3'
    )
    study = Study(run.path)
    assert study.compared_replicates == [0, 3]
    assert write_results(study).replicates['concat'] == 2
    assert all(is_made(run, part) for wave in waves_of(config) for part in wave if part.name != 'concat')
    monkeypatch.undo()
    run.report.write_text('of two replicates </html>')
    runner.run_study(config, run.path)
    assert run.read_failures() == {} and Study(run.path).compared_replicates == [0, 1, 2, 3]
    assert not run.report.exists()


def test_a_generator_that_fails_takes_its_replicate_with_it(run, monkeypatch):
    def fails(config, there, part):
        raise MemoryError

    monkeypatch.setitem(runner._MAKE, 'generator', fails)
    config = few('replicates=3')
    runner.run_study(config, run.path)
    assert run.read_failures() == {'generator of replicate 2': 'memory ran out'}
    assert run.trained('real', 2) and not is_made(run, Part('images', 2, 'generator'))
    assert Study(run.path).compared_replicates == [0, 1]


def test_generators_that_diverge_leave_an_answer_of_the_controls(tmp_path):
    "At their first steps, before anything is logged"
    run = RunFolder(tmp_path / 'study')
    runner.run_study(few('generator.loop.lr=1000'), run.path)
    assert {*run.read_failures()} == {'generator of replicate 0', 'generator of replicate 1'}
    write_results(Study(run.path))
    fig_training(Results(run.path))
    assert run.verdict.read_text().startswith('No arm with synthetic images')


@pytest.mark.slow
def test_every_sentence_says_that_there_is_one_generator(base, run, tmp_path):
    "And its replicates share it: only the first has one"
    one = RunFolder(tmp_path / 'one')
    runner.run_study(few('generators=1', 'replicates=3'), one.path)
    assert [path.parent.name for path in one.path.glob('*/generator')] == ['replicate-0']
    write_report(one.path)
    sentences = one.verdict.read_text().split('\n')
    assert all('for this generator' in line for line in (sentences[0], *sentences[2:-1]))
    assert one.report.read_text().count('for this generator') >= 2
    assert 'for this generator' not in '\n'.join(write_words(run))


def write_words(run):
    write_results(Study(run.path))
    return run.verdict.read_text().splitlines()


def test_a_study_of_controls_alone_has_an_answer(tmp_path):
    "No arm has images of a generator: what the controls say is in the tables, and the sentence says so"
    run = RunFolder(tmp_path / 'study')
    runner.run_study(few('arms=[real, duplicate_real, {name: perfect, strategy: concat, source: oracle}]'), run.path)
    write_report(run.path)
    assert run.verdict.read_text().startswith('No arm with synthetic images')
    tables = run.read_results()
    assert len(tables['verdict']) == 0 and {*tables['comparisons'].arm} == {'duplicate_real', 'perfect'}


def test_an_arm_to_compare_with_is_needed():
    for arms in ('[real]', '[real, {name: half, strategy: real, fraction: 0.5}]'):
        with pytest.raises(InputError, match="at least one arm besides 'real'"):
            few(f'arms={arms}')


@pytest.mark.parametrize('line', ['looks: 5', 'classes: [a]', 'arms: {tested: 3}', 'level: high'])
def test_a_damaged_plan_is_named(run, line):
    name = line.partition(':')[0]
    run.plan.write_text(re.sub(rf'(?m)^{name}:.*(\n[ -].*)*', line, run.plan.read_text()))
    with pytest.raises(InputError, match='is not the plan of a study'):
        write_results(Study(run.path))


def test_images_are_judged_by_the_replicates_own_classifier(tmp_path):
    run = RunFolder(tmp_path / 'study')
    runner.run_study(few('filter={judge: true, drop_copies: true}', 'generate.best_of=2'), run.path)
    made = [run.open_synthetic(number).manifest['made']['filter'] for number in range(2)]
    assert made[0]['classifier'] and made[0]['classifier'] != made[1]['classifier']
    assert run.open_synthetic().table.fidelity.between(0, 1).all()


def test_a_share_of_the_training_groups_is_used_throughout(tmp_path):
    run = RunFolder(tmp_path / 'study')
    runner.run_study(few('data.fraction=.5', 'real_fractions=[.25, .5, 1]'), run.path)
    study = Study(run.path)
    assert [study.images_of(arm, 0) for arm in ('real-0.25', 'real', 'real-1')] == sorted(
        study.images_of(arm, 0) for arm in ('real-0.25', 'real', 'real-1')
    )
    assert study.images_of('real-1', 1) == 48 and study.images_of('real', 1) < 36
    table = write_results(study)
    assert re.match('adding 24 synthetic images equals ', table.worth['concat'])
    assert run.read_generator_note(1)['images'] == study.images_of('concat', 1)


def test_a_share_without_a_class_is_refused(tmp_path):
    with pytest.raises(InputError, match="has none that shows '"):
        wide = 'data.simulate.classes=[Nucleoli, Plasma membrane, Cytosol, Mitochondria, Nucleoplasm, Microtubules]'
        runner.run_study(few('real_fractions=[.01, 1]', wide), tmp_path / 'study')


def test_images_of_a_generator_that_saw_the_test_images_are_refused(run, tmp_path):
    "The split was made anew between its training and theirs"
    real, synthetic = run.open_real(), run.open_synthetic()
    assert choose_second_store(build_strategy('concat'), real, synthetic) is synthetic
    table = table_as_written(real)
    moved = table.assign(split=table.split.map(dict(train='test', test='train', val='val')))
    again = replace_table(ImageStore(shutil.copytree(real.path, tmp_path / 'again')), moved)
    with pytest.raises(InputError, match='may have seen those of val and test'):
        choose_second_store(build_strategy('concat'), again, synthetic)
    noted = replace_table(ImageStore(shutil.copytree(real.path, tmp_path / 'noted')), table.assign(slide='a'))
    assert choose_second_store(build_strategy('concat'), noted, synthetic) is synthetic


def test_a_changed_plan_is_refused(run):
    text = run.plan.read_text()
    run.plan.write_text(text.replace('margin: 0.02', 'margin: 0.05'))
    with pytest.raises(InputError, match='margin is 0.05 there and 0.02 now'):
        runner.run_study(few(), run.path)
    run.plan.write_text('margin: 0.02')
    with pytest.raises(InputError, match='is not the plan of a study'):
        runner.run_study(few(), run.path)


def test_training_until_validation_stops_rising(tmp_path):
    run = RunFolder(tmp_path / 'study')
    loop = 'classifier.loop={steps: 40, batch_size: 8, lr: 0.003, evaluate_every: 1, patience: 3, schedule: constant}'
    runner.run_study(few(loop, 'budget=converged', 'arms=[real, synthetic]'), run.path)
    steps = write_results(Study(run.path)).steps
    assert (steps < 40).all()


@pytest.mark.slow
def test_a_grid_shares_what_is_the_same(protloc, tmp_path):
    words = [word for setting in FEW for word in ('--set', setting)]
    words += ['--set', 'controls=false']
    grid = 'grid={generate.guidance_scale: [1, 2], arms.concat.ratio: [0.5, 1]}'
    out = tmp_path / 'grid'
    code, said, err = protloc('run', 'demo', '--out', out, *words, '--set', grid)
    assert code == 0, err
    second = RunFolder(out / 'guidance_scale=2')
    assert 'generator of replicate 0: taken over from' in said
    assert {part.split(' of ')[0] for part in made_in(second)} == {
        'concat-ratio-0.5', 'concat-ratio-1', 'images', 'judgement'
    }  # fmt: skip
    weights = 'generator/pipeline/unet/diffusion_pytorch_model.safetensors'
    first = RunFolder(out / 'guidance_scale=1')
    assert (first.replicate(1) / weights).samefile(second.replicate(1) / weights)
    assert len((out / 'verdicts.csv').read_text().splitlines()) == 1 + 2 * 2
    code, _, err = protloc('run', 'demo', '--out', out, *words, '--set', 'grid={generator.loop.lr: [1000]}')
    assert code == 2 and 'lr=1000 has no answer' in err and '1 of 1 studies have no answer: lr=1000' in err
    assert 'has nothing to compare' in err


def test_names_of_a_grid_are_folders(tmp_path):
    studies = study_configs(
        'demo', overrides=['grid={generate.plan: [match, balance], generator.loop.lr: [0.001, 0.0001]}']
    )
    assert list(studies) == [
        'plan=match,lr=0.001', 'plan=match,lr=0.0001', 'plan=balance,lr=0.001', 'plan=balance,lr=0.0001'
    ]  # fmt: skip


@pytest.mark.slow
def test_a_plan_is_printed_before_anything_long(protloc):
    code, out, err = protloc('plan', 'demo', *[word for setting in FEW for word in ('--set', setting)])
    assert code == 0, err
    assert '2 generators' in out and 'smallest difference that is called with power .8' in out
