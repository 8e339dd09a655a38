# make serve   builds everything a fresh machine lacks and serves a model    (MODEL=default, ARGS="--port 8080")
# make test    all tests, half an hour on two cores                           (TESTS=tests/unit for a part: minutes)
# make install-check   empty environments, a chat from each                   (ARGS="python3.13 --kind sdist" or --quick)
# make clients   agent and extraction frameworks against the gateway, from an environment of their own (.clients)
# make check   style, types, import directions, generated code
PYTHON ?= python3
VENV   ?= .venv
MODEL  ?= default
TESTS  ?= tests
BIN    := $(VENV)/bin

CLIENTS := .clients

.PHONY: serve test clients check install-check dashboards proto tree clean
.DEFAULT_GOAL := serve

serve: $(VENV)/.runtime
	@$(BIN)/expertmesh serve $(MODEL) $(ARGS)

test: $(VENV)/.dev
	@test "$(TESTS)" != tests || echo "All tests: half an hour on two cores. A part: make test TESTS=tests/unit, or ARGS='-k word'."
	$(BIN)/python -m pytest $(TESTS) $(ARGS)

$(CLIENTS)/.installed: tests/clients/requirements.txt tests/clients/package.json
	$(PYTHON) -m venv $(CLIENTS)
	$(CLIENTS)/bin/pip install -q -r tests/clients/requirements.txt
	mkdir -p $(CLIENTS)/node && cp tests/clients/package.json $(CLIENTS)/node && npm install --silent --prefix $(CLIENTS)/node
	@touch $@

clients: $(VENV)/.dev $(CLIENTS)/.installed
	EXPERTMESH_CLIENTS=$(abspath $(CLIENTS)) $(BIN)/python -m pytest tests/clients $(ARGS)

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python scripts/proto.py --check
	$(BIN)/python scripts/tree.py --check
	$(BIN)/python scripts/chart.py --check
	$(BIN)/python scripts/metrics.py --check
	$(BIN)/python -m scripts.dashboards --check

install-check: $(VENV)/.dev
	$(BIN)/python scripts/install_check.py $(ARGS)

dashboards: $(VENV)/.dev
	$(BIN)/python -m scripts.dashboards

proto: $(VENV)/.dev
	$(BIN)/python scripts/proto.py

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "ExpertMesh needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) -V). Try: make PYTHON=python3.11"; exit 1; }
	@$(PYTHON) -m venv $(VENV) || \
	  { rm -f $@; echo "Python's venv module is missing. On Debian and Ubuntu: apt install python3-venv"; exit 1; }

# What pip says of its indexes and caches is of no use to a newcomer; when it fails, its last words are.
PIP     = $(BIN)/python -m pip install --disable-pip-version-check --no-warn-script-location
INSTALL = $(PIP) $(1) > $(VENV)/install.log 2>&1 || { tail -n 20 $(VENV)/install.log; exit 1; }
# PyPI's torch is the one for CUDA, five gigabytes of it. Where there is no GPU, PyTorch's own index has a small one.
CPU_TORCH = ls /dev/nvidia[0-9]* > /dev/null 2>&1 || $(BIN)/python -c 'import torch' 2> /dev/null || \
  $(PIP) --retries 0 --timeout 10 --index-url https://download.pytorch.org/whl/cpu 'torch>=2.11,<2.14' \
  > $(VENV)/install.log 2>&1 || true

$(VENV)/.runtime: $(VENV)/bin/python pyproject.toml
	@echo "Installing ExpertMesh and what it needs into $(VENV) (once, a minute or two) ..."
	@$(CPU_TORCH)
	@$(call INSTALL,-e .)
	@touch $@

$(VENV)/.dev: $(VENV)/bin/python pyproject.toml
	@echo "Installing ExpertMesh and its development tools into $(VENV) (once, a few minutes) ..."
	@$(CPU_TORCH)
	@$(call INSTALL,-e '.[dev]')
	@touch $@ $(VENV)/.runtime

tree: $(VENV)/.dev
	$(BIN)/python scripts/tree.py

clean:
	rm -rf $(VENV) $(CLIENTS) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
