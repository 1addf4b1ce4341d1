# `make demo` and `make test` do everything on a fresh machine: environment, installation, then the job.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
# A process per core, of one thread each: threads that wait for each other on tiny tensors only cost time.
BESIDE := --numprocesses 2 --dist worksteal

.PHONY: demo docs test test-fast compat bench bench-docs lint format clean

demo: $(READY)
	$(BIN)/ebft-train demo --output demo-output --overwrite

# Everything, on two cores: first the tests that may run beside others, then those that measure.
test: lint
	$(BIN)/python -m pytest $(BESIDE) -m "not speed"
	$(BIN)/python -m pytest -m speed

# For while one works: nothing that measures, compiles or starts many processes.
test-fast: $(READY)
	$(BIN)/python -m pytest $(BESIDE) -m "not speed and not heavy"

# Other versions of Triton, transformers and setuptools, each in an environment of its own: an hour or two.
compat: $(READY)
	$(BIN)/python -m bench.compat

# A selection for a CPU, some minutes; results, tables and plots in bench-output.
bench: $(READY)
	mkdir -p bench-output
	$(BIN)/python -m pytest bench/suites --benchmark-json=bench-output/suites.json
	$(BIN)/python -m bench --model demo --length 512
	$(BIN)/python -m bench.step --model demo --length 512 --rounds 1
	$(BIN)/python -m bench.plain_forward --model demo --length 512
	$(BIN)/python -m bench.growth --axis length --axis samples --points 3

# Runs every command in docs/benchmarks.md (half an hour) and writes its output there.
bench-docs: $(READY)
	$(BIN)/python -m bench.document

# The site of all pages, in site/; an error if a link leads nowhere.
docs: $(READY)
	PYTHONPATH=.:python $(BIN)/mkdocs build --quiet

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(READY): pyproject.toml setup.py constraints.txt $(wildcard csrc/*.cpp csrc/*.h csrc/*/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[trainer,plot,docs,dev]"
	touch $@

clean:
	rm -rf $(VENV) build dist site demo-output *.egg-info .pytest_cache .ruff_cache
