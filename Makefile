# `make demo` and `make test` need Python 3.11 and make; they set the rest up in .venv, and a second call starts at once.
SHELL := /bin/bash
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
# Twice quiet: one quiet still warns about every index that a machine's own pip settings name in vain.
PIP := $(BIN)/python -m pip -qq --no-input --disable-pip-version-check

# Where bytecode is not kept, each process compiles torch and transformers anew: six seconds of a core.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test soak bench lab lock clean chromium

demo: $(READY)
	@$(BIN)/interp-kernel demo

test: $(READY) chromium
	@echo -n "ruff:   "; $(BIN)/ruff check .
	@echo -n "mypy:   "; $(BIN)/mypy -n 2
	@echo "pytest:"; $(BIN)/pytest -q -n 3 --dist loadfile $(PYTEST_ARGS)

soak: $(READY)
	@$(BIN)/pytest -q -m soak --timeout 3600 $(PYTEST_ARGS)

bench: $(READY)
	@$(BIN)/python -m benchmarks

lab: $(READY)
	@$(BIN)/jupyter lab $(if $(filter 0,$(shell id -u)),--allow-root) notebooks/quickstart.ipynb

$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python %d.%d was found as \"$(PYTHON)\"; 3.11 or newer is needed. Name one with: make PYTHON=python3.12" % sys.version_info[:2])'
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || { echo "Making .venv ..."; $(PYTHON) -m venv --clear .venv; }
	@echo "Installing $$(grep -c == requirements.lock) pinned packages into .venv (a minute or two, 2 GB) ..."
	@$(PIP) install --no-compile -r requirements.lock
	@echo "Installing interp-kernel ..."
	@$(PIP) install --no-build-isolation --no-deps -e .
	@touch $@

# Chromium is for the browser tests alone. Where it can't be installed they are skipped, and say so.
chromium:
	@if command -v chromium chromium-browser google-chrome >/dev/null; then :; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  echo "Installing Chromium for the browser tests ..."; \
	  { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
	    chromium fonts-dejavu-core; } >/dev/null 2>&1 || echo "Chromium could not be installed."; \
	fi

# torch stays at the release whose CPU build the CI machine holds; what it brings for GPUs is its own affair.
lock: $(READY)
	@{ echo "# Every package of .venv, for Python 3.11 and newer. Made by \`make lock\` from pyproject.toml."; \
	  echo "# What a torch build brings for its GPUs is left to torch, so that the CPU build needs none of it."; \
	  $(BIN)/uv pip compile -q pyproject.toml --extra peft --extra lab --extra modal --extra agents --extra wandb --extra png --extra dev --universal --python-version 3.11 \
	    --no-annotate --no-header -c <(echo torch==2.13.0) | grep -vE '^(nvidia|triton|cuda)'; } > requirements.new
	@mv requirements.new requirements.lock

clean:
	rm -rf .venv out dist build .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
