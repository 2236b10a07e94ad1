# make install | train | results MODALITY=speaker | test | test-slow | golden. Everything goes into .venv and runs/;
# PYTHON picks the interpreter.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/installed
DEVELOPMENT := .venv/installed-for-development
SOUND := .venv/installed-for-sound

.PHONY: install train results test test-slow lint golden clean

install: $(STAMP)

$(STAMP): pyproject.toml
	$(PYTHON) -c "import sys; sys.exit(None if sys.version_info >= (3, 11) else 'Python 3.11 or newer is needed: make PYTHON=python3.12 install')"
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --editable .
	touch $(STAMP)

$(DEVELOPMENT): $(STAMP)
	$(BIN)/pip install --quiet --disable-pip-version-check --editable ".[dev]"
	touch $(DEVELOPMENT)

$(SOUND): $(STAMP)
	$(BIN)/pip install --quiet --disable-pip-version-check --editable ".[audio]"
	touch $(SOUND)

train: $(STAMP)
	$(BIN)/python benchmarks/skin.py

results: $(SOUND) # make results MODALITY=speaker: real data out of Debian's packages, into docs/results.md
	@test -n "$(MODALITY)" || { echo "results: which? make results MODALITY=speaker (or spectrogram)"; exit 2; }
	$(BIN)/python -m benchmarks.results $(MODALITY)

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
