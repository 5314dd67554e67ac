# A Debian (or another Linux) with Python 3.11 or newer is enough, a Mac for `make check` and
# `make demo`. `make demo` shows what this is, `make test` says whether it works.

PYTHON ?= python3
PYTEST ?= -q
WORKERS ?= 3
SIZES ?=
# CPU seconds of a test in `make check`; it fails above.
BUDGET ?= 2
TYPES ?= -p prefect_dicom
BIN := .venv/bin
INSTALLED := .venv/.installed

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_ROOT_USER_ACTION := ignore
export DO_NOT_TRACK := 1
export PREFECT_SERVER_ANALYTICS_ENABLED := false
# Containers often forbid it, and the tests start hundreds of processes that compile all they import.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help demo check test test-without-corpus campaign bench lint style site layers types docs \
    quick bytecode peers lock clean

help:
	@echo 'make demo      a small PACS, a generated cohort, a local archive: pulled in a minute'
	@echo 'make check     before every commit, in a minute: style, types, import contracts, and the'
	@echo '               tests that need nothing but Python: no root, no Orthanc, no corpus'
	@echo 'make test      before every merge, a quarter of an hour: all tests but the campaign, and the'
	@echo '               docs; installs what they talk to (as root or with sudo) or skips them'
	@echo 'make campaign  kills, faults and attacks without end: the whole matrix, in some hours'
	@echo 'make bench     how fast it is beside DCMTK and pynetdicom: one table, in ten minutes'
	@echo 'make lint      style, and who may import whom'
	@echo 'make types     mypy, strict, of the package as installed'
	@echo 'make docs      the docs as a site in build/docs, warnings as errors'
	@echo 'make lock      resolves the dependencies anew into requirements.lock'
	@echo 'make clean     removes what these have made'
	@echo
	@echo 'Which tests a target runs follows from what they use (tests/support/selection.py):'
	@echo 'a new test with a PACS program, a database server or a process is left to make test by'
	@echo 'itself. One that takes long says so: @pytest.mark.needs("time").'

$(INSTALLED): requirements.lock pyproject.toml scripts/make-venv
	@scripts/make-venv '$(PYTHON)' .venv
	@touch $@

demo: export PREFECT_HOME := $(CURDIR)/demo/prefect
demo: $(INSTALLED)
	@mkdir -p demo/prefect
	@env -u PREFECT_API_URL $(BIN)/prefect-dicom demo demo

# Two at a time: types take one core, tests the other.
check: $(INSTALLED)
	@$(MAKE) --no-print-directory -j 2 quick style layers types

quick: export PREFECT_HOME := $(CURDIR)/build/prefect
quick: $(INSTALLED)
	@mkdir -p build/prefect
	@env -u PREFECT_API_URL PREFECT_DICOM_CORPUS=/nowhere $(BIN)/python -m pytest -m plain \
	    --budget $(BUDGET) -n 2 --dist loadfile $(PYTEST)

# Prefect's profiles and database of the person who runs the tests are none of their business.
test: export PREFECT_HOME := $(CURDIR)/build/prefect
test: $(INSTALLED) peers
	@$(MAKE) --no-print-directory -j 2 types lint docs bytecode
	@mkdir -p build/prefect
	@env -u PREFECT_API_URL $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile \
	    --no-loadscope-reorder $(PYTEST)

# What uses the corpus of real files has to work, or be skipped, where there is none.
test-without-corpus: export PREFECT_HOME := $(CURDIR)/build/prefect
test-without-corpus: export PREFECT_DICOM_CORPUS := /nowhere
test-without-corpus: $(INSTALLED) peers
	@mkdir -p build/prefect
	@env -u PREFECT_API_URL $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile \
	    --no-loadscope-reorder -m "corpus and not full" $(PYTEST)

# PYTEST takes options: make campaign PYTEST='-q --seed 7 -k kill'
campaign: export PREFECT_HOME := $(CURDIR)/build/prefect
campaign: $(INSTALLED) peers
	@mkdir -p build/prefect
	@env -u PREFECT_API_URL $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal \
	    --campaign -m campaign $(PYTEST)

# SIZES takes options: make bench SIZES='--only receive --rounds 3'
bench: $(INSTALLED) peers
	@env -u PREFECT_API_URL PYTHONPATH=. $(BIN)/python -m benchmarks $(SIZES)

# Beside the types, on the other core: each process of the tests would rewrite all assertions.
bytecode: $(INSTALLED)
	@mkdir -p build
	@$(BIN)/python -m pytest --collect-only -q > build/collected.txt || \
	    { tail -n 20 build/collected.txt; exit 1; }

peers:
	@scripts/install-test-peers

lint: style layers

style: $(INSTALLED)
	@$(BIN)/ruff check --quiet --extend-exclude build,demo .
	@$(BIN)/ruff format --check --quiet --extend-exclude build,demo . || \
	    { echo 'Run: $(BIN)/ruff format'; exit 1; }

# The package as users have it, where flows and tasks are inside it.
site: $(INSTALLED)
	@rm -rf build/lib build/site
	@$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --target build/site .

layers: site
	@cd build/site && PYTHONPATH='$(CURDIR)/build/site' '$(CURDIR)/$(BIN)/lint-imports' \
	    --config '$(CURDIR)/.importlinter' --no-cache > ../layers.txt || { cat ../layers.txt; exit 1; }

# TYPES takes names: make types TYPES='-p prefect_dicom.ledger'
types: site
	@cd build/site && MYPYPATH=. '$(CURDIR)/$(BIN)/mypy' --config-file '$(CURDIR)/pyproject.toml' \
	    --cache-dir '$(CURDIR)/.mypy_cache' $(TYPES)

docs: site
	@$(BIN)/mkdocs build --quiet --strict

lock:
	@scripts/make-lock '$(PYTHON)'

clean:
	@rm -rf .venv build dist demo *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
