# Every target sets up .venv first, with the pinned versions of constraints.txt, and again whenever that file or
# pyproject.toml changes. Variables: PYTHON (the interpreter for .venv), WORKERS and PYTEST_ARGS (make test), PINS
# (versions that replace those of constraints.txt in a new .venv, such as PINS="torch==2.11.0 triton==3.6.0").

PYTHON ?= python3
WORKERS ?= 2
PYTEST_ARGS ?=
PINS ?=

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.installed
DOCS_READY := $(VENV)/.docs-installed

.PHONY: demo test test-fast lint docs performance bench bench-gpu bench-gpu-plan dist check-dist check-install check-tag \
    clean
.DELETE_ON_ERROR:

demo: $(READY)
	$(BIN)/python examples/demo.py

# One thread per worker: otherwise the workers' OpenMP threads compete for the cores.
test: $(READY)
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TORCHINDUCTOR_COMPILE_THREADS=1 \
	    $(BIN)/pytest -n $(WORKERS) --dist worksteal $(PYTEST_ARGS)

# The tests that are not marked slow, in two minutes; tests/conftest.py marks the slow ones.
test-fast: $(READY)
	$(MAKE) test PYTEST_ARGS='-m "not slow" $(PYTEST_ARGS)'

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

# The pages of docs/ as a site in out/site; a broken link or anchor is an error.
docs: $(DOCS_READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench: $(READY)
	$(BIN)/python benchmarks/run.py

# Time the Triton kernels, PyTorch's kernels and the cost model's choices on a GPU, in ten minutes; writes
# benchmarks/results/gpu.json.
bench-gpu: $(READY)
	$(BIN)/python benchmarks/gpu.py

# Compare planned with measured GPU memory, in ten minutes; writes benchmarks/results/gpu_plan.json.
bench-gpu-plan: $(READY)
	$(BIN)/python benchmarks/gpu_plan.py

# Writes docs/performance.md and the README's table and pictures from the files in benchmarks/results; measures nothing.
performance: $(READY)
	$(BIN)/python benchmarks/page.py
	$(BIN)/python benchmarks/picture.py

# Build the wheel and the sdist. The sdist would also contain the files that an old attnfx.egg-info lists.
dist: $(READY)
	rm -rf dist attnfx.egg-info
	$(BIN)/python -m build --quiet

# Use each of them from a clean environment, which shares the packages of .venv that attnfx requires.
check-dist: dist
	$(BIN)/python tests/packaging/check_dist.py dist/*

# Do the same with PYTHON and the existing files of dist/. pip downloads the packages that attnfx requires.
check-install:
	$(PYTHON) tests/packaging/check_dist.py --download dist/*

# Check that TAG names the version.
check-tag:
	@test "$(TAG)" = "v$$($(PYTHON) -c 'import attnfx; print(attnfx.__version__)')" || { echo "TAG is not v + version"; exit 1; }

# Keeps .venv, because making it again needs a download.
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

$(DOCS_READY): $(READY)
	@echo "installing the tools of the documentation into $(VENV)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(VENV)/constraints.txt -e '.[docs]'
	@touch $@
