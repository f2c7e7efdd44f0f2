# The project's commands. Everything runs in .venv, which the first of them makes; nothing else is touched.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
DEMO ?= runs/demo

.PHONY: help install demo test test-oldest nightly gpu bench bench-gpu lint format clean

help:  ## list these commands
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

install: $(INSTALLED)  ## make .venv with everything the main job and the tests need

# DS_BUILD_OPS=0: DeepSpeed's C++ and CUDA operators are compiled on first use, not at installation. torch-fidelity comes
# without what it depends on: its Inception, all we use, needs no torchvision, and one that isn't built for this very torch
# (PyPI's beside a CPU build) breaks diffusers.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: $(PYTHON) is older than Python 3.11; name a newer one: make PYTHON=python3.11 ..." >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	DS_BUILD_OPS=0 $(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps torch-fidelity
	@touch $@

# On a CPU two ranks with half of the cores each are a sixth faster than one with all: small products don't fill two threads.
DEMO_RANKS := $(if $(shell command -v nvidia-smi),,--num_accelerators 2)
demo: $(INSTALLED)  ## train on the embedded digits, then judge the samples (four minutes on two fast CPU cores, ten on slow ones)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/deepspeed $(DEMO_RANKS) launch/train.py --ds_config launch/zero2.json --out $(DEMO)
	$(BIN)/mpdit evaluate $(DEMO)

# worksteal: a worker that has done its half of the tests takes some of the other's.
PYTEST := $(BIN)/python -m pytest
PARALLEL := -n auto --maxprocesses 8 --dist worksteal

test: $(INSTALLED)  ## run the tests (minutes), without those of make nightly
	$(PYTEST) -m "not slow" $(PARALLEL)

# The oldest of what kernels are compiled and interpreted by, as pyproject.toml claims them; the rest as constraints.txt.
# PyPI's torch is a CUDA build, 5.5 GB with its libraries; the tests use no GPU where there is none.
OLDEST := torch|triton|numpy
OLDEST_VENV := .venv-oldest
OLDEST_PYTHON ?= python$(shell sed -n 's/^requires-python = ">=\(.*\)"/\1/p' pyproject.toml)
$(OLDEST_VENV)/.installed: pyproject.toml constraints.txt
	$(OLDEST_PYTHON) -m venv --clear $(OLDEST_VENV)
	sed -nE 's/^ +"($(OLDEST))>=([0-9.]+).*/\1==\2/p' pyproject.toml > $(OLDEST_VENV)/constraints.txt
	grep -vE '^($(OLDEST))==' constraints.txt >> $(OLDEST_VENV)/constraints.txt
	DS_BUILD_OPS=0 $(OLDEST_VENV)/bin/python -m pip install --quiet --constraint $(OLDEST_VENV)/constraints.txt \
		--editable '.[vae]' pytest pytest-benchmark pytest-xdist hypothesis
	@touch $@

test-oldest: $(OLDEST_VENV)/.installed  ## test kernels, model and benchmarks with the oldest Python, torch, triton, numpy
	$(OLDEST_VENV)/bin/python -m pytest -m "not slow" $(PARALLEL) tests/kernels tests/benchmarks tests/test_model*.py

PART ?=
KILLS ?= 100
NIGHTLY := kernels runs fuzz kills cuda faults oldest
nightly: $(INSTALLED)  ## what make test leaves out, in parts of 25 minutes at most: PART=kernels|runs|fuzz|kills|cuda|faults|oldest
	@for part in $(or $(PART),$(NIGHTLY)); do $(MAKE) --no-print-directory nightly-$$part || exit; done

nightly-kernels: $(INSTALLED)  # kernels at every size, every candidate of the tuner, every architecture's budget
	$(PYTEST) -m slow $(PARALLEL) tests/kernels tests/planning tests/benchmarks tests/test_model*.py

nightly-runs: $(INSTALLED)  # real training, the demo's among it, and wide sets of everything else
	$(PYTEST) -m slow $(PARALLEL) tests --ignore-glob='tests/test_model*.py' \
		$(addprefix --ignore=tests/,kernels planning benchmarks fuzz cuda_standin)

nightly-fuzz: $(INSTALLED)  # thousands of drawn cases, new ones each time
	HYPOTHESIS_PROFILE=nightly $(PYTEST) $(PARALLEL) tests/fuzz

nightly-kills: $(INSTALLED)
	$(BIN)/python tests/crash.py --kills $(KILLS)

nightly-oldest: test-oldest

