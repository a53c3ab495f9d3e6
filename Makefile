# Two commands do everything from a fresh clone: `make train` and `make test`.
# PYTHON picks the interpreter of the virtual environment: make train PYTHON=python3.12
# ARGS is passed on: make train ARGS="--workers 2 --epochs 5", make tests ARGS="-k digits"

PYTHON ?= python3
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
CODE := src tests $(if $(wildcard benchmarks/*.py),benchmarks)
CHECKS := lint format types architecture tests

.DEFAULT_GOAL := help
.PHONY: help train test install fix clean $(CHECKS)

help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

train: $(STAMP) ## set up if needed, then train on real handwritten digits
	$(BIN)/shardwise train digits $(ARGS)

test: $(STAMP) ## every check that CI runs: lint, format, types, architecture, tests
	@failed=""; \
	for check in $(CHECKS); do \
	  echo "== $$check"; \
	  $(MAKE) --no-print-directory $$check || failed="$$failed $$check"; \
	done; \
	if [ -n "$$failed" ]; then echo "== failed:$$failed"; exit 1; fi; \
	echo "== all checks passed: $(CHECKS)"

lint: $(STAMP) ## ruff check
	$(BIN)/ruff check $(CODE)

format: $(STAMP) ## ruff format, without changing files
	$(BIN)/ruff format --check $(CODE)

types: $(STAMP) ## mypy in strict mode
	$(BIN)/mypy $(CODE)

architecture: $(STAMP) ## the floor plan: who imports whom, file and function sizes
	$(BIN)/pytest tests/test_architecture.py

tests: $(STAMP) ## all other tests, file by file on as many cores as there are, up to eight
	$(BIN)/pytest --ignore=tests/test_architecture.py --numprocesses auto --dist loadfile --no-loadscope-reorder $(ARGS)

fix: $(STAMP) ## format the code and repair what ruff can
	$(BIN)/ruff format $(CODE)
	$(BIN)/ruff check --fix $(CODE)

install: $(STAMP) ## only the virtual environment, with the versions of constraints.txt

clean: ## remove the virtual environment and all caches
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache build src/*.egg-info

# The stamp is touched last, so an interrupted installation is done again. torch goes first and alone: it is by far the
# largest, and where a machine has its own build of the pinned version, that build is found and then left in place.
$(STAMP): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "make: $(PYTHON) is not on the PATH: install Python 3.10 or newer, or say where it is: make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "make: $(PYTHON) is $$($(PYTHON) --version 2>&1): shardwise needs Python 3.10 or newer: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "make: $(PYTHON) cannot create virtual environments: install its venv package (Debian, Ubuntu: apt install python3-venv)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $(STAMP)
