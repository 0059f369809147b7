# From nothing: `make test`, `make demo`. Each makes .venv when it is missing; a second call does only what changed.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
SOURCES := setup.py pyproject.toml $(shell find backend csrc -type f -not -name '*.pyc' 2>/dev/null)

.PHONY: help env test demo bench lint native registers clean
.DELETE_ON_ERROR:

help:  ## this list
	@sed -n 's/^\([a-z]*\):.*##/\1\t/p' $(MAKEFILE_LIST) | expand -t 10

env: $(VENV)/.demo $(VENV)/.test $(VENV)/.lint $(VENV)/.built  ## .venv with everything for development

test: $(VENV)/.test $(VENV)/.built  ## the tests that take seconds; ARGS="..." goes to pytest
	$(BIN)/python -m pytest -m "not slow and not gpu" $(ARGS)

demo: $(VENV)/.built  ## train a network, fused and stock; writes out/report.html and out/report.json
	$(BIN)/python -m fused_resnet.train.demo

bench: $(VENV)/.built  ## the quick benchmark; ARGS="..." goes to it
	$(BIN)/python -m fused_resnet bench $(ARGS)

lint: $(VENV)/.demo $(VENV)/.lint  ## ruff, mypy, clang-format
	$(BIN)/ruff check .
	$(BIN)/mypy
	find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.inc' -o -name '*.cu' -o -name '*.cuh' | \
	  xargs $(BIN)/clang-format --dry-run -Werror

native:  ## the kernels' own tests, with sanitizers
	$(MAKE) -C tests/native -j2 check

registers:  ## registers of the CUDA kernels; fails when one spills
	$(PYTHON) backend/registers.py $(ARGS)

clean:  ## remove what was built; .venv stays
	rm -rf build dist out *.egg-info fused_resnet/_C*.so fused_resnet/_C.json $(VENV)/.built

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: requirements/demo.txt | $(VENV)/bin/python
	$(PIP) install -r $<
	touch $@

$(VENV)/.test: requirements/test.txt requirements/oracles.txt $(VENV)/.demo
	$(PIP) install -r requirements/test.txt
	$(PIP) install --no-deps -r requirements/oracles.txt
	touch $@

$(VENV)/.lint: requirements/lint.txt | $(VENV)/bin/python
	$(PIP) install -r $<
	touch $@

# Editable, so that the tests' and the demo's Python is the source tree's.
$(VENV)/.built: $(SOURCES) $(VENV)/.demo
	$(PIP) install --no-deps --editable .
	touch $@
