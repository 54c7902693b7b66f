# Needs Python 3.11 or newer and make; everything else is installed into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# More OpenMP threads than cores make everything ten times slower: tests run in processes of one thread each.
TEST_WORKERS ?= 2

# What `make bench` measures; one process with so many threads, beside executors with processes of their own.
BENCH_THREADS ?= 2

.PHONY: run test test-all lint bench docs clean

run: $(VENV)/run.stamp
	$(BIN)/fedftg compare default_base default

test: $(VENV)/dev.stamp
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(TEST_WORKERS)

# With what takes minutes or needs Ray (processes that are killed, Flower's own simulation), and the kept results' tables.
test-all: $(VENV)/all.stamp
	OMP_NUM_THREADS=1 FEDFTG_TEST_ALL=1 $(BIN)/python -m pytest -n $(TEST_WORKERS)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest benchmarks/accuracy benchmarks/deployed benchmarks/oneshot benchmarks/speed -p no:xdist

lint: $(VENV)/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/dev.stamp
	OMP_NUM_THREADS=$(BENCH_THREADS) $(BIN)/python benchmarks/speed/bench.py --threads $(BENCH_THREADS) $(BENCH)

# The site in site/, from docs/ and zensical.toml: python3 -m http.server -d site
docs: $(VENV)/docs.stamp
	$(BIN)/python docs/build.py

$(VENV)/bin/pip:
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "fedftg needs Python 3.11 or newer, this is " + sys.version.split()[0] + "; use make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/run.stamp: $(VENV)/bin/pip pyproject.toml constraints.txt
	$(BIN)/pip install --quiet -c constraints.txt -e .
	touch $@

$(VENV)/dev.stamp: $(VENV)/run.stamp
	$(BIN)/pip install --quiet -c constraints.txt -e .[dev]
	touch $@

$(VENV)/all.stamp: $(VENV)/dev.stamp
	$(BIN)/pip install --quiet -c constraints.txt -e .[dev,simulation,docs]
	touch $@

$(VENV)/docs.stamp: $(VENV)/run.stamp
	$(BIN)/pip install --quiet -c constraints.txt -e .[docs]
	touch $@

clean:
	rm -rf $(VENV) build site dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
