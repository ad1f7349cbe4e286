# `make run` and `make test` do all the set-up they need; neither needs root. See README.md.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export OMP_NUM_THREADS ?= 2
export PYTHONUNBUFFERED := 1

.PHONY: run test test-slow test-long test-compose test-k8s images reproduce drill bench bench-gpu bench-peers lint format lock clean

run: $(VENV)/.ready
	$(BIN)/python -m trainer.run

# Two files of tests at a time, a core each; those that measure time or take 10 GB of memory follow one by one.
PAIR := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q --numprocesses 2 --dist loadfile

test: $(VENV)/.ready .cache/checkov/.ready
	$(PAIR) -m "not slow and not long and not drill and not gpu"

test-slow: $(VENV)/.ready
	$(PAIR) -m "slow and not alone and not drill and not gpu"
	$(BIN)/python -m pytest -q -m "(drill or (slow and alone)) and not gpu"

# Every full-size recipe on the CPU, those of d16 with all ten scales; some minutes each.
test-long: $(VENV)/.ready
	$(BIN)/python -m pytest -q -m "long and not gpu"

# The real thing, where there is a container engine.
test-compose: $(VENV)/.ready
	$(BIN)/python -m pytest -q tests/deploy/compose_run.py

test-k8s: $(VENV)/.ready
	$(BIN)/python -m tests.deploy.k8s_play

# bake and not `compose build`: the labels of that would make any container of these images one of the project's.
images:
	docker buildx bake -f docker-compose.yml

# The paper's experiments in miniature: fills docs/results.md and writes runs/reproduce/report.html. Goes on where it was stopped.
SEEDS ?= 0
reproduce: $(VENV)/.ready  # which gives each run its share of the cores
	env -u OMP_NUM_THREADS $(BIN)/python -m trainer.reproduce --seeds $(SEEDS) --results docs/results.md

# What the machine at hand can measure; alone on it, or the seconds mean little. benchmarks/README.md has the tables.
bench: $(VENV)/.ready
	$(BIN)/python -m benchmarks.train_step --model mini
	$(BIN)/python -m benchmarks.step_ratios
	$(BIN)/python -m benchmarks.step_forecast --model d16
	$(BIN)/python -m benchmarks.overlap
	$(BIN)/python -m benchmarks.idle_latency
	$(BIN)/python -m benchmarks.serving
	$(BIN)/python -m benchmarks.queue
	$(BIN)/python -m benchmarks.behind --reward mini-clip

# Likewise on a GPU: agreement in bfloat16, training steps at full size, ViT-L/14 behind the service.
bench-gpu: $(VENV)/.ready
	$(BIN)/python -m benchmarks.on_gpu runs/on_gpu --minutes 30

# The environments that benchmarks.serving compares with; several GB, because each has a torch.
bench-peers: $(VENV)/.ready
	for peer in litserve bentoml rayserve; do \
		$(BIN)/uv venv --quiet --allow-existing --python $(BIN)/python .cache/peers/$$peer && \
		$(BIN)/uv pip install --quiet --python .cache/peers/$$peer/bin/python -r benchmarks/peers/$$peer/requirements.txt \
			|| exit 1; \
	done

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

# checkov wants other versions of packages that we use: an environment of its own.
.cache/checkov/.ready: tests/deploy/checkov.lock $(VENV)/.ready
	$(BIN)/uv venv --quiet --clear --python $(BIN)/python .cache/checkov
	$(BIN)/uv pip install --quiet --python .cache/checkov/bin/python --require-hashes -r tests/deploy/checkov.lock
	touch $@

lock: $(VENV)/.ready
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --all-extras --no-emit-index-url \
		pyproject.toml --output-file requirements.lock
	echo checkov==3.3.30 | $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes \
		--no-annotate --no-header --no-emit-index-url - --output-file tests/deploy/checkov.lock

clean:
	rm -rf $(VENV) .cache .pytest_cache .mypy_cache .ruff_cache
