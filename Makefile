# Two commands: `make lab` opens the course, `make test` tests it. `make help` lists the rest.
# The system's python3 makes .venv; PYTHON=python3.12 picks another one (3.11 to 3.14).

PYTHON ?= python3
BIN := .venv/bin
EXTRAS := course,dali,engines,quant,codecs,stores,profiling,ray,torchdata,dev
OLDEST := .venv-oldest
# two at a time, each on one thread; bytecode is kept for the processes that tests start
UNIT := PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal
NBVAL := $(BIN)/python -m pytest --nbval -p no:cacheprovider
# the lessons' main lines; notebooks such as 01b_more.ipynb hold their smaller tips
MAIN := $(filter-out %b_more.ipynb,$(sort $(wildcard notebooks/*.ipynb)))
# notebooks settle claims while they are tested: their ledger is not the learner's
TEST_LEDGER := $(CURDIR)/.venv/test-ledger.json

.DEFAULT_GOAL := help
.PHONY: help lab test test-oldest verify report bench lint pages chromium clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

lab: .venv/.stamp  ## open the course in JupyterLab; ARGS="--no-browser --port 8899" is passed on
	@$(BIN)/python tools/lab.py $(ARGS)

test: lint  ## lint, unit tests with doctests, the main notebooks cell by cell
	$(UNIT)
	DLHELPERS_LEDGER=$(TEST_LEDGER) $(NBVAL) $(MAIN)

# the extras whose packages ask for a newer torch are left out
test-oldest: $(OLDEST)/.stamp  ## the unit tests on the oldest torch that is supported
	$(OLDEST)/bin/python -m pytest --ignore=tests/browser -m "not slow and not browser"

verify: lint  ## the same with every notebook and the full sweeps (minutes)
	$(UNIT) -m "not alone"
	$(BIN)/python -m pytest -m alone
	DLHELPERS_LEDGER=$(TEST_LEDGER) $(NBVAL) notebooks

report: .venv/.stamp  ## run every notebook; write report.html and ledger.json
	$(BIN)/python -m dlhelpers report --run

bench: .venv/.stamp-bench  ## install the peers and run the benchmarks
	for script in benchmarks/*.py; do $(BIN)/python $$script || exit 1; done

lint: .venv/.stamp  ## ruff, notebooks included, and spelling
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell

PAGES := links readme_table api_page architecture ledger_page
pages: .venv/.stamp  ## write the pages and links that are made from the code
	for page in $(PAGES); do $(BIN)/python tools/$$page.py || exit 1; done

chromium:  ## install Chromium for the browser tests (Debian and Ubuntu, as root)
	@command -v chromium >/dev/null || { \
	  command -v apt-get >/dev/null && [ "$$(id -u)" = 0 ] && apt-get update -qq \
	  && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
	     chromium fonts-dejavu-core >/dev/null; } \
	|| echo "no Chromium: the browser tests will be skipped; install it by your system's means"

clean:  ## remove the environment and what was generated; never work/
	rm -rf .venv $(OLDEST) report.html ledger.json .pytest_cache .ruff_cache .hypothesis

# the stamp is newer than pyproject.toml unless something has to be installed
.venv/.stamp: pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if (3, 11) <= v[:2] <= (3, 14) else \
	"Python 3.11 to 3.14 is needed, $(PYTHON) is %d.%d: install one and say make PYTHON=python3.12" \
	% v[:2])'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -e ".[$(EXTRAS)]"
	@touch $@

$(OLDEST)/.stamp: pyproject.toml
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --disable-pip-version-check -e ".[course,stores,profiling,dev]" \
	  "torch==2.11.*" "torchvision==0.26.*"
	@touch $@

.venv/.stamp-bench: .venv/.stamp
	$(BIN)/python -m pip install --disable-pip-version-check -e ".[$(EXTRAS),bench]"
	@touch $@
