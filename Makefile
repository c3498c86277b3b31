# Thin: each target is the command one would type. `bash setup_env.sh COMMAND` makes the environment when it is needed.
RUN := bash setup_env.sh

.PHONY: help install check format test test-all smoke constraints

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

install: ## make or update .venv
	$(RUN)

check: ## ruff and pyright, as pre-commit and CI run them
	$(RUN) ruff check
	$(RUN) ruff format --check
	$(RUN) pyright

format: ## let ruff rewrite what it can
	$(RUN) ruff check --fix
	$(RUN) ruff format

test: ## the fast tests
	$(RUN) pytest -n auto

test-all: ## the fast tests, the slow ones, and those on a SLURM cluster
	$(RUN) pytest -m ""

smoke: ## the quickstart in seconds: prints the seeded scores, to compare before and after a change
	$(RUN) python experiments/exp_000_quickstart/run.py +scale=smoke

constraints: SHELL := /bin/bash -o pipefail
constraints: ## pin the newest versions that fit pyproject.toml; torch stays, edit it by hand
	{ grep '^#' constraints.txt; $(RUN) uv pip compile pyproject.toml --universal --python-version 3.11 --extra dev \
	  --quiet --no-header --no-annotate -c <(grep '^torch==' constraints.txt) \
	  | grep -vE '^(nvidia-|cuda-|triton)'; } >constraints.txt.new
	mv constraints.txt.new constraints.txt
