# Two commands for a newcomer: `make demo` and `make test`. Both set everything up by themselves.
.DEFAULT_GOAL := help
.PHONY: help setup demo ui test bench lint clean

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
HOME_DIR ?= .redqueen
SCENARIO ?= attack
SEED ?= 1
PORT ?= 3000

export DO_NOT_TRACK := 1
export GX_ANALYTICS_ENABLED := false

help:  ## List these commands
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10
	@echo
	@echo "Options:  make demo SEED=3 SCENARIO=attack|quiet|organic"
	@echo "          make demo DATA=path [DATA_OPTIONS='--window month --undated spread ...']"
	@echo "          make ui PORT=3000    HOME_DIR=<dir> anywhere"

setup: $(STAMP)  ## Create .venv with pinned dependencies (fast when nothing changed)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not ((3, 11) <= sys.version_info[:2] < (3, 13)))' \
	  || { echo "Python 3.11 or 3.12 is needed, $(PYTHON) is $$($(PYTHON) -V 2>&1). Try: make PYTHON=python3.11 $(MAKECMDGOALS)"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing pinned dependencies into $(VENV); this takes a few minutes the first time."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: setup  ## The whole lifecycle on built-in traffic, or on DATA=path
ifdef DATA
	@$(BIN)/redqueen --home $(HOME_DIR) demo --data "$(DATA)" --seed $(SEED) $(DATA_OPTIONS)
else
	@$(BIN)/redqueen --home $(HOME_DIR) demo --scenario $(SCENARIO) --seed $(SEED)
endif

ui: setup  ## Dagster on the same instance: web server and daemon
	@$(BIN)/redqueen --home $(HOME_DIR) ui --port $(PORT)

test: setup  ## All tests
	@$(BIN)/python -m pytest -q

bench: setup  ## One benchmark: NAME=labels|features|canonical|streams|training|... (QUICK=1 for a look)
	@$(BIN)/python benchmarks/$(NAME).py

lint: setup  ## Format, lint, types, import contract
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

clean:  ## Remove the demo's home directory
	rm -rf $(HOME_DIR)
