PYTHON ?= python3
JOBS ?= 2
TEST_ARGS ?=
HOPE_ARGS ?=
STUDY_ARGS ?= digits factorisation permuted-digits --optimizers adamw torch.adamw muon m3 --tuning-seeds 3

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/stamp
CODE := $(wildcard deepopt torch_backend jax_backend examples tests benchmarks docs .ci)

.DEFAULT_GOAL := help
.PHONY: help .venv hope study test contract integrations lint format docs mutants bench wheel-test clean

help: ## print this list
	@awk -F ':.*## ' '/^[a-z.-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile
	@echo "variables: PYTHON=$(PYTHON)  JOBS=$(JOBS) (test processes, 0 for none)  TEST_ARGS  HOPE_ARGS  STUDY_ARGS"

.venv: $(STAMP) ## create the virtual environment at the versions of constraints.txt

# torch first, so that nothing installed later can choose its version; hatchling with it, so that
# the project itself is built by the pinned version as well.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("$(PYTHON) is Python %d.%d; deepopt needs 3.11 or newer: make PYTHON=python3.12" % sys.version_info[:2])'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt torch hatchling
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-build-isolation -e '.[dev]'
	@touch $@

hope: $(STAMP) ## train the Hope example (HOPE_ARGS="--help")
	$(BIN)/python -m examples.hope.train $(HOPE_ARGS)

study: $(STAMP) ## compare optimizers (STUDY_ARGS="bytes --optimizers adamw m3", docs/compare.md)
	$(BIN)/python -m examples.compare run $(STUDY_ARGS) --jobs $(JOBS)

test: $(STAMP) ## run the tests (TEST_ARGS="-k m3", JOBS=0, HYPOTHESIS_PROFILE=thorough)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) $(TEST_ARGS)

contract: $(STAMP) ## print the contract of torch's optimizers, rule by check (docs/contract.md)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.contract --jobs $(JOBS)

integrations: $(STAMP) ## run the tests with the loops people have, docs/integrations.md
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-build-isolation -e '.[integrations]'
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) -m integrations \
		tests/integrations tests/test_optax_contract.py tests/test_jax_sharding.py

lint: $(STAMP) ## check format, style and types
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/ruff check $(CODE)
	$(BIN)/pyright

format: $(STAMP) ## format the code and apply the safe fixes
	$(BIN)/ruff check --fix-only $(CODE)
	$(BIN)/ruff format $(CODE)

docs: $(STAMP) ## write the pages of the rules, docs/rules
	$(BIN)/python docs/generate.py

mutants: $(STAMP) ## plant bugs and see that the tests catch them, docs/testing.md
	$(BIN)/python -m benchmarks.mutants

bench: $(STAMP) ## time optimizer steps beside their peers (docs/performance.md) and the training of Hope
	$(BIN)/python -m benchmarks.step --threads 1 2 --page docs/performance.md
	$(BIN)/python -m benchmarks.hope --page docs/hope-speed.md

# The scratch environment holds the wheel alone and borrows its dependencies from .venv by a .pth,
# which lends the folder but does not follow the editable install in it.
wheel-test: $(STAMP) ## build the wheel and import it from outside the checkout
	rm -rf dist
	$(BIN)/python -m build --wheel --no-isolation --outdir dist .
	$(BIN)/python -m venv --without-pip dist/venv
	$(BIN)/python -m pip --python dist/venv/bin/python install --quiet --no-index --no-deps dist/*.whl
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
		> "$$(dist/venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/dependencies.pth"
	cd / && "$(CURDIR)/dist/venv/bin/python" -I "$(CURDIR)/.ci/wheel.py"

clean: ## remove caches and everything built, keep .venv and runs/
	rm -rf build dist .pytest_cache .ruff_cache .hypothesis *.egg-info
	find . -path ./$(VENV) -prune -o -type d -name __pycache__ -exec rm -rf {} +
