# make train       from nothing to a trained, evaluated T6 in minutes (no GPU, no data download)
# make test        the fast tests, for before each commit
# make test-all    all tests; make test-list shows which tests each of the two runs
# make setup       only .venv; PYTHON=python3.12 chooses the Python (3.11 to 3.13)
# make lint        ruff

PYTHON ?= python3
RUN ?= first
ARGS ?=
BIN := .venv/bin
# For the kernels' tests on a CPU; the CUDA build of torch brings its own.
TRITON := triton==3.7.1

PYTEST := $(BIN)/python -m pytest --numprocesses=auto --dist=loadfile --no-loadscope-reorder

.PHONY: train test test-all test-list setup lint clean

train: .venv/.installed
	$(BIN)/python train.py run.name=$(RUN) $(ARGS)
	$(BIN)/python -m eval.run run=runs/$(RUN)
	$(BIN)/python -m eval.run run=runs/$(RUN) suite=builtin_cloze
	$(BIN)/python -m eval.sample run=runs/$(RUN) prompt="The"
	@echo "The loss plot is runs/$(RUN)/loss.png"

test: .venv/.installed-dev
	$(PYTEST) -m "not slow" $(ARGS)

test-all: .venv/.installed-dev
	$(PYTEST) $(ARGS)

test-list: .venv/.installed-dev
	@echo "make test:"
	@$(BIN)/python -m pytest --collect-only --quiet -m "not slow" $(ARGS)
	@echo "only make test-all:"
	@$(BIN)/python -m pytest --collect-only --quiet -m slow $(ARGS)

setup: .venv/.installed

lint: .venv/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || \
		{ echo "Python 3.11, 3.12 or 3.13 is needed, and $(PYTHON) is $$($(PYTHON) -V 2>&1): make PYTHON=python3.12 ..." >&2; exit 2; }
	$(PYTHON) -m venv .venv

.venv/.installed: requirements.txt | .venv/bin/python
	$(BIN)/python -m pip install --quiet -r requirements.txt
	@touch $@

.venv/.installed-dev: requirements-dev.txt requirements.txt | .venv/bin/python
	$(BIN)/python -m pip install --quiet -r requirements-dev.txt
	@$(BIN)/python -c "import triton" 2>/dev/null || $(BIN)/python -m pip install --quiet $(TRITON)
	@touch .venv/.installed $@

clean:
	rm -rf .venv
