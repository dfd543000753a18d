# `make demo` and `make test` do their own set-up, from a fresh clone on.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PY := $(BIN)/python
PIP_INSTALL := $(PY) -m pip install -qq --disable-pip-version-check -c constraints.txt

# Stamps: what is installed stays good until one of these two files changes.
PINS := pyproject.toml constraints.txt
RUNTIME := $(VENV)/.installed
DEV := $(VENV)/.installed-dev

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test test-slow bench lint format clean

help: ## list these commands
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 18

demo: $(RUNTIME) ## watch a run go wrong and be rescued
	@$(BIN)/grpo-watchdog demo

test: lint ## everything that CI runs: style, types, layers, tests, the built wheel
	$(PY) -m pytest --numprocesses=auto --maxprocesses=4 --dist=loadfile

test-slow: $(DEV) ## the tests marked slow
	$(PY) -m pytest -m slow || [ $$? -eq 5 ] # 5: none is marked slow yet

bench: $(RUNTIME) ## every figure of the README
	@for script in $(sort $(wildcard benchmarks/*.py)); do \
		echo "== $$script"; $(PY) "$$script" || exit 1; \
	done

lint: $(DEV) ## style, types and layers
	$(PY) -m ruff check
	$(PY) -m ruff format --check
	$(PY) -m mypy
	$(BIN)/lint-imports --no-logo

format: $(DEV) ## mend what ruff can mend
	$(PY) -m ruff check --fix
	$(PY) -m ruff format

clean: ## back to a fresh clone: removes .venv, caches and builds
	rm -rf $(VENV) build dist .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# --- set-up -------------------------------------------------------------------------------------

# The pip of the environment is written last, so where it is, the environment is whole.
$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo "grpo-watchdog needs Python 3.11 or newer; try: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; \
		exit 1; }
	@$(PYTHON) -m venv $(VENV)

$(RUNTIME): $(PINS) | $(BIN)/pip
	@echo "Installing grpo-watchdog into $(VENV) (minutes at first, nothing after that) ..."
	@$(PIP_INSTALL) -e .
	@touch $@

$(DEV): $(PINS) | $(BIN)/pip
	@echo "Installing grpo-watchdog and its tools into $(VENV) (minutes at first) ..."
	@$(PIP_INSTALL) -e '.[dev]'
	@touch $(RUNTIME) $@
