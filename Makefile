# The two commands of the README: make reproduce-glue, make test. Everything sets itself up; a second call skips what is done.
SHELL := /bin/bash
PYTHON ?= python3
SCALE ?= local
SEEDS ?=
# Where torch comes from, e.g. TORCH_INDEX=https://download.pytorch.org/whl/cpu to leave the CUDA packages out.
TORCH_INDEX ?=
VENV := .venv
PY := $(VENV)/bin/python
READY := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help setup assets reproduce-glue report plan lint test test-fast clean

help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

setup: $(READY) ## virtual environment with the pinned dependencies

$(READY): pyproject.toml
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$$(sed -n 's/^  "\(torch==[^"]*\)".*/\1/p' pyproject.toml)"
	$(PY) -m pip install --quiet --editable '.[dev]'
	@touch $@

assets: setup ## pinned data files into the user cache
	@$(PY) -m lora_ga.data.assets

reproduce-glue: assets ## the GLUE table: SCALE=local (default) or paper, SEEDS=3 for three seeds
	@$(PY) -m experiments.sweep experiment=glue scale=$(SCALE) $(if $(SEEDS),seeds=$(SEEDS)); status=$$?; \
	$(PY) -m experiments.report experiment=glue scale=$(SCALE) && exit $$status

report: setup ## tables and figures from your records, nothing trained
	@$(PY) -m experiments.report experiment=glue scale=$(SCALE)

plan: setup ## the runs of the GLUE table, nothing executed
	@$(PY) -m experiments.plan experiment=glue scale=$(SCALE) $(if $(SEEDS),seeds=$(SEEDS))

lint: setup ## style and types
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

test: assets lint ## style, types and every test
	$(PY) -m pytest

test-fast: assets ## the tests that take seconds
	$(PY) -m pytest -m "not slow"

clean: ## remove what runs leave behind (not results/runs)
	rm -rf outputs .pytest_cache .mypy_cache .ruff_cache
