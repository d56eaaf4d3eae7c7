# `make train` and `make test` do all the set-up on a fresh machine that has Python >= 3.11 and make.
PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python
export JAX_COMPILATION_CACHE_DIR ?= $(CURDIR)/.cache/jax
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS ?= 0.5
# What a contributor runs before each commit: the house, configurations, command lines in this process, mathematics.
QUICK := tests/test_house.py tests/test_package.py tests/test_fields.py tests/test_yaml_file.py \
	tests/training/test_config.py tests/cli/test_hostile_values.py tests/cli/test_plot.py \
	tests/ops/test_rope.py tests/ops/test_projection.py tests/ops/test_documents.py tests/model/test_language_model.py

.PHONY: train test test-all quick test-slow test-lm-eval test-reference lint format docs wheel clean

train: $(VENV)/ready
	$(PY) train.py --config configs/quickstart.yaml

test: $(VENV)/ready lint
	$(PY) -m pytest -m "not long and not slow and not reference" --numprocesses 2 --dist loadfile

# What continuous integration runs: the tests that take some seconds each as well.
test-all: $(VENV)/ready lint
	$(PY) -m pytest -m "not slow and not reference" --numprocesses 2 --dist loadfile

quick: $(VENV)/ready lint
	$(PY) -m pytest -m "not long and not slow and not reference" --numprocesses 2 --dist loadfile $(QUICK)

test-slow: $(VENV)/ready
	$(PY) -m pytest -m "slow and not reference"

test-reference: $(VENV)/ready
	$(PY) -m pip install --quiet -c constraints.txt -e '.[reference]'
	$(PY) -m pytest -m reference

# In an environment of its own: the package brings much that nothing else needs.
test-lm-eval:
	$(PYTHON) -m venv $(VENV)-lm-eval
	$(VENV)-lm-eval/bin/python -m pip install --quiet -c constraints.txt -e '.[test,lm-eval]'
	$(VENV)-lm-eval/bin/python -m pytest tests/evaluation/lm_eval_harness.py

lint: $(VENV)/ready
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

format: $(VENV)/ready
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

# The pages need no network to be read: open build/docs/index.html.
docs: $(VENV)/ready
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict --site-dir build/docs

wheel: $(VENV)/ready
	$(PY) -m build

# The environment is made again whenever the versions it is made from change.
$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --upgrade pip
	$(PY) -m pip install --quiet -c constraints.txt -e '.[test]'
	touch $@

clean:
	rm -rf $(VENV) .cache .mypy_cache .ruff_cache .pytest_cache build dist
