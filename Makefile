# Two commands: `make demo` and `make test`. Both set up what they need first; once that is
# done they need no network.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
KERNELS := 6.12 6.1
DETECTORS := debug-6.12 debug-6.1 kcsan-6.12
LAB_TESTS := tests/kernel tests/test_contract.py tests/test_calls.py tests/test_exhaustion.py \
	tests/test_dropin.py tests/test_arrays.py
# in these, processors have to do things at the same time
RACES := $(addprefix tests/kernel/,test_memory.py test_protect.py test_races.py test_readonly.py \
	test_tlb.py)
KERNEL_LAB = tools/in-lab $* --memory 3G --disk 2G --swap 512M --hugepages 8 --timeout 7200
DURATION := 3m
STEPS := 100000
CALLS := 1000000
SEED := 1
# a failure on the left of a pipe is one
SHELL := /bin/bash
.SHELLFLAGS := -o pipefail -c
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PYTHON
.DEFAULT_GOAL := help

.PHONY: help setup demo test lint types unit kernel storm spec oracle fuzz lab-kernels test-debug \
	detectors kmod-matrix clean

help:
	@echo "make demo   set up, then the main job: what sharing saves here, and in the lab"
	@echo "make test   set up, then lint, types and all tests, those of the module on both kernels"
	@echo "make setup  the environment in $(VENV), and Debian packages if root"
	@echo
	@echo "Parts of make test, and what takes longer; KERNELS=6.1 on that kernel alone:"
	@echo "make kernel      the tests of the module"
	@echo "make storm       processes that do everything at once to two regions; DURATION=20m"
	@echo "make spec        the models of the protocol, all of them, checked by SPIN: minutes"
	@echo "make oracle      the module and every engine against the reference model; STEPS=100000"
	@echo "make fuzz        calls with any arguments, as a user without rights; CALLS=1000000"
	@echo "make test-debug  the module on kernels with KASAN, lockdep and KCSAN, built first: hours"
	@echo "make detectors   bugs planted in the module, and each found: an hour"
	@echo "make kmod-matrix the module built for every kernel of its series that apt knows"

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

test: lint types unit kernel storm

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy

unit: setup
	$(BIN)/pytest

# What can runs side by side, on one thread a machine: two machines with threads of their own for each
# processor would wait for each other's interrupts.
kernel: setup
	$(MAKE) --no-print-directory --jobs=2 $(KERNELS:%=kernel-most-%)
	$(MAKE) --no-print-directory $(KERNELS:%=kernel-races-%)

kernel-most-%: setup
	$(KERNEL_LAB) --one-thread -- $(BIN)/pytest -p no:cacheprovider $(LAB_TESTS) \
		$(RACES:%=--ignore=%) 2>&1 | sed --unbuffered 's/^/$*: /'

kernel-races-%: setup
	$(KERNEL_LAB) -- $(BIN)/pytest -p no:cacheprovider $(RACES)

# make storm KERNELS=debug-6.12 LAB="--memory 4G --timeout 3600" on a kernel that needs more
storm: setup $(KERNELS:%=storm-%)

storm-%: setup
	$(BIN)/python -m tests.storm --build
	tools/in-lab $* --memory 2G --disk 1G --swap 512M --timeout 1800 \
		--kernel-args numa=fake=2 $(LAB) -- \
		$(BIN)/python -m tests.storm --duration $(DURATION)

spec: setup
	$(BIN)/python spec/check.py

oracle: $(KERNELS:%=oracle-%)
	$(BIN)/python -m tests.oracle --library shm --steps $(STEPS) --seed $(SEED)
	$(BIN)/python -m tests.oracle --library hugetlb --steps $(STEPS) --seed $(SEED)

oracle-%: setup
	$(BIN)/python -m tests.oracle --lab $* --steps $(STEPS) --seed $(SEED)

fuzz: $(KERNELS:%=fuzz-%)

fuzz-%: setup
	tools/in-lab $* --one-thread --memory 3G --timeout 7200 $(LAB) -- \
		$(BIN)/python -m tests.security.run_fuzz --calls $(CALLS) --seed $(SEED)

lab-kernels: $(DETECTORS:%=lab-kernel-%)

lab-kernel-%:
	tools/lab-kernel $*

test-debug: $(DETECTORS:%=test-on-%)

test-on-%: setup lab-kernel-%
	tools/in-lab $* --memory 5G --disk 2G --swap 512M --hugepages 8 --timeout 20000 \
		$(LAB) -- \
		$(BIN)/pytest -p no:cacheprovider tests/kernel tests/inject

detectors: setup lab-kernels
	MSHARE_DETECTORS=1 $(BIN)/pytest tests/detectors

kmod-matrix: setup
	$(BIN)/python tools/kmod_matrix.py --write

clean:
	rm -rf $(VENV) build dist
