# The main commands are `make sweep` and `make figures`. Everything runs in .venv, which is created when it is first
# needed; that takes Python 3.11 or 3.12.

GRID ?= laptop
ARGS ?=
PYTHON ?= $(firstword $(foreach name,python3.12 python3.11 python3,$(if $(shell $(name) -c 'import sys; print(1 if (3, 11) <= sys.version_info < (3, 13) else "")' 2>/dev/null),$(name),)))
BIN := .venv/bin

.PHONY: setup sweep figures test test-slow test-slurm test-triton check bench gpu

setup: .venv/.installed

.venv/.installed: pyproject.toml
	@test -n "$(PYTHON)" || { echo "make: no Python 3.11 or 3.12 found; give one: make PYTHON=/path/to/python3.11" >&2; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

# Train and evaluate the cells of the grid that are not done, then fit and draw. Options: make sweep ARGS="--jobs 4"
sweep: setup
	$(BIN)/suite sweep $(GRID) $(ARGS)

# Draw the paper's figures (results/published and matching runs), those of the kernels (results/bench), and those of the
# grid if it has runs.
figures: setup
	$(BIN)/python -m analysis paper
	$(BIN)/python -m analysis kernels
	@if ls results/grids/$(GRID)/grid.json >/dev/null 2>&1; then $(BIN)/python -m analysis report --grid $(GRID) $(ARGS); \
	else echo "grid $(GRID) has no runs to draw; run: make sweep GRID=$(GRID)"; fi

test: setup
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/pytest -q -n 2 --dist loadfile -m 'not slow and not slurm' $(ARGS)

test-slow: setup
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/pytest -q -m slow $(ARGS)

# Uses the Slurm that answers `sinfo`; tests/slurm/cluster.py starts one on this host.
test-slurm: setup
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/pytest -q -m 'slurm and not slow' tests/slurm $(ARGS)

# Test the Triton kernels with the oldest supported triton, placed before the installed one on the path.
OLD_TRITON := .venv/triton-3.6
test-triton: $(OLD_TRITON)/.installed
	PYTHONPATH=$(OLD_TRITON) $(BIN)/python -c 'import sys, triton; print("triton", triton.__version__); \
	sys.exit(None if triton.__version__.startswith("3.6.") else "make: not triton 3.6: " + triton.__file__)'
	PYTHONPATH=$(OLD_TRITON) TRITON_INTERPRET=1 OMP_NUM_THREADS=1 \
	$(BIN)/pytest -q -n 2 -m 'not slow' -k triton tests/kernels $(ARGS)

$(OLD_TRITON)/.installed: .venv/.installed
	rm -rf $(OLD_TRITON)
	$(BIN)/python -m pip install --quiet --no-deps --target $(OLD_TRITON) 'triton==3.6.*'
	touch $@

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Measure kernels, whole training steps and the reading of records; with DATA_ROOT=path/to/eval also evaluation.
bench: setup
	$(BIN)/suite bench kernels
	$(BIN)/suite bench step --half-keys 32,128,512 $(ARGS)
	$(BIN)/suite bench records
	$(if $(DATA_ROOT),$(BIN)/suite bench evaluate --data-root $(DATA_ROOT))

# Measure everything on one GPU, in eight minutes: correctness first. Options: make gpu ARGS="--only correct search"
gpu: setup
	$(BIN)/python -m suite.bench.gpu $(ARGS)
