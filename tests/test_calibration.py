"The rule of the verdict against slow definitions, limits, and studies whose truth is known; broken rules are found out"

import itertools
import json
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from protloc.core import rng_for
from protloc.evaluate import power, rule
from protloc.evaluate.intervals import count_in_groups, drawn_groups, f1_influence, macro, resampled_f1
from protloc.study.forecast import REPLICATE_SD, noise_of_test

sys.path.append(str(Path(__file__).resolve().parent.parent / 'benchmarks'))

import calibration
import end_to_end

STUDIES = 250
HARD = calibration.Cell(8, 200, 10, arms=8, generator=0, other_images=0.2)  # the test part and Holm's rule both matter


@pytest.fixture(scope='module')
def studies():
    "Studies of eight arms without an effect, scored"
    return [calibration.draw_study(HARD, number, draws=100).matched for number in range(STUDIES)]


def any_false(studies):
    "Studies with a false call"
    return sum(calibration.new_rule(scored).called.any() for scored in studies)


LIMIT = stats.binom.ppf(0.999, STUDIES, 0.05)


def test_studies_without_an_effect_are_rarely_called(studies):
    assert any_false(studies) <= LIMIT


def replicates_counted_twice(differences, found=rule.replicate_variance):
    "The variance between replicates divided by their number once more"
    variance, df = found(differences)
    return variance / differences.shape[1], df


BROKEN = {
    'replicate_variance': replicates_counted_twice,
    'holm': lambda p: p,
    'shared_variance': lambda of_mean, of_each: np.zeros_like(of_mean),
}


@pytest.mark.parametrize('name', BROKEN)
def test_a_broken_rule_is_found_out(studies, monkeypatch, name):
    monkeypatch.setattr(rule, name, BROKEN[name])
    assert any_false(studies) > LIMIT


def random_study(arms, replicates, groups=60, draws=400):
    "Differences over bootstrapped test sets, (A, R, 1 + draws), and influences, (A, G)"
    rng = rng_for(0, 'random study', arms, replicates)
    values = 0.02 * rng.normal(size=(arms, replicates, 1)) + 0.01 * rng.normal(size=(arms, 1, 1 + draws))
    values = values + 0.01 * rng.normal(size=(arms, replicates, 1 + draws))
    return values, rng.normal(size=(arms, groups)) ** 3


def decided(values, influence, **options):
    "The rule on such a study"
    of_mean, of_each = values[:, :, 1:].mean(1).var(-1, ddof=1), values[:, :, 1:].var(-1, ddof=1)
    return rule.decide(values[:, :, 0], of_mean, of_each, influence, **options)


def in_loops(values, influence):
    "Difference, standard error, degrees of freedom and p of each arm, one number at a time"
    arms, replicates = values.shape[:2]
    spreads = [np.var(values[a, :, 0], ddof=1) for a in range(arms)]
    df_between = (replicates - 1) * arms / (1 + 0.64 * (arms - 1))
    for a in range(arms):
        mean = sum(values[a, :, 0]) / replicates
        between = max(spreads[a], sum(spreads) / arms) / replicates
        pairs = [np.cov(values[a, r, 1:], values[a, s, 1:])[0, 1] for r in range(replicates) for s in range(r)]
        of_test = max(sum(pairs) / len(pairs), 0)
        squares, fourths = sum(influence[a] ** 2), sum(influence[a] ** 4)
        df_test = 2 * squares**2 / (fourths - squares**2 / len(influence[a]))
        df_test = min(max(df_test, 1), len(influence[a]) - 1)
        se = (between + of_test) ** 0.5
        df = (between + of_test) ** 2 / (between**2 / df_between + of_test**2 / df_test)
        yield mean, se, df, 2 * (1 - stats.t.cdf(abs(mean) / se, df))


@pytest.mark.parametrize(('arms', 'replicates'), [(1, 2), (1, 5), (4, 2), (4, 3), (8, 10)])
def test_the_rule_is_what_its_formulas_say(arms, replicates):
    values, influence = random_study(arms, replicates)
    table = decided(values, influence)
    np.testing.assert_allclose(table[['difference', 'se', 'df', 'p']], [*in_loops(values, influence)], rtol=1e-6)
    np.testing.assert_allclose(table.high - table.difference, stats.t.ppf(0.975, table.df) * table.se)
    np.testing.assert_allclose(table.difference - table.low90, stats.t.ppf(0.95, table.df) * table.se)


