# Everything from a bare clone: `make bench`, `make test`. Targets are listed by `make help`.

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
ARGS ?=

PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
BUILD_INPUTS := pyproject.toml setup.py $(shell find build_backend csrc -type f -not -name '*.pyc')
CXX_FILES := $(shell find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
PYTHON_FILES := setup.py build_backend dgl_ext tests benchmarks examples

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help bench bench-results bench-memory test test-slow gpu-check fuzz lint format wheel wheel-check
.PHONY: test-gate test-trainers cpp-tests clang-tests sanitize cuda-compile docs clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))
	@echo
	@echo "  PYTHON=$(PYTHON)  VENV=$(VENV)  TORCH=\"$(TORCH)\"  ARGS=\"$(ARGS)\""
	@echo "  A torch from another index: make test TORCH=\"torch==2.13.0 --index-url URL\""

bench: $(VENV)/.bench  ## time the training step, the README's table (options in ARGS)
	$(PY) benchmarks/bench_fusion.py $(ARGS)

bench-results: $(VENV)/.bench  ## renew the committed results of bench_fusion.py
	$(PY) benchmarks/bench_fusion.py --out benchmarks/results $(ARGS)
	$(PY) benchmarks/bench_fusion.py --mode logits --out benchmarks/results $(ARGS)

bench-memory: $(VENV)/.bench  ## measure peak memory and time of large heads (options in ARGS)
	$(PY) benchmarks/bench_memory.py $(ARGS)

# Most tests keep one core busy, hence several processes.
test: $(VENV)/.dev cpp-tests  ## run the tests, without the slow ones (pytest's options in ARGS)
	$(PY) -m pytest -m "not slow" -n auto --maxprocesses 4 $(ARGS)

test-gate: $(VENV)/.dev cpp-tests  ## run those of the slow tests that CI runs
	$(PY) -m pytest -m "slow and gate" -n auto --maxprocesses 4 --dist loadfile $(ARGS)

test-slow: $(VENV)/.dev cpp-tests  ## run the slow tests
	$(PY) -m pytest -m slow $(ARGS)

test-trainers: $(VENV)/.dev $(VENV)/.trainers  ## run the pages' code that needs other packages
	$(PY) -m pytest -m slow tests/project/test_docs_pages.py $(ARGS)

# The venv is made in the recipe: without a GPU nothing is built.
gpu-check:  ## on a machine with a GPU: tests, sanitizers, benchmarks, one JSON report
	@$(PYTHON) tests/gpu/gpu_check.py --look
	@NVCC_APPEND_FLAGS=-lineinfo $(MAKE) --no-print-directory $(VENV)/.dev
	$(PY) tests/gpu/gpu_check.py $(ARGS)

cuda-compile: $(VENV)/.dev cpp-tests  ## compile the kernels for every architecture, by nvcc alone
	$(PY) -m pytest tests/cuda/test_cuda_compile.py -n 2 --dist loadgroup $(ARGS)

fuzz: $(VENV)/.dev  ## draw 100,000 random problems and check each
	$(PY) -m pytest tests/heads/test_fuzz.py --hypothesis-profile=long $(ARGS)

lint: $(VENV)/.dev  ## check style and types, changing nothing
	$(PY) -m ruff check $(PYTHON_FILES)
	$(PY) -m ruff format --check $(PYTHON_FILES)
	$(PY) -m mypy
	$(VENV)/bin/clang-format --dry-run -Werror $(CXX_FILES)

format: $(VENV)/.dev  ## rewrite Python and C++ files in the project's style
	$(PY) -m ruff check --fix $(PYTHON_FILES)
	$(PY) -m ruff format $(PYTHON_FILES)
	$(VENV)/bin/clang-format -i $(CXX_FILES)

docs: $(VENV)/.dev  ## make the API pages from the docstrings, into build/docs
	$(VENV)/bin/pdoc --docformat google --output-directory build/docs dgl_ext

