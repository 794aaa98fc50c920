"""How often is the verdict wrong where the truth is known? Studies of a score model, judged by two rules.

    python benchmarks/calibration.py [--studies 500] [--only CELL ...] [--out benchmarks/results/calibration.jsonl]
    python benchmarks/calibration.py --list

Appends a JSON line for each cell of `CELLS`; cells that are there are left out, so run it again to continue.

The model. Label sets as frequent as HPA's, 1 to 4 images a group that share theirs. A classifier sees
`signal * label + noise` for each image and class, with noise of variance 1: one half is the image's own and the same
for all classifiers, the rest is drawn anew for each classifier; where arms find other images easy, .10 of it is the
arm's and shared by its replicates. Bayes' rule turns that into a calibrated probability. `signal` is such that
macro-F1 at thresholds matched to the prevalence is .75 over the classes that are scored; there F1 of a class follows
from the normal distribution, without simulation. Luck moves the signal: that of a classifier's seed by .015 of
macro-F1 (standard deviation), that of a generator by .012, drawn anew for each replicate and each arm but `real`.
Effects are planted the same way. A validation part of half the test part's size gives the thresholds.

The rule of 0.2.0, beside the present one: threshold .5, all classes that occur, seeds' variance pooled over the arms,
plus the bootstrap variance of the mean difference, 95 % interval of each arm by Student's t.

What is counted: calls of arms without an effect (`false`), studies with one or more (`any`), arms shown to be
equivalent, 95 % intervals that hold the truth, calls of arms with an effect by arm. Each as [share, low, high], the
95 % interval by Wilson, which takes the arms of one study as independent. The truth of a planted effect is the mean
over the cell's studies."""

import argparse
import json
import os
import platform
import sys
import time
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import optimize, stats
from scipy.special import expit, logit

from protloc.classify.thresholds import prevalence_thresholds
from protloc.core import rng_for
from protloc.data.simulate.datasets import class_numbers, label_set_probabilities
from protloc.evaluate.intervals import count_in_groups, f1_influence, resampled_f1
from protloc.evaluate.power import level_of_look, power, spent, standard_error
from protloc.evaluate.rule import decide

RESULTS = Path(__file__).parent / 'results' / 'calibration.jsonl'
DEMO_CLASSES = ['Nucleoplasm', 'Nuclear membrane', 'Nucleoli', 'Golgi apparatus'] + [
    'Microtubules',
    'Plasma membrane',
    'Mitochondria',
    'Cytosol',
]
MACRO_F1, SEED_SD, GENERATOR_SD = 0.75, 0.015, 0.012
SHARED = 0.5  # of the noise's variance, by all classifiers
LEAST_GROUPS = 5  # positive ones in the test part, of a class that is scored
MOST_IN_GROUP = 4
MARGIN, ALPHA = 0.02, 0.05


@dataclass(frozen=True)
class Cell:
    "A kind of study"

    classes: int = 28  # or 8, the demo's
    images: int = 800  # in the test part
    replicates: int = 5
    arms: int = 4  # besides `real`
    effects: tuple[float, ...] = ()  # of the last arms, in macro-F1; the others have none
    generator: float = GENERATOR_SD  # standard deviation of its luck, in macro-F1
    luck_of: str = 'arm'  # 'arm': each arm's and replicate's, 'replicate': all arms', 'study': one for all replicates
    other_images: float = 0.0  # share of the noise's variance that belongs to an arm
    wide: float = 1.0  # times the luck of the first arm
    shift: float = 0.0  # of the first arm's logits
    looks: bool = False  # replicates are added until an arm is called


