# Two commands for a fresh machine: `make quickstart` draws and trains, `make test` tests.
PYTHON ?= $(firstword $(foreach p,python3.11 python3.12 python3.13 python3,$(shell command -v $(p) 2>/dev/null)) python3)
# Without an NVIDIA driver the CPU build: on Linux the usual index has CUDA's 3 GB alone, torch's own
# has both. Where that one cannot be reached (a mirror, no network), whatever the usual one has.
CPU_INDEX := https://download.pytorch.org/whl/cpu
GPU := $(shell command -v nvidia-smi 2>/dev/null)

.PHONY: setup quickstart test

setup: .venv/core

.venv/core: pyproject.toml
	@"$(PYTHON)" -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo 'mmrdpm needs Python 3.11 or newer with its venv module (Debian, Ubuntu: apt install' \
	    'python3-venv); another one: make PYTHON=/path/to/python3.11 ...' >&2; exit 1; }
	"$(PYTHON)" -m venv .venv
ifdef GPU
	.venv/bin/pip install -q 'torch>=2.10'
else
	.venv/bin/pip install -q 'torch==2.13.0' $$(.venv/bin/python -c \
	  'import urllib.request as r; r.urlopen("$(CPU_INDEX)/torch/", timeout=10)' 2>/dev/null \
	  && echo --extra-index-url $(CPU_INDEX) \
	  || echo '$(CPU_INDEX) cannot be reached: torch as the usual index has it' >&2)
endif
	.venv/bin/pip install -q -e .
	touch $@

# torch-fidelity without its torchvision, which the usual index has for CUDA alone: tests have a stand-in
.venv/dev: .venv/core
	.venv/bin/pip install -q -e '.[dev]'
	.venv/bin/pip install -q --no-deps 'torch-fidelity>=0.4'
	touch $@

quickstart: setup
	.venv/bin/mmrdpm quickstart

test: .venv/dev
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/pytest -q
