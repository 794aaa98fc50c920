PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
CORES := $(shell nproc 2>/dev/null || echo 2)
JOBS := $(shell test $(CORES) -lt 8 && echo $(CORES) || echo 8)
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses $(CORES) --maxprocesses 8 --dist loadfile --no-loadscope-reorder

.PHONY: demo test thorough quick lint docs lab export clean

demo: .venv/.installed  ## the main job on the embedded data; ends with the path of the report
	$(BIN)/protloc run demo --jobs $(JOBS)

test: lint  ## every check
	OMP_NUM_THREADS=1 $(BIN)/nbdev_test --n_workers $(CORES)
	$(BIN)/python docs/build.py
	$(PYTEST)

thorough: .venv/.installed-dev  ## more cases of what the tests show: hours
	PROTLOC_THOROUGH=1 PROTLOC_KILLS=all PROTLOC_FAULTS=all PROTLOC_SIGNALS=1 $(PYTEST)

quick: lint  ## what to run between two edits: under two minutes
	$(PYTEST) -m 'not slow'

lint: .venv/.installed-dev  ## exported code is current; ruff, types, directions of imports
	$(BIN)/python tests/check_notebooks.py
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/ty check
	$(BIN)/lint-imports

docs: .venv/.installed-dev  ## the documentation site, into _docs/
	$(BIN)/python docs/build.py

lab: .venv/.installed-dev  ## JupyterLab on the notebooks
	$(BIN)/python -c 'import protloc, os; os.execv("$(BIN)/jupyter", ["jupyter", "lab", "nbs"])'  # kernels wait as protloc has it

export: .venv/.installed-dev  ## notebooks -> protloc/, README.md and the sidebar; formatted, noise removed from outputs
	$(BIN)/ruff check --quiet --select I --fix nbs
	$(BIN)/ruff format --quiet nbs
	$(BIN)/nbdev_export
	$(BIN)/python docs/outputs.py
	$(BIN)/nbdev_clean
	$(BIN)/python docs/derived.py

.venv/.installed: setup.py settings.ini pyproject.toml
	$(PYTHON) -m venv .venv
	@echo 'Installing protloc and PyTorch; the download is large, a few minutes.'
	$(BIN)/pip install --quiet --editable .
	touch $@

.venv/.installed-dev: .venv/.installed
	@echo 'Installing the development extras.'
	$(BIN)/pip install --quiet --editable '.[dev]'
	touch $@

clean:  ## remove what was built; runs/ is kept
	rm -rf build dist *.egg-info _docs _proc docs/node_modules .pytest_cache .hypothesis .import_linter_cache