def cells() -> dict[str, Cell]:
    "Name -> cell, the ones that matter most first"
    found = {}
    for classes in (8, 28):
        for images in (200, 800, 2000):
            for replicates in (3, 5, 10):
                found[f'null-{classes}-{images}-{replicates}'] = Cell(classes, images, replicates)
    for classes in (8, 28):
        for replicates in (3, 10):
            found[f'one-generator-{classes}-800-{replicates}'] = Cell(classes, 800, replicates, luck_of='study')
        found[f'no-generator-luck-{classes}-800-5'] = Cell(classes, generator=0)
        found[f'shared-generator-{classes}-800-5'] = Cell(classes, luck_of='replicate')
        found[f'shifted-{classes}-800-5'] = Cell(classes, shift=-1.0)
        found[f'other-images-{classes}-200-5'] = Cell(classes, 200, other_images=0.1)
        found[f'looks-{classes}-800'] = Cell(classes, replicates=10, looks=True)
    for replicates in (3, 5, 10):
        found[f'wide-28-800-{replicates}'] = Cell(replicates=replicates, wide=3.0)
    found['eight-arms-28-800-5'] = Cell(arms=8)
    found['eight-arms-other-images-28-200-5'] = Cell(images=200, arms=8, other_images=0.1)
    effects = (0.01, 0.02, 0.05)
    for classes, images, replicates in ((28, 2000, 5), (28, 2000, 10), (8, 800, 5), (28, 800, 5), (28, 800, 10)):
        found[f'effects-{classes}-{images}-{replicates}'] = Cell(classes, images, replicates, effects=effects)
    return found


class Model(NamedTuple):
    "What a cell's studies are drawn from"

    sets: np.ndarray  # (S, K) bool: label sets
    p: np.ndarray  # (S,) how likely each is
    signal: float  # of every class
    slope: float  # of macro-F1 by the signal


def f1_at_prevalence(
    signal: float,
    prevalence: np.ndarray,  # (K,) in (0, 1)
) -> np.ndarray:  # (K,): as many are said to show the class as do, so F1 is the share of them that is found
    "F1 of `signal * label + noise` at the thresholds that pass as many images as there are positive ones"

    def of_class(share):
        limit = optimize.brentq(
            lambda limit: share * stats.norm.sf(limit - signal) + (1 - share) * stats.norm.sf(limit) - share, -20, 20
        )
        return stats.norm.sf(limit - signal)

    return np.array([of_class(share) for share in prevalence])


@cache
def fit(
    classes: int,  # 8 or 28
    images: int,  # in the test part
) -> Model:
    "The signal that gives a macro-F1 of `MACRO_F1` over the classes that the test part will score"
    names = DEMO_CLASSES if classes == len(DEMO_CLASSES) else None
    label_sets, p = label_set_probabilities(names, temper=1)
    numbers = class_numbers(names)
    sets = np.array([[number in labels for number in numbers] for labels in label_sets])
    prevalence = p @ sets
    groups = images / np.mean(range(1, MOST_IN_GROUP + 1))
    scored = prevalence[prevalence * groups >= LEAST_GROUPS]

    def macro_f1(signal):
        return f1_at_prevalence(signal, scored).mean()

    signal = optimize.brentq(lambda signal: macro_f1(signal) - MACRO_F1, 0.1, 10)
    return Model(sets, p, signal, (macro_f1(signal + 0.01) - macro_f1(signal - 0.01)) / 0.02)


