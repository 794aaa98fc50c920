"""Metrics agree with independent computations; rules for thresholds keep what they promise on any probabilities."""

import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torchmetrics.functional.classification import (
    binary_calibration_error,
    multilabel_auroc,
    multilabel_average_precision,
    multilabel_exact_match,
    multilabel_f1_score,
    multilabel_hamming_distance,
)

from protloc.classify.thresholds import (
    RULES,
    best_f1_thresholds,
    choose_thresholds,
    global_threshold,
    prevalence_thresholds,
    shrunken_thresholds,
)
from protloc.core import InputError
from protloc.labels import Vocabulary
from protloc.metrics import METRICS, MORE_METRICS, every_score, per_class, reliability, scores

settings.register_profile('protloc', max_examples=60, deadline=None, derandomize=True)
settings.load_profile('protloc')


@st.composite
def classified(draw, distinct=False):
    "Probabilities, with 0, 1, neighbours and equals among them; labels, of classes that may be nowhere or everywhere"
    shape = draw(st.integers(1, 25)), draw(st.integers(1, 5))
    kind = draw(st.sampled_from([np.float32, np.float64]))
    just_below = np.nextafter(kind(0.5), kind(0))
    some = st.floats(0, 1, width=32) | st.sampled_from([0.0, 0.25, float(just_below), 0.5, 1.0])
    if distinct:
        some = st.floats(2.0**-100, 1, width=32)
        columns = [draw(hnp.arrays(kind, shape[0], elements=some, unique=True)) for _ in range(shape[1])]
        predicted = np.stack(columns, 1)
    else:
        predicted = draw(hnp.arrays(kind, shape, elements=some))
    labels = draw(hnp.arrays(np.float32, shape, elements=st.sampled_from([0, 1])))
    return predicted, labels


def macro_f1(predicted, labels, threshold):
    "By its definition; 0 where no class occurs"
    passes, present = predicted > threshold, labels > 0.5
    images = present.sum(0)
    f1 = 2 * (passes & present).sum(0) / (passes.sum(0) + images).clip(1)
    return f1[images > 0].mean() if images.any() else 0


@pytest.mark.parametrize('rule', RULES)
@given(classified())
def test_every_rule_gives_a_threshold_from_0_to_1_for_each_class(rule, case):
    predicted, labels = case
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        limits = RULES[rule](predicted, labels)
    assert limits.shape == (labels.shape[1],) and limits.dtype == float
    assert ((limits >= 0) & (limits <= 1)).all()
    assert (RULES[rule](predicted.astype(float), labels > 0.5) == limits).all()


@given(classified(distinct=True))
def test_as_many_images_pass_as_are_labelled(case):
    predicted, labels = case
    assert ((predicted > RULES['prevalence'](predicted, labels)).sum(0) == labels.sum(0)).all()


@given(classified())
def test_of_equal_images_at_the_border_none_passes(case):
    predicted, labels = case
    passes = predicted > RULES['prevalence'](predicted, labels)
    for k, wanted in enumerate(labels.sum(0).astype(int)):
        falling = np.append(np.sort(predicted[:, k])[::-1], 0)
        last = falling[wanted - 1] if wanted else 1.0
        expected = (predicted[:, k] > last).sum() if last == falling[wanted] else wanted
        assert passes[:, k].sum() == expected


def test_neighbouring_numbers_are_separated():
    above = np.array([0.5, np.nextafter(0.5, 0), np.nextafter(np.nextafter(0.5, 0), 0)])
    for wanted in range(4):
        assert (above[:, None] > prevalence_thresholds(above[:, None], [wanted / 3])).sum() == wanted
    labels = np.array([[1], [1], [0]])
    for rule in RULES.values():
        assert (above[:, None] > rule(above[:, None], labels)).sum() == 2


@given(classified())
def test_no_threshold_of_a_class_is_better_than_the_best(case):
    predicted, labels = case
    best = best_f1_thresholds(predicted, labels)
    tried = [*np.linspace(0, 1, 21), *np.unique(predicted.astype(float))]
    for k in range(labels.shape[1]):
        column = predicted[:, [k]], labels[:, [k]]
        assert macro_f1(*column, best[k : k + 1]) >= max(macro_f1(*column, np.array([t])) for t in tried) - 1e-12


@given(classified())
def test_no_single_threshold_is_better_than_the_global_one(case):
    predicted, labels = case
    shared = global_threshold(predicted, labels)
    assert (shared == shared[0]).all()
    tried = [*np.linspace(0, 1, 21), *np.unique(predicted.astype(float))]
    best = max(macro_f1(predicted, labels, np.array([t])) for t in tried)
    assert macro_f1(predicted, labels, shared) >= best - 1e-12


