# The two commands of the README are `make quickstart` and `make test`; both set up .venv by themselves.
PYTHON ?= python3.11

.PHONY: help quickstart test test-all check install clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

quickstart: .venv/installed  ## from photos to a generated picture, with a tiny model, on a CPU
	@.venv/bin/bitdance quickstart

test: check  ## linters, types, and all tests (two workers, one thread each)
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n 2 --dist loadfile --durations 15

test-all: check  ## also the long tests: ten kills, many ranks, all faults of a cluster (forty minutes)
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n 2 --dist loadfile --durations 15 -m ""

check: .venv/installed  ## format, lint, types
	.venv/bin/ruff format --check --quiet .
	.venv/bin/ruff check --quiet .
	.venv/bin/mypy --no-error-summary

install: .venv/installed  ## a .venv with everything pinned

.venv/installed: pyproject.toml requirements/cpu.txt requirements/overrides.txt requirements/install.sh
	@echo "setting up .venv (once)"
	@requirements/install.sh $(PYTHON)
	@touch $@

clean:  ## remove what quickstart has made
	rm -rf runs/quickstart
