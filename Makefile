# make quickstart: train a small tool-using model here.   make test: lint, types and tests.
# make browser: Chromium for the tests of the report.
# make sglang: a CPU build of the SGLang server in an environment of its own.   make engine: its tests.
PYTHON ?= python3
VENV ?= .venv
# A CPU build of torch is enough without a GPU. Where pip offers one elsewhere, say so, for example
# make setup TORCH_ARGS="--index-url https://download.pytorch.org/whl/cpu"
TORCH ?= torch==2.13.0
TORCH_ARGS ?=
ARGS ?=
# Test files that run at a time; many start two to four ranks.
WORKERS ?= 2
BIN := $(VENV)/bin
RUNS := $(VENV)/.runs
STAMP := $(VENV)/.installed
# The newest megatron-core that is supported. From 0.17 on it asks for Python 3.12 and does without;
# from 0.18 on for triton, which no run on a CPU uses.
LATEST_MCORE ?= 0.19.2
LATEST_VENV ?= .venv-mcore-latest
LATEST_STAMP := $(LATEST_VENV)/.installed-$(LATEST_MCORE)

SGLANG_VENV ?= .venv-sglang
SGLANG_STAMP := $(SGLANG_VENV)/.installed
SGLANG_PINS := tests/support/sglang_cpu

.PHONY: setup bfcl browser sglang engine quickstart test test-mcore-latest lint format type pytest slow clean

setup: $(STAMP)

$(RUNS): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet $(TORCH_ARGS) $(TORCH)
	$(BIN)/pip install --quiet --editable .
	touch $(RUNS)

# What developers need besides (Triton alone is 200 MB).
$(STAMP): $(RUNS)
	$(BIN)/pip install --quiet --editable '.[dev]'
	touch $(STAMP)

# BFCL without the hundred dependencies of its package: what its backends and checkers need, in the
# versions that it names. For the suite and the environment "bfcl", and their tests.
bfcl: setup
	$(BIN)/pip install --quiet --no-deps bfcl-eval==2026.3.23 mpmath==1.3.0 tree_sitter==0.21.3 \
		tree-sitter-java==0.21.0 tree-sitter-javascript==0.21.4 'tenacity>=8.5' 'filelock>=3.20'

# The browser that the tests of the report drive; without it they are skipped.
browser:
	@command -v chromium >/dev/null || { [ "$$(id -u)" = 0 ] && apt-get update -qq \
		&& DEBIAN_FRONTEND=noninteractive apt-get install -y -qq chromium >/dev/null; } \
		|| echo "no Chromium, and apt-get could not install it: tests of the report are skipped"

sglang: $(SGLANG_STAMP)

$(SGLANG_STAMP): $(SGLANG_PINS)/server.txt $(SGLANG_PINS)/requirements.txt
	$(PYTHON) -m venv $(SGLANG_VENV)
	$(SGLANG_VENV)/bin/pip install --quiet $(TORCH_ARGS) $(TORCH)
	$(SGLANG_VENV)/bin/pip install --quiet --no-deps --requirement $(SGLANG_PINS)/server.txt
	$(SGLANG_VENV)/bin/pip install --quiet --requirement $(SGLANG_PINS)/requirements.txt
	touch $(SGLANG_STAMP)

quickstart: $(RUNS)
	PATH="$(abspath $(BIN)):$$PATH" examples/quickstart/run.sh $(ARGS)

test: lint type pytest

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

type: setup
	$(BIN)/mypy
	$(BIN)/mypy tools/*.py examples/smollm2_135m/*.py
	$(BIN)/mypy examples/scaling/*.py

pytest: setup
	$(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile $(ARGS)

engine: setup sglang
	$(BIN)/python -m pytest -q -m engine $(ARGS)

slow: setup
	$(BIN)/python -m pytest -q -m 'slow' $(ARGS)

$(LATEST_STAMP): pyproject.toml
	$(PYTHON) -m venv $(LATEST_VENV)
	$(LATEST_VENV)/bin/pip install --quiet $(TORCH_ARGS) $(TORCH)
	$(LATEST_VENV)/bin/pip install --quiet --editable '.[dev]'
	$(LATEST_VENV)/bin/pip install --quiet --no-deps --ignore-requires-python \
		megatron-core==$(LATEST_MCORE)
	touch $(LATEST_STAMP)

# What touches megatron-core, with another version of it than `make test` has.
test-mcore-latest: $(LATEST_STAMP)
	$(LATEST_VENV)/bin/python -m pytest -q tests/distributed tests/unit/trainer tests/unit/sync $(ARGS)

clean:
	rm -rf $(VENV) $(LATEST_VENV) $(SGLANG_VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
