# Every target does its own set-up in .venv, on a machine that has only Python, make, a C++ compiler and git.
PYTHON ?= python3
VENV ?= .venv
# Torch is installed first and by exact version: a range would fetch whatever is newest, with its CUDA packages.
TORCH ?= torch==2.13.0
# The suite is built for two CUDA architectures, which tests/test_cuda_build.py looks at; GEAR_CUDA_ARCHS=release builds
# all that a wheel ships.
export GEAR_CUDA ?= AUTO
export GEAR_CUDA_ARCHS ?= 80;90a-real
export GEAR_WERROR ?= ON
# tests/test_cuda_build.py runs it: without a GPU up to the point where it says so.
export GEAR_GPU_SMOKE ?= ON

BIN := $(VENV)/bin
PY := $(BIN)/python
INSTALLED := $(VENV)/.installed
SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
PYTEST_ARGS ?=
# Every test has one thread, so that several files run at a time; 0 is one process. A file's tests stay together, in order.
PYTEST_WORKERS ?= logical

.PHONY: all install build demo shapes test pytest lint format bench report sanitize tsan cuda-release gpu-test gpu-peers clean
all: test

# Makes the environment, and brings it up to date when the metadata changed.
install: $(INSTALLED)
$(INSTALLED): pyproject.toml setup.py
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -c "import sys; assert sys.version_info >= (3, 11), 'gear_engine needs Python 3.11 or newer'"
	$(PY) -c "import torch" 2>/dev/null || $(PY) -m pip install -q $(TORCH)
	$(PY) -m pip install -q "setuptools>=77" "pybind11>=2.13" "cmake>=3.24" ninja
	$(PY) -m pip install -q --no-build-isolation -e ".[dev]"
	touch $@

# Compiles what changed; the module lands in gear_engine/.
build: $(VENV)/.built
$(VENV)/.built: $(INSTALLED) CMakeLists.txt $(SOURCES)
	$(PY) setup.py -q build_ext --inplace
	touch $@

demo: build
	$(BIN)/gear-engine demo

# Trains the shipped model again in runs/shapes/model, from the rendered images on; killed, it goes on. See docs/shapes.md.
SHAPES := runs/shapes
$(SHAPES)/scenes-32.npz: | build
	mkdir -p $(SHAPES)
	$(PY) -m gear_engine.training.scenes $@ --count 2048 --seed 11 --size 32
$(SHAPES)/scenes-64.npz: | build
	mkdir -p $(SHAPES)
	$(PY) -m gear_engine.training.scenes $@ --count 8192 --seed 12
shapes: build $(SHAPES)/scenes-32.npz $(SHAPES)/scenes-64.npz
	for stage in 0-small 1-tokenizer 2-joint 3-generator; do \
		$(BIN)/gear-engine train --resume --config gear_engine/training/configs/shapes-$$stage.toml || exit 1; done
	$(BIN)/gear-engine convert $(SHAPES)/3-generator/checkpoints/0003600.pt $(SHAPES)/model --force \
		--tokenizer $(SHAPES)/2-joint/checkpoints/0000200.pt
	$(PY) -m gear_engine.bench.shapes $(SHAPES)/model

test: lint pytest

pytest: build
	$(PY) -m pytest -n $(PYTEST_WORKERS) --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

CPP := $(shell find csrc tests/csrc -name "*.cpp" -o -name "*.h" -o -name "*.cu" -o -name "*.cuh")
lint: build
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CPP)

format: install
	$(BIN)/ruff check --fix-only -q .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

bench: build
	$(PY) -m gear_engine.bench.codebook_quantize

# Measures this machine and adds it to bench/results.
PRESET ?= standard
report: build
	$(BIN)/gear-engine bench --preset $(PRESET) --out build/report.json
	$(BIN)/gear-engine report add build/report.json --results bench/results

# AddressSanitizer and UndefinedBehaviorSanitizer over the op tests. The extension goes to a folder of its own; the
# sanitizer's run-time library has to be loaded before Python, which leaks at exit by design.
SANITIZED := build/sanitize
sanitize: build
	GEAR_SANITIZE=address GEAR_BUILD_DIR=$(SANITIZED)/cmake \
		$(PY) setup.py -q build_ext --build-lib $(SANITIZED)/lib --build-temp $(SANITIZED)/tmp
	LD_PRELOAD="$$($${CXX:-c++} -print-file-name=libasan.so) $$($${CXX:-c++} -print-file-name=libstdc++.so.6)" \
		ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
		GEAR_NATIVE_MODULE=$$(echo $(SANITIZED)/lib/gear_engine/_C.*.so) $(PY) -m pytest tests/ops -q $(PYTEST_ARGS)

# ThreadSanitizer over the threaded ops: a plain C++ driver, since Python itself is not built for it.
tsan: install
	cmake=$$(test -x $(BIN)/cmake && echo $(BIN)/cmake || echo cmake); \
	$$cmake -S . -B build/tsan -G Ninja -DGEAR_SANITIZE=thread -DGEAR_THREADS_TEST=ON -DCMAKE_BUILD_TYPE=RelWithDebInfo \
		-DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(BIN)/ninja -DPython_EXECUTABLE=$(CURDIR)/$(PY) \
		-Dpybind11_DIR=$$($(PY) -m pybind11 --cmakedir) && \
	$$cmake --build build/tsan --target threads
	TSAN_OPTIONS=halt_on_error=1 ./build/tsan/threads

# All kernels for every architecture that a wheel ships; minutes, and no GPU needed.
cuda-release: install
	GEAR_CUDA=ON GEAR_CUDA_ARCHS=release GEAR_BUILD_DIR=build/cuda-release/cmake \
		$(PY) setup.py -q build_ext --build-lib build/cuda-release/lib --build-temp build/cuda-release/tmp

# On a machine with a GPU, against the $(PYTHON) that is there: no environment, no network. See docs/gpu.md.
gpu-test:
	$(PYTHON) bench/gpu_test.py $(GPU_TEST_ARGS)
gpu-peers:
	$(PYTHON) bench/gpu_test.py peers-xl peers-b $(GPU_TEST_ARGS)

clean:
	rm -rf build dist *.egg-info gear_engine/_C.*.so $(VENV)/.built
