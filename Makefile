# The two commands of the README: make reproduce-glue, make test. Everything sets itself up; a second call skips what is
# done.
SHELL := /bin/bash
PYTHON ?= python3
SCALE ?= local
SEEDS ?=
EXPERIMENT ?=
RECORDS ?= results/runs
ONLY ?=
# What SLURM is asked for: a file of conf/slurm, e.g. SLURM=mine.
SLURM ?= default
# Where torch comes from, e.g. TORCH_INDEX=https://download.pytorch.org/whl/cpu to leave the CUDA packages out.
TORCH_INDEX ?=
VENV := .venv
PY := $(VENV)/bin/python
READY := $(VENV)/.ready

.DEFAULT_GOAL := help
# One table: its runs, then its page, whether or not every run finished.
TABLES := glue math code chat
define reproduce
@$(PY) -m experiments.sweep experiment=$(1) scale=$(SCALE) $(if $(SEEDS),seeds=$(SEEDS)) $(2); status=$$?; \
$(PY) -m experiments.report experiment=$(1) scale=$(SCALE) && exit $$status
endef

define submit
@$(PY) -m slurm.submit experiment=$(1) scale=$(SCALE) slurm=$(SLURM) $(if $(SEEDS),seeds=$(SEEDS)) $(2)
endef

.PHONY: help setup assets reproduce $(TABLES:%=reproduce-%) $(TABLES:%=slurm-%) slurm-status report baseline-tables plan wandb-sync bench lint test test-fast clean

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

reproduce: ## all four tables, one after another
	@status=0; for table in $(TABLES); do $(MAKE) reproduce-$$table || status=1; done; exit $$status

reproduce-glue: assets ## the GLUE table: SCALE=local (default) or paper, SEEDS=3 for three seeds
	$(call reproduce,glue)

reproduce-math: assets ## the math table: word problems here, MetaMathQA and GSM8K at paper scale
	$(call reproduce,math)

reproduce-code: assets ## the code table with HumanEval; RUNS PROGRAMS THE MODEL WRITES, isolated as eval/sandbox.py says
	@echo "reproduce-code consents to running programs that the model writes (eval.run_code=true); see eval/sandbox.py"
	$(call reproduce,code,'overrides=["eval.run_code=true"]')

reproduce-chat: assets ## the chat table; MT-Bench only where a judge is configured
	$(call reproduce,chat)

slurm-glue: assets ## the GLUE table as a SLURM array, sent and not waited for: SLURM=mine for conf/slurm/mine.yaml
	$(call submit,glue)

slurm-math: assets ## ... the math table
	$(call submit,math)

slurm-code: assets ## ... the code table; RUNS PROGRAMS THE MODEL WRITES on the nodes, isolated as eval/sandbox.py says
	@echo "slurm-code consents to running programs that the model writes (eval.run_code=true); see eval/sandbox.py"
	$(call submit,code,'overrides=["eval.run_code=true"]')

slurm-chat: assets ## ... the chat table
	$(call submit,chat)

slurm-status: setup ## where the runs of EXPERIMENT (glue) on the cluster stand
	@$(PY) -m slurm.status experiment=$(or $(EXPERIMENT),glue) scale=$(SCALE)

report: setup ## tables and figures from RECORDS (yours), nothing trained: of EXPERIMENT, or all and results/report.html
	@$(PY) -m experiments.report $(if $(EXPERIMENT),experiment=$(EXPERIMENT) scale=$(SCALE)) records=$(RECORDS)

baseline-tables: setup ## tables and figures of the committed records, after records were added to them
	@for folder in results/baseline/*-local; do name=$$(basename $$folder -local); \
	$(PY) -m experiments.report experiment=$$name records=results/baseline out=$$folder || exit 1; done
	@$(PY) -m experiments.report scale=paper records=results/baseline out=results/baseline/papers

plan: assets ## the runs of EXPERIMENT (glue) and what they take in memory, nothing executed
	@$(PY) -m experiments.plan experiment=$(or $(EXPERIMENT),glue) scale=$(SCALE) $(if $(SEEDS),seeds=$(SEEDS)) memory=true

wandb-sync: setup ## upload the W&B runs that were made offline (logger=wandb); those uploaded before are skipped
	@$(PY) -m experiments.wandb_sync

bench: assets ## speed and memory beside other implementations, side by side on this machine (an hour and a half); ONLY=start-smollm2,...
	@$(PY) -m experiments.bench $(if $(ONLY),only=$(ONLY))

lint: setup ## style and types
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

# A file of tests stays on one worker, as its tests share what takes long; each worker computes with one thread.
test: assets lint ## style, types and every test
	$(PY) -m pytest -n 2 --dist loadfile

test-fast: assets ## the tests that take seconds
	$(PY) -m pytest -m "not slow"

clean: ## remove what runs leave behind (not results/runs)
	rm -rf outputs .pytest_cache .mypy_cache .ruff_cache
