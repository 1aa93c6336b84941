# Every target sets up what it needs, once, in its own virtual environment.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: help demo test lab panel bench coverage lint clean

help: ## show this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c "import sys; sys.exit(0 if sys.version_info >= (3, 11) else 'bnviz needs Python 3.11 or later, found ' + sys.version.split()[0] + '; run: make PYTHON=/path/to/python3.11 ...')"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	@touch $(READY)

demo: $(READY) ## watch real models, diagnose them, write demo/report.html
	$(BIN)/bnviz demo demo

test: $(READY) ## run the tests
	$(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder
	$(if $(shell command -v npm),cd labextension && npm test --silent,@echo "no npm: the side panel's own tests were left out")

lab: $(READY) ## open JupyterLab on the quickstart notebook
	$(BIN)/jupyter lab notebooks/quickstart.ipynb

panel: $(READY) ## build JupyterLab's side panel again, after a change in labextension/
	cd labextension && PATH="$(abspath $(BIN)):$$PATH" npm install --silent && PATH="$(abspath $(BIN)):$$PATH" npm run build:prod
	$(BIN)/jupyter-builder develop --overwrite .

bench: $(READY) ## print what a capture costs, beside its peers where they are installed, and the kernels' rates
	$(BIN)/python -m bench.capture
	$(BIN)/python -m bench.events
	$(BIN)/python -m bench.peers
	$(BIN)/python kernels/bench

coverage: $(READY) ## capture every model type of transformers and others, write docs/coverage.md
	$(BIN)/python -m bench.coverage --write docs/coverage.md

lint: $(READY) ## ruff, mypy, prettier and eslint
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy
	$(if $(shell command -v npm),cd labextension && npm run lint --silent,@echo "no npm: TypeScript was left out")

clean: ## remove the environment and everything built
	rm -rf $(VENV) demo build dist bnviz/labextension labextension/lib labextension/node_modules .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
