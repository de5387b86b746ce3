# All commands of the project; `make help` lists them. The embedded cluster needs root on Linux; KUBECONFIG and
# REGISTRY of your own cluster work instead.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory --no-builtin-rules
export PYTHONDONTWRITEBYTECODE := 1

CACHE := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/finetune-operator
export PATH := $(PATH):$(CACHE)/bin
PYTHON := .venv/bin/python
VENV := .venv/.stamp
CHART := charts/finetune-operator
PYTEST := $(PYTHON) -m pytest

# uv comes from PATH, or is installed into the cache.
UV := $(or $(shell command -v uv),$(CACHE)/uv/bin/uv)
export UV_PYTHON_DOWNLOADS := never

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  %-18s %s\n", $$1, $$2} /^## / {print "\n" substr($$0, 4)}' Makefile

## Use it

demo: deploy $(VENV) ## From nothing to a tuned model that answers; the cluster stays up
	@$(PYTHON) -m e2e.demo

cluster-up: ## Start the embedded Kubernetes; with KUBECONFIG or CLUSTER=existing, check that yours answers
	@python3 -m e2e.cluster up

images: ## Build the images and bring them to the cluster (REGISTRY=host/path: to your registry)
	@python3 -m e2e.cluster images

deploy: ## Install the chart with these images, storage, and the demo's namespace
	@python3 -m e2e.cluster deploy

cluster-down: ## Stop the embedded cluster and remove everything of it but the cache
	@python3 -m e2e.cluster down

## Check it

test: $(VENV) ## Everything, in the order that fails fastest: verify, unit, integration, e2e
	@$(PYTHON) -m e2e.suite

verify: lint types generated chart ## Lint, types, import rules, generated files up to date, the chart

lint: $(VENV) ## Lint, format and import rules
	@.venv/bin/ruff check --quiet .
	@.venv/bin/ruff format --check --quiet . || { echo 'not formatted: run `make fmt`'; exit 1; }
	@.venv/bin/lint-imports --no-logo > .venv/lint-imports.log || { cat .venv/lint-imports.log; exit 1; }

types: $(VENV)
	@.venv/bin/mypy

generated: $(VENV)
	@$(PYTHON) -m finetune_operator.crdgen --check
	@diff -r crds $(CHART)/files/crds || { echo 'the CRDs in the chart are stale: run `make generate`'; exit 1; }
	@$(PYTHON) docs/generate.py --check

chart: cluster-binaries
	@helm lint --quiet --strict $(CHART)

unit: $(VENV) cluster-binaries ## Unit tests
	@# The trainer switches the hub clients of its process offline, so the clients are tested in one of their own.
	@$(PYTEST) tests/hub_server
	@OMP_NUM_THREADS=1 $(PYTEST) --numprocesses 2 --dist worksteal tests/unit

integration: $(VENV) cluster-binaries ## Tests against a real API server
	@$(PYTEST) tests/integration

e2e: deploy $(VENV) ## Tests on the real cluster
	@$(PYTEST) -s --timeout 900 e2e/cases

bench: deploy $(VENV) ## Time from create to the prepare Job, on the cluster
	@$(PYTHON) -m bench.reconcile

bench-trainer: $(VENV) cluster-binaries ## The trainer beside a plain loop and `trl sft`: speed, start, memory, losses
	@$(PYTHON) -m bench.trainer

## Change it

generate: $(VENV) ## Write the CRDs from the types, and the reference pages from both
	@$(PYTHON) -m finetune_operator.crdgen
	@mkdir -p $(CHART)/files/crds && cp crds/*.yaml $(CHART)/files/crds/
	@$(PYTHON) docs/generate.py

fmt: $(VENV) ## Format the code
	@.venv/bin/ruff check --fix-only --quiet .
	@.venv/bin/ruff format --quiet .

# Each lock starts from dev.txt, so that all have the same versions; UPGRADE=1 takes the newest ones.
COMPILE := UV_PYTHON=$(PYTHON) $(UV) pip compile --quiet
FOR_PYTHON := --python-version 3.11
TRAINER := --overrides requirements/trainer.overrides
lock: $(VENV) ## Resolve pyproject.toml into requirements/*.txt (UPGRADE=1: to the newest versions)
	@$(COMPILE) $(TRAINER) $(if $(UPGRADE),--upgrade) --all-extras pyproject.toml -o requirements/dev.txt
	@for image in operator "trainer --extra tasks" serving; do cp requirements/dev.txt requirements/$${image%% *}.txt; \
	    $(COMPILE) $(TRAINER) --extra $$image pyproject.toml -o requirements/$${image%% *}.txt; done
	@$(COMPILE) $(FOR_PYTHON) -c requirements/trainer.txt requirements/torch.in -o requirements/torch.txt
	@$(COMPILE) $(FOR_PYTHON) --overrides requirements/engine-cpu.overrides -c requirements/torch.txt \
	    requirements/engine-cpu.in -o requirements/engine-cpu.txt

cluster-binaries:
	@python3 -m e2e.cluster binaries

$(CACHE)/uv/bin/uv:
	@echo "installing uv into $(CACHE)/uv"
	@python3 -m venv $(CACHE)/uv && $(CACHE)/uv/bin/pip install --quiet uv==0.13.9

$(VENV): requirements/dev.txt pyproject.toml | $(UV)
	@echo "updating .venv from requirements/dev.txt"
	@[ -x $(PYTHON) ] || $(UV) venv --quiet --python python3 .venv
	@$(UV) pip sync --quiet --python $(PYTHON) requirements/dev.txt
	@$(UV) pip install --quiet --python $(PYTHON) --no-deps --editable .
	@touch $@

.PHONY: $(shell awk -F: '/^[a-z0-9-]+:/ {print $$1}' Makefile)
