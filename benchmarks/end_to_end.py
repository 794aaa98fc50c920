"""Is the verdict right for trained classifiers? Studies on simulated cells, so many that the truth is known.

    python benchmarks/end_to_end.py [--studies 200] [--only KIND ...] [--folder runs/end_to_end]
        [--out benchmarks/results/end_to_end.jsonl]

Appends a JSON line for each kind of study and number of replicates; run it again to continue. The studies' scores are
kept in the folder.

The cells: 6,000 simulated images of 32 px of the demo's eight classes, antibodies and cell lines as usual, and as
many test images of other cell lines. They are seen through frozen features, the pooled ones of a ResNet-10 that was
trained for 60 steps on 1,000 other cells. A study draws 300 training and 300 validation images from the first and 400
test images from the second, in whole antibodies. A classifier is a layer of 48 random ReLU units, drawn with its seed,
and a logistic regression of each class (scikit-learn) on it; it sees 600 draws from its training images, with
replacement. `real` draws all of them from the study's real images, every other arm half of them from its generator:

- `copies` draws from the study's real training images, which changes nothing: no effect, by construction;
- `oracle` has 300 cells of the simulator of its own, new ones in each replicate: an effect that helps;
- `half_oracle` has such cells for one half, copies for the other;
- `permuted` draws from the study's real training images, and half of them have others' labels: this hurts;
- `varying` is the oracle, but a share of its labels is permuted that is drawn anew in each replicate, 0 to .6.

Kinds of study: `copies`, four such arms; `lucky`, `varying` in five arms of which the first is taken for the baseline:
no effect by construction, but luck of the generators; `one_generator`, the same with one generator for all replicates
of an arm; `planted`, the other four. The first 20 studies of `planted` are a pilot: their spreads give the power that
is predicted, `evaluate.power` at a level of .05 divided by the arms, the strictest of Holm's; the other studies
measure it. The truth of an effect is its mean over all studies."""

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from calibration import ALPHA, DEMO_CLASSES, LEAST_GROUPS, Scored, new_rule, old_rule, processor, score, share
from sklearn.linear_model import LogisticRegression

from protloc.classify.thresholds import prevalence_thresholds
from protloc.classify.train import ClassifierConfig, train_classifier
from protloc.core import rng_for
from protloc.data.simulate.datasets import oracle_store, simulate_store
from protloc.data.store import ImageStore
from protloc.evaluate.features import features
from protloc.evaluate.power import power, standard_error
from protloc.training import LoopConfig

RESULTS = Path(__file__).parent / 'results' / 'end_to_end.jsonl'
POOL = 6_000  # images of each kind
TRAIN, VAL, TEST = 300, 300, 400  # images of a study
UNITS = 48  # of the random layer
PILOT = 20  # studies
REPLICATES = (3, 5, 8)
REPLICATES_OF_PLANTED = (3, 5, 8, 12)
KINDS = {  # kind -> generator of each arm, the baseline first
    'copies': ('copies',) * 5,
    'lucky': ('varying',) * 5,
    'one_generator': ('varying',) * 5,
    'planted': ('copies', 'oracle', 'half_oracle', 'permuted', 'varying'),
}


class Cells:
    "Features, labels and groups of many images"

    def __init__(self, values, labels, groups):
        self.values, self.labels, self.groups = values, labels, groups

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, rows):
        return Cells(self.values[rows], self.labels[rows], self.groups[rows])

    @classmethod
    def through(cls, classifier, store, rows):
        values = features(classifier, store, rows)[0].numpy()
        return cls(values, store.labels[rows] > 0.5, store.table.group.to_numpy()[rows])

    def of_groups(
        self,
        least: int,  # images
        rng: np.random.Generator,
    ) -> list['Cells']:  # two parts without a common group: `least` images, and the rest
        "Whole groups at random"
        names, member = np.unique(self.groups, return_inverse=True)
        order = rng.permutation(len(names))[member]
        rows = np.argsort(order, kind='stable')
        return [self[rows[:least]], self[rows[order[rows] > order[rows[least - 1]]]]]


