# make demo, make test: both set up .venv by themselves. PYTHON names the interpreter to build it with (3.11 or later).
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
DEMO_OUTPUT ?= runs/demo
JOBS ?= 2

.PHONY: help install demo test test-sites test-quantized test-tracking check format bench clean

help:
	@echo "make demo    train the embedded model on the embedded data (about a minute) and print the scores"
	@echo "make test    run the tests"
	@echo "make test-sites  run the tests that start processes and kill them: a server's and sites', workers, sweeps (some minutes)"
	@echo "make test-quantized  run the tests of 4-bit weights, with bitsandbytes in a folder of its own"
	@echo "make test-tracking  run the tests of Weights & Biases and MLflow, in a folder of their own"
	@echo "make check   lint, types, import direction"
	@echo "make format  rewrite the code in the house style"
	@echo "make bench   compare with other loops (about fifteen minutes; installs Ray and NVFlare)"

install: $(READY)

$(READY): pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or later is needed, this is " + sys.version + "; name another with make PYTHON=python3.12")'
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt "torch==2.13.0"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	@touch $(READY)

demo: $(READY)
	@rm -rf $(DEMO_OUTPUT)
	$(BIN)/fedmllm train experiments/quickstart.yaml --output $(DEMO_OUTPUT)

test: $(READY)
	$(BIN)/python -m pytest --numprocesses=$(JOBS) --quiet -m "not slow"

test-quantized: $(READY)
	$(BIN)/python -m pip install --quiet --target build/quantized --no-deps "bitsandbytes>=0.49"
	PYTHONPATH=build/quantized $(BIN)/python -m pytest --quiet tests/models/test_quantized.py

test-sites: $(READY)
	$(BIN)/python -m pytest --numprocesses=$(JOBS) --quiet -m slow

test-tracking: $(READY)
	$(BIN)/python -m pip install --quiet --target build/tracking --upgrade --constraint constraints.txt "wandb>=0.19" "mlflow-skinny>=3" sqlalchemy alembic
	PYTHONPATH=build/tracking $(BIN)/python -m pytest --quiet tests/run/test_tracking.py

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[bench]"
	$(BIN)/python benchmarks/run.py

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist
