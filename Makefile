# make serve   builds everything a fresh machine lacks and serves a model    (MODEL=default, ARGS="--port 8080")
# make test    all tests                                                      (TESTS=tests/unit for a part)
# make check   style, types, import directions, generated code
PYTHON ?= python3
VENV   ?= .venv
MODEL  ?= default
TESTS  ?= tests
BIN    := $(VENV)/bin

.PHONY: serve test check proto tree clean
.DEFAULT_GOAL := serve

serve: $(VENV)/.runtime
	@$(BIN)/expertmesh serve $(MODEL) $(ARGS)

test: $(VENV)/.dev
	$(BIN)/python -m pytest $(TESTS) $(ARGS)

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python scripts/proto.py --check
	$(BIN)/python scripts/tree.py --check

proto: $(VENV)/.dev
	$(BIN)/python scripts/proto.py

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "ExpertMesh needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) -V). Try: make PYTHON=python3.11"; exit 1; }
	@$(PYTHON) -m venv $(VENV) || \
	  { rm -f $@; echo "Python's venv module is missing. On Debian and Ubuntu: apt install python3-venv"; exit 1; }

$(VENV)/.runtime: $(VENV)/bin/python pyproject.toml
	@echo "Installing ExpertMesh and what it needs into $(VENV) (once, a minute or two) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-warn-script-location -e .
	@touch $@

$(VENV)/.dev: $(VENV)/bin/python pyproject.toml
	@echo "Installing ExpertMesh and its development tools into $(VENV) (once, a few minutes) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-warn-script-location -e '.[dev]'
	@touch $@ $(VENV)/.runtime

tree: $(VENV)/.dev
	$(BIN)/python scripts/tree.py

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
