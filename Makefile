# `make train` and `make test` do all the set-up on a fresh machine that has Python >= 3.11 and make.
PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python
export JAX_COMPILATION_CACHE_DIR ?= $(CURDIR)/.cache/jax
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS ?= 0.5

.PHONY: train test test-slow lint format clean

train: $(VENV)/ready
	$(PY) train.py --config configs/quickstart.yaml

test: $(VENV)/ready lint
	$(PY) -m pytest -m "not slow" --numprocesses 2 --dist loadfile

test-slow: $(VENV)/ready
	$(PY) -m pytest -m slow

lint: $(VENV)/ready
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

format: $(VENV)/ready
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

# The environment is made again whenever the versions it is made from change.
$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --upgrade pip
	$(PY) -m pip install --quiet -c constraints.txt -e '.[test]'
	touch $@

clean:
	rm -rf $(VENV) .cache .mypy_cache .ruff_cache .pytest_cache
