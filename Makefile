# make train | test | lab | bench. The first of them sets up .venv; after that setting up is instant.
PYTHON ?= python3
PARAMS ?= params/quickstart.yaml
ARGS ?=
VENV := .venv
RUN := $(VENV)/bin/python

.PHONY: train test test-slow lab bench survival lint notebooks clean

train: $(VENV)/ready
	$(RUN) -m lmlib notebook $(PARAMS) $(ARGS)

test: $(VENV)/ready lint
	$(RUN) -m pytest -q -m "not slow" --numprocesses auto --maxprocesses 8 --dist worksteal $(ARGS)

test-slow: $(VENV)/ready
	$(RUN) -m pytest -q -m slow $(ARGS)

lint: $(VENV)/ready
	$(VENV)/bin/ruff check --quiet . && $(VENV)/bin/ruff format --quiet --check .

lab: $(VENV)/ready
	$(VENV)/bin/jupyter lab notebooks

bench: $(VENV)/ready
	$(RUN) benchmarks/train.py
	$(RUN) benchmarks/generate.py
	$(RUN) benchmarks/experts.py

notebooks: $(VENV)/ready
	$(RUN) docs/publish_notebooks.py

survival: $(VENV)/ready
	$(RUN) tests/support/survival.py $(ARGS)

$(VENV)/ready: requirements.txt pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed" if sys.version_info < (3, 11) else 0)'
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	$(RUN) -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch $@

clean:
	rm -rf $(VENV)
