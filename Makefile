# SPDX-License-Identifier: Apache-2.0
# Works from any directory with `make -C`. ARGS go to the program that a target runs,
# PYTHON and TORCH choose what .venv is made of: make venv PYTHON=python3.12 TORCH=2.14.1
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

VENV ?= .venv
PYTHON ?= python3
TORCH ?=
ARGS ?=
# Where sdist and wheel go, and what a wheel is built from: this folder or an sdist.
DIST ?= dist
FROM ?= .
BIN := $(abspath $(VENV))/bin
CORE := build/core
export PYTHON TORCH
HOST_PATH := $(PATH)
export PATH := $(BIN):$(PATH)
# For every target: other flags would compile everything anew.
override CMAKE_ARGS := -DAUTOMOE_WERROR=ON $(CMAKE_ARGS)
export CMAKE_ARGS

# With folders, whose times change when a file comes or goes.
SOURCES := CMakeLists.txt setup.py pyproject.toml tools/build_backend.py tools/cuda.cmake \
  $(shell find csrc)
CPP_FILES = $(shell find csrc tests/cpp -name '*.[ch]pp' -o -name '*.cu' -o -name '*.cuh')

.PHONY: help venv build train test test-all test-gpu test-without-gpu cpp-test lint \
  format wheel sdist wheel-check clean ip

help: ## show this list
	@grep -hE '^[a-z-]+:.*## ' $(firstword $(MAKEFILE_LIST)) | \
	  awk -F ':.*## ' '{ printf "  make %-11s %s\n", $$1, $$2 }'

$(VENV)/.made:
	@tools/prepare.sh venv $(VENV)
	@touch $@

$(VENV)/.installed: $(VENV)/.made $(SOURCES)
	@echo "== building and installing torch_automoe"
	@$(BIN)/python -m pip install -q --disable-pip-version-check \
	  --no-build-isolation -e '.[dev]'
	@touch $@

venv: $(VENV)/.made ## make .venv with torch, UCX and the build tools

build: $(VENV)/.installed ## build the extension and install the package into .venv

ip:
	@tools/prepare.sh ip

train: build ip ## train a small MoE model on real text over emulated nodes
	$(BIN)/automoe train $(ARGS)

cpp-test: $(VENV)/.made
	@tools/prepare.sh gtest
	cmake -S . -B $(CORE) -G Ninja -DPython_EXECUTABLE=$(BIN)/python \
	  -DAUTOMOE_BUILD_TORCH=OFF -DAUTOMOE_BUILD_TESTS=ON
	cmake --build $(CORE)
	timeout 900 $(CORE)/automoe_tests --gtest_brief=1
	timeout 300 $(CORE)/kill_ranks --gtest_brief=1
# Half of the program is not compiled for this, so its containers are not known.
	ASAN_OPTIONS=detect_container_overflow=0 \
	  timeout 600 $(CORE)/automoe_kernel_tests --gtest_brief=1

test: build ip cpp-test ## run the C++ tests and the Python tests that are not slow
	$(BIN)/python -m pytest -m "not slow" $(ARGS)

test-all: build ip cpp-test ## run every test, the heavy matrices too
	$(BIN)/python -m pytest $(ARGS)

test-gpu: ## build with the torch of PYTHON and run what needs a GPU
	@PATH="$(HOST_PATH)" tools/test_gpu.sh

test-without-gpu: ## run what can be of the tests for GPUs; PYTHON has torch for CUDA
	@tools/test_without_gpu.sh $(ARGS)

lint: build ## check formatting, Python style, include levels and file sizes
	@echo "clang-format of $(words $(CPP_FILES)) files"
	@$(BIN)/clang-format --dry-run -Werror $(CPP_FILES)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python tools/check_layers.py
	$(BIN)/python tools/check_sources.py

format: build ## format all sources in place
	@$(BIN)/clang-format -i $(CPP_FILES)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

wheel: $(VENV)/.made ## build a wheel into dist/, from FROM, an sdist, where it is given
	@$(BIN)/python -m pip wheel -q --disable-pip-version-check \
	  --no-build-isolation --no-deps -w $(DIST) $(FROM)
	@ls $(DIST)/*.whl

sdist: $(VENV)/.made ## build a source archive into dist/
	@PYTHONPATH=tools $(BIN)/python -c 'import build_backend, sys; \
	  build_backend.build_sdist(sys.argv[1])' $(DIST) >/dev/null
	@ls $(DIST)/*.tar.gz

wheel-check: build ## check contents and linkage of the wheels in dist/
	$(BIN)/python tools/check_wheel.py $(DIST)/*.whl

clean: ## remove what was built, but not .venv
	rm -rf build dist torch_automoe.egg-info torch_automoe/_build.py \
	  torch_automoe/_C.*.so $(VENV)/.installed
