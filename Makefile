# Two commands: `make demo` and `make test`. Both set up what they need first; once that is
# done they need no network.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
KERNELS := 6.12 6.1
DETECTORS := debug-6.12 debug-6.1 kcsan-6.12
LAB_TESTS := tests/kernel tests/test_contract.py tests/test_calls.py
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PYTHON
.DEFAULT_GOAL := help

.PHONY: help setup demo test lint types unit kernel spec lab-kernels test-debug clean

help:
	@echo "make demo   set up, then the main job: what sharing saves here, and in the lab"
	@echo "make test   set up, then lint, types and all tests, those of the module on both kernels"
	@echo "make setup  the environment in $(VENV), and Debian packages if root"
	@echo "make kernel the tests of the module alone; KERNELS=6.1 on that one"
	@echo "make test-debug  the same on kernels with KASAN, lockdep and KCSAN, built first: hours"
	@echo "make spec   the models of the protocol, all of them, checked by SPIN: two minutes"

setup: $(VENV)/.done

$(VENV)/.done: pyproject.toml tools/packages src/mshare/lab/packages.py
	tools/packages
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

demo: setup
	mkdir -p build
	$(BIN)/mshare bench --reserve --plot build/pagetables.svg
	@echo "the same with the kernel module, in an emulated machine: about two minutes"
	tools/in-lab 6.12 --memory 4G --write build -- $(BIN)/mshare bench --size 512M \
		--engine msharefs --engine shm --plot build/pagetables-lab.svg

test: lint types unit kernel

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy

unit: setup
	$(BIN)/pytest

kernel: setup $(KERNELS:%=kernel-%)

kernel-%: setup
	tools/in-lab $* --memory 3G --disk 2G --swap 512M --hugepages 8 --timeout 1500 -- \
		$(BIN)/pytest -p no:cacheprovider $(LAB_TESTS)

lab-kernels: $(DETECTORS:%=lab-kernel-%)

lab-kernel-%:
	tools/lab-kernel $*

test-debug: $(DETECTORS:%=test-on-%)

test-on-%: setup lab-kernel-%
	tools/in-lab $* --memory 5G --disk 2G --swap 512M --hugepages 8 --timeout 3600 -- \
		$(BIN)/pytest -p no:cacheprovider tests/kernel

spec: setup
	$(BIN)/python spec/check.py

clean:
	rm -rf $(VENV) build dist
