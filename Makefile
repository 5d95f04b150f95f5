# make demo   a fresh machine to a trained, tested SIS net and its pictures, in minutes
# make test   the whole suite
# make lint   style and types

PYTHON ?= python3
BIN := .venv/bin
DEMO := --config tasks/seg_voc.yaml --config configs/demo.yaml --data.root data/demo --run_dir runs/demo

.PHONY: demo test lint format clean

.venv/installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "sis-lightning needs Python 3.11 or newer: make PYTHON=/path/to/python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[dev]"
	touch $@

demo: .venv/installed
	$(BIN)/sis-lightning synth data/demo --images 2000 --size 96 --min-object 16 --rotation 30 --kinds voc
	$(BIN)/sis-lightning fit $(DEMO) --overwrite true
	$(BIN)/sis-lightning test $(DEMO)
	$(BIN)/sis-lightning predict $(DEMO)
	@echo "Pictures: runs/demo/pictures (predictions beside the truth while it learnt),"
	@echo "          runs/demo/predictions (masks and overlays of the val split), data/demo/contact_sheet.png"

test: .venv/installed
	$(BIN)/python -m pytest --numprocesses 2

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv build dist .mypy_cache .pytest_cache .ruff_cache
