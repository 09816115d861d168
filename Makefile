# The commands people type. Each one makes what it needs: system packages (Debian and Ubuntu, as root), a virtual
# environment with torch, the library, installed into that environment. What is up to date is not made again.
#   TORCH_VERSION=2.11.0   another torch than the newest one, in an environment and build folder of its own
#   PYTHON=python3.12      the Python to make the environment with
#   WERROR=ON              compiler warnings are errors
#   CMAKE_ARGS=...         further arguments of the CMake build
#   CUDA=ON                with CUDA kernels: needs nvcc, takes some minutes more; pip install has them where nvcc is
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
SHELL := /bin/bash

PYTHON ?= python3
TORCH_VERSION ?=
WERROR ?= OFF
CUDA ?= OFF

variant := $(addprefix -,$(TORCH_VERSION))
venv := .venv$(variant)
build := build/cmake$(variant)
demo := build/demo$(variant)
stamps := build/stamps$(variant)
bin := $(CURDIR)/$(venv)/bin
unexport PYTHONPATH
export PATH := $(bin):$(PATH)
export VIRTUAL_ENV := $(CURDIR)/$(venv)
export CMAKE_GENERATOR := Ninja
export CMAKE_CXX_COMPILER_LAUNCHER ?= $(shell command -v ccache)
# So that it works with precompiled headers, and across build folders.
export CCACHE_BASEDIR ?= $(CURDIR)
export CCACHE_SLOPPINESS ?= pch_defines,time_macros

# Stamps carry a hash of what they depend on: they survive touched files and notice deleted ones.
hash = $(shell find $(1) -type f -not -path '*/__pycache__/*' | LC_ALL=C sort | xargs sha256sum | sha256sum | cut -c -16)
environment := $(stamps)/environment-$(call hash,pyproject.toml .ci/system_packages)
flags = $(shell printf %s "$(cmake_args)" | sha256sum | cut -c -8)
installed = $(stamps)/installed-$(flags)-$(call hash,$(sources))
cmake_args = -DNORMCORE_TESTS=ON -DNORMCORE_WERROR=$(WERROR) -DNORMCORE_CUDA=$(CUDA) $(CMAKE_ARGS)
sources := CMakeLists.txt cmake csrc kernels pyproject.toml python setup.py

.PHONY: help
help: ## what can be made
	@sed -nE 's/^([a-z]+):.*## (.*)/make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 16

$(environment):
	.ci/system_packages $(PYTHON)
	test -x $(bin)/python || $(PYTHON) -m venv $(venv)
	@echo "installing torch and the Python packages into $(venv); the first time takes minutes"
	python -m pip install --quiet --upgrade "pip>=25.1"
	python -m pip install --quiet torch$(addprefix ==,$(TORCH_VERSION)) \
	  --group build --group test --group examples --group benchmarks --group lint
	@mkdir -p $(stamps) && rm -f $(stamps)/environment-* && touch $@

# setuptools' own build folder may hold files of another version.
$(installed): $(environment)
	rm -rf build/lib* build/bdist*
	NORMCORE_BUILD_DIR=$(build) CMAKE_ARGS="$(cmake_args)" \
	  python -m pip install --verbose --no-build-isolation --no-deps --force-reinstall .
	@rm -f $(stamps)/installed-* && touch $@

.PHONY: install
install: $(installed) ## the library, in the environment's Python

.PHONY: demo
demo: $(installed) ## train on real data in Python, evaluate the exported model in C++
	@mkdir -p $(demo)
	python examples/train_digits.py --output $(demo) --at-least 0.97
	cmake -S examples/cpp_app -B $(demo)/cpp_app -DCMAKE_BUILD_TYPE=Release --log-level=WARNING \
	  -DCMAKE_PREFIX_PATH="$$(python -m normcore --cmake-prefix)"
	cmake --build $(demo)/cpp_app
	set -o pipefail; $(demo)/cpp_app/evaluate_digits $(demo)/digits_model.pt $(demo)/digits_test.pt \
	  | tee $(demo)/cpp_accuracy.txt
	grep --quiet --fixed-strings ": $$(cat $(demo)/accuracy.txt)" $(demo)/cpp_accuracy.txt || \
	  { echo "the accuracy in C++ is not that in Python" >&2; exit 1; }

.PHONY: test
test: $(installed) ## C++ tests, then Python tests of the installed package from outside the source tree
	cmake --build $(build)
	ctest --test-dir $(build) --output-on-failure --parallel $$(nproc) --progress
	cd build && python -m pytest --config-file=../pyproject.toml --numprocesses=$$(nproc) --dist=loadfile \
	  ../tests/python ../tests/gpu ../tests/torch_suite
	cd build && python -m pytest --config-file=../pyproject.toml ../tests/distributed # of up to 8 processes each

.PHONY: bench
bench: $(installed) ## speed of the CPU kernels alone, and beside torch, in build/
	cmake -S . -B $(build) -DNORMCORE_BENCHMARKS=ON --log-level=WARNING
	cmake --build $(build) --target normcore_kernels_benchmark
	$(build)/benchmarks/normcore_kernels_benchmark --benchmark_out=build/kernels$(variant).json
	python -m benchmarks run --output build/speed$(variant).json
	python -m benchmarks report build/speed$(variant).json --output build/speed$(variant) >/dev/null

.PHONY: lint
lint: $(environment) ## formatting, style, types and layering
	find kernels csrc python tests benchmarks examples -name '*.cpp' -o -name '*.h' -o -name '*.cu*' | \
	  xargs clang-format --dry-run --Werror
	ruff check .
	ruff format --check .
	mypy
	python .ci/check_layers.py

.PHONY: format
format: $(environment) ## what `make lint` would complain about, as far as tools can mend it
	find kernels csrc python tests benchmarks examples -name '*.cpp' -o -name '*.h' -o -name '*.cu*' | \
	  xargs clang-format -i
	ruff check --fix .
	ruff format .

# For other machines than this one: auditwheel repair --exclude 'libtorch*' --exclude 'libc10*' --exclude 'libgomp*'.
.PHONY: wheel
wheel: $(installed) ## the wheel for this Python and torch, in dist/
	rm -rf build/lib* build/bdist* dist
	NORMCORE_BUILD_DIR=$(build) CMAKE_ARGS="$(cmake_args)" \
	  python -m pip wheel --quiet --no-build-isolation --no-deps --wheel-dir dist .

.PHONY: clean
clean: ## remove builds (rm -r .venv* removes the environments too)
	rm -rf build dist
