PYTHON ?= python3
SERVE ?= 1
BIN := .venv/bin
QUICK := not ray and not s3 and not mlflow and not browser and not slow and not soak

.NOTPARALLEL:
.PHONY: help install demo test lint types quick thorough soak stack bench format clean

help:
	@echo 'make install              the environment in .venv (about 6 minutes and 8 GB the first time)'
	@echo 'make demo                 the whole chain on photographs, then a search page until Ctrl-C'
	@echo '     DATA=<folder>        ... on a folder of class folders, or DATA=torchvision:Flowers102'
	@echo '     SERVE=0              ... and end after the report'
	@echo 'make test                 lint, types, all tests but the long ones'
	@echo 'make quick                the tests that need neither servers nor Ray'
	@echo 'make soak                 the long tests'
	@echo 'make stack                object store, MLflow server and a two-node Ray on this machine, until Ctrl-C'
	@echo 'make bench                every benchmark; bench-<name> for one'
	@echo 'make format               rewrite the sources as ruff wants them'
	@echo 'make clean                remove what the demo, the stack and the tools left (not .venv)'

install: .venv/installed

# With uv the versions that were tested (uv.lock), from whatever index is configured; else the newest in range.
.venv/installed: pyproject.toml uv.lock
	@echo 'installing into .venv (about 6 minutes and 8 GB the first time)'
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15) and "namr needs Python 3.11 to \
	3.14 (Ray has no wheels for others), this is " + sys.version.split()[0] + "; say which one to use: \
	make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv .venv
	@if command -v uv >/dev/null; then \
		uv export --quiet --frozen --extra dev --no-emit-project --output-file .venv/locked.txt && \
		uv pip install --quiet --python $(BIN)/python --requirement .venv/locked.txt && \
		uv pip install --quiet --python $(BIN)/python --no-deps --editable . ; \
	else \
		$(BIN)/pip install --quiet --upgrade pip && $(BIN)/pip install --quiet --editable '.[dev]'; \
	fi
	@touch $@

demo: install
	$(BIN)/namr demo $(if $(DATA),--data '$(DATA)') $(if $(filter 0,$(SERVE)),--no-serve)

test: lint types quick thorough

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install
	$(BIN)/mypy

quick: install
	$(BIN)/python -m pytest -q -n auto --dist worksteal -m '$(QUICK)'

thorough: install
	$(BIN)/python -m pytest -q -m 'not soak and not ($(QUICK))'

soak: install
	$(BIN)/python -m pytest -q -m soak

stack: install
	$(BIN)/python -m infra.stack --data stack-data

BENCHMARKS := $(filter-out __init__,$(basename $(notdir $(wildcard tests/benchmarks/*.py))))

bench: $(BENCHMARKS:%=bench-%)

bench-%: install
	$(BIN)/python -m tests.benchmarks.$*

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf demo-data stack-data .mypy_cache .pytest_cache .ruff_cache .hypothesis build
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
