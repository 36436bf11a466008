# Two commands set everything up on a fresh machine: `make demo` and `make test`.

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: demo test clean

demo: $(VENV)/cli
	$(BIN)/memformer-kernels demo

test: $(VENV)/test
	$(BIN)/python -m pytest -n auto --dist loadfile --contract=contract.json

# Extras are installed once, and again when the build files change. The constraints pin what CI runs.
$(VENV)/cli $(VENV)/test: $(VENV)/%: pyproject.toml setup.py constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[$*]'
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info memformer_kernels/*.so memformer_kernels/_build_info.json
