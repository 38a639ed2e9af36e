# Everything starts here: each target does all the set-up it needs on a fresh machine (Python 3.10+, git, make).
#   make serve   a server on $(HOST):$(PORT) with the demo model and three tasks; MODEL=DIR|FILE.gguf serves that instead
#   make test    the tests (ALL=1: the slow ones too; JOBS=2: two at a time, but for those that judge times; CI does both)
#   make lint    ruff and mypy
#   make bench-engine [OUT=FILE] [FULL=1]   the engine under load, offline and served; FULL: 20 minutes of it, not 2
#   make bench-kernels [OUT=FILE]   the kernels against this machine's own rates, on the CPU and on a GPU if there is one;
#                SETUP=0 ARGS="--device cuda": only the GPU's table, with what $(PYTHON) has (torch and triton are enough)
#   make bench-tuning DATA=DIR [OUT=FILE] [DOCUMENT=FILE] [FULL=1]   tuned sets against LoRA and the float model, about an
#                hour on two cores; rows that OUT has are kept, DOCUMENT gets its tables anew.
#                `python -m peqa_runtime.bench.tuning fetch DIR` gets the data

PYTHON ?= python3
VENV ?= .venv
HOST ?= 127.0.0.1
PORT ?= 8000
MODEL ?=
ARGS ?=
OUT ?=
FULL ?=
DATA ?=
DOCUMENT ?=
SETUP ?= 1
PEQA_HOME ?= $(CURDIR)/.peqa
export PEQA_HOME
TORCH_VERSION ?= 2.13.0

BIN := $(VENV)/bin
# A stamp is touched only when its step is complete, so an interrupted set-up is repeated by the next run.
STAMP := $(VENV)/.installed
STAMP_DEV := $(VENV)/.installed-dev
STAMP_BENCH := $(VENV)/.installed-bench
SOURCES := pyproject.toml setup.py $(wildcard kernels/native/*.c kernels/native/*.h kernels/native/build_backend.py)
GPU := $(shell command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -q . && echo yes)
PIP := $(BIN)/python -m pip --disable-pip-version-check install -q

.PHONY: serve test lint format setup setup-dev clean imports bench-kernels bench-engine bench-tuning

serve: $(STAMP)
	$(BIN)/peqa serve $(MODEL) --host $(HOST) --port $(PORT) $(ARGS)

CHOSEN = $(if $(ALL),not gpu,not slow and not gpu)
test: $(STAMP_DEV)
ifdef JOBS
	$(if $(ALL),$(BIN)/python -m pytest -m "alone and $(CHOSEN)" $(ARGS))
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder --durations=40 -m "not alone and $(CHOSEN)" $(ARGS)
else
	$(BIN)/python -m pytest -m "$(CHOSEN)" $(ARGS)
endif

# The folders under their import names, for who cannot use an editable install: a machine without network, and mypy, which
# follows no import hook.
imports:
	@mkdir -p build/types && for pair in kernels:peqa_kernels server:peqa_server loadtest:peqa_loadtest \
	  peqa_runtime:peqa_runtime; do ln -sfn ../../$${pair%%:*} build/types/$${pair##*:}; done

lint: $(STAMP_DEV) imports
	$(BIN)/ruff format --check . && $(BIN)/ruff check .
	MYPYPATH=build/types $(BIN)/mypy -p peqa_kernels -p peqa_runtime -p peqa_server -p peqa_loadtest

format: $(STAMP_DEV)
	$(BIN)/ruff format . && $(BIN)/ruff check --fix .

ifeq ($(SETUP),0)
ifneq ($(filter-out bench-kernels imports clean,$(MAKECMDGOALS)),)
$(error SETUP=0 goes with bench-kernels only)
endif
endif
BARE := $(filter 0,$(SETUP))
bench-kernels: $(if $(BARE),imports,$(STAMP))
	$(if $(BARE),PYTHONPATH=build/types $(PYTHON),$(BIN)/python) -m peqa_kernels.bench $(if $(OUT),--out $(OUT)) $(ARGS)

bench-engine: $(STAMP)
	$(BIN)/python -m peqa_loadtest.bench $(MODEL) $(if $(OUT),--out $(OUT)) $(if $(FULL),--minutes 20) $(ARGS)

bench-tuning: $(STAMP_BENCH)
	@test -n "$(DATA)" || { echo "Say where the data is: make bench-tuning DATA=DIR" \
	  "($(BIN)/python -m peqa_runtime.bench.tuning fetch DIR gets it)" >&2; exit 2; }
	$(BIN)/python -m peqa_runtime.bench.tuning run $(DATA) $(if $(OUT),--out $(OUT)) \
	  $(if $(DOCUMENT),--document $(DOCUMENT)) $(if $(FULL),--full) $(ARGS)

setup: $(STAMP)
setup-dev: $(STAMP_DEV)

# hqq, which writes files that the importer is tested on, lies apart: where transformers finds it, every start of every
# program imports it, and torch's compiler with it.
$(STAMP_DEV): $(STAMP)
	$(PIP) -e '.[dev]'
	$(PIP) --no-deps --upgrade --target build/hqq 'hqq>=0.2.8' 'termcolor>=2'
	@touch $@

$(STAMP_BENCH): $(STAMP)
	$(PIP) -e '.[bench]'
	@touch $@

# torch: the CUDA build where an NVIDIA GPU is found (PyPI's default on Linux), else the CPU build, which is 15 times
# smaller. It is looked for in the configured package index first, then in PyTorch's own.
$(STAMP): $(SOURCES)
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || { rm -rf $(VENV); $(PYTHON) -m venv $(VENV) || \
	  { echo "No virtual environment could be made: on Debian, 'apt install python3-venv' first." >&2; rm -rf $(VENV); exit 1; }; }
	@echo "Installing torch$(if $(GPU), for CUDA, for the CPU) and the server into $(VENV) …"
	@$(BIN)/python -c 'import torch' >/dev/null 2>&1 || \
	  if [ -n "$(GPU)" ] || [ "$$(uname)" = Darwin ]; then $(PIP) 'torch>=$(TORCH_VERSION),<3'; \
	  else $(PIP) 'torch==$(TORCH_VERSION)+cpu' 2>/dev/null || \
	       $(PIP) 'torch==$(TORCH_VERSION)+cpu' --extra-index-url https://download.pytorch.org/whl/cpu; fi
	$(PIP) -e .
	@touch $@

clean:
	rm -rf $(VENV) .peqa build *.egg-info kernels/native/*.so
