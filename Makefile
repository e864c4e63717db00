# Everything runs from .venv, which `make setup` builds: apt packages where missing (root only), then pip.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# needed to build the cffi glue and pyfuse3, and fio to measure the disk against
APT_PACKAGES := gcc libc6-dev python3-dev python3-venv pkg-config fuse3 libfuse3-dev fio

.PHONY: setup demo test sim mutations lint bench clean

setup: $(STAMP)

GLUE := $(wildcard $(foreach folder,ftl/* kvfs/*/* spdk_glue/* spdk_glue/*/*,$(folder)/build.py $(folder)/*.[ch]))

$(STAMP): setup.py pyproject.toml tools/setup_system.sh $(GLUE)
	sh tools/setup_system.sh $(APT_PACKAGES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --upgrade pip setuptools wheel
	$(BIN)/pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[transformers,plot,test]'
	touch $(STAMP)

demo: setup
	$(BIN)/kvfsctl demo

test: setup lint
	$(BIN)/python -m pytest

# crash simulation: make sim SEEDS=1000:2000 ARGS="--mode ftl --crash-points 1000"
SEEDS ?= 0:100

sim: setup
	$(BIN)/python -m tests.crash.simulate $(SEEDS) $(ARGS)

# whether the simulator notices lines that are broken on purpose
mutations: setup
	$(BIN)/python -m tests.crash.mutations $(ARGS)

lint: setup
	$(BIN)/ruff check .

bench: setup
	$(BIN)/kvfsctl bench attention

clean:
	rm -rf build *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -exec rm -rf {} +
