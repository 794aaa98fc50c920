"Opens a finished run and draws from it; fails if that imports PyTorch or training. Argument: the run's folder."

import sys

import protloc.study.figures

results = protloc.study.figures.Results(sys.argv[1])
protloc.study.figures.fig_scores(results)
print(results.verdict.to_string())
for module in ('torch', 'protloc.training', 'protloc.study.runner'):
    assert module not in sys.modules, module
