# `make run` serves an image, `make test` tests everything; both begin on a fresh Debian 12.
#
#   make run [IMAGE=path] [PORTAL=host:port]
#   make test          everything, with the peers and the user-mode-linux guest
#   make kernel        only the tests in the user-mode-linux guest
#   make check         style, types, layers and the quick tests
#   make torture       the long programmes of RELIABILITY.md, as far as they are not done [TORTURE_ARGS=…]
#   make demo-standby  a minute to watch, a disk outlives its storage [DEMO_ARGS=…]
#   make bench         ploopd, tgtd and qemu-storage-daemon side by side
#   make bench-kernel  ploopd and tcmu-runner under the kernel's target, in the guest
#   make install       the program, its units, manual and completion into PREFIX=/usr/local [DESTDIR=…];
#                      make install-data only what is not the program, make uninstall the opposite
#   make compiled      compile the request path; run, test and bench do so, where there is a compiler
#   make interpreted   run it from its sources
#   make setup         the virtual environment for all of them; make clean removes it

SHELL := /bin/bash
VENV := .venv
BIN := $(VENV)/bin
# Debian's python3 is built with profile-guided optimisation; others found in PATH often are not.
PYTHON ?= $(shell test -x /usr/bin/python3 && echo /usr/bin/python3 || command -v python3 || echo python3)
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
COMPILE := $(BIN)/python tools/compile_modules.py
IMAGE ?=
PORTAL ?=
PYTEST_ARGS ?=
BENCH_ARGS ?=
DEMO_ARGS ?=
TORTURE_ARGS ?=
# The program's optional parts; without fuse no compiler is needed.
EXTRAS ?= fuse,lio,dbus,shell
INSTALL = DESTDIR='$(DESTDIR)' PREFIX='$(PREFIX)' SYSCONFDIR='$(SYSCONFDIR)' LOCALSTATEDIR='$(LOCALSTATEDIR)' \
	BINDIR='$(BINDIR)' EXTRAS='$(EXTRAS)' PYTHON='$(PYTHON)' tools/install

.DEFAULT_GOAL := help
.PHONY: help setup compiled interpreted run test kernel check torture demo-standby bench bench-kernel clean install install-data uninstall

help:
	@sed -n 's/^#   //p' Makefile

setup: $(VENV)/.stamp-test $(VENV)/.stamp-targetcli

compiled: $(VENV)/.stamp-run
	@$(COMPILE)

interpreted: $(VENV)/.stamp-run
	@$(COMPILE) --remove

run: $(VENV)/.stamp-run
	@$(COMPILE)
	@exec $(BIN)/python -m ploopd.demo $(if $(PORTAL),--portal '$(PORTAL)') $(if $(IMAGE),"$$IMAGE")

test: $(VENV)/.stamp-test $(VENV)/.stamp-targetcli
	@$(COMPILE)
	$(BIN)/python -m pytest $(PYTEST_ARGS)

kernel: $(VENV)/.stamp-test $(VENV)/.stamp-targetcli
	@$(COMPILE)
	$(BIN)/python -m pytest tests/kernel $(PYTEST_ARGS)

check: $(VENV)/.stamp-test
	@$(COMPILE) --tidy
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest -q -m "not slow and not functional and not kernel" tests/unit

torture: $(VENV)/.stamp-test
	@$(COMPILE)
	$(BIN)/python -m tests.torture $(TORTURE_ARGS)

demo-standby: $(VENV)/.stamp-demo
	@$(COMPILE)
	@$(BIN)/python -m tests.demo.standby $(DEMO_ARGS)

bench: $(VENV)/.stamp-bench
	@$(COMPILE)
	$(BIN)/python -m bench $(BENCH_ARGS)

bench-kernel: $(VENV)/.stamp-test
	@$(COMPILE)
	PLOOPD_IN_GUEST=1 PYTHONDONTWRITEBYTECODE=1 tests/kernel/run.sh -t 600 -o out/kernel -- \
	    $(abspath $(BIN))/python -m bench.guest $(BENCH_ARGS)

install:
	PYTHON='$(PYTHON)' tools/packages install $(if $(findstring fuse,$(EXTRAS)),view)
	@$(INSTALL) program data activate

install-data:
	@$(INSTALL) data

uninstall:
	@$(INSTALL) uninstall

clean:
	-tools/compile_modules.py --remove
	rm -rf $(VENV) build dist out .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamps are set up again when pyproject.toml or this file's recipes change.
$(VENV)/.stamp-run: pyproject.toml Makefile tools/packages
	PYTHON='$(PYTHON)' tools/packages run
	$(call make_venv)
	$(PIP) install --editable '.[compile]'
	@touch $@

$(VENV)/.stamp-test: pyproject.toml Makefile tools/packages
	PYTHON='$(PYTHON)' tools/packages run test
	$(call make_venv)
	$(PIP) install --editable '.[test,dev,bench,compile]'
	@touch $@ $(VENV)/.stamp-run $(VENV)/.stamp-demo

# Without it one test is skipped, and says so; it is tried again next time.
$(VENV)/.stamp-targetcli: tests/kernel/targetcli.txt tools/targetcli $(VENV)/.stamp-test
	@if tools/targetcli $(VENV)/targetcli $<; then touch $@; fi

$(VENV)/.stamp-demo: pyproject.toml Makefile tools/packages
	PYTHON='$(PYTHON)' tools/packages run demo
	$(call make_venv)
	$(PIP) install --editable '.[test,bench,compile]'
	@touch $@ $(VENV)/.stamp-run

$(VENV)/.stamp-bench: $(VENV)/.stamp-test
	PYTHON='$(PYTHON)' tools/packages bench
	@touch $@

define make_venv
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON) is older than Python 3.11; name another: make PYTHON=/path/to/python3" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@# A virtual environment that was moved or half made is made again.
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
endef
