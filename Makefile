# Two commands for a fresh machine: `make test` now; `make quickstart` comes with the first model.
PYTHON ?= python3.11
# A CPU build where there is no NVIDIA driver.
TORCH := $(if $(shell command -v nvidia-smi),torch>=2.10,torch==2.13.0)

.PHONY: setup test

setup: .venv/stamp

.venv/stamp: pyproject.toml
	$(PYTHON) -m venv .venv
	.venv/bin/pip install -q '$(TORCH)'
	.venv/bin/pip install -q -e '.[dev]'
	touch $@

test: setup
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/pytest -q
