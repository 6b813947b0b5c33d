# Every target does its own set-up in $(VENV). What the machine must have: Linux, Python >= 3.11 with its headers and
# the venv module, make, and a C compiler; `make check` names each one that is missing and how to get it.
#
#   make up ARGS="--port 9000"     arguments of the command        make test ARGS="-k ring"     arguments of pytest
#   make setup PYTHON=python3.12   another interpreter (after `make clean` when .venv exists)

PYTHON ?= python3
ifeq ($(origin CC),default)
CC := $(notdir $(firstword $(foreach name,cc gcc clang,$(shell command -v $(name))) cc))
endif
export CC
VENV ?= .venv
PARITY_VENV ?= .venv-parity
BENCH_VENV ?= .venv-bench
ARGS ?=

BIN := $(VENV)/bin
SOURCES := $(wildcard bus/*/*.[ch] services/*/*.[ch])
PACKAGES := bus gateway services

# Each stamp is newer than all that its step was made from, so an edit repeats that step and no other.
RUNTIME := $(VENV)/.stamp-runtime
EXTENSIONS := $(VENV)/.stamp-extensions
TOOLS := $(VENV)/.stamp-tools
PARITY := $(PARITY_VENV)/.stamp
BENCH := $(BENCH_VENV)/.stamp
BENCH_MODEL := $(BENCH_VENV)/.stamp-model

# The requirements of an extra of pyproject.toml, one on each line.
extra = $(PYTHON) -c 'import sys, tomllib; \
  project = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
  print(*project["optional-dependencies"][sys.argv[1]], sep="\n")' $(1)

.PHONY: help check setup up down test lint bench bench-model bench-serve parity chaos test-native test-docker clean
.DELETE_ON_ERROR:
.NOTPARALLEL:

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1|/p' $(MAKEFILE_LIST) | while IFS='|' read -r target text; do \
	  printf '  make %-12s %s\n' "$$target" "$$text"; done