def prepare(folder: Path) -> tuple[Cells, Cells, Cells]:  # for training and validation, for testing, the oracle's
    "Simulate once, and keep what the frozen network sees"
    path = folder / 'cells.npz'
    if not path.exists():
        torch.manual_seed(0)
        if not (folder / 'others').exists():
            simulate_store(folder / 'others', dict(train=1000, val=200), classes=DEMO_CLASSES, seed=1)
        if not (folder / 'real').exists():
            simulate_store(folder / 'real', dict(train=POOL, test=POOL), classes=DEMO_CLASSES, seed=2)
        real = ImageStore(folder / 'real')
        if not (folder / 'oracle').exists():
            oracle_store(folder / 'oracle', real, real.labels[real.rows('train')], seed=3)
        loop = LoopConfig(steps=60, batch_size=64, lr=3e-3, evaluate_every=60)
        config = ClassifierConfig(backbone='resnet10', loop=loop)
        classifier = train_classifier(ImageStore(folder / 'others'), folder / 'network', config, 'real')
        oracle = ImageStore(folder / 'oracle')
        parts = [(real, real.rows('train')), (real, real.rows('test')), (oracle, oracle.rows())]
        cells = [Cells.through(classifier, *part) for part in parts]
        arrays = {
            f'{name}_{i}': np.asarray(getattr(part, name), str if name == 'groups' else None)
            for i, part in enumerate(cells)
            for name in ('values', 'labels', 'groups')
        }
        np.savez(path, **arrays)
    with np.load(path) as arrays:
        return tuple(Cells(*(arrays[f'{name}_{i}'] for name in ('values', 'labels', 'groups'))) for i in range(3))


def permuted(
    cells: Cells,
    part: float,  # of the images, in [0, 1]
    rng: np.random.Generator,
) -> Cells:
    "Some images with the labels of others among them"
    rows = rng.choice(len(cells), round(part * len(cells)), replace=False)
    labels = cells.labels.copy()
    labels[rows] = labels[rng.permutation(rows)]
    return Cells(cells.values, labels, cells.groups)


def joined(first: Cells, second: Cells) -> Cells:
    "Both together"
    both = zip(vars(first).values(), vars(second).values(), strict=True)
    return Cells(*(np.concatenate(pair) for pair in both))


def synthetic_images(
    generator: str,  # a name in `KINDS`
    real: Cells,  # the study's training images
    oracle: Cells,
    rng: np.random.Generator,  # of the generator
) -> Cells:  # as many as there are real ones
    "What a generator draws in one replicate"
    drawn = oracle[rng.choice(len(oracle), len(real), replace=False)]
    if generator == 'copies':
        return real
    if generator == 'oracle':
        return drawn
    if generator == 'half_oracle':
        half = len(real) // 2
        return joined(drawn[:half], real[rng.choice(len(real), len(real) - half, replace=False)])
    if generator == 'permuted':
        return permuted(real, 0.5, rng)
    return permuted(drawn, rng.uniform(0, 0.6), rng)


def probabilities(
    cells: Cells,  # to train on
    times: np.ndarray,  # (n,) how often each was drawn
    to_predict: list[np.ndarray],  # features
    rng: np.random.Generator,  # of the classifier
) -> list[np.ndarray]:  # (n, K) each
    "Train a classifier, and ask it"
    weights = rng.normal(size=(cells.values.shape[1] + 1, UNITS)) / cells.values.shape[1] ** 0.5

    def units(values):
        return np.maximum(values @ weights[:-1] + weights[-1], 0)

    seen = times > 0
    inputs, inputs_to_predict = units(cells.values[seen]), [units(values) for values in to_predict]

    def of_class(present):
        if present.all() or not present.any():
            return [np.full(len(values), float(present.any())) for values in inputs_to_predict]
        model = LogisticRegression(C=1.0, solver='newton-cholesky', tol=1e-3)
        model.fit(inputs, present, times[seen])
        return [model.predict_proba(values)[:, 1] for values in inputs_to_predict]

    by_class = [of_class(cells.labels[seen, k]) for k in range(cells.labels.shape[1])]
    return [np.stack(columns, 1) for columns in zip(*by_class, strict=True)]