nightly-cuda:  # launches, copies and waits of GPU code on a stand-in for CUDA, which needs PyPI's torch
	@if [ "$$(uname -sm)" != "Linux x86_64" ] || ! command -v gcc >/dev/null; then \
		echo "skipped: the stand-in for CUDA is for Linux on x86-64, and needs gcc"; \
	else \
		$(MAKE) --no-print-directory $(OLDEST_VENV)/.installed && \
		$(OLDEST_VENV)/bin/python -m pytest -m slow tests/cuda_standin; \
	fi

nightly-faults: $(INSTALLED)  # what the tests are worth: each of some seventy planted faults must be found
	$(BIN)/python tests/planted_faults.py --jobs 2

# Needs no .venv: PYTHON must have torch, triton and pytest. Test files run side by side, the longest from the start, as
# most of their time is compiling; drawn tests need hypothesis and are left out without it. Tuning gets its time even when
# a test failed: it proves each kernel again before it publishes a figure. Attention's libraries are timed last, beside
# our kernel as tuned. The limits together are under eight minutes, and each tool's own, which leaves a report, ends first.
GPU_TEST_SECONDS ?= 165
gpu: export PYTHONPATH := $(CURDIR)/kernels
gpu:  ## on a machine with a GPU: prove the kernels there, then tune and time them (under eight minutes)
	@$(PYTHON) -c 'import pytest, torch, triton' 2>/dev/null || \
		{ echo "error: $(PYTHON) lacks torch, triton or pytest: name one that has them, make gpu PYTHON=..." >&2; exit 2; }
	@$(PYTHON) -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || \
		{ echo "error: no CUDA GPU here, and make gpu proves and times the kernels on one" >&2; exit 2; }
	@failed=0; drawn='*_drawn.py'; $(PYTHON) -c 'import hypothesis' 2>/dev/null && drawn=; \
	{ echo tests/kernels/test_gpu.py; \
	  find tests/kernels -name 'test_*.py' ! -name test_gpu.py ! -name "$$drawn" | sort; } | \
		timeout -s INT -k 10 $(GPU_TEST_SECONDS) xargs -P 8 -n 1 $(PYTHON) -m pytest -q -m "not slow" -p no:cacheprovider || \
		{ failed=1; echo "error: a test failed, or the tests took more than $(GPU_TEST_SECONDS) seconds" >&2; }; \
	timeout -s INT -k 5 220 $(PYTHON) -m tools.tune --minutes 3.4 || failed=1; \
	timeout -s INT -k 5 85 $(PYTHON) -m tools.tune --attention --minutes 1 || failed=1; \
	exit $$failed

# Needs no .venv either: PYTHON must have torch, triton, einops, numpy, pytest and pytest-benchmark. Called again with the
# same OUT it goes on where it was.
gpu-first: export PYTHONPATH := $(CURDIR):$(CURDIR)/kernels
gpu-first:  ## the first five minutes on a new GPU, into OUT=DIR: proofs, ceilings, tuning, the XL step; again for what is left
	@test -n "$(OUT)" || { echo "error: give a folder for what is found: make gpu-first OUT=DIR" >&2; exit 2; }
	@$(PYTHON) -c 'import einops, numpy, pytest, pytest_benchmark, torch, triton' 2>/dev/null || \
		{ echo "error: $(PYTHON) lacks torch, triton, einops, numpy, pytest or pytest-benchmark: name one that has them," \
			"make gpu-first PYTHON=..." >&2; exit 2; }
	@$(PYTHON) benchmarks/first.py $(OUT) $(PART)

bench: $(INSTALLED)  ## time everything: small sizes on a CPU (minutes), real ones on a GPU (long: see bench-gpu)
	$(BIN)/python -m pytest benchmarks/ --benchmark-only

# Needs no .venv: PYTHON must have torch, triton, einops, pytest and pytest-benchmark. BENCH passes options on, such as
# BENCH="--official ../MPDiT --memory-limit 40".
bench-gpu:  ## on a machine with a GPU: PART=kernels|block|forward|step|sampling|optimizer|loader, all by default
	@$(PYTHON) -c 'import einops, pytest, pytest_benchmark, torch, triton' 2>/dev/null || \
		{ echo "error: $(PYTHON) lacks torch, triton, einops, pytest or pytest-benchmark: name one that has them," \
			"make bench-gpu PYTHON=..." >&2; exit 2; }
	@$(PYTHON) benchmarks/gpu.py $(PART) $(BENCH)

lint: $(INSTALLED)  ## check style, types, and that the rooms import only downwards
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	PYTHONPATH=kernels $(BIN)/lint-imports --no-logo

format: $(INSTALLED)  ## mend style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove .venv, caches and build leftovers; runs/ stays
	rm -rf $(VENV) $(OLDEST_VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis .cache benchmarks/.cache
