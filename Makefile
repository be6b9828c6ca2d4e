# make run   trains AdvMoE on scikit-learn's digits, attacks it and writes a report
# make test  runs the test suite
# Both make .venv first; what is installed already is not installed again.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: run test clean

run: $(VENV)/quickstart.stamp
	$(BIN)/python -m advmoe_jax.main --config configs/digits_r18.py

test: $(VENV)/test.stamp
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(PYTEST_FLAGS)

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/%.stamp: setup.cfg pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[$*]"
	touch $@

clean:
	rm -rf $(VENV)
