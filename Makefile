# The project's commands. Everything runs in .venv, which the first of them makes; nothing else is touched.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
DEMO ?= runs/demo

.PHONY: help install demo test test-slow lint format clean

help:  ## list these commands
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

install: $(INSTALLED)  ## make .venv with everything the main job and the tests need

# DS_BUILD_OPS=0: DeepSpeed's C++ and CUDA operators are compiled on first use, not at installation.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: $(PYTHON) is older than Python 3.11; name a newer one: make PYTHON=python3.11 ..." >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	DS_BUILD_OPS=0 $(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: $(INSTALLED)  ## train on the embedded digits, then judge the samples (about five minutes on two CPU cores)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/deepspeed launch/train.py --ds_config launch/zero2.json --out $(DEMO)
	$(BIN)/mpdit evaluate $(DEMO)

test: $(INSTALLED)  ## run the tests (minutes)
	$(BIN)/python -m pytest -m "not slow"

test-slow: $(INSTALLED)  ## run the tests that train for real
	$(BIN)/python -m pytest -m slow

lint: $(INSTALLED)  ## check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED)  ## mend style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove .venv, caches and build leftovers; runs/ stays
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
