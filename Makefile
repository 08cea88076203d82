# `make demo` and `make test` are all a fresh machine needs; both set up `.venv` first.
.DEFAULT_GOAL := help
PYTHON ?= python3
INDEX ?= cpu
# Processes that test; each takes a gigabyte.
TESTERS ?= 2
BIN := .venv/bin
READY := .venv/.ready-$(INDEX)

.PHONY: help setup demo serve test test-deploy check format audit lock sbom image fuzz clean

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
	$(BIN)/python -m pytest --numprocesses $(TESTERS) --dist loadfile

check: setup ## Lint, types and tests: what CI runs
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(MAKE) --no-print-directory test

test-deploy: setup ## Try the image and the compose file on this Docker host (RESTART_ENGINE='...' restarts the engine, too)
	$(BIN)/python -m deploy.test_deploy

format: setup ## Format the code
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

audit: .venv/.ready-tools ## Look for known faults of what the image installs
	.venv/tools/bin/pip-audit --strict --require-hashes --disable-pip --requirement requirements/cpu.lock
	.venv/tools/bin/pip-audit --strict --require-hashes --disable-pip --requirement requirements/gpu.lock

lock: .venv/.ready-tools ## Write the image's locks again, after a change of the dependencies
	PATH="$(CURDIR)/.venv/tools/bin:$$PATH" requirements/lock.sh

sbom: .venv/.ready-tools setup ## List what is installed here, as CycloneDX (the image has its own list)
	.venv/tools/bin/cyclonedx-py environment --pyproject pyproject.toml --output-file sbom.cdx.json $(BIN)/python

.venv/.ready-tools: pyproject.toml | $(READY)
	$(PYTHON) -m venv .venv/tools
	.venv/tools/bin/pip install --quiet --disable-pip-version-check \
	  $$($(BIN)/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["audit"])')
	@touch $@

image: ## Build the image, labelled with its revision (INDEX=gpu takes faiss-gpu and CUDA)
	docker build --tag passerby:$(INDEX) --build-arg INDEX=$(INDEX) \
	  --build-arg REVISION="$$(git describe --always --dirty --abbrev=12)" .

fuzz: setup ## Send 100,000 hostile uploads to a service of its own (REQUESTS=1000 for fewer)
	$(BIN)/python -m bench.fuzz --requests $${REQUESTS:-100000} --keep fuzz-found

clean: ## Remove the environment and everything that can be made again
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis demo *.egg-info
