# SPDX-License-Identifier: Apache-2.0
# `make demo` and `make test` do all set-up on a fresh machine with python3, a C++ compiler, make and git.
.DEFAULT_GOAL := help
.PHONY: help demo test bench gpu-libraries lint format clean

VENV := .venv
BIN := $(abspath $(VENV)/bin)
PROCESSES := $(shell nproc 2>/dev/null || echo 2)
NATIVE_SOURCES := CMakeLists.txt setup.py $(shell find csrc -type f 2>/dev/null)
export PATH := $(BIN):$(PATH)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

help:
	@echo "make demo    distil a teacher with each loss on real data and show the result (arguments: DEMO='--data digits')"
	@echo "make test    the whole test suite (arguments: PYTEST='-k triton')"
	@echo "make bench   the benchmark suite; writes benchmarks/results/ (arguments: BENCH='--shape pooled')"
	@echo "make gpu-libraries   the native libraries for sm_90 in gpu-libraries/, to be carried to a machine with a GPU"
	@echo "make lint    ruff and clang-format, changing nothing; make format applies them"
	@echo "make clean   remove everything that make built"

# Debian's python3 comes without venv and headers; as root they are installed here, otherwise this says what to do.
$(VENV)/.created:
	@python3 -c "import ensurepip, os, sysconfig; assert os.path.exists(sysconfig.get_path('include') + '/Python.h')" \
	  2>/dev/null || { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && \
	  apt-get update -qq && apt-get install -y -qq python3-venv python3-dev; } || \
	  { echo "python3 lacks venv or headers; on Debian: apt-get install python3-venv python3-dev" >&2; exit 1; }
	python3 -m venv $(VENV)
	@touch $@

$(VENV)/.installed: $(VENV)/.created requirements-dev.txt
	$(BIN)/python -m pip install -q -r requirements-dev.txt
	@touch $@

$(VENV)/.built: $(VENV)/.installed pyproject.toml $(NATIVE_SOURCES)
	KDKERNELS_NATIVE=1 $(BIN)/python -m pip install -q --no-build-isolation --no-deps -e .
	@touch $@

demo: $(VENV)/.built
	$(BIN)/kdkernels demo $(DEMO)

# Waiting threads sleep: those of two test processes would otherwise spin on each other's cores.
test: $(VENV)/.built
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n $(PROCESSES) --dist loadgroup $(PYTEST)

bench: $(VENV)/.built
	$(BIN)/kdkernels bench --output benchmarks/results $(BENCH)

# What benchmarks/run_on_gpu.sh takes in place of a build (arguments: GPU_LIBRARIES='--architectures 80-real')
gpu-libraries: $(VENV)/.installed
	$(BIN)/python benchmarks/gpu_libraries.py pack $(GPU_LIBRARIES)

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $$(git ls-files '*.h' '*.cpp' '*.cu')

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(git ls-files '*.h' '*.cpp' '*.cu')

clean:
	rm -rf $(VENV) build dist gpu-libraries *.egg-info kdkernels/*.so .pytest_cache .ruff_cache .hypothesis .benchmarks demo-results
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
