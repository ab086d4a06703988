# `make demo` and `make test` set everything up by themselves: Python >= 3.10, a C++17 compiler and make are enough.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Hundreds of processes import the package in a test run.
unexport PYTHONDONTWRITEBYTECODE
STAMP := $(VENV)/.paci_rt-installed
DOCS_STAMP := $(VENV)/.paci_rt-docs-installed
CXX_HEADERS := $(wildcard csrc/*/*.hpp)
CXX_FILES := $(CXX_HEADERS) $(wildcard csrc/*/*.cpp csrc/*/*.cu tests/cpp/*.cpp)
CXX_WARNED := -std=c++17 -O1 -g -Wall -Wextra -Icsrc
TSAN_FLAGS := -fsanitize=thread
ASAN_FLAGS := -fsanitize=address,undefined -fno-sanitize-recover=all
TSAN_PROGRAM ?= build/tsan/protocol_stress
TSAN_SOURCES := tests/cpp/protocol_stress.cpp $(addprefix csrc/, buffers/lifecycle.cpp buffers/weight_gate.cpp \
  testing/host_twin.cpp)
P2P_TSAN_PROGRAM ?= build/tsan/p2p_stress
P2P_ASAN_PROGRAM ?= build/asan/p2p_stress
P2P_SOURCES := tests/cpp/p2p_stress.cpp $(addprefix csrc/p2p/, channel.cpp copier.cpp shm_channel.cpp shm_segment.cpp)
DEVICE_TSAN_PROGRAM ?= build/tsan/device_stress
DEVICE_ASAN_PROGRAM ?= build/asan/device_stress
DEVICE_SOURCES := tests/cpp/device_stress.cpp $(addprefix csrc/testing/, fake_nccl.cpp host_twin.cpp) \
  $(addprefix csrc/p2p/, channel.cpp control_link.cpp device_channel.cpp device_engine.cpp device_issuer.cpp \
  device_watchdog.cpp ipc_lane.cpp nccl_api.cpp nccl_communicator.cpp nccl_lane.cpp)
DEVICE_MODES := nccl nccl-background nccl-registered ipc nccl-fails ipc-fails
P2P_BREAK ?=# for the tests: what of the protocol to break, for example -DPACI_RT_P2P_PUBLISH=std::memory_order_relaxed
PY_DIRS := paci_rt kernels tests benchmarks examples tools setup.py
# Where nothing can be installed: PYTHON if it was given, else .venv if there is one, else the python3 that is there.
GPU_PYTHON := $(if $(filter file,$(origin PYTHON)),$(or $(wildcard $(BIN)/python),$(PYTHON)),$(PYTHON))
DEMO_OUT ?= runs/demo
DEMO_ARGS ?= --accumulation 2 --batch-size 16 --lr 1e-3 --steps 400 --eval-interval 20

.PHONY: help venv test test-all soak demo bench gpu docs sdist lint format imports tsan asan clean

help:
	@echo "make demo    train a GPT on real text with 1F1B-flush and with PACI, and compare (about 5 minutes)"
	@echo "make test    run the tests; make test-all those too that take longest (half an hour)"
	@echo "make soak    two minutes of delays, kills and restarts"
	@echo "make bench   measure the native kernels and the pipelines"
	@echo "make gpu     build, test and measure on a GPU, offline, with the Python that has torch (GPU_ARGS=--dry-run: the plan)"
	@echo "make docs    build the documentation into build/site; a broken link or anchor fails the build"
	@echo "make sdist   build the source distribution, a wheel from it, install that elsewhere and train a step (minutes)"
	@echo "make lint    ruff, clang-format and mypy;  make format rewrites what they would refuse"
	@echo "make tsan    streams, events and channels under ThreadSanitizer, without a GPU"
	@echo "make asan    channels under AddressSanitizer and UndefinedBehaviorSanitizer"
	@echo "make venv    only set up $(VENV);  make clean removes what was built"

venv: $(STAMP)

$(STAMP): pyproject.toml constraints.txt setup.py CMakeLists.txt cmake/cuda.cmake tools/install.py $(CXX_FILES)
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || \
	  { echo "could not create $(VENV): install Python >= 3.10 with its venv module (Debian, Ubuntu: python3-venv)"; exit 1; }
	$(BIN)/python tools/install.py
	@touch $@

test: venv
	$(BIN)/python -m pytest -m "not gpu and not multigpu and not long" $(PYTEST_ARGS)

test-all: venv
	$(BIN)/python -m pytest -m "not gpu and not multigpu" $(PYTEST_ARGS)

soak: venv
	PYTHONPATH=. $(BIN)/python benchmarks/soak.py --seconds 120

demo: venv
	$(BIN)/paci-rt compare --schedules 1f1b,paci --stages 2 --out $(DEMO_OUT) $(DEMO_ARGS)

bench: venv
	@mkdir -p runs
	$(BIN)/python benchmarks/kernels.py --json runs/kernels.json
	$(BIN)/python benchmarks/executor_overhead.py --json runs/executor_overhead.json
	$(BIN)/python benchmarks/evaluation.py --json runs/evaluation.json
	$(BIN)/python benchmarks/pipeline_throughput.py --peer torch --json runs/pipeline_throughput.json
	$(BIN)/python benchmarks/pipeline_throughput.py --stages 8 --accumulation 8 --emulate-ms 10,20 --slack 0,1 \
	  --json runs/pipeline_throughput_emulated.json
	$(BIN)/python benchmarks/comm_overlap.py --json runs/comm_overlap.json --plot runs/comm_overlap.png
	$(BIN)/python benchmarks/pipeline_throughput.py --stages 8 --accumulation 8 --emulate-ms 20,20,20 \
	  --schedules paci,paci-split --hop-ms 5,10 --slack 0,auto --json runs/pipeline_throughput_slow_links.json

gpu:
	$(GPU_PYTHON) tools/gpu.py $(GPU_ARGS)

docs: $(DOCS_STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

$(DOCS_STAMP): pyproject.toml constraints.txt | $(STAMP)
	$(BIN)/python tools/install.py docs
	@touch $@

sdist: venv
	$(BIN)/python tools/check_sdist.py

lint: venv
	$(BIN)/ruff check $(PY_DIRS)
	$(BIN)/ruff format --check $(PY_DIRS)
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)
	$(BIN)/mypy

format: venv
	$(BIN)/ruff check --fix $(PY_DIRS)
	$(BIN)/ruff format $(PY_DIRS)
	$(BIN)/clang-format -i $(CXX_FILES)

imports: venv
	$(BIN)/python -m pytest -q tests/test_imports.py

tsan: $(TSAN_PROGRAM) $(P2P_TSAN_PROGRAM) $(DEVICE_TSAN_PROGRAM)
	$(TSAN_PROGRAM) 400 $$(date +%s)
	$(P2P_TSAN_PROGRAM) threads 100 $$(date +%s)
	$(P2P_TSAN_PROGRAM) processes 100 $$(date +%s)
	for mode in $(DEVICE_MODES); do $(DEVICE_TSAN_PROGRAM) $$mode 40 $$(date +%s) || exit 1; done

asan: $(P2P_ASAN_PROGRAM) $(DEVICE_ASAN_PROGRAM)
	$(P2P_ASAN_PROGRAM) threads 200 $$(date +%s)
	$(P2P_ASAN_PROGRAM) processes 200 $$(date +%s)
	for mode in $(DEVICE_MODES); do $(DEVICE_ASAN_PROGRAM) $$mode 40 $$(date +%s) || exit 1; done

$(TSAN_PROGRAM): $(TSAN_SOURCES)
$(P2P_TSAN_PROGRAM) $(P2P_ASAN_PROGRAM): $(P2P_SOURCES)
$(DEVICE_TSAN_PROGRAM) $(DEVICE_ASAN_PROGRAM): $(DEVICE_SOURCES)

$(TSAN_PROGRAM) $(P2P_TSAN_PROGRAM) $(DEVICE_TSAN_PROGRAM): SANITIZER := $(TSAN_FLAGS)
$(P2P_ASAN_PROGRAM) $(DEVICE_ASAN_PROGRAM): SANITIZER := $(ASAN_FLAGS)

$(TSAN_PROGRAM) $(P2P_TSAN_PROGRAM) $(P2P_ASAN_PROGRAM) $(DEVICE_TSAN_PROGRAM) $(DEVICE_ASAN_PROGRAM): $(CXX_HEADERS)
	@mkdir -p $(dir $@)
	$(CXX) $(CXX_WARNED) $(SANITIZER) $(P2P_BREAK) $(filter %.cpp,$^) -pthread -ldl -o $@

clean:
	rm -rf build dist $(VENV) *.egg-info paci_rt/_C*.so runs
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
