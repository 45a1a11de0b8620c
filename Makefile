# The two commands are `make run` and `make test`; everything else is a part of them. Set-up is remembered by stamps
# inside .venv, so it costs nothing the second time and is redone when a lock file or a proto changes.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMPS := $(VENV)/stamps
PROTOS := $(shell find protos/openmanager -name '*.proto')
ROUNDS ?= 500
# A file's tests stay together, so that they share their servers.
WORKERS ?= -n 2 --dist loadfile
CODE := runtime fleet services gateway client launcher tools deploy bench tests

.PHONY: help setup run test test-full crash power faults bench bench-scale bench-api bench-metadata bench-analytics example-clients check format lock gen docs clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-15s %s\n", $$1, $$2}' Makefile

setup: $(STAMPS)/gen ## set up .venv and the generated code, nothing else; .venv/bin/openmanager is the client

run: $(STAMPS)/gen ## set up and start the whole product; Ctrl-C stops it
	@exec $(BIN)/python -m launcher

test: $(STAMPS)/gen-dev ## set up and pass the tests (under 10 minutes on 2 cores)
	@$(BIN)/python -m pytest -m "not full" $(WORKERS) $(ARGS)

test-full: $(STAMPS)/gen-dev ## the long tests that `make test` leaves out
	@$(BIN)/python -m pytest -m "full and not marathon" $(WORKERS) $(ARGS)

crash: $(STAMPS)/gen-dev ## kill -9 a writing engine 500 times and check what is left each time; ROUNDS=, ARGS="--seed N"
	@$(BIN)/python -m tests.timeseries.engine.crash --rounds $(ROUNDS) $(ARGS)

power: $(STAMPS)/gen-dev ## let 200 stores lose power again and again and check what is left each time (an hour or more); POWER_STORES=
	@POWER_STORES=$${POWER_STORES:-200} $(BIN)/python -m pytest -s -k many_losses tests/timeseries/engine/test_power_loss.py $(ARGS)

faults: $(STAMPS)/gen-dev ## break each store in each way, for an hour's worth of ticks, and print what came of it; FAULT_TICKS=
	@FAULT_TICKS=$${FAULT_TICKS:-360} $(BIN)/python -m pytest -m fault $(ARGS)

bench: $(STAMPS)/gen-dev ## measure beside VictoriaMetrics and InfluxDB; ARGS="--quick", "--only queries", "--help"
	@$(BIN)/python -m bench $(ARGS)

bench-scale: $(STAMPS)/gen-dev ## 20,000 servers for half an hour, kill -9, restart, count; ARGS="--minutes 3", "--quick"
	@$(BIN)/python -m bench scale $(ARGS)

bench-api: $(STAMPS)/gen-dev ## measure the gateway beside bare servers; ARGS="--quick", "--only grpc", "--help"
	@$(BIN)/python -m bench api $(ARGS)

bench-metadata: $(STAMPS)/gen-dev ## measure recording and searching AI interactions beside bare inserts; ARGS="--quick", "--help"
	@$(BIN)/python -m bench metadata $(ARGS)

bench-analytics: $(STAMPS)/gen-dev ## measure how good anomalies, forecasts and dates of full disks are; ARGS="--quick", "--help"
	@OPENBLAS_NUM_THREADS=1 $(BIN)/python -m bench analytics $(ARGS)

example-clients: $(STAMPS)/gen-dev ## build examples/clients/ and run each against a live product; ARGS="go rust"
	@$(BIN)/python -m tests.examples.clients $(ARGS)

check: $(STAMPS)/gen-dev ## format, lint, types, layers, protos
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/ruff check $(CODE)
	$(BIN)/mypy
	$(BIN)/lint-imports
	cd protos && ../$(BIN)/buf lint && ../$(BIN)/buf format --diff --exit-code .

format: $(STAMPS)/gen-dev ## format code and protos in place
	$(BIN)/ruff check --fix --silent $(CODE) || true
	$(BIN)/ruff format $(CODE)
	cd protos && ../$(BIN)/buf format --write .

lock: $(STAMPS)/dev ## write the lock files anew from pyproject.toml
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header --no-annotate \
	  --upgrade pyproject.toml --output-file requirements.txt
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header --no-annotate \
	  --upgrade --extra dev --constraint requirements.txt pyproject.toml --output-file requirements-dev.txt
	$(BIN)/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["parquet"], sep="\n")' \
	  | $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header --no-annotate \
	  --constraint requirements-dev.txt - --output-file requirements-parquet.txt

gen: $(STAMPS)/dev ## generate gen/ from protos/ even if nothing changed
	$(BIN)/python tools/generate.py

docs: $(STAMPS)/gen-dev ## write docs/settings.md anew from the code
	$(BIN)/python tools/document_settings.py

.PHONY: parquet
parquet: $(STAMPS)/parquet ## add what export to and import from Parquet need (pyarrow, 170 MB)

clean: ## remove what set-up made (never data/)
	rm -rf $(VENV) gen protos/google .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
	cd examples/clients && rm -rf go/bin go/client go/gen java/target node/node_modules rust/target

# With a path from there to here, so that a checkout that is moved or copied runs its own code.
$(STAMPS)/venv:
	@$(PYTHON) tools/check_python.py
	@$(PYTHON) -m venv $(VENV)
	@mkdir -p $(STAMPS)
	@site=$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))'); \
	  here=$$($(BIN)/python -c 'import os, sys; print(os.path.relpath(".", sys.argv[1]))' "$$site"); \
	  printf '%s\n%s\n' "$$here" "$$here/gen" > "$$site/openmanager.pth"
	@touch $@

# The `openmanager` command; a copy, so that it stays where PATH finds it.
$(BIN)/openmanager: tools/openmanager | $(STAMPS)/venv
	@install -m 755 $< $@

$(STAMPS)/product: requirements.txt | $(STAMPS)/venv
	@echo "Installing the product's packages (about 250 MB, once) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements.txt
	@touch $@

$(STAMPS)/dev: requirements-dev.txt $(STAMPS)/product
	@echo "Installing the development tools (about 200 MB, once) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements-dev.txt
	@touch $@

$(STAMPS)/gen: $(PROTOS) tools/generate.py $(STAMPS)/product | $(BIN)/openmanager
	@$(BIN)/python tools/generate.py
	@touch $@

$(STAMPS)/parquet: requirements-parquet.txt $(STAMPS)/product
	@echo "Installing pyarrow (170 MB, once) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements-parquet.txt
	@touch $@

# With the stubs that the type checker wants; the product's own code is the same.
$(STAMPS)/gen-dev: $(PROTOS) tools/generate.py $(STAMPS)/dev | $(BIN)/openmanager
	@$(BIN)/python tools/generate.py
	@touch $@ $(STAMPS)/gen
