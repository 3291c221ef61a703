# make demo: train a detector on synthetic pets; make test: run every notebook and every test.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
ICEVISION = icevision==0.12.0 icedata==0.5.1
# with its dependencies it would bring a second OpenCV, which needs libGL
SAHI = sahi==0.12.8 'shapely>=2'
DEMO ?= --preset demo
JOBS ?= auto
RUN = PATH="$(abspath $(BIN)):$$PATH" "$(abspath $(BIN))/python"
READS = settings.ini setup.py pyproject.toml backbones_nb/__init__.py
READY := $(VENV)/.installed-$(shell cat $(READS) | cksum | cut -d' ' -f1)
PIP = $(BIN)/python -m pip --disable-pip-version-check

.PHONY: help demo test test-all notebooks readme docs clean

help:
	@echo "make demo       train a detector on toy pets on the CPU; results in demo/"
	@echo "make test       run every notebook and every test, check the site's sources, build and check the package"
	@echo "make test-all   the same with everything that is marked slow (hours)"
	@echo "make notebooks  execute the notebooks in place and keep their outputs (NB=nbs/core/02_features.ipynb for one)"
	@echo "make readme     make README.md from nbs/index.ipynb"
	@echo "make docs       build the site into _docs (needs quarto)"
	@echo "make clean      remove what these commands made"
	@echo "Variables: ARGS (for pytest) JOBS=$(JOBS) PYTHON=$(PYTHON) VENV=$(VENV) DEMO='$(DEMO)'"

# A virtual environment. The stamps make a second run quick; they are named after the content of READS, so a change there installs again.
$(BIN)/python:
	@command -v "$(PYTHON)" >/dev/null || { echo "There is no $(PYTHON): run 'apt install python3 python3-venv', or name one, 'make $(MAKECMDGOALS) PYTHON=python3.12'."; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3,11))' || { echo "$(PYTHON) is older than 3.11: name a newer one, 'make $(MAKECMDGOALS) PYTHON=python3.12'."; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "$(PYTHON) cannot make virtual environments: run 'apt install python3-venv' first."; exit 1; }
	$(PYTHON) -m venv "$(VENV)"

$(READY): | $(BIN)/python
	@echo "Installing into $(VENV): PyTorch and its libraries, several minutes and several GB the first time."
	$(PIP) install -q -e .
	@touch $@

$(READY)-dev: | $(BIN)/python
	@echo "Installing into $(VENV): PyTorch and its libraries, several minutes and several GB the first time."
	$(PIP) install -q -e '.[dev,onnx,icevision,imagenet]'
	$(PIP) install -q --no-deps $(ICEVISION) $(SAHI)
	@touch $(READY) $@

demo: $(READY)
	$(RUN) $(BIN)/backbones-nb finetune $(DEMO) --out demo --picture demo.png --force

test: $(READY)-dev
	$(RUN) -m pytest -n $(JOBS) --dist=loadgroup --durations=15 $(ARGS)

test-all: $(READY)-dev
	$(RUN) -m pytest -n $(JOBS) --dist=loadgroup --durations=15 --slow --timeout=7200 $(ARGS)

notebooks: $(READY)-dev
	$(RUN) tools/notebooks.py $(NB)

readme: $(READY)-dev
	$(RUN) tools/readme.py

docs: $(READY)-dev
	@command -v quarto >/dev/null || { echo "quarto is not on PATH: install it from https://quarto.org/docs/get-started first."; exit 1; }
	$(RUN) $(BIN)/nbdev-docs --n-workers 1

clean:
	rm -rf "$(VENV)" demo _docs _proc build dist *.egg-info .pytest_cache
