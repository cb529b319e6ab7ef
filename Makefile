# Everything is installed in .venv below this directory and nowhere else; root is not needed.
#
#   make demo    train on two ranks, kill one, compare the result with an undisturbed run
#   make test    ruff, mypy and all tests but the slow ones

PYTHON ?= python3
PADDLE ?= paddlepaddle==3.3.1
JOBS ?= 3
SEEDS ?= 20000
TRIALS ?= 10
FAULTS ?= 30
PEER_TRIALS ?= $(TRIALS)
SLOW_TRIALS ?= 2

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.made-for
VENV26 := .venv-2.6
STAMP26 := $(VENV26)/.made-for
STAMPTORCH := .venv-torch/.made-for
PIP := install -qq --disable-pip-version-check --no-input

.DEFAULT_GOAL := help
.PHONY: help setup setup-2.6 setup-torch bench-checkpoint bench-recovery bench-serving soak demo test lint test-slow test-2.6 sim chaos chaos-all chaos-checkpoint clean

help:
	@sed -n 's/^\([a-z][a-z0-9.-]*\):.*## /\1	/p' $(MAKEFILE_LIST) | expand -t 12

setup: $(STAMP) ## build .venv with the package, Paddle for the CPU and all tools

setup-2.6: $(STAMP26) ## build .venv-2.6, the same on Paddle 2.6.2

$(STAMP): pyproject.toml Makefile
	@echo "setup: building $(VENV) with $(PADDLE); the first time takes a few minutes"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	  || { echo "setup: Python 3.10 or later is needed; name one with make PYTHON=..." >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) \
	  || { rm -rf $(VENV); echo "setup: on Debian, apt-get install python3-venv" >&2; exit 1; }
	@echo "setup: 1 of 3, Paddle"
	@$(BIN)/python -m pip $(PIP) "$(PADDLE)"
	@echo "setup: 2 of 3, paddle_ft, what it needs, and what its tests need"
	@$(BIN)/python -m pip $(PIP) --editable ".[cpu,serve,onnx,test]" "$(PADDLE)"
	@echo "setup: 3 of 3, check that everything fits together"
	@$(BIN)/python -m pip check
	@touch $(STAMP)

$(STAMP26): pyproject.toml Makefile
	@echo "setup-2.6: building $(VENV26) with paddlepaddle 2.6.2"
	@test -x $(VENV26)/bin/python || $(PYTHON) -m venv $(VENV26)
	@$(VENV26)/bin/python -m pip $(PIP) --editable ".[cpu,serve,test]" "paddlepaddle==2.6.2" "protobuf<7"
	@$(VENV26)/bin/python -m pip check
	@touch $(STAMP26)

setup-torch: $(STAMPTORCH) ## build .venv-torch, for the rows of PyTorch in the benchmark

$(STAMPTORCH): Makefile
	@echo "setup-torch: building .venv-torch with PyTorch for the CPU and torchft"
	@test -x .venv-torch/bin/python || $(PYTHON) -m venv .venv-torch
	@.venv-torch/bin/python -m pip $(PIP) "torch==2.13.0" "torchft==0.2.0" numpy
	@touch $(STAMPTORCH)

bench-checkpoint: setup ## checkpoints against dd, boto3, memcpy, paddle.save and PyTorch, into docs/
	@$(BIN)/python -m bench.checkpoint

bench-recovery: setup ## recovery against paddle.distributed.launch, torchrun and torchft, into docs/
	@$(BIN)/python -m bench.recovery --trials $(TRIALS) --peer_trials $(PEER_TRIALS) --slow_trials $(SLOW_TRIALS)

bench-serving: setup ## serving under kills, stops, promotions, without etcd; batching, the hop, OCR; hours; into docs/
	@$(BIN)/python -m bench.serving $(if $(ONLY),--only $(ONLY))

soak: setup ## long jobs: 10,000 steps in which nobody is slow, 500 kills, a kill every 30 s; an hour; into docs/
	@$(BIN)/python -m bench.recovery --soak --stragglers 20 --undisturbed_steps 10000 --faults 500 --goodput_s 600

demo: setup ## train digits on two ranks, kill one worker, compare the weights
	@$(BIN)/python examples/demo.py

lint: setup ## ruff and mypy --strict
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

test: lint ## lint, then every test but the slow ones
	@$(BIN)/python -m pytest -n $(JOBS)

test-slow: setup ## the slow tests
	@$(BIN)/python -m pytest -n $(JOBS) -m slow

test-2.6: setup setup-2.6 ## examples, restart, resume, optimizers and serving on Paddle 2.6.2
	@$(VENV26)/bin/python -m pytest -n $(JOBS) -m "paddle and not slow" -k "examples or stop_saves" \
	  tests/integration/test_examples.py tests/integration/test_launch.py
	@$(VENV26)/bin/python -m pytest -n $(JOBS) -m slow tests/integration/test_serve_digits.py
	@$(BIN)/python -m pytest -n $(JOBS) -m slow -k "paddle_26 or 2.6" \
	  tests/integration/test_session_resume.py tests/integration/test_session_numbers.py

sim: setup ## SEEDS=20000 runs of the simulated cluster, and a quarter as many of the serving group, on two cores
	@half=$$(( $(SEEDS) / 2 )); eighth=$$(( $(SEEDS) / 8 )); \
	{ $(BIN)/python -m tests.sim.run --seeds $$half && \
	  $(BIN)/python -m tests.sim.serve.run --seeds $$eighth; } & first=$$!; \
	{ $(BIN)/python -m tests.sim.run --from $$half --seeds $$(( $(SEEDS) - half )) && \
	  $(BIN)/python -m tests.sim.serve.run --from $$eighth --seeds $$eighth; }; second=$$?; \
	wait $$first && exit $$second

chaos: setup ## FAULTS=30 random faults of every kind on three nodes in network namespaces (root); 5 minutes
	@FAULTS=$(FAULTS) $(BIN)/python -m pytest -n 0 -s -rs -m slow -k random tests/chaos/test_network_faults.py

chaos-all: setup ## the same, each kind alone as well, and on one and two launchers without namespaces
	@FAULTS=$(FAULTS) $(BIN)/python -m pytest -n 0 -s -rs -m slow tests/chaos/test_network_faults.py tests/chaos/test_faults.py

chaos-checkpoint: setup ## every fault of store, workers, launchers, 50 times at random; 20 minutes
	@rows=$$(mktemp -d -t paddle_ft-chaos-XXXXXX); \
	CHAOS_REPORT=$$rows $(BIN)/python -m pytest -n $(JOBS) -m slow tests/chaos/test_checkpoint_store.py \
	  tests/chaos/test_checkpoint_job.py; \
	result=$$?; $(BIN)/python -m tests.chaos.report $$rows; rm -rf $$rows; exit $$result

clean: ## remove what builds and runs left, but not the environments
	@rm -rf .demo .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist log checkpoints
