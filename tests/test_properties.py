import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from protloc.core import InputError
from protloc.data.duplicates import apply_symmetry, join_groups
from protloc.data.split import Fractions, assign_folds, assign_splits, fold_splits, spread_classes
from protloc.data.store import write_store
from protloc.labels import Vocabulary

settings.register_profile('protloc', max_examples=60, deadline=None, derandomize=True)
settings.load_profile('protloc')

letters = st.characters(exclude_categories=['Cc', 'Cs', 'Zl', 'Zp'])
names = st.lists(st.text(letters, min_size=1, max_size=8), min_size=1, max_size=30, unique=True)
words = st.text(st.characters(codec='utf-8', exclude_categories=['Cc', 'Cs', 'Zl', 'Zp']), min_size=1, max_size=6)


@st.composite
def labelled(draw, least_groups=3):
    "Multi-hot labels, groups of several images, a seed"
    n = draw(st.integers(least_groups, 40))
    classes = draw(st.integers(1, 6))
    more = n - least_groups
    groups = [*range(least_groups), *draw(st.lists(st.integers(0, 20), min_size=more, max_size=more))]
    labels = draw(hnp.arrays(int, (n, classes), elements=st.integers(0, 1)))
    seed = draw(st.integers(0, 2**40))
    return labels, [f'g{group}' for group in groups], seed


@st.composite
def fractions(draw):
    val = draw(st.floats(0.05, 0.4))
    test = draw(st.floats(0.05, 0.4))
    return Fractions(train=1 - val - test, val=val, test=test)


@given(names, st.data())
def test_targets_round_trip(names, data):
    vocab = Vocabulary(names)
    row = data.draw(hnp.arrays(np.float32, len(vocab), elements=st.sampled_from([0, 1])))
    assert (vocab.encode(vocab.decode(row)) == row).all()
    assert (vocab.multi_hot([vocab.names_of(row)]) == row).all()
    target = ' '.join(map(str, data.draw(st.lists(st.integers(0, len(vocab) - 1), max_size=5))))
    assert sorted(set(target.split()), key=int) == vocab.decode(vocab.encode(target)).split()


@given(names, st.text(letters | st.sampled_from('0123456789 -'), max_size=6))
def test_any_text_is_a_target_or_one_sentence(names, text):
    vocab = Vocabulary(names)
    try:
        assert vocab.encode(text).shape == (len(vocab),)
    except InputError as e:
        assert '\n' not in str(e)


@given(labelled(), fractions())
def test_a_split_tears_no_group_and_repeats_itself(case, fractions):
    labels, groups, seed = case
    split = assign_splits(labels, groups, fractions, seed)
    assert set(split) == {'train', 'val', 'test'} and len(split) == len(groups)
    assert pd.Series(split).groupby(groups).nunique().max() == 1
    assert (split == assign_splits(labels, groups, fractions, seed)).all()


@given(labelled(least_groups=4), st.integers(3, 4))
def test_folds_tear_no_group_and_test_each_image_once(case, folds):
    labels, groups, seed = case
    fold = assign_folds(labels, groups, folds, seed)
    assert set(fold) == set(range(folds))
    assert pd.Series(fold).groupby(groups).nunique().max() == 1
    assert (fold == assign_folds(labels, groups, folds, seed)).all()
    assert (sum((fold_splits(fold, i) == 'test').astype(int) for i in range(folds)) == 1).all()


@given(st.lists(st.integers(0, 4), min_size=6, max_size=60), fractions(), st.integers(0, 9))
def test_a_class_with_three_groups_is_in_every_split(classes, fractions, seed):
    labels = np.eye(5, dtype=int)[classes]
    split = assign_splits(labels, range(len(classes)), fractions, seed)
    for k in np.flatnonzero(labels.sum(0) >= 3):
        assert {'train', 'val', 'test'} == set(split[labels[:, k] > 0])


@given(labelled(), st.data())
def test_moving_groups_takes_no_class_from_a_split_but_a_scarce_one(case, data):
    labels = case[0]
    numbers = hnp.arrays(int, len(labels), elements=st.integers(0, 2))
    split = data.draw(numbers.filter(lambda numbers: len(set(numbers)) == 3))
    moved = spread_classes(labels, split, 3)
    for k in np.flatnonzero(labels.sum(0) >= 3):
        assert set(split[labels[:, k] > 0]) <= set(moved[labels[:, k] > 0])


@given(
    st.lists(st.tuples(st.sampled_from('abcdefgh'), st.sampled_from(['', 'x', 'y', 'z'])), min_size=2, max_size=20),
    st.data(),
)
def test_joined_groups_tie_all_that_is_tied_and_nothing_more(rows, data):
    first, second = map(list, zip(*rows, strict=True))
    at = st.integers(0, len(rows) - 1)
    pairs = data.draw(st.lists(st.tuples(at, at), max_size=5))
    joined = join_groups([first, second], np.array(pairs, int).reshape(-1, 2))
    tied = np.eye(len(rows), dtype=bool)
    for column in (first, second):
        tied |= np.array([[a == b != '' for b in column] for a in column])
    for a, b in pairs:
        tied[a, b] = tied[b, a] = True
    tied = np.linalg.matrix_power(tied.astype(float), len(rows)) > 0
    assert (tied == (joined[:, None] == joined[None])).all()


@given(hnp.arrays(np.float32, (2, 5, 5), elements=st.floats(-9, 9, width=32)), st.integers(0, 7))
def test_a_symmetry_is_undone_by_a_symmetry(frequencies, symmetry):
    turned = apply_symmetry(frequencies, symmetry)
    assert any((apply_symmetry(turned, back) == frequencies).all() for back in range(8))


@settings(max_examples=30)
@given(st.data())
def test_a_store_gives_back_what_was_written(data):
    n, channels, size, classes = (data.draw(st.integers(1, most)) for most in (5, 3, 6, 4))
    images = data.draw(hnp.arrays(np.uint8, (n, channels, size, size)))
    vocab = Vocabulary([f'class {i}' for i in range(classes)])
    labels = data.draw(hnp.arrays(np.float32, (n, classes), elements=st.sampled_from([0, 1])))
    text = st.lists(words, min_size=n, max_size=n)
    table = pd.DataFrame(
        dict(
            id=data.draw(st.lists(words, min_size=n, max_size=n, unique=True)),
            target=[vocab.decode(row) for row in labels],
            group=data.draw(text),
            split=data.draw(st.lists(st.sampled_from(['train', 'val', 'test', '']), min_size=n, max_size=n)),
            source='real',
        )
    )
    with tempfile.TemporaryDirectory() as folder:
        store = write_store(Path(folder) / 'store', images, table, [f'stain {i}' for i in range(channels)], vocab)
        assert (store.images == images).all() and (store.labels == labels).all() and store.verify()
        pd.testing.assert_frame_equal(store.table, table, check_dtype=False)
        del store
