# Everything runs from .venv, which `make setup` builds: apt packages where missing (root only), then pip.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# needed to build the cffi glue, pyfuse3 and the simulated FPGA, and fio to measure the disk against
APT_PACKAGES := gcc g++ libc6-dev python3-dev python3-venv pkg-config fuse3 libfuse3-dev fio

.PHONY: setup demo test test-engines search sim mutations lint bench clean

setup: $(STAMP)

GLUE := $(wildcard $(foreach folder,ftl/* kvfs/*/* spdk_glue/* spdk_glue/*/*,$(folder)/build.py $(folder)/*.[ch]))

$(STAMP): setup.py pyproject.toml tools/setup_system.sh $(GLUE)
	sh tools/setup_system.sh $(APT_PACKAGES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --upgrade pip setuptools wheel
	$(BIN)/pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[transformers,plot,test]'
	$(BIN)/kvfsctl warm-up
	touch $(STAMP)

demo: setup
	$(BIN)/kvfsctl demo

# A file's tests stay in one process, in their order; the long files come first, and many short ones last.
JOBS ?= 2

test: setup lint
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder $(ARGS)

# `make test` runs the same examples of each property every time; this looks for others: make search ROUNDS=20
ROUNDS ?= 5

search: setup
	for round in $$(seq $(ROUNDS)); do \
		$(BIN)/python -m pytest -n $(JOBS) --hypothesis-profile=search tests/property || exit 1; \
	done

# Engines pin torch, transformers and NumPy each in its own way: an environment for each, with what its tests need
# on a machine without a GPU. One alone: make test-engines ENGINES=sglang
ENGINES ?= transformers lmcache vllm sglang
ENGINE_VENV := .venv-engines
ENGINE_PINS := tests/engines/requirements

$(ENGINE_VENV)/%/.installed: setup.py $(ENGINE_PINS)/%.txt $(ENGINE_PINS)/%-alone.txt $(ENGINE_PINS)/%-unwanted.txt | setup
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install --quiet --disable-pip-version-check torch==2.13.0
	$(@D)/bin/pip install --quiet --disable-pip-version-check --editable '.[test]' -r $(ENGINE_PINS)/$*.txt
	$(@D)/bin/pip install --quiet --disable-pip-version-check --no-deps -r $(ENGINE_PINS)/$*-alone.txt
	! test -s $(ENGINE_PINS)/$*-unwanted.txt || \
		$(@D)/bin/pip uninstall --quiet --yes -r $(ENGINE_PINS)/$*-unwanted.txt
	touch $@

test-engines: setup $(patsubst %,$(ENGINE_VENV)/%/.installed,$(filter-out transformers,$(ENGINES)))
	for engine in $(ENGINES); do \
		python=$(ENGINE_VENV)/$$engine/bin/python; test -x $$python || python=$(BIN)/python; \
		folder=tests/engines/$$engine; test -d $$folder || folder=tests/engines; \
		echo "== $$engine"; $$python -m pytest $$folder || exit 1; \
	done

# crash simulation: make sim SEEDS=1000:2000 ARGS="--mode ftl --crash-points 1000"; caps of sets: --mode set-caps
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
	rm -rf build *.egg-info .pytest_cache .ruff_cache .hypothesis .mypy_cache
	find . -name __pycache__ -not -path './.venv*/*' -exec rm -rf {} +
