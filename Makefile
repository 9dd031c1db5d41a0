# Every target sets up .venv by itself: with the pinned versions of constraints.txt, again whenever these or
# pyproject.toml change. Knobs: PYTHON (the interpreter .venv is made of), WORKERS and PYTEST_ARGS (make test), PINS
# (versions instead of those of constraints.txt in a new .venv, such as PINS="torch==2.11.0 triton==3.6.0").

PYTHON ?= python3
WORKERS ?= 2
PYTEST_ARGS ?=
PINS ?=

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.installed

.PHONY: demo test test-fast lint bench bench-gpu bench-gpu-plan dist check-dist check-install \
    check-tag clean
.DELETE_ON_ERROR:

demo: $(READY)
	$(BIN)/python examples/demo.py

# One thread a worker, or the workers' OpenMP threads fight over the cores.
test: $(READY)
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TORCHINDUCTOR_COMPILE_THREADS=1 \
	    $(BIN)/pytest -n $(WORKERS) --dist worksteal $(PYTEST_ARGS)

# What is not marked as slow, in two minutes; tests/conftest.py says what is.
test-fast: $(READY)
	$(MAKE) test PYTEST_ARGS='-m "not slow" $(PYTEST_ARGS)'

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

bench: $(READY)
	$(BIN)/python benchmarks/run.py

# The Triton kernels on a GPU against PyTorch's own, and what the cost model chose, in ten minutes; writes
# benchmarks/results/gpu.json.
bench-gpu: $(READY)
	$(BIN)/python benchmarks/gpu.py

# Plans held against a GPU's memory, in ten minutes; writes benchmarks/results/gpu_plan.json.
bench-gpu-plan: $(READY)
	$(BIN)/python benchmarks/gpu_plan.py

# The wheel and the sdist. An old attnfx.egg-info would add the files that it lists.
dist: $(READY)
	rm -rf dist attnfx.egg-info
	$(BIN)/python -m build --quiet

# Each of them in a clean environment, which shares the packages of .venv that attnfx requires.
check-dist: dist
	$(BIN)/python tests/packaging/check_dist.py dist/*

# The same for the files of dist/ as they are and another PYTHON; pip downloads what attnfx requires.
check-install:
	$(PYTHON) tests/packaging/check_dist.py --download dist/*

# Before a release: the tag must be the version.
check-tag:
	@test "$(TAG)" = "v$$($(PYTHON) -c 'import attnfx; print(attnfx.__version__)')" || { echo "TAG is not v + version"; exit 1; }

# Keeps .venv, which costs a download to make again.
clean:
	rm -rf build dist *.egg-info .hypothesis .import_linter_cache .pytest_cache .ruff_cache torch_compile_debug
	rm -rf out benchmarks/out examples/out
	find . -name .venv -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

$(READY): pyproject.toml constraints.txt
	@test -x $(BIN)/python || { echo "making $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@echo "installing attnfx and its tools into $(VENV)"
	@cp constraints.txt $(VENV)/constraints.txt
	@for pin in $(PINS); do sed -i "s/^$${pin%%==*}==[^;]*/$$pin/" $(VENV)/constraints.txt; done
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(VENV)/constraints.txt -e '.[dev]'
	@touch $@
