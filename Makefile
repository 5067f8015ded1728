# Two commands for a fresh machine: `make quickstart` draws and trains, `make test` tests.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
# Where there is no NVIDIA driver: its CPU build, if the package index offers one.
TORCH := $(if $(shell command -v nvidia-smi),torch>=2.10,torch==2.13.0)

.PHONY: setup quickstart test

setup: .venv/core

.venv/core: pyproject.toml
	$(PYTHON) -m venv .venv
	.venv/bin/pip install -q '$(TORCH)'
	.venv/bin/pip install -q -e .
	touch $@

.venv/dev: .venv/core
	.venv/bin/pip install -q -e '.[dev]'
	touch $@

quickstart: setup
	.venv/bin/mmrdpm quickstart

test: .venv/dev
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/pytest -q
