# Everything runs in one environment, made on first use: `make demo` and `make test` need nothing before them.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
TORCH ?= torch==2.13.0
# The CPU build of a torch asks for no Triton of its own, and budgets of the kernels are kept for this one.
TRITON := $(if $(filter torch==2.13.0,$(TORCH)),triton==3.7.1)
EXTRAS ?= dev
# Python compiles what it imports; all 14,000 files of the packages would take it a minute.
PIP := $(BIN)/pip install -q --disable-pip-version-check --no-compile
BUILD := build/cmake
NATIVE := $(if $(filter 0,$(VLMKERNELS_NATIVE)),,1)
SOURCES := $(wildcard csrc/*/*.* csrc/include/*/*.h python/*.* python/cuda/*.* cmake/*.*) CMakeLists.txt setup.py
PYTEST := OPENBLAS_NUM_THREADS=1 $(BIN)/python -m pytest -q
OP_TESTS := $(addprefix tests/test_,$(addsuffix .py,pairwise_small pairwise_targets distillation_formed linear_distillation_topk linear_distillation_calls sums determinism raw_arguments arguments fuzz)) $(patsubst vlmkernels/ops/%.py,tests/test_%.py,$(filter-out vlmkernels/ops/_%,$(wildcard vlmkernels/ops/*.py)))

.PHONY: setup demo test test-all test-gpu-full bench lint format clean

setup: $(VENV)/$(if $(NATIVE),native,packages)

$(VENV)/packages: pyproject.toml
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 10), "vlmkernels needs Python 3.10 or newer"'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) "$(TORCH)" "setuptools>=77" wheel cmake ninja pybind11
	VLMKERNELS_NATIVE=0 $(PIP) --no-build-isolation -e '.[$(EXTRAS)]' "$(TORCH)" $(TRITON)
	$(if $(filter dev,$(EXTRAS)),$(PIP) --no-deps open-flamingo==2.0.1)  # it asks for torch 2.0.1
	touch $@

$(VENV)/native: $(VENV)/packages $(SOURCES)
	PATH="$(abspath $(BIN)):$$PATH" $(PIP) --no-build-isolation --no-deps -e .
	touch $@

# The CUDA compiler from pip where the system has none: tests read its machine code and simulate its PTX.
$(VENV)/nvcc: $(VENV)/packages
	command -v nvcc > /dev/null || test "$$(uname)" != Linux || \
	  $(PIP) "cuda-toolkit[nvcc,cudart,cccl,crt,nvvm]==13.0.2"
	touch $@

demo: setup
	$(BIN)/python -m benchmarks.demo

test: setup $(VENV)/nvcc
	OMP_NUM_THREADS=1 $(PYTEST) -n 2 --dist loadfile
	VLMKERNELS_NATIVE=0 OMP_NUM_THREADS=1 $(PYTEST) --one-in 6 -n 2 --dist loadfile $(OP_TESTS)
	$(if $(NATIVE),$(MAKE) test-native SHARE="--one-in 6 --kernels-alone")

# The op tests (in `make test` a sixth of the cases of each, and none that is the same everywhere) with every
# other instruction set that this machine has, and the kernels without torch.
.PHONY: test-native
test-native: setup
	set -e; for isa in $$($(BIN)/python -m tests.instruction_sets --others); do \
	  VLMKERNELS_CPU_ISA=$$isa OMP_NUM_THREADS=1 $(PYTEST) $(SHARE) -n 2 --dist loadfile $(OP_TESTS); done
	if test -d $(BUILD); then $(BIN)/cmake --build $(BUILD) --target test_csrc && $(BIN)/ctest --test-dir $(BUILD) --output-on-failure; fi

# The suite without the peers under another torch, in a copy of the tree with an environment of its own:
# `make test-torch TORCH=torch==2.9.1`.
OTHER = build/$(subst ==,-,$(TORCH))
.PHONY: test-torch
test-torch:
	rm -rf $(OTHER)/tree $(OTHER)/venv/native
	mkdir -p $(OTHER)/tree
	git ls-files -co --exclude-standard | tar -cf - -T - | tar -xf - -C $(OTHER)/tree
	$(MAKE) -C $(OTHER)/tree setup VENV=../venv EXTRAS=test
	cd $(OTHER)/tree && OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 ../venv/bin/python -m pytest -q -n 2 --dist loadfile

test-all: setup $(VENV)/nvcc
	$(PYTEST) -m "slow or not slow"
	$(if $(NATIVE),$(MAKE) test-native)

# Every case of the GPU kernels on every rung, and the compile matrix of both releases of Triton.
test-gpu-full: setup $(VENV)/nvcc
	OMP_NUM_THREADS=1 $(PYTEST) -n 2 --dist loadfile -m "slow or not slow" tests/gpu

bench: setup
	$(BIN)/python -m benchmarks.run
	$(BIN)/python -m benchmarks.run --write-docs

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files '*.h' '*.cpp' '*.cc' '*.cu' '*.cuh')

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(git ls-files '*.h' '*.cpp' '*.cc' '*.cu' '*.cuh')

clean:
	rm -rf build $(VENV) vlmkernels/_C*.so
