# `make run` and `make test` do all the set-up they need; neither needs root. See README.md.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export OMP_NUM_THREADS ?= 2
export PYTHONUNBUFFERED := 1

.PHONY: run test test-slow drill lint format lock clean

run: $(VENV)/.ready
	$(BIN)/python -m trainer.run

test: $(VENV)/.ready
	$(BIN)/python -m pytest -q -m "not slow and not drill and not gpu"

test-slow: $(VENV)/.ready
	$(BIN)/python -m pytest -q -m "(slow or drill) and not gpu"

# The long form of what tests/drills and tests/fuzz do in a minute each; about a quarter of an hour.
drill: $(VENV)/.ready
	$(BIN)/python -m tests.drills --kills 100
	$(BIN)/python -m tests.fuzz --requests 100000

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# uv only fetches faster; every file is held to the hash in the lock.
$(VENV)/.ready: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if v >= (3, 11) else f"Python {v[0]}.{v[1]} is too old: 3.11 or newer is needed; name one with make PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "uv>=0.5,<1"
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python --require-hashes -r requirements.lock
	touch $@

lock: $(VENV)/.ready
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --all-extras --no-emit-index-url \
		pyproject.toml --output-file requirements.lock

clean:
	rm -rf $(VENV) .cache .pytest_cache .mypy_cache .ruff_cache
