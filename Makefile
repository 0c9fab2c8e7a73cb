# make demo | test | sanitize | install | bench | tune | lint | gpu ; a second call does only what has changed
SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
NATIVE := CMakeLists.txt setup.py $(wildcard csrc/*/* csrc/*/*/*)
BUILD_NEEDS := setuptools wheel cmake ninja pybind11 torch numpy
DEMO ?=

.PHONY: install demo test sanitize bench tune lint format gpu wheel clean prerequisites
.DELETE_ON_ERROR:

install: $(VENV)/native.stamp

# Named before anything is downloaded. A C++ compiler is wanted, not needed: without one the other backends work.
prerequisites:
	@command -v $(PYTHON) > /dev/null || { echo "mmfast needs Python 3.10 or later: '$(PYTHON)' is not there (apt-get install python3)"; exit 1; }
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 10) <= v < (3, 14) else f"mmfast needs Python 3.10 to 3.13: $(PYTHON) is {v[0]}.{v[1]}")'
	@$(PYTHON) -c 'import venv, ensurepip' 2> /dev/null || { echo "mmfast needs Python's venv module (apt-get install python3-venv)"; exit 1; }
	@$(PYTHON) -c 'import os, sys, sysconfig; p = os.path.join(sysconfig.get_paths()["include"], "Python.h"); sys.exit(0 if os.path.exists(p) else f"mmfast needs the headers of Python: {p} is not there (apt-get install python3-dev)")'
	@command -v $${CXX:-c++} > /dev/null || echo "no C++ compiler: the CPU kernels are left out and plain PyTorch takes their place (apt-get install g++)"

$(VENV)/packages.stamp: pyproject.toml constraints.txt | prerequisites
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt $(BUILD_NEEDS)
	$(BIN)/python -m pip install -q -c constraints.txt --no-build-isolation -e '.[dev]'
	touch $@

$(VENV)/native.stamp: $(VENV)/packages.stamp $(NATIVE)
	$(BIN)/python setup.py -q build_ext --inplace > $(VENV)/native.log 2>&1 || { cat $(VENV)/native.log; exit 1; }
	@cat mmfast/native.txt
	@touch $@

demo: install
	$(BIN)/python examples/demo.py $(DEMO)

# Two at a time, since most tests keep one core busy; then, alone, what measures memory or time. Between two processes'
# threads that wait should not spin.
test: install
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -q -n 2 --dist worksteal -m "not alone"
	$(BIN)/python -m pytest -q -m alone

# The ops' tests over a CPU library built with GCC's AddressSanitizer and UndefinedBehaviorSanitizer, which see no masked
# AVX-512 load: hence plain C++ too. Left out: Triton's interpreter, which enters no native kernel; tests that measure
# memory or time, of which the sanitizer takes some; and leaks, which are Python's and torch's. No memory is handed on, since
# it does not see who uses that too late.
SANITIZED := $(CURDIR)/build/sanitize
sanitize: install
	$(BIN)/cmake -S . -B $(SANITIZED) -G Ninja -DMMFAST_SANITIZE=ON -DPython_EXECUTABLE=$(abspath $(BIN)/python) \
	  -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja)
	$(BIN)/cmake --build $(SANITIZED) --target mmfast_cpu
	export LD_PRELOAD=$$(ldd $(SANITIZED)/libmmfast_cpu.so | awk '/libasan|libstdc/ {print $$3}' | paste -sd:) && \
	export MMFAST_NATIVE=$(SANITIZED) MMFAST_IDLE_MIB=0 ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 && \
	$(BIN)/python -c 'from mmfast import _native; _native.isa()' && for isa in plain ""; do \
	  MMFAST_ISA=$$isa $(BIN)/python -m pytest -q --capture=sys tests/ops -k "not triton" -m "not alone" || exit 1; \
	done

bench: install
	$(BIN)/python -m pytest -q mmfast/bench --benchmark-only --benchmark-columns=median,iqr,rounds

tune: install
	$(BIN)/python -m mmfast.bench.tune

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files 'csrc/*')
	$(BIN)/mypy

format: install
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .
	$(BIN)/clang-format -i $$(git ls-files 'csrc/*')

# On a machine with a GPU and a torch of its own: no network, no virtual environment.
gpu:
	bash bench/gpu.sh

wheel: install
	rm -rf build/lib* build/bdist*
	$(BIN)/python -m pip wheel -q --no-deps --no-build-isolation -w dist .

clean:
	rm -rf build dist *.egg-info mmfast/*.so mmfast/native.txt $(VENV)/*.stamp
