# Every target sets up what it needs first; a second call finds it done. `make` alone prints this list.
#   PYTHON=python3.12   interpreter the virtual environment is made with
#   VENV=path           virtual environment (default .venv)
#   SYSTEM=no           install no system packages
#   WORKERS=n           test processes (default 2)

VENV ?= .venv
WORKERS ?= 2
SYSTEM ?= yes
BIN := $(VENV)/bin

export VENV SYSTEM
export PYTHON WORKERS

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-all test-low lint clean

help:  ## print the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

setup:  ## virtual environment, Python packages, FFCV, native decoder (system packages where that is allowed)
	@bash .ci/setup.sh

demo: setup  ## prune a small ResNet on real digits: 5 levels, a table, a plot and levels.csv
	OMP_NUM_THREADS=1 $(BIN)/torchrun --standalone --nproc-per-node=2 harness.py --config configs/quickstart.yaml

test: export TESTS := yes
test: setup  ## the tests, without the slow ones
	@bash .ci/test.sh quick

test-all: export TESTS := yes
test-all: setup  ## all tests, then all of them again with the lowest versions requirements.txt allows
	@bash .ci/test.sh all
	@$(MAKE) --no-print-directory test-low

test-low:  ## all tests with the lowest versions requirements.txt allows (in .venv-low)
	@VENV=.venv-low LOWEST=yes bash .ci/setup.sh
	@VENV=.venv-low bash .ci/test.sh all

lint: setup  ## ruff (rules and format) and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:  ## remove caches and build output; runs, data and environments stay
	rm -rf build .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage benchmarks/out
	find . -name __pycache__ -type d -not -path './.venv*' -prune -exec rm -rf {} +
