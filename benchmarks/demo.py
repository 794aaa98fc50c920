"""Wall time and peak memory of `protloc run PRESET` in an empty folder, from start to report.

    python benchmarks/demo.py [demo]

Prints JSON: the whole, and the stages as the run logged them. Memory is the largest resident set of the process and of
the largest of its children (the report's kernel)."""

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from protloc.study.folder import RunFolder

PROTLOC = Path(sys.executable).parent / 'protloc'


def main():
    preset = sys.argv[1] if len(sys.argv) > 1 else 'demo'
    with tempfile.TemporaryDirectory() as scratch:
        run = RunFolder(Path(scratch) / 'run')
        start = time.time()
        subprocess.run([PROTLOC, 'run', preset, '--out', run.path], check=True, stdout=subprocess.DEVNULL)
        seconds = time.time() - start
        stages = run.read_stages().set_index('stage').seconds.to_dict()
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    measured = dict(benchmark='demo', preset=preset, seconds=round(seconds), peak_gib=round(peak, 2), stages=stages)
    print(json.dumps(measured))


if __name__ == '__main__':
    main()