def replicates_of(kind: str) -> tuple[int, ...]:
    "The numbers of replicates with which a kind's studies are judged"
    return REPLICATES_OF_PLANTED if kind == 'planted' else REPLICATES


def draw_study(
    kind: str,  # a name in `KINDS`
    number: int,  # of the study
    pools: tuple[Cells, Cells, Cells],  # of `prepare`
    draws: int = 1000,  # bootstrapped test parts
) -> tuple[Scored, Scored, np.ndarray]:  # thresholds matched, thresholds .5, (A + 1, R) matched on all test images
    "Train the classifiers of a study and score them"
    rng = rng_for(number, 'end to end', kind)
    train, rest = pools[0].of_groups(TRAIN, rng)
    val = rest.of_groups(VAL, rng)[0]
    test = pools[1].of_groups(TEST, rng)[0]
    mean, sd = train.values.mean(0), train.values.std(0) + 1e-6
    train, val, test, everything, oracle = (
        Cells((part.values - mean) / sd, part.labels, part.groups) for part in (train, val, test, pools[1], pools[2])
    )
    asked = [val.values, test.values, everything.values]
    said, most = [], max(replicates_of(kind))
    for arm, generator in enumerate(KINDS[kind]):
        for replicate in range(most):
            luck = rng_for(number, kind, 'generator', arm, 0 if kind == 'one_generator' else replicate)
            synthetic = synthetic_images(generator, train, oracle, luck)
            draws_of_each = [rng.multinomial(TRAIN, np.full(TRAIN, 1 / TRAIN)) for _ in range(2)]
            said.append(probabilities(joined(train, synthetic), np.concatenate(draws_of_each), asked, rng))
    shape = (len(KINDS[kind]), most)
    of_val, of_test, of_all = (np.stack(part).reshape(*shape, *part[0].shape) for part in zip(*said, strict=True))
    limits = np.array([[prevalence_thresholds(one, val.labels.mean(0)) for one in of_arm] for of_arm in of_val])
    limits = limits[:, :, None]
    matched = score(of_test > limits, test.labels, test.groups, LEAST_GROUPS, draws, number)
    half = score(of_test > 0.5, test.labels, test.groups, 1, draws, number)
    on_all = score(of_all > limits, everything.labels, everything.groups, LEAST_GROUPS, 1, number)
    return matched, half, on_all.f1[:, :, 0]


def studies_of(kind, studies, pools, folder):
    "The studies of a kind, drawn where they are not there yet, and the seconds that they took"
    folder.mkdir(parents=True, exist_ok=True)
    found, seconds = [], 0
    for number in range(studies):
        path = folder / f'{kind}-{number:04d}.npz'
        if not path.exists():
            start = time.perf_counter()
            matched, half, on_all = draw_study(kind, number, pools)
            by_rule = dict(f1=matched.f1, influence=matched.influence, half=half.f1, half_influence=half.influence)
            np.savez(path, **by_rule, all=on_all, seconds=time.perf_counter() - start)
        with np.load(path) as saved:
            matched, half = Scored(saved['f1'], saved['influence']), Scored(saved['half'], saved['half_influence'])
            found.append((matched, half, saved['all']))
            seconds += saved['seconds']
    return found, round(float(seconds), 1)


def stacked(tables: list[pd.DataFrame], name: str) -> np.ndarray:  # (studies, A)
    "A column of all studies"
    return np.stack([table[name] for table in tables])


