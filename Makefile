# make demo    set up, then 48 layers -> 6, walked as 34, on real Korean text (CPU, under 10 minutes; ends with a mixture that speaks)
# make test    set up, then every kind of test, with a fixed sample of the large matrices
# make lint    ruff and mypy
# make docs    the documentation as a site, build/site/index.html

VENV := .venv
PY := $(VENV)/bin/python
CHERRY := $(VENV)/bin/cherry
STAMP := $(VENV)/.installed
DEMO := runs/demo
# Test files side by side; some start four processes of their own.
JOBS ?= 2

.PHONY: demo test test-full test-deps lint format docs board clean setup

setup: $(STAMP)

$(STAMP): pyproject.toml tools/find_python.sh
	$$(sh tools/find_python.sh) -m venv $(VENV)
	$(PY) -m pip install -q --upgrade pip
	@echo "installing into $(VENV): some minutes"
	$(PY) -m pip install -q -e '.[dev]'
	@# The demo's text: Korean documentation under Apache-2.0. Only its files are needed, not what it imports.
	$(PY) -m pip install -q --no-deps portone-mcp-server==0.12.1
	touch $(STAMP)

demo: setup
	sh tools/demo.sh $(CHERRY)

test: setup
	$(PY) -m pytest -m "not full" -n $(JOBS) --dist loadfile

# Resumable: a test that passed with this code is not run again. The dated result is kept.
test-full: setup
	$(PY) tools/test_full.py

test-deps:
	sh tools/test_deps.sh

lint: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

format: setup
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

docs: setup
	$(PY) -m sphinx -q -W --keep-going -b html -c docs . build/site
	@echo build/site/index.html

board: setup
	$(CHERRY) board runs

clean:
	rm -rf $(DEMO) build/site docs/reference .pytest_cache .mypy_cache .ruff_cache
