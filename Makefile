# make install | train | test | test-slow | golden. Everything goes into .venv and runs/; PYTHON picks the interpreter.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/installed

.PHONY: install train test test-slow lint golden clean

install: $(STAMP)

$(STAMP): pyproject.toml
	$(PYTHON) -c "import sys; sys.exit(None if sys.version_info >= (3, 11) else 'Python 3.11 or newer is needed: make PYTHON=python3.12 install')"
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --editable ".[dev]"
	touch $(STAMP)

train: $(STAMP)
	$(BIN)/python benchmarks/skin.py

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(BIN)/python -m pytest --numprocesses 2 --dist worksteal

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m slow -rs

golden: $(STAMP) # the losses that tests/test_golden.py compares with
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.test_golden

clean:
	rm -rf .venv runs
