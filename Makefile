# make demo: set up .venv and train a language model on real text. make test: set up the same and run the tests.

PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11 python; do \
	command -v $$p >/dev/null 2>&1 && $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
BIN := .venv/bin
TORCH := torch==2.13.0
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
# On Linux, PyPI's torch brings 3 GB of CUDA. Without an NVIDIA card the CPU build (0.2 GB) is tried first.
CPU_TORCH := [ "$$(uname -s)" != Linux ] || [ -e /dev/nvidiactl ] || $(INSTALL) --retries 0 --timeout 10 \
	--index-url https://download.pytorch.org/whl/cpu $(TORCH) >/dev/null 2>&1 || true

.PHONY: demo test check lint fuzz test-slow clean

demo: .venv/.core
	$(BIN)/kiem train --minutes 3.7 --out runs/demo

test: .venv/.dev
	$(BIN)/python -m pytest -q -n 2 -m "not slow and not gpu"

# The property tests, on examples not seen before.
fuzz: .venv/.dev
	KIEM_HYPOTHESIS=fuzz $(BIN)/python -m pytest -q -n 2 $$(grep -rl "^@given" tests)

test-slow: .venv/.dev
	$(BIN)/python -m pytest -q -m slow

# What CI runs: format, lint, types, then the tests.
check: lint test

lint: .venv/.dev
	$(BIN)/ruff format --check --quiet .
	$(BIN)/ruff check --quiet .
	$(BIN)/mypy --no-error-summary

clean:
	rm -rf .venv

.venv/bin/python:
	@[ -n "$(PYTHON)" ] || { echo "Kiem needs Python 3.11 or newer; none was found. Name one: make $(MAKECMDGOALS) PYTHON=/path/to/python"; exit 1; }
	$(PYTHON) -m venv .venv || { echo "No virtual environment: on Debian and Ubuntu, apt install python3-venv"; rm -rf .venv; exit 1; }

.venv/.core: pyproject.toml constraints.txt | .venv/bin/python
	@echo "Installing Kiem into .venv ..."
	@$(CPU_TORCH)
	@$(INSTALL) --editable .
	@touch $@

.venv/.dev: pyproject.toml constraints.txt | .venv/bin/python
	@echo "Installing Kiem and its test tools into .venv ..."
	@$(CPU_TORCH)
	@$(INSTALL) --editable '.[dev]'
	@touch $@
