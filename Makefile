# VENV=.venv (default) is created and filled; VENV=other names another environment; VENV=system uses the Python at hand
# and installs only what it lacks, never torch. PYTHON names the interpreter that creates the environment; one that is there
# keeps its own.
VENV ?= .venv
PYTHON ?= $(firstword $(wildcard $(VENV)/bin/python) python3)
# Test files go to so many processes, which start ranks of their own. Plain `pytest` runs in one.
WORKERS ?= 3
# A part of the tests: make test TESTS=tests/pure
TESTS ?=
RUN := $(if $(filter system,$(VENV)),$(PYTHON),$(VENV)/bin/python)

# Hundreds of processes import the package; those of a machine that says not to keep bytecode would compile it every time.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: install quickstart test test-all-pythons bench lint docs
install:
	@$(PYTHON) tools/install.py --venv $(VENV)

quickstart: install
	@$(RUN) examples/quickstart/run.py

test: install
	$(RUN) -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(TESTS)

# Every Python here that torch has builds for, or PYTHONS="python3.11 python3.13"
test-all-pythons:
	@$(PYTHON) tests/pythons.py $(PYTHONS)

bench: install
	$(RUN) benchmarks/train.py
	$(RUN) benchmarks/pipeline.py
	$(RUN) benchmarks/optimizer.py
	$(RUN) benchmarks/checkpoint.py

# Pages of docs/ and of every module, in site/
docs: install
	$(RUN) tools/build_docs.py --output site

lint: install
	$(RUN) -m ruff check .
	$(RUN) -m mypy
