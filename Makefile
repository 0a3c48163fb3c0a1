# make setup | demo | test | check | bench      (PYTHON=python3.12 and TORCH=... choose others)
PYTHON ?= python3
# PyTorch first and by itself: everything else accepts the one that is there. For NVIDIA GPUs: see README.md.
TORCH ?= torch==2.13.0
BIN := .venv/bin
export HF_HUB_OFFLINE := 1

.PHONY: setup dev demo test check bench clean

setup: .venv/setup
dev: .venv/dev
demo: setup
	$(BIN)/sqplus demo
test: dev
	$(BIN)/python -m pytest --numprocesses auto --dist worksteal
check: dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_dependencies.py
bench: setup
	$(BIN)/python tools/bench_accuracy.py
	$(BIN)/python tools/bench_memory.py 1b --work .bench
clean:
	rm -rf .venv .bench build

.venv/setup: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$(TORCH)" "setuptools>=77"
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable .
	touch $@
.venv/dev: .venv/setup
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable ".[dev]"
	touch $@