def test_one_arm_without_test_variance_is_the_t_test_of_its_differences():
    values, influence = random_study(1, 6)
    found = rule.decide(values[:, :, 0], np.zeros(1), np.zeros((1, 6)), influence).iloc[0]
    expected = stats.ttest_1samp(values[0, :, 0], 0)
    bounds = expected.confidence_interval()
    wanted = [expected.pvalue, expected.pvalue, expected.df, bounds.low, bounds.high]
    np.testing.assert_allclose(found[['p', 'p_holm', 'df', 'low', 'high']].astype(float), wanted)


def test_without_replicates_spread_only_the_test_set_is_in_doubt():
    influence = np.tile([0.001, -0.001], (2, 50))
    of_test = (influence**2).sum(1)
    differences = np.array([[0.05] * 4, [0.0] * 4])
    table = rule.decide(differences, of_test, np.repeat(of_test[:, None], 4, 1), influence)
    np.testing.assert_allclose(table.se, of_test**0.5)
    np.testing.assert_allclose(table.df, 99)


def test_without_any_spread_a_difference_is_certain():
    differences = np.array([[0.05] * 3, [0.0] * 3, [-0.03] * 3])
    table = rule.decide(differences, np.zeros(3), np.zeros((3, 3)), np.zeros((3, 40)))
    assert list(table.verdict) == ['helps', 'equivalent', 'hurts']
    np.testing.assert_allclose(table.p, [0, 1, 0], atol=1e-12)  # three times .05 differ by a rounding
    np.testing.assert_allclose(table[['low', 'high']].T, [table.difference] * 2, atol=1e-12)


def test_holm_is_the_closed_test_of_bonferroni():
    rng = rng_for(0, 'holm')
    for _ in range(20):
        p = rng.random(5).round(1) ** 2  # with ties
        subsets = [s for size in range(1, 6) for s in itertools.combinations(range(5), size)]
        wanted = [max(min(1, len(s) * p[list(s)].min()) for s in subsets if arm in s) for arm in range(5)]
        np.testing.assert_allclose(rule.holm(p), wanted)


def test_degrees_of_freedom_are_those_of_a_mean_of_correlated_variances():
    rng = rng_for(0, 'degrees of freedom')
    arms, replicates = 5, 4
    correlated = 0.8 + 0.2 * np.eye(arms)
    drawn = rng.multivariate_normal(np.zeros(arms), correlated, (40_000, replicates))
    means = drawn.var(1, ddof=1).mean(1)
    _, df = rule.replicate_variance(drawn[0].T)
    assert df == pytest.approx(2 * means.mean() ** 2 / means.var(), rel=0.03)


def test_degrees_of_freedom_of_the_test_set_lie_within_their_limits():
    even, one = np.ones((1, 30)), np.eye(1, 30)
    assert rule.df_of_test(even) == 29
    assert rule.df_of_test(one) == pytest.approx(2 / (1 - 1 / 30))
    assert rule.df_of_test(np.zeros((1, 30))) == 1
    groups = rng_for(0, 'test df').normal(size=(1, 20_000))
    assert rule.df_of_test(groups)[0] == pytest.approx(20_000, rel=0.05)  # of a normal sample: one each


def test_classes_that_do_not_occur_have_no_part_in_it():
    rng = rng_for(0, 'absent')
    labels = rng.random((80, 4)) < (0.5, 0.3, 0.2, 0)
    decisions = rng.random((3, 80, 4)) < 0.3
    groups = np.char.mod('%02d', rng.integers(25, size=80))
    counts, without = (count_in_groups(decisions[..., :k], labels[:, :k], groups) for k in (4, 3))
    f1 = resampled_f1(counts, 50)
    assert np.isnan(f1[..., 3]).all() and not np.isnan(f1[..., :3]).any()
    classes = slice(None), slice(None), slice(0, without.true.shape[1])
    np.testing.assert_allclose(f1_influence(counts)[classes], f1_influence(without))
    np.testing.assert_allclose(macro(f1), macro(resampled_f1(without, 50)), rtol=1e-6)


