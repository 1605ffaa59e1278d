# make lab     install everything into .venv, build the labextension, open JupyterLab
# make test    set up what the tests need, then run every check
# make bench   measure, store the results, put the table into the README
#
# Each step is done again only when what it depends on has changed; `make clean` begins anew.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory

BIN := .venv/bin
DONE := .venv/.done
LABEXTENSION := src/warmcell/labextension/package.json
TYPESCRIPT := $(shell find labextension/src labextension/style labextension/schema -type f)
SHARED_DATA := $(shell find kernel_provisioner/kernelspec extension/jupyter-config -type f) labextension/install.json
LAB_DIR ?= examples

export PATH := $(CURDIR)/$(BIN):$(PATH)
export SKIP_JUPYTER_BUILDER := 1 # The rules below build the labextension.

.PHONY: help lab test lint build bench long docs clean packages setup-lab setup-dev

help:
	@sed -n '1,/^$$/s/^# \{0,1\}//p' Makefile
	@echo 'make lint, build, long, docs, clean: as their names say'
	@echo 'make packages (as root): the Debian packages of all test lanes'

# --- what people run ----------------------------------------------------------------------------------------------

lab: setup-lab
	$(BIN)/jupyter lab --notebook-dir=$(LAB_DIR) $(if $(filter 0,$(shell id -u)),--allow-root) $(LAB_ARGS)

# The file system of the tests of containers is made beside the first steps; who needs it waits for it.
test: setup-dev
	@if [ "$$(id -u)" = 0 ] && command -v mmdebstrap >/dev/null; then nice scripts/base-image >/dev/null 2>&1 & fi
	@$(MAKE) lint
	scripts/jlpm test
	@$(MAKE) build
	scripts/run-tests $(TEST_ARGS)

lint: setup-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy -p warmcell
	$(BIN)/lint-imports
	scripts/jlpm lint

build: setup-dev
	rm -rf dist
	$(BIN)/python -m build --no-isolation >/dev/null
	@ls -l dist

bench: setup-dev
	$(BIN)/python -m benchmarks $(BENCH_ARGS)

# Its log is kept where all of it has run and passed; with CI=true what this machine lacks is a failure.
long: setup-dev
	mkdir -p .cache
	{ date -u; CI=$(if $(TEST_ARGS),,true) $(BIN)/python -m pytest --long -v -rP --durations=0 $(TEST_ARGS); } 2>&1 \
	  | sed -u 's|$(CURDIR)|.|g' | tee .cache/long.log
	$(if $(TEST_ARGS),,mv .cache/long.log benchmarks/results/long-$$(date -u +%Y-%m-%d).log)

docs: setup-dev
	$(BIN)/python -m pip install -qq --group docs
	$(BIN)/python -m sphinx -W --keep-going -b html docs docs/_build/html

packages:
	scripts/packages

clean:
	rm -rf .venv .cache .yarn node_modules labextension/lib src/warmcell/labextension dist docs/_build \
	  .mypy_cache .ruff_cache .import_linter_cache .hypothesis

# --- set-up -------------------------------------------------------------------------------------------------------

# The Python half and the Node half wait for the network more than for the processor, so they run side by side.
setup-lab:
	@scripts/packages
	@$(MAKE) -j2 $(DONE)/editable $(DONE)/notebooks $(DONE)/criu
setup-dev:
	@scripts/packages
	@$(MAKE) -j2 $(DONE)/editable $(DONE)/dev $(DONE)/criu

$(DONE)/venv: scripts/find-python scripts/make-venv
	scripts/make-venv
	@mkdir -p $(DONE) && touch $@

# Without it kernels start from templates, and the tests of snapshots say what is missing.
$(DONE)/criu: scripts/criu $(DONE)/venv
	@scripts/criu .venv/criu && touch $@ || true

$(DONE)/notebooks: $(DONE)/venv pyproject.toml
	scripts/pip-install notebooks
	@touch $@

$(DONE)/dev: $(DONE)/notebooks
	scripts/pip-install dev
	@touch $@

node_modules/.done: $(DONE)/venv package.json yarn.lock .yarnrc.yml
	scripts/jlpm install --immutable >.venv/jlpm.log 2>&1 || { cat .venv/jlpm.log; exit 1; }
	@touch $@

$(LABEXTENSION): node_modules/.done tsconfig.json $(TYPESCRIPT)
	scripts/jlpm build:prod

# Two seconds: no dependencies, no isolation. The labextension, the kernelspec and the server's configuration are
# copied into .venv/share and .venv/etc, hence again when they change.
$(DONE)/editable: $(LABEXTENSION) $(SHARED_DATA) $(DONE)/notebooks
	$(BIN)/python -m pip install -qq --no-deps --no-build-isolation --editable .
	@touch $@
