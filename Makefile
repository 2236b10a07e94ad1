# make install | train | test | test-slow | golden. Everything goes into .venv and runs/; PYTHON picks the interpreter.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/installed
DEVELOPMENT := .venv/installed-for-development

.PHONY: install train test test-slow lint golden clean

install: $(STAMP)

$(STAMP): pyproject.toml
	$(PYTHON) -c "import sys; sys.exit(None if sys.version_info >= (3, 11) else 'Python 3.11 or newer is needed: make PYTHON=python3.12 install')"
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --editable .
	touch $(STAMP)

$(DEVELOPMENT): $(STAMP)
	$(BIN)/pip install --quiet --disable-pip-version-check --editable ".[dev]"
	touch $(DEVELOPMENT)

train: $(STAMP)
	$(BIN)/python benchmarks/skin.py

lint: $(DEVELOPMENT)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint # two processes of one thread each: with more, they take turns on the cores of a small machine
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist worksteal

test-slow: $(DEVELOPMENT)
	$(BIN)/python -m pytest -m slow -rs

golden: $(DEVELOPMENT) # the losses that tests/test_golden.py compares with
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.test_golden

clean:
	rm -rf .venv runs
