# Everything runs in .venv, which the first target that needs it creates; repeated calls install nothing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --constraint requirements-dev.txt
RUN_DIR ?= runs/sample
WORKERS ?= $(shell n=$$(nproc 2>/dev/null || echo 2); [ $$n -gt 8 ] && n=8; echo $$n)
TRITON_3_6 := .cache/triton-3.6

SOURCES := pyproject.toml setup.py requirements-dev.txt $(shell find csrc -type f)
CXX_FILES = $(shell find csrc -type f \( -name '*.cpp' -o -name '*.h' -o -name '*.hpp' -o -name '*.cu' -o -name '*.cuh' \))

.PHONY: help align test test-ptx nightly lint format bench clean
.DELETE_ON_ERROR:

help:
	@echo "make align      install, build what this machine can run, one-seed alignment run with pictures under $(RUN_DIR)"
	@echo "make test       install the test packages and run every test"
	@echo "make test-ptx   run the compiled Triton kernels on this CPU; part of make test"
	@echo "make nightly    ten thousand random problems on each backend: never NaN, never an undocumented exception"
	@echo "make lint       ruff, mypy and clang-format, changing nothing"
	@echo "make format     ruff and clang-format, in place"
	@echo "make bench      the quick benchmark against the peers"
	@echo "make clean      remove what make made, runs/ excepted"

# The data of the run ships with the project: no hub is asked for anything.
align: $(VENV)/.align
	HF_HUB_OFFLINE=1 $(BIN)/python -m training.align --config training/configs/sample.yaml --output_dir $(RUN_DIR)

# One thread a worker: the workers already fill the cores. Tests that need more threads ask for them.
test: $(VENV)/.dev $(TRITON_3_6)/.complete
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 OTKERN_TRITON_PATHS=$(abspath $(TRITON_3_6)) \
		$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(PYTEST_ARGS)
	$(MAKE) test-ptx

# A call of its own: the kernels must be decorated without Triton's interpreter.
test-ptx: $(VENV)/.dev
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 OTKERN_TEST_PTX=1 $(BIN)/python -m pytest -n $(WORKERS) tests/ptx

nightly: $(VENV)/.dev
	OMP_NUM_THREADS=1 OTKERN_DRAWS=10000 $(BIN)/python -m pytest -n $(WORKERS) tests/test_finite.py

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

bench: $(VENV)/.dev
	$(BIN)/python -m benchmarks run --suite quick --json runs/benchmarks-quick.json

clean:
	rm -rf $(VENV) .cache build dist otkern.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find otkern -name '*.so' -delete
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch first and by its pin: a looser requirement brings several GB of CUDA packages to a machine without a GPU.
$(VENV)/.base: requirements-dev.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "otkern needs Python 3.10 or newer")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch setuptools pybind11 ninja
	@touch $@

$(VENV)/.align: $(VENV)/.base $(SOURCES)
	$(PIP) --no-build-isolation --editable '.[train]'
	@$(BIN)/python -m otkern.env
	@touch $@

# With the CUDA kernels for every target, on any machine with nvcc, and the executor that runs them on the CPU.
$(VENV)/.dev: $(VENV)/.base $(SOURCES)
	OTKERN_CUDA_ARCHS=all OTKERN_BUILD_HOST_EXECUTOR=1 $(PIP) --no-build-isolation --editable '.[train,bench,test,dev]'
	@touch $(VENV)/.align $@

# The oldest supported Triton, beside the installed one: kernels are compiled with both, without a GPU.
$(TRITON_3_6)/.complete:
	rm -rf $(TRITON_3_6)
	$(PIP) --no-deps --target $(TRITON_3_6) triton==3.6.0
	@touch $@
