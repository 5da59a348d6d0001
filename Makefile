# `make demo` and `make test` need Python 3.11 with venv, git and make; they install the rest into .venv.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: install demo test lint unit checkpoint bench clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

# The main job on the embedded checkpoint, and a picture of what it measured.
demo: install
	$(BIN)/dinoexport demo --task eyelid --target coreml --out artifacts

# All checks; the same here, in CI and before a commit.
test: lint unit

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

# One process per core; each goes on with the tests of one module, so that fixtures are shared.
unit: install
	$(BIN)/python -m pytest -q -n auto --dist worksteal

# Reproduces the embedded checkpoint: backbone on rendered eyes, then a head on its frozen features.
checkpoint: install
	$(BIN)/python -m dinotrain.pretrain.embedded --out exporter/dinoexport/assets/eyelid-vitti14_eyes-224.safetensors

bench: install
	$(BIN)/python -m dinobench.build_cost

clean:
	rm -rf $(VENV) artifacts/demo-* artifacts/eyelid-*