check: ## name each thing that the machine lacks
	@missing=0; \
	lacks() { echo "setup: $$1" >&2; missing=1; }; \
	headers='import pathlib, sysconfig as s; raise SystemExit(not pathlib.Path(s.get_path("include"), "Python.h").is_file())'; \
	[ "$$(uname -s)" = Linux ] || \
	  lacks "$$(uname -s) is not supported: the bus needs Linux (futex, open-file-description locks)"; \
	if ! command -v $(firstword $(PYTHON)) >/dev/null 2>&1; then \
	  lacks "no Python interpreter $(PYTHON): install Python >= 3.11 (Debian, Ubuntu: apt-get install python3 python3-venv python3-dev; Fedora: dnf install python3-devel) or name one with PYTHON="; \
	elif ! $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	  lacks "$(PYTHON) is $$($(PYTHON) --version 2>&1), but Python >= 3.11 is needed: install one and name it with PYTHON=python3.11"; \
	else \
	  $(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || \
	    lacks "$(PYTHON) has no venv module (venv, ensurepip): apt-get install python3-venv (or python3.x-venv for another version)"; \
	  $(PYTHON) -c "$$headers" || \
	    lacks "$(PYTHON) has no C headers (Python.h): apt-get install python3-dev (Fedora: dnf install python3-devel)"; \
	fi; \
	if ! command -v $(firstword $(CC)) >/dev/null 2>&1; then \
	  lacks "no C compiler $(firstword $(CC)): apt-get install gcc libc6-dev (Fedora: dnf install gcc) or name one with CC="; \
	elif ! echo '#include <stdatomic.h>\n#include <stdlib.h>' | sed 's/\\n/\n/' | $(CC) -E - >/dev/null 2>&1; then \
	  lacks "the C compiler $(CC) finds no C library headers (stdlib.h): apt-get install libc6-dev (Fedora: dnf install glibc-devel)"; \
	fi; \
	exit $$missing

$(RUNTIME): pyproject.toml setup.py
	@$(MAKE) --no-print-directory check
	@$(BIN)/python -c 'import pip' 2>/dev/null || $(PYTHON) -m venv --clear $(VENV)
	@echo "setup: installing into $(VENV)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check 'setuptools>=77,<84' wheel
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --editable .
	@touch $@

# The editable install has built the extensions; only what was edited since is built again.
$(EXTENSIONS): $(RUNTIME) $(SOURCES)
	@test -z "$$(find $(SOURCES) -newer $(RUNTIME))" || $(BIN)/python setup.py --quiet build_ext --inplace
	@touch $@

$(TOOLS): $(RUNTIME)
	@echo "setup: installing the test tools into $(VENV)"
	@$(call extra,test) | $(BIN)/python -m pip install --quiet --disable-pip-version-check --requirement /dev/stdin
	@touch $@

$(PARITY): pyproject.toml
	@$(MAKE) --no-print-directory check
	@$(PARITY_VENV)/bin/python -c 'import pip' 2>/dev/null || $(PYTHON) -m venv --clear $(PARITY_VENV)
	@echo "parity: installing torch and transformers into $(PARITY_VENV)"
	@$(call extra,parity) | \
	  $(PARITY_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --requirement /dev/stdin
	@touch $@

# The project itself, in a second environment, beside the transports that it is compared with.
$(BENCH): $(RUNTIME) $(EXTENSIONS)
	@$(BENCH_VENV)/bin/python -c 'import pip' 2>/dev/null || $(PYTHON) -m venv --clear $(BENCH_VENV)
	@echo "bench: installing MPI, iceoryx2, torch and matplotlib into $(BENCH_VENV)"
	@$(BENCH_VENV)/bin/python -m pip install --quiet --disable-pip-version-check 'setuptools>=77,<84' wheel
	@$(BENCH_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --editable '.[bench]'
	@touch $@

$(BENCH_MODEL): $(BENCH)
	@echo "bench: installing transformers and llama.cpp (which compiles for some minutes) into $(BENCH_VENV)"
	@$(BENCH_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --editable '.[bench-model]'
	@touch $@

setup: $(TOOLS) $(EXTENSIONS) ## make .venv, install everything, build the C extensions

up: $(RUNTIME) $(EXTENSIONS) ## serve the demo model until Ctrl-C (ARGS="--model DIR --port N ...")
	@exec $(BIN)/xds up $(ARGS)

down: ## end the pod that `make up` started
	@test -x $(BIN)/xds || { echo "down: nothing to end, $(BIN)/xds is not installed" >&2; exit 1; }
	@exec $(BIN)/xds down $(ARGS)

lint: setup ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint ## lint, then all tests that take seconds
	$(BIN)/python -m pytest tests -m 'not slow' --ignore=tests/docker $(ARGS)

bench: $(BENCH) ## measure the bus against MPI, iceoryx2, ZeroMQ, gloo (ARGS="--quick --json FILE")
	$(BENCH_VENV)/bin/xds bench bus $(ARGS)

bench-model: $(BENCH_MODEL) ## measure the engine alone against transformers and llama.cpp (ARGS="--batch 1 8")
	$(BENCH_VENV)/bin/xds bench model $(ARGS)

bench-serve: setup ## measure whole pods under load (ARGS="--concurrency 1 8 32 --compare colocated disaggregated")
	$(BIN)/xds bench serve $(ARGS)

chaos: setup ## kill every kind of process, twenty times each (minutes)
	$(BIN)/python -m pytest tests/chaos -m slow $(ARGS)

parity: setup $(PARITY) ## compare with transformers: the goldens, then fresh checkpoints through real pods (minutes)
	$(PARITY_VENV)/bin/python -m tests.parity.check_goldens
	$(BIN)/python -m tests.e2e.parity_matrix --python $(PARITY_VENV)/bin/python $(ARGS)

test-native: setup ## the bus under sanitizers, on an emulated Arm CPU, and with ten million messages (minutes)
	$(BIN)/python -m pytest tests/native tests/litmus -m slow $(ARGS)

test-docker: setup ## build the image, run the Compose pod, kill services in it (needs a Docker engine)
	$(BIN)/python -m pytest tests/docker $(ARGS)

clean: ## remove environments, builds and caches
	rm -rf $(VENV) $(PARITY_VENV) $(BENCH_VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find $(PACKAGES) tests -name __pycache__ -type d -prune -exec rm -rf {} +
	find $(PACKAGES) -name '*.so' -delete
