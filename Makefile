PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
CORES := $(shell nproc 2>/dev/null || echo 2)

.PHONY: demo test docs lab export clean

demo: .venv/.installed  ## the main job on the embedded data; ends with the path of the report
	$(BIN)/protloc run demo

test: .venv/.installed-dev  ## every check
	$(BIN)/python tests/check_notebooks.py
	$(BIN)/lint-imports
	OMP_NUM_THREADS=1 $(BIN)/nbdev_test --n_workers $(CORES)
	$(BIN)/python docs/build.py
	$(BIN)/pytest

docs: .venv/.installed-dev  ## the documentation site, into _docs/
	$(BIN)/python docs/build.py

lab: .venv/.installed-dev  ## JupyterLab on the notebooks
	$(BIN)/jupyter lab nbs

export: .venv/.installed-dev  ## notebooks -> protloc/, README.md and the sidebar, outputs' noise removed
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
