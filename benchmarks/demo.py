"""Wall time and peak memory of `protloc run PRESET` in an empty folder, from start to report.

    python benchmarks/demo.py [demo]

Prints JSON: the whole, and the stages as the run logged them. Memory is the largest resident set of the process and of the
largest of its children (the report's kernel)."""

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def main():
    preset = sys.argv[1] if len(sys.argv) > 1 else 'demo'
    with tempfile.TemporaryDirectory() as scratch:
        folder, start = Path(scratch) / 'run', time.time()
        subprocess.run(
            [Path(sys.executable).parent / 'protloc', 'run', preset, '--out', folder],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        seconds = time.time() - start
        stages = [json.loads(line) for line in (folder / 'log.jsonl').read_text().splitlines()]
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    print(
        json.dumps(
            dict(
                benchmark='demo',
                preset=preset,
                seconds=round(seconds),
                peak_gib=round(peak, 2),
                stages={s['stage']: s['seconds'] for s in stages},
            )
        )
    )


if __name__ == '__main__':
    main()
