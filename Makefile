# `make demo` and `make test` do everything on a fresh machine: environment, installation, then the job.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

.PHONY: demo test lint format clean

demo: $(READY)
	$(BIN)/ebft-train demo --output demo-output --overwrite

test: lint
	$(BIN)/python -m pytest

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(READY): pyproject.toml setup.py constraints.txt $(wildcard csrc/*.cpp csrc/*.h csrc/*/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[trainer,plot,dev]"
	touch $@

clean:
	rm -rf $(VENV) build dist demo-output *.egg-info .pytest_cache .ruff_cache