def draw_images(
    model: Model,
    images: int,  # n
    rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:  # (n, K) bool labels, (n,) number of each image's group
    "Images in groups that share their labels"
    sizes = rng.integers(1, MOST_IN_GROUP + 1, images)
    groups = np.repeat(np.arange(images), sizes)[:images]
    return model.sets[rng.choice(len(model.p), images, p=model.p)][groups], groups


def draw_signals(
    cell: Cell,
    model: Model,
    rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:  # (A + 1, R), `real` first; (A,) luck of each arm's generators, in macro-F1
    "The signal that each classifier sees, and what the generators have to do with it"
    arms, replicates = cell.arms, cell.replicates
    generator = cell.generator * rng.normal(size=(arms, replicates))
    if cell.luck_of == 'study':
        generator[:] = generator[:, :1]
    elif cell.luck_of == 'replicate':
        generator[:] = generator[:1]
    luck = SEED_SD * rng.normal(size=(arms + 1, replicates))
    luck[1:] += generator
    luck[1] *= cell.wide
    if cell.effects:
        luck[-len(cell.effects) :] += np.array(cell.effects)[:, None]
    return model.signal + luck / model.slope, generator.mean(1)


def draw_probabilities(
    cell: Cell,
    model: Model,
    signals: np.ndarray,  # (A + 1, R)
    labels: np.ndarray,  # (n, K) bool
    rng: np.random.Generator,
) -> np.ndarray:  # (A + 1, R, n, K) float32
    "What each classifier says of each image"

    def noise(share, *of):
        return share**0.5 * rng.standard_normal((*of, *labels.shape), dtype=np.float32)

    seen = noise(1 - SHARED - cell.other_images, *signals.shape) + noise(SHARED)
    if cell.other_images:
        seen += noise(cell.other_images, len(signals), 1)
    seen += signals.astype(np.float32)[:, :, None, None] * labels
    prevalence = model.p @ model.sets
    seen *= model.signal
    seen += (logit(prevalence) - model.signal**2 / 2).astype(np.float32)
    seen[1] += cell.shift
    return expit(seen)


class Scored(NamedTuple):
    "Scores of a study's classifiers, `real` first"

    f1: np.ndarray  # (A + 1, R, 1 + draws) macro-F1 of the test part and of bootstrapped copies of it
    influence: np.ndarray  # (A + 1, R, G)

    def first(self, replicates):
        return Scored(self.f1[:, :replicates], self.influence[:, :replicates])


def score(
    decisions: np.ndarray,  # (A + 1, R, n, K) bool
    labels: np.ndarray,  # (n, K) bool
    groups: np.ndarray,  # (n,)
    least: int,  # positive groups of a class that is scored
    draws: int,  # bootstrapped test parts
    seed: int,  # of the draws
) -> Scored:
    "Macro-F1 of each classifier, and how it moves with the test part"
    counts = count_in_groups(decisions.reshape(-1, *labels.shape), labels, groups)
    classes = (counts.true > 0).sum(0) >= least
    f1 = resampled_f1(counts, draws, seed)[:, :, classes].mean(-1)
    shape = decisions.shape[:2]
    return Scored(f1.reshape(*shape, -1), f1_influence(counts)[:, :, classes].mean(-1).reshape(*shape, -1))


class Study(NamedTuple):
    "A study's scores: as the present rule wants them, and as the one of 0.2.0"

    matched: Scored  # thresholds match the validation part's prevalence, classes with enough positive groups
    half: Scored  # threshold .5, all classes that occur
    luck: np.ndarray  # (A,) luck of this study's generators, in macro-F1


def draw_study(
    cell: Cell,
    number: int,  # of the study; another number is another study
    draws: int = 300,  # bootstrapped test parts
) -> Study:
    "Everything that a verdict needs"
    model = fit(cell.classes, cell.images)
    rng = rng_for(number, 'calibration', *map(str, asdict(cell).values()))
    signals, luck = draw_signals(cell, model, rng)
    labels, groups = draw_images(model, cell.images, rng)
    val_labels, _ = draw_images(model, cell.images // 2, rng)
    probabilities = draw_probabilities(cell, model, signals, labels, rng)
    of_val = draw_probabilities(cell, model, signals, val_labels, rng)
    num_classifiers = signals.size
    by_column = of_val.reshape(num_classifiers, *val_labels.shape).transpose(1, 0, 2).reshape(len(val_labels), -1)
    limits = prevalence_thresholds(by_column, np.tile(val_labels.mean(0), num_classifiers))
    limits = limits.reshape(*signals.shape, 1, -1)
    matched = score(probabilities > limits, labels, groups, LEAST_GROUPS, draws, number)
    half = score(probabilities > 0.5, labels, groups, 1, draws, number)
    return Study(matched, half, luck)


def new_rule(
    scored: Scored,
    alpha: float = ALPHA,  # of the study
) -> pd.DataFrame:  # a row an arm, of `decide`
    "The present rule"
    differences = scored.f1[1:] - scored.f1[0]  # (A, R, 1 + draws)
    of_mean = differences[:, :, 1:].mean(1).var(-1, ddof=1)
    of_each = differences[:, :, 1:].var(-1, ddof=1)
    influence = (scored.influence[1:] - scored.influence[0]).mean(1)
    table = decide(differences[:, :, 0].astype(float), of_mean, of_each, influence, MARGIN, alpha)
    return table.assign(called=table.verdict.isin(['helps', 'hurts']), own=differences[:, :, 0].var(1, ddof=1))


def old_rule(
    scored: Scored,
    alpha: float = ALPHA,  # of each arm
) -> pd.DataFrame:  # a row an arm: difference, low, high, se, df, p, called, equivalent
    "The rule of 0.2.0"
    differences = scored.f1[1:] - scored.f1[0]
    arms, replicates = differences.shape[:2]
    as_it_is = differences[:, :, 0].astype(float)
    mean = as_it_is.mean(1)
    of_seeds = as_it_is.var(1, ddof=1).mean() / replicates
    of_test = differences[:, :, 1:].mean(1).var(-1)
    total = of_seeds + of_test
    groups = scored.influence.shape[-1]
    df = total**2 / (of_seeds**2 / (arms * (replicates - 1)) + of_test**2 / (groups - 1))
    half = stats.t.ppf(0.975, df) * total**0.5
    p = 2 * stats.t.sf(np.abs(mean) / total**0.5, df)
    columns = dict(difference=mean, low=mean - half, high=mean + half, se=total**0.5, df=df, p=p, called=p < alpha)
    return pd.DataFrame(columns).assign(equivalent=False, own=as_it_is.var(1, ddof=1), test_variance=of_test)


def wilson(
    hits: int,
    tries: int,
) -> list[float]:  # share, low, high
    "A share and its 95 % interval (Wilson 1927)"
    z = stats.norm.ppf(0.975)
    share = hits / tries
    middle = (share + z**2 / (2 * tries)) / (1 + z**2 / tries)
    half = z / (1 + z**2 / tries) * (share * (1 - share) / tries + z**2 / (4 * tries**2)) ** 0.5
    return [round(float(value), 4) for value in (share, max(middle - half, 0), min(middle + half, 1))]


def share(hits: np.ndarray) -> list[float]:  # of bools; share, low, high
    "How many are true"
    return wilson(int(hits.sum()), hits.size)


def summary(
    cell: Cell,
    tables: list[pd.DataFrame],  # one a study
    luck: np.ndarray,  # (studies, A) luck of each study's generators, in macro-F1
) -> dict:
    "What a rule did in the studies of a cell"
    values = {name: np.stack([table[name] for table in tables]) for name in ('difference', 'low', 'high', 'p')}
    called, equivalent, df, own, of_test, se = (
        np.stack([table[name] for table in tables])
        for name in ('called', 'equivalent', 'df', 'own', 'test_variance', 'se')
    )
    null = cell.arms - len(cell.effects)
    truth = np.r_[np.zeros(null), values['difference'].mean(0)[null:]]
    holds = (values['low'] <= truth) & (truth <= values['high'])
    raw = values['p'] < ALPHA
    result = dict(
        false=share(called[:, :null]),
        false_uncorrected=share(raw[:, :null]),
        any=share(called[:, :null].any(1)),
        any_uncorrected=share(raw[:, :null].any(1)),
        equivalent=share(equivalent[:, :null]),
        coverage=share(holds),
    )
    if cell.wide != 1 or cell.shift:
        result |= dict(false_first=share(called[:, 0]), false_first_uncorrected=share(raw[:, 0]))
        result |= dict(first_difference=round(float(values['difference'][:, 0].mean()), 4))
    if cell.luck_of == 'study':
        holds = (values['low'] <= luck) & (luck <= values['high'])
        wrong = called & (np.sign(values['difference']) != np.sign(luck))
        result |= dict(coverage_this_generator=share(holds), wrong_sign_this_generator=share(wrong))
    spreads = dict(
        replicate_sd=own.mean() ** 0.5,
        test_sd=max(values['difference'].var(0, ddof=1).mean() - own.mean() / cell.replicates, 0) ** 0.5,
        test_sd_found=of_test.mean() ** 0.5,
        se=se.mean(),
        sd_of_difference=values['difference'].var(0, ddof=1).mean() ** 0.5,
    )
    result |= {name: round(float(value), 5) for name, value in spreads.items()} | dict(df=round(float(df.mean()), 1))
    if cell.effects:
        result['effects'] = against_prediction(cell, spreads, truth[null:], called, raw, equivalent)
    return result


def against_prediction(cell, spreads, truth, called, raw, equivalent):
    "Power of each planted effect, measured and predicted from the spreads that the cell has"
    groups = round(cell.images / np.mean(range(1, MOST_IN_GROUP + 1)))
    error = standard_error(spreads['replicate_sd'], spreads['test_sd'], cell.replicates, cell.arms, groups)
    null = cell.arms - len(cell.effects)
    return [
        dict(
            planted=planted,
            truth=round(float(truth[arm]), 4),
            called=share(called[:, null + arm]),
            predicted=round(power(truth[arm], *error, ALPHA / cell.arms), 3),
            called_uncorrected=share(raw[:, null + arm]),
            predicted_uncorrected=round(power(truth[arm], *error, ALPHA), 3),
            equivalent=share(equivalent[:, null + arm]),
        )
        for arm, planted in enumerate(cell.effects)
    ]


PLANS = {'two planned looks': (5, 10), 'three planned looks': (4, 7, 10)}


def level_at(
    looks: tuple[int, ...],  # planned numbers of replicates
    number: int,  # of the look, from 0
) -> float:
    "The level of a planned look: what has been spent since the one before"
    if number == len(looks) - 1:
        return level_of_look(looks)
    return spent(looks[number] / looks[-1]) - (spent(looks[number - 1] / looks[-1]) if number else 0)


def until_called(study, rule, half, looks):
    "Which arms are called at the first look that calls any"
    for replicates, alpha in looks:
        called = rule((study.half if half else study.matched).first(replicates), alpha).called.to_numpy()
        if called.any():
            return called
    return called


def ways_of_stopping() -> dict:
    "Way -> rule, whether it takes the scores at .5, looks as (replicates, level)"
    every = [(replicates, ALPHA) for replicates in range(2, 11)]
    ways = {'old rule, until called': (old_rule, True, every), 'until called': (new_rule, False, every)}
    for name, looks in PLANS.items():
        ways[name] = (new_rule, False, [(looks[i], level_at(looks, i)) for i in range(len(looks))])
    added = [(5, ALPHA), (7, level_of_look([5], 1)), (10, level_of_look([5], 2))]
    return ways | {'one planned look, two added': (new_rule, False, added)}


def run_cell(
    cell: Cell,
    studies: int,
    draws: int,  # bootstrapped test parts a study
) -> dict:  # rule -> summary
    "Draw a cell's studies and judge them"
    new, old, lucks = [], [], []
    stops = {way: [] for way in ways_of_stopping()} if cell.looks else {}
    for number in range(studies):
        study = draw_study(cell, number, draws)
        new.append(new_rule(study.matched))
        old.append(old_rule(study.half))
        lucks.append(study.luck)
        for way in stops:
            stops[way].append(until_called(study, *ways_of_stopping()[way]))
    result = dict(new=summary(cell, new, np.array(lucks)), old=summary(cell, old, np.array(lucks)))
    if cell.looks:
        called = {way: np.stack(of_way) for way, of_way in stops.items()}
        result['looks'] = {way: dict(false=share(of), any=share(of.any(1))) for way, of in called.items()}
    return result


def done(path: Path) -> set[str]:
    "Names of the cells that are there"
    return {json.loads(line)['cell'] for line in path.read_text().splitlines()} if path.exists() else set()


def processor() -> str:
    "What this runs on"
    about = Path('/proc/cpuinfo')
    lines = about.read_text().splitlines() if about.exists() else []
    models = [line.split(':', 1)[1].strip() for line in lines if line.startswith('model name')]
    return f'{models[0] if models else platform.machine()}, {os.environ.get("OMP_NUM_THREADS", "all")} thread'


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--studies', type=int, default=500, help='of each cell')
    parser.add_argument('--draws', type=int, default=300, help='bootstrapped test parts of a study')
    parser.add_argument('--only', nargs='+', choices=list(cells()), default=list(cells()), metavar='CELL')
    parser.add_argument('--out', type=Path, default=RESULTS)
    parser.add_argument('--list', action='store_true', help='names of the cells')
    args = parser.parse_args()
    if args.list:
        print(*cells(), sep='\n')
        return
    machine = processor()
    for name in args.only:
        if name in done(args.out):
            continue
        start = time.perf_counter()
        cell = cells()[name]
        result = run_cell(cell, args.studies, args.draws)
        line = dict(benchmark='calibration', cell=name, **asdict(cell), studies=args.studies, draws=args.draws)
        line |= result | dict(seconds=round(time.perf_counter() - start, 1), machine=machine)
        line |= dict(command=' '.join(['python', *sys.argv]))
        with args.out.open('a') as file:
            file.write(json.dumps(line) + '\n')
        print(name, line['seconds'], 'any: new', result['new']['any'], 'old', result['old']['any'], flush=True)


if __name__ == '__main__':
    main()
