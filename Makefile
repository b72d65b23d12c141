# `make demo` and `make test` need nothing but Python >= 3.11: they make .venv and install into it what they use.
#
#   make test PYTHON=python3.12
#   make test PIP_FLAGS="--extra-index-url https://download.pytorch.org/whl/cpu"   # torch without CUDA (1 GB less)
#   make test PYTEST_FLAGS="tests/ops -x"
#   make test PYTEST_PROCESSES=8      # files of tests run side by side, about 3 GB of memory each
#   make demo DEMO_FLAGS="--help"

PYTHON ?= python3
PIP_FLAGS ?=
PYTEST_FLAGS ?=
PYTEST_PROCESSES ?= 2
DEMO_FLAGS ?=

VENV := .venv
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --quiet $(PIP_FLAGS)

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow test-tpu-aot docs lint format clean

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

demo: $(VENV)/.installed ## adapt the embedded tiny teacher and print the table (minutes on a laptop)
	$(BIN)/zeda demo $(DEMO_FLAGS)

test: lint $(VENV)/.installed-libtpu ## ruff, mypy, shellcheck and the tests
	$(BIN)/python -m pytest --numprocesses=$(PYTEST_PROCESSES) --dist=loadfile --no-loadscope-reorder $(PYTEST_FLAGS)

test-slow: $(VENV)/.installed-dev ## the tests marked slow: minutes of work or gigabytes of disk
	$(BIN)/python -m pytest -m slow $(PYTEST_FLAGS)

test-tpu-aot: $(VENV)/.installed-dev $(VENV)/.installed-libtpu ## compile for TPUs on this machine, which needs none
	$(BIN)/python -m pytest -m tpu_aot $(PYTEST_FLAGS)

docs: $(VENV)/.installed-dev ## the site of docs/, in build/site
	$(BIN)/python docs/config_reference.py
	$(BIN)/python -m mkdocs build --strict

lint: $(VENV)/.installed-dev ## ruff, mypy and shellcheck alone
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/shellcheck --external-sources launch/*.sh launch/slurm.sbatch

format: $(VENV)/.installed-dev ## let ruff rewrite what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove .venv and every cache
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "zeda-jax needs Python 3.11 or newer, \
	and $(PYTHON) is " + sys.version.split()[0] + ": run make with PYTHON=/path/to/a/newer/python3.")'
	$(PYTHON) -m venv $(VENV)

# Stamps, written only after a finished installation: an interrupted one starts again.
$(VENV)/.installed: pyproject.toml | $(BIN)/python
	@echo "Installing zeda-jax into $(VENV) (some minutes the first time)"
	$(PIP_INSTALL) -e .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml | $(BIN)/python
	@echo "Installing zeda-jax and its development tools into $(VENV) (some minutes the first time)"
	$(PIP_INSTALL) -e '.[dev]'
	@touch $@ $(VENV)/.installed

# The TPU compiler (690 MB on disk) lies beside the environment's packages, not among them: among them, every program on
# the CPU would look for a TPU first. Where there is no wheel of it (macOS, Windows), its tests are skipped.
$(VENV)/.installed-libtpu: pyproject.toml | $(VENV)/.installed-dev
	@echo "Installing the TPU compiler into $(VENV)/libtpu"
	$(BIN)/python -m pip install --quiet $(PIP_FLAGS) --no-deps --upgrade --target $(VENV)/libtpu \
	  "$$($(BIN)/python -c 'from importlib.metadata import requires; \
	  print(next(r.split(";")[0] for r in requires("jax") if r.startswith("libtpu")))')" \
	  || echo "There is no libtpu for this machine: the tests that compile for TPUs are skipped."
	@touch $@
