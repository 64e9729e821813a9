# Two commands: `make demo` and `make test`. Both set up what they need first; once that is
# done they need no network.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1
.DEFAULT_GOAL := help

.PHONY: help setup demo test lint types unit clean

help:
	@echo "make demo   set up, then the main job: what sharing saves on this machine"
	@echo "make test   set up, then lint, types and all tests"
	@echo "make setup  the environment in $(VENV), and Debian packages if root"

setup: $(VENV)/.done

$(VENV)/.done: pyproject.toml tools/packages
	tools/packages
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

demo: setup
	$(BIN)/mshare bench --reserve --plot pagetables.svg

test: lint types unit

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy

unit: setup
	$(BIN)/pytest

clean:
	rm -rf $(VENV) build dist pagetables.svg
