"""How long a report takes, stage by stage: 10,000 test images, 20,000 synthetic ones, 28 classes.

    python benchmarks/report.py [--test 10000] [--train 8000] [--val 2000] [--classes 28] [--out runs/report]

Prints JSON: seconds of the tables (bootstrap, verdict), of the examination of the synthetic images, and of the page,
and the size of the page in megabytes. Images are simulated cells of 32 px; what seven classifiers in two replicates say
of them is drawn at random, and the network whose features are compared has learned nothing: neither changes the time.
The synthetic images are the real ones again, as many as there are in all.
"""

import argparse
import json
import shutil
import time
from pathlib import Path

import protloc.study.rehearsal as rehearsal
from protloc.classify.backbone import Classifier
from protloc.classify.predict import save_classifier
from protloc.data.simulate.datasets import simulate_store
from protloc.data.store import ImageStore
from protloc.labels import HPA
from protloc.study.arms import study_config
from protloc.study.examine import examine_study
from protloc.study.report import write_report
from protloc.study.scores import Study
from protloc.study.verdict import write_results


def finished(folder, args):
    "A run as it would be at its end, made once"
    if not (folder / 'real').exists():
        counts = dict(train=args.train, val=args.val, test=args.test)
        simulate_store(folder / 'real', counts, classes=list(HPA)[: args.classes], temper=0.5)
    shutil.rmtree(folder / 'run', ignore_errors=True)
    rehearsal.FIRST = args.train + args.val + args.test  # all images, where a rehearsal takes a few
    run = rehearsal.dummy_run(study_config('demo'), ImageStore(folder / 'real'), folder / 'run')
    real = run.open_real()
    classifier = Classifier('resnet10', len(real.channels), len(real.vocab), real.size)
    save_classifier(classifier, run.classifier('real', 0), real)
    return run


def timed(function, *args, **options):
    "How many seconds a call takes"
    start = time.perf_counter()
    function(*args, **options)
    return round(time.perf_counter() - start, 1)


def main():
    "Time it"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in dict(test=10_000, train=8_000, val=2_000, classes=28).items():
        parser.add_argument(f'--{name}', type=int, default=default)
    parser.add_argument('--out', type=Path, default=Path('runs/report'))
    args = parser.parse_args()
    run = finished(args.out, args)
    seconds = dict(
        tables=timed(write_results, Study(run.path), examined=False),
        examination=timed(examine_study, Study(run.path)),
        everything=timed(write_report, run.path),
    )
    size = run.report.stat().st_size / 1e6
    print(json.dumps(dict(images=vars(args) | dict(out=str(args.out)), seconds=seconds, megabytes=round(size, 1))))


if __name__ == '__main__':
    main()