def of_null(tables: list[pd.DataFrame]) -> dict:
    "What a rule did where no arm has an effect"
    called, raw = stacked(tables, 'called'), stacked(tables, 'p') < ALPHA
    columns = dict(false=called, false_uncorrected=raw, any=called.any(1), any_uncorrected=raw.any(1), coverage=~raw)
    return {name: share(hits) for name, hits in columns.items()} | dict(equivalent=share(stacked(tables, 'equivalent')))


def of_planted(
    tables: list[pd.DataFrame],
    names: tuple[str, ...],  # of the arms
    replicates: int,
    on_all: np.ndarray,  # (studies, A, R) differences on all test images
) -> dict:  # arm -> truth, power measured and predicted, coverage
    "What a rule did with each effect"
    difference, own, of_test = (stacked(tables, name) for name in ('difference', 'own', 'test_variance'))
    low, high, called = (stacked(tables, name) for name in ('low', 'high', 'called'))
    right = called & (np.sign(difference) == np.sign(difference.mean(0)))
    groups = round(TEST / 2.5)
    found = {}
    for arm, name in enumerate(names):
        truth = difference[:, arm].mean()
        spreads = [column[:PILOT, arm].mean() ** 0.5 for column in (own, of_test)]
        error = standard_error(*spreads, replicates, len(names), groups)
        of_training = on_all[:, arm].mean(1).var(ddof=1) - on_all[:, arm].var(1, ddof=1).mean() / replicates
        found[name] = dict(
            truth=round(float(truth), 4),
            replicate_sd=round(float(spreads[0]), 4),
            test_sd=round(float(spreads[1]), 4),
            training_sd=round(float(max(of_training, 0) ** 0.5), 4),
            predicted=round(power(truth, *error, ALPHA / len(names)), 3),
            called=share(right[PILOT:, arm]),
            wrong_sign=share((called & ~right)[:, arm]),
            coverage=share((low[:, arm] <= truth) & (truth <= high[:, arm])),
        )
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--studies', type=int, default=200, help='of each kind')
    parser.add_argument('--only', nargs='+', choices=list(KINDS), default=list(KINDS), metavar='KIND')
    parser.add_argument('--folder', type=Path, default=Path('runs/end_to_end'))
    parser.add_argument('--out', type=Path, default=RESULTS)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    pools = prepare(args.folder)
    there = [json.loads(line) for line in args.out.read_text().splitlines()] if args.out.exists() else []
    for kind in args.only:
        if any(line['kind'] == kind and line['studies'] >= args.studies for line in there):
            continue
        found, seconds = studies_of(kind, args.studies, pools, args.folder / 'studies')
        for replicates in replicates_of(kind):
            new = [new_rule(matched.first(replicates)) for matched, _, _ in found]
            old = [old_rule(half.first(replicates)) for _, half, _ in found]
            line = dict(benchmark='end_to_end', kind=kind, replicates=replicates, studies=args.studies)
            line |= dict(macro_f1=round(float(np.mean([matched.f1[0, :, 0].mean() for matched, _, _ in found])), 4))
            line |= dict(seed_sd=round(float(np.mean([on_all[0].var(ddof=1) for *_, on_all in found]) ** 0.5), 4))
            if kind == 'planted':
                on_all = np.stack([scores[1:, :replicates] - scores[0, :replicates] for *_, scores in found])
                names = KINDS[kind][1:]
                line |= {name: of_planted(of, names, replicates, on_all) for name, of in (('new', new), ('old', old))}
            else:
                line |= dict(new=of_null(new), old=of_null(old))
            line |= dict(seconds=seconds, machine=processor(), command=' '.join(['python', *sys.argv]))
            with args.out.open('a') as file:
                file.write(json.dumps(line) + '\n')
            print(kind, replicates, seconds, flush=True)


if __name__ == '__main__':
    main()