@given(classified(), st.floats(0.1, 100))
def test_shrunken_thresholds_lie_between_the_two_and_nearer_with_more_images(case, prior_images):
    predicted, labels = case
    own, shared = best_f1_thresholds(predicted, labels), global_threshold(predicted, labels)
    drawn = shrunken_thresholds(predicted, labels, prior_images)
    absent = labels.sum(0) == 0
    assert (drawn[absent] == shared[absent]).all()
    low, high = np.minimum(own, shared), np.maximum(own, shared)
    assert ((drawn >= low) & (drawn <= high))[~absent].all()
    twice = shrunken_thresholds(np.tile(predicted, (2, 1)), np.tile(labels, (2, 1)), prior_images)
    assert (np.abs(twice - own) <= np.abs(drawn - own) + 1e-12)[~absent].all()


def test_rules_by_name(tmp_path):
    rng = np.random.default_rng(0)
    predicted, labels = rng.random((40, 3)), rng.random((40, 3)) < 0.3
    for name, rule in RULES.items():
        chosen = choose_thresholds(predicted, labels.astype(float), tmp_path / f'{name}.json', list('abc'), name)
        assert (chosen.to_numpy() == rule(predicted, labels)).all()
    with pytest.raises(InputError, match='prior_images must be above 0, not nan'):
        shrunken_thresholds(predicted, labels, float('nan'))


def test_metrics_agree_with_torchmetrics():
    rng = np.random.default_rng(0)
    labels = (rng.random((500, 4)) < [0.5, 0.2, 0.05, 0.01]).astype(int)
    predicted = np.clip(0.4 * labels + 0.5 * rng.random(labels.shape), 0, 1)
    found = every_score(predicted, labels, 0.45)
    assert [*found] == [*METRICS, *MORE_METRICS]
    p, y = torch.tensor(predicted), torch.tensor(labels)
    at = dict(num_labels=4, threshold=0.45)
    errors = [float(binary_calibration_error(p[:, k].contiguous(), y[:, k], n_bins=15)) for k in range(4)]
    expected = {
        'macro_f1': multilabel_f1_score(p, y, average='macro', **at),
        'micro_f1': multilabel_f1_score(p, y, average='micro', **at),
        'map': multilabel_average_precision(p, y, 4),
        'weighted_f1': multilabel_f1_score(p, y, average='weighted', **at),
        'auroc': multilabel_auroc(p, y, 4),
        'subset_accuracy': multilabel_exact_match(p, y, **at),
        'hamming_loss': multilabel_hamming_distance(p, y, **at),
        'calibration_error': np.mean(errors),
    }
    assert found == pytest.approx({name: float(value) for name, value in expected.items()}, abs=1e-5)


@given(classified())
def test_every_score_is_right_or_empty_and_warns_of_nothing(case):
    predicted, labels = case
    if not labels.any():
        with pytest.raises(InputError, match='no image of this split has a label'):
            every_score(predicted, labels)
        return
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        found = every_score(predicted, labels)
        table = per_class(predicted, labels, Vocabulary([f'c{k}' for k in range(labels.shape[1])]))
        bins = reliability(predicted, labels, 4)
    assert {name: found[name] for name in METRICS} == scores(predicted, labels)
    passes, present = predicted > 0.5, labels > 0.5
    occurring = present.any(0)
    assert found['subset_accuracy'] == pytest.approx((passes == present).all(1).mean())
    assert found['hamming_loss'] == pytest.approx((passes != present).mean())
    images = present.sum(0)
    f1 = 2 * (passes & present).sum(0) / (passes.sum(0) + images).clip(1)
    assert found['weighted_f1'] == pytest.approx((f1 * images).sum() / images.sum())

    def ranked_above(k):
        here, there = predicted[present[:, k], k, None], predicted[~present[:, k], k]
        return ((here > there) + 0.5 * (here == there)).mean() if here.size and there.size else np.nan

    by_class = [ranked_above(k) for k in range(labels.shape[1])]
    assert table.auroc.tolist() == pytest.approx(by_class, nan_ok=True)
    assert found['auroc'] == pytest.approx(pd.Series(by_class).mean(), nan_ok=True)
    assert (table.average_precision.notna() == occurring).all()
    assert found['map'] == pytest.approx(table.average_precision.mean())
    assert bins.decisions.sum() == predicted[:, occurring].size and 0 <= found['calibration_error'] <= 1
    full = bins[bins.decisions > 0]
    assert (full.probability.between(full.low - 1e-9, full.high + 1e-9) & full.observed.between(0, 1)).all()
    assert bins[bins.decisions == 0][['probability', 'observed']].isna().all(None)


def test_a_bin_has_its_upper_edge():
    said = np.array([[0, 0.25, 0.5, 0.75, 1]]).T
    assert reliability(said, np.ones((5, 1)), 4).decisions.tolist() == [2, 1, 1, 1]
    with pytest.raises(InputError, match='reliability needs one bin or more, not -1'):
        reliability(said, said, -1)