wheel: $(VENV)/.torch  ## build the wheel into dist/
	rm -rf dist
	$(PIP) wheel . --no-deps --wheel-dir dist

wheel-check:  ## try the wheel beside another torch: OTHER_TORCH=torch==2.10.0 [OTHER_PYTHON=python3.10]
	@test -n "$(OTHER_TORCH)" || { echo "set OTHER_TORCH, for example torch==2.10.0" >&2; exit 2; }
	$(MAKE) --no-print-directory wheel
	rm -rf build/wheel-check
	$(or $(OTHER_PYTHON),$(PYTHON)) -m venv build/wheel-check
	build/wheel-check/bin/python -m pip install $(OTHER_TORCH) numpy
	build/wheel-check/bin/python -m pip install --no-deps dist/*.whl
	cd build/wheel-check && bin/python -m dgl_ext && bin/python ../../tests/project/smoke.py

# CMake rebuilds only what changed, so it runs every time.
cpp-tests: $(VENV)/.dev
	cmake --log-level=NOTICE -G Ninja -S . -B build/cpp \
	  -DCMAKE_MAKE_PROGRAM=$(abspath $(VENV))/bin/ninja -DPython_EXECUTABLE=$(abspath $(PY))
	cmake --build build/cpp

# What they test is free of torch, so it is quickly built once more.
clang-tests: $(VENV)/.dev  ## build and run the C++ tests with clang, where there is one
	@if command -v clang++ > /dev/null; then \
	  cmake --log-level=NOTICE -G Ninja -S . -B build/clang -DCMAKE_CXX_COMPILER=clang++ \
	    -DCMAKE_MAKE_PROGRAM=$(abspath $(VENV))/bin/ninja -DPython_EXECUTABLE=$(abspath $(PY)) && \
	  cmake --build build/clang --target dgl_core && \
	  DGL_EXT_CPP_TESTS=$(abspath build/clang) $(PY) -m pytest tests/cpu/test_core.py; \
	else echo "clang-tests: skipped, since there is no clang++ here"; fi

SANITIZE = -fsanitize=address,undefined -fno-sanitize-recover=undefined
sanitize: $(VENV)/.dev  ## fuzz the CPU ops under the address and undefined-behaviour sanitizers
	CFLAGS="$(SANITIZE) -O1 -g" LDFLAGS="$(SANITIZE)" $(PY) setup.py -q build \
	  --build-lib build/sanitize/lib --build-temp build/sanitize/temp
	cd tests && ASAN_OPTIONS=detect_leaks=0 PYTHONPATH=$(abspath build/sanitize/lib) \
	  LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" \
	  $(abspath $(PY)) -m pytest -s -p no:cacheprovider heads/test_fuzz.py $(ARGS)

clean:  ## remove everything that was built, the venv included
	rm -rf $(VENV) build dist dgl_ext.egg-info dgl_ext/*.so dgl_ext/_build_info.json
	rm -rf .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# --- the venv: a stamp for its torch, one for the package, and one for each set of extras ---

# Another TORCH than the one that is installed makes the venv anew.
ifneq ($(strip $(shell cat $(VENV)/.torch 2>/dev/null)),$(strip $(TORCH)))
.PHONY: $(VENV)/.torch
endif

$(VENV)/.torch:
	$(PYTHON) -m venv --clear $(VENV)
	$(PIP) install $(TORCH) "setuptools>=77" ninja
	@echo "$(strip $(TORCH))" > $@

# Editable: Python files need no new install. Not isolated: the build's needs are in the venv.
$(VENV)/.package: $(VENV)/.torch $(BUILD_INPUTS)
	@echo "compiling dgl_ext: one to three minutes, up to ten where nvcc takes part"
	$(PIP) install --quiet --no-build-isolation --editable .
	@touch $@

# What the extra needs; the package itself is there, and not built again.
$(VENV)/.%: $(VENV)/.package
	$(PIP) install --quiet "dgl_ext[$*]"
	@touch $@