def test_resampled_scores_are_those_of_resampled_images():
    rng = rng_for(0, 'resampled')
    labels, decisions = rng.random((60, 2)) < 0.4, rng.random((2, 60, 2)) < 0.4
    groups = np.char.mod('%02d', np.arange(60) // 3)
    f1 = resampled_f1(count_in_groups(decisions, labels, groups), 5, seed=3)
    for draw, times in enumerate(np.concatenate([*drawn_groups(20, 5, seed=3)])):
        images = [
            image for group in range(20) for _ in range(int(times[group])) for image in range(3 * group, 3 * group + 3)
        ]
        for c, k in itertools.product(range(2), range(2)):
            said, true = decisions[c, images, k], labels[images, k]
            assert f1[c, 1 + draw, k] == pytest.approx(2 * (said & true).sum() / (said.sum() + true.sum()), rel=1e-5)


@pytest.mark.parametrize(('difference', 'test_sd'), [(0, 0), (0.02, 0), (0.03, 0.01)])
def test_power_is_how_often_a_simulated_study_calls(difference, test_sd):
    replicates, replicate_sd, tries = 5, 0.024, 20_000
    rng = rng_for(0, 'power', str(difference), str(test_sd))
    of_test = test_sd * rng.normal(size=(tries, 1))
    found = difference + of_test + replicate_sd * rng.normal(size=(tries, replicates))
    groups = 10_000  # so many that the test set's variance is known
    se, df = rule.satterthwaite(
        [found.var(1, ddof=1) / replicates, np.full(tries, test_sd**2)], [replicates - 1, groups]
    )
    called = rule.p_value(found.mean(1), se, df) < 0.05
    error = power.standard_error(replicate_sd, test_sd, replicates, groups=groups)
    assert called.mean() == pytest.approx(power.power(difference, *error), abs=0.03)


@pytest.mark.parametrize(('arms', 'replicates'), [(2, 5), (4, 3), (4, 5), (4, 12), (8, 8)])
def test_the_error_that_is_planned_with_is_the_one_that_the_rule_finds(arms, replicates):
    rng = rng_for(0, 'planned error', arms, replicates)
    of_baseline = rng.normal(size=(2000, 1, replicates))
    drawn = (rng.normal(size=(2000, arms, replicates)) - of_baseline) * 0.5**0.5
    found = np.mean([rule.replicate_variance(differences)[0].mean() for differences in drawn])
    se, _ = power.standard_error(1, 0, replicates, arms)
    assert se == pytest.approx(found**0.5, rel=0.05)


def test_the_levels_of_planned_looks_add_up_to_the_level_of_the_study():
    for plan in calibration.PLANS.values():
        assert sum(calibration.level_at(plan, i) for i in range(len(plan))) == pytest.approx(0.05)


def test_the_model_scores_what_it_was_fitted_to():
    cell = calibration.Cell(8, 4000, 6, generator=0)
    study = calibration.draw_study(cell, 0, draws=1).matched
    assert study.f1[:, :, 0].mean() == pytest.approx(calibration.MACRO_F1, abs=0.015)
    assert study.f1[:, :, 0].std(1).mean() == pytest.approx(calibration.SEED_SD, rel=0.4)


def test_wilson_holds_what_an_exact_interval_holds():
    for hits, tries in ((0, 20), (3, 50), (17, 17), (250, 500)):
        wanted = stats.binomtest(hits, tries).proportion_ci(method='wilson')
        np.testing.assert_allclose(calibration.wilson(hits, tries)[1:], wanted, atol=1e-4)


def test_a_study_of_trained_classifiers_has_no_effect_where_arms_are_copies():
    rng = rng_for(0, 'cells')
    labels = rng.random((900, 2)) < 0.4
    groups = np.char.mod('%03d', np.arange(900) // 2)
    values = labels @ rng.normal(size=(2, 6)) + rng.normal(size=(900, 6))
    cells = end_to_end.Cells(values, labels, groups)
    train, rest = cells.of_groups(300, rng)
    assert len(train) == 300 and not set(train.groups) & set(rest.groups)
    assert (end_to_end.permuted(train, 0, rng).labels == train.labels).all()
    assert (end_to_end.permuted(train, 1.0, rng).labels.sum(0) == train.labels.sum(0)).all()
    matched, half, on_all = end_to_end.draw_study('copies', 0, (cells, cells, cells), draws=100)
    assert matched.f1.shape == half.f1.shape == (5, 8, 101) and on_all.shape == (5, 8)
    table = calibration.new_rule(matched)
    assert not table.called.any() and (abs(table.difference) < 0.05).all()


@pytest.mark.parametrize('images', [200, 800, 2000])
def test_a_plan_foresees_the_spread_of_such_studies(images):
    "The spread over replicates that the benchmark's studies found, which a plan adds up from luck and test images"
    lines = map(json.loads, calibration.RESULTS.read_text().splitlines())
    found = next(line['new']['replicate_sd'] for line in lines if line['cell'] == f'null-28-{images}-5')
    model, rng, tables = calibration.fit(28, images), rng_for(0, 'a plan'), []
    for split, size in (('test', images), ('val', images // 2)):
        labels, groups = calibration.draw_images(model, size, rng)
        sets = [tuple(np.flatnonzero(row)) for row in labels]
        tables.append(pd.DataFrame(dict(split=split, group=groups.astype(str), labels=sets)))
    noise = noise_of_test(pd.concat(tables), 28)
    assert (REPLICATE_SD**2 + noise.own**2) ** 0.5 == pytest.approx(found, rel=0.2)
