# make demo   installs into .venv and explains the embedded model: out/demo/index.html
# make test   installs into .venv and runs every test
# make lint   ruff, mypy and the import rule
# make bench  installs into .venv and runs every benchmark, about three hours: benchmarks/RESULTS.md. Some of them, or the
#             rows whose name begins so: make bench BENCH="explain compare visualize:cost". Peers take part where they are
#             installed: .venv/bin/python -m pip install -c constraints.txt -e '.[peers]' and, for one row, quantus

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: demo test lint bench clean

demo: $(INSTALLED)
	$(BIN)/torchloupe demo --out out/demo

test: $(INSTALLED)
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_layout_of_tree.py

bench: $(INSTALLED)
	$(BIN)/python benchmarks/run.py $(BENCH)

clean:
	rm -rf .venv out .pytest_cache .mypy_cache .ruff_cache

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if (3, 11) <= sys.version_info[:2] <= (3, 13) else "torchloupe needs Python 3.11 to 3.13, this is " + sys.version.split()[0] + "; choose one with PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv==0.13.8 \
	  && $(BIN)/uv pip install --quiet --python $(BIN)/python --constraint constraints.txt --editable '.[test]' \
	  || $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[test]'
	@touch $(INSTALLED)
