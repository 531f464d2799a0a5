# Two commands on a fresh machine: `make demo` and `make test`. Each makes .venv, installs what
# constraints.txt pins, builds the C++ library where a compiler is found, and runs.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
SOURCES := $(wildcard kernels/csrc/*) $(wildcard kernels/*/csrc/*) $(wildcard pinet_fast/*/csrc/*)
DATA ?=
OUT ?= demo
WRITE ?=
OLD_TRITON := build/triton-3.6.0

.DEFAULT_GOAL := help
.PHONY: help install demo test grid sanitize gates lint types bench bench-gate expectations guards tables \
  scaling gpu-report clean

help:  ## Say what there is
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

install: $(VENV)/.installed  ## Make .venv with everything pinned, and build
	@$(BIN)/python -m pinet_fast.kernels

# torch comes first: a build of it that is there already is kept by everything after it.
$(VENV)/.installed: pyproject.toml constraints.txt CMakeLists.txt $(SOURCES)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "pinet_fast needs Python 3.11 or newer; choose one with make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --constraint constraints.txt torch
	$(PIP) install --quiet --constraint constraints.txt scikit-build-core cmake ninja
	$(PIP) install --quiet --constraint constraints.txt --no-build-isolation --editable '.[dev,bench]'
	@touch $@

demo: install  ## Joint against deconfounded training, by stratum (DATA=path for a real log)
	rm -rf $(OUT)/joint $(OUT)/agreement-heads
	$(BIN)/pinet-fast demo --out $(OUT) $(if $(DATA),--data $(DATA))

test: install  ## All tests
	$(BIN)/python -m pytest

grid: install  ## Layers x situations x dtypes against plain autograd, every cell: a table
	PYTHONPATH=tests $(BIN)/python -W ignore -m grid.table

sanitize: install  ## The C++ kernels and the lane under AddressSanitizer and UBSan
	SANITIZE_LANE=1 $(BIN)/python -m pytest tests/kernels/test_sanitize.py

# Every kernel, dtype and launch config, compiled for sm_80, sm_90 and sm_100 by the newest Triton
# that the torch here takes and by the oldest that is supported, against tests/kernels/gates.json.
gates: install  ## Compile all GPU kernels, without a GPU, and compare with the baseline (WRITE=1: a new one)
	$(BIN)/python tests/kernels/compile_gate.py $(if $(WRITE),--write)
	@if $(MAKE) --silent $(OLD_TRITON)/.installed; then \
	  PYTHONPATH=$(OLD_TRITON) $(BIN)/python tests/kernels/compile_gate.py $(if $(WRITE),--write); \
	else echo "gates: pip cannot get triton 3.6.0 here, so the newest alone was checked"; fi

$(OLD_TRITON)/.installed: $(VENV)/.installed
	$(PIP) install --quiet --no-deps --upgrade --target $(OLD_TRITON) triton==3.6.0
	@touch $@

lint: install  ## Ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install  ## mypy, strict
	$(BIN)/mypy

bench: install  ## All benchmarks on this CPU, into benchmarks/results/cpu.json and cpu.md
	$(BIN)/python -m benchmarks.suite --json benchmarks/results/cpu.json --command "make bench"
	$(BIN)/python -m benchmarks.make_tables

bench-gate: install  ## Fail where a ratio is above benchmarks/expectations.json; 90 seconds
	$(BIN)/python -m pytest benchmarks -q --benchmark-columns=median --paired-gate benchmarks/expectations.json

expectations: install  ## Write the ratios of today into benchmarks/expectations.json
	$(BIN)/python -m pytest benchmarks -q --paired-gate benchmarks/expectations.json --paired-gate-update --paired-gate-seconds 240

guards: install  ## Write the counts of calls, allocations and syncs of today into benchmarks/guards.json
	$(BIN)/python -m benchmarks.guards

scaling: install  ## Cost and memory over S, B, L, d, V, rules and threads: JSON and plots, five minutes
	$(BIN)/python -m benchmarks.scaling

tables: install  ## README's performance tables from the committed results
	$(BIN)/python -m benchmarks.make_tables

# No installation: a checkout, torch and Triton are enough.
gpu-report:  ## Check and time every kernel on a GPU (OUT=FILE.json)
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) -m benchmarks.gpu_report \
	  --out $(if $(filter-out demo,$(OUT)),$(OUT),benchmarks/results/gpu.json)

clean:  ## Remove what was built and installed here
	rm -rf $(VENV) build dist demo .mypy_cache .ruff_cache .pytest_cache .hypothesis .benchmarks
