# make book · make test · make tangle · make weave · make bench · make test-gpu · make clean
# On a fresh machine each target first creates .venv from requirements.txt.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.PHONY: book test test-gpu tangle weave bench clean env

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

# Two processes run side by side, one thread each; spinning OpenMP threads would slow both tenfold.
export OMP_NUM_THREADS ?= 1
export OMP_WAIT_POLICY ?= passive
export PYTHONUNBUFFERED = 1
export GUIDED_DESCENT_PROGRESS = 0

# The cell limit is for hangs, not for speed: a loaded machine may be many times slower.
NBVAL := --nbval-current-env --nbval-cell-timeout 900 --dist loadscope

book: $(READY)
	$(BIN)/python -m literate.site

test: $(READY)
	@echo "── ruff"
	$(BIN)/ruff check .
	@echo "── literate check"
	$(BIN)/python -m literate check
	@echo "── tests and notebooks"
	@command -v chromium chromium-browser google-chrome >/dev/null || \
		echo "No Chromium found: the browser tests are skipped. Debian and Ubuntu: apt-get install chromium"
	$(BIN)/pytest -n 2 --nbval $(NBVAL) tests chapters

# Every notebook (outputs that differ are no failure, errors are) and the contract, on CUDA.
test-gpu: $(READY)
	$(BIN)/python -c "import sys, torch; sys.exit(None if torch.cuda.is_available() else 'make test-gpu needs a CUDA device; torch sees none')"
	$(BIN)/pytest -n 2 --nbval-lax $(NBVAL) chapters tests/contract

# Our optimizers against named peers, as ratios measured in one run, on two threads (some minutes: it compiles).
bench: $(READY)
	OMP_NUM_THREADS=2 PYTHONPATH=. $(BIN)/python benchmarks/step_time.py
	OMP_NUM_THREADS=2 PYTHONPATH=. $(BIN)/python benchmarks/curvature_operators.py
	OMP_NUM_THREADS=2 PYTHONPATH=. $(BIN)/python benchmarks/kfac_step.py
	OMP_NUM_THREADS=2 PYTHONPATH=. $(BIN)/python benchmarks/shampoo_step.py

tangle weave: $(READY)
	$(BIN)/python -m literate $@

env: $(READY)

$(READY): requirements.txt pyproject.toml
	@echo "── $(VENV): installing requirements.txt (a minute or three)"
	$(PYTHON) -c "import sys; sys.exit(None if sys.version_info >= (3, 11) else f'Python 3.11 or newer is needed, this is {sys.version.split()[0]}; run make PYTHON=python3.12 ...')"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --progress-bar off -q -r requirements.txt
	$(BIN)/python -m pip install --disable-pip-version-check -q --no-deps --no-build-isolation -e .
	@touch $@

clean:
	rm -rf _build build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
