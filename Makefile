# make demo: train a detector on toy pets; make test: run every notebook and every test.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
DEMO ?= --data toy --toy-images 800 --backbone vovnet19_slim --size 128 --epochs 8 --bs 8 --lr 1e-3 --lean --seed 0 --cache

.PHONY: help demo test docs readme notebooks clean

help:
	@echo "make demo       train a detector on toy pets on the CPU; results in demo/"
	@echo "make test       export, run every notebook and every test, build and check the package"
	@echo "make notebooks  execute the notebooks in place and keep their outputs (NB=nbs/core/01_features.ipynb for one)"
	@echo "make readme     make README.md from nbs/index.ipynb"
	@echo "make docs       build the site into _docs (needs quarto)"
	@echo "make clean      remove what these commands made"

# A virtual environment; the stamps make a second run quick and a changed list of dependencies count.
$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3,11))' || { echo "Python 3.11 or newer is needed, $(PYTHON) is older: set PYTHON=python3.11"; exit 1; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || { echo "$(PYTHON) has no venv module: run  apt install python3-venv  first"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip

$(VENV)/.installed: settings.ini setup.py pyproject.toml | $(BIN)/python
	@echo "installing (PyTorch and its libraries: several minutes and GB the first time)"
	$(BIN)/python -m pip install -q -e .
	@touch $@

$(VENV)/.installed-dev: settings.ini setup.py pyproject.toml | $(BIN)/python
	@echo "installing (PyTorch and its libraries: several minutes and GB the first time)"
	$(BIN)/python -m pip install -q -e '.[dev,onnx]'
	@touch $@ $(VENV)/.installed

demo: $(VENV)/.installed
	$(BIN)/backbones-nb finetune $(DEMO) --out demo --png demo.png --force

test: $(VENV)/.installed-dev
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python .ci/test.py

notebooks: $(VENV)/.installed-dev
	$(BIN)/python .ci/notebooks.py $(NB)

readme: $(VENV)/.installed-dev
	$(BIN)/python .ci/readme.py

docs: $(VENV)/.installed-dev
	@command -v quarto >/dev/null || { echo "quarto is not on PATH: install it from https://quarto.org"; exit 1; }
	PATH="$(abspath $(BIN)):$$PATH" nbdev-docs --n-workers 1

clean:
	rm -rf $(VENV) demo _docs _proc build dist *.egg-info
