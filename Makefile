# `make demo` and `make test` are all a fresh machine needs; both set up `.venv` first.
.DEFAULT_GOAL := help
PYTHON ?= python3
INDEX ?= cpu
BIN := .venv/bin
READY := .venv/.ready-$(INDEX)

.PHONY: help setup demo serve test check format clean

help: ## Show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: $(READY) ## Make .venv and install everything once (INDEX=gpu takes faiss-gpu)

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Passerby needs Python 3.11 or newer, got $$($(PYTHON) --version); try: make PYTHON=python3.11 $(MAKECMDGOALS)" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
	  --constraint constraints.txt --editable '.[$(INDEX),dev]'
	@rm -f .venv/.ready-*
	@touch $@

demo: setup ## Draw people, enrol them from one camera, find them again in another
	$(BIN)/passerby demo

serve: setup ## Run the service on http://127.0.0.1:8000
	$(BIN)/passerby serve

test: setup ## Run every test that this machine can run
	$(BIN)/python -m pytest

check: setup ## Lint, types and tests: what CI runs
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(MAKE) --no-print-directory test

format: setup ## Format the code
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

clean: ## Remove the environment and everything that can be made again
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis demo *.egg-info
