# Each target works alone on a fresh clone; running it again does not install again.
VENV ?= .venv
PYTHON ?= python3
HOURS ?= 1
WORKERS ?= 2
STAMP := $(VENV)/.installed

.PHONY: quickstart test soak lint install clean

quickstart: $(STAMP)  ## train, evaluate and draw detections on generated images, in minutes
	$(VENV)/bin/stage-interactor quickstart

test: $(STAMP)  ## run the tests, in WORKERS processes
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -q --durations=5 -n $(WORKERS) --dist loadfile

soak: $(STAMP)  ## rounds of hostile files, kills, signals and full disks, each with a new seed
	$(VENV)/bin/python tools/soak.py --hours $(HOURS) $(if $(SEED),--seed $(SEED)) $(if $(CASES),--cases $(CASES))

lint: $(STAMP)  ## style and types
	$(VENV)/bin/ruff check . && $(VENV)/bin/ruff format --check . && $(VENV)/bin/mypy

install: $(STAMP)

$(STAMP): pyproject.toml
	@echo "== Setting up $(VENV) (PyTorch and its CUDA libraries are large: a few minutes)"
	@command -v $(PYTHON) >/dev/null || { echo "python3 is missing"; exit 1; }
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 10) and f"Python 3.10 or newer is needed, this is {v[0]}.{v[1]}")'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --disable-pip-version-check -e '.[dev]'
	@touch $@
	@echo "== $(VENV) is ready"

clean:
	rm -rf $(VENV) output datasets/shapes
