# make serve [PORT=8000] [MODEL=folder or hub name] [ARGS="--max-model-len 4096"]    install what is missing, then serve
# make test                                                                          lint, types and all tests; what fails once is tried again, and listed
# make docs                                                                          regenerate the file list in docs/structure.md
#
# Everything is installed into .venv, once: the stamps in it are older than pyproject.toml only if that has changed.
# A torch within the supported range that is already there is kept, so `python3 -m venv --system-site-packages .venv` before
# the first `make` uses the machine's own.

PYTHON ?= python3
TORCH ?= torch==2.13.0
TRITON ?= triton==3.8.0
PORT ?= 8000
MODEL ?= bundled
WORKERS ?= 2

BIN := .venv/bin
PIP := $(BIN)/python -m pip install -q --disable-pip-version-check

.PHONY: serve test docs clean

serve: .venv/serve.stamp
	@exec $(BIN)/miniinfer serve $(MODEL) --port $(PORT) $(ARGS)

test: .venv/test.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q -n $(WORKERS) --reruns 1 -raR

docs: .venv/serve.stamp
	$(BIN)/python tools/structure.py

clean:
	rm -rf .venv build *.egg-info

$(BIN)/python:
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) not found: install Python 3.11 or newer (Debian, Ubuntu: apt install python3 python3-venv)" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "$(PYTHON) is `$(PYTHON) -V`, MiniInfer needs 3.11 or newer: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "$(PYTHON) cannot make virtual environments: apt install python3-venv" >&2; exit 1; }
	@$(PYTHON) -m venv .venv

.venv/serve.stamp: pyproject.toml | $(BIN)/python
	@echo "Installing into .venv (once, a minute or two) ..."
	@$(BIN)/python -c 'from importlib.metadata import version; v = version("torch").split("."); exit(not 11 <= int(v[1]) < 16)' 2>/dev/null \
	  || $(PIP) "$(TORCH)" || $(PIP) "torch>=2.11,<2.16"
	@$(PIP) -e .
	@echo "Compiling the kernels for this machine (once) ..."
	-@$(BIN)/miniinfer generate --max-tokens 1 hello >/dev/null
	@touch $@

# Triton is what a CUDA build of torch brought; elsewhere one for its interpreter, in which the kernels are tested without a GPU.
.venv/test.stamp: .venv/serve.stamp
	@echo "Installing what the tests need ..."
	@$(PIP) -e ".[test]"
	@$(BIN)/python -c 'from importlib.metadata import version; version("triton")' 2>/dev/null || $(PIP) "$(TRITON)"
	@touch $@
