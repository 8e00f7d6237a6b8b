# SPDX-License-Identifier: Apache-2.0
# On Debian 12, as root: each target first sets up what it needs, and does nothing for what is there.

VENV := build/venv
PYTHON := $(VENV)/bin/python
# pbr asks git for the version. Git refuses if root builds what another user has checked out.
TRUST_CHECKOUT := GIT_CONFIG_COUNT=1 GIT_CONFIG_KEY_0=safe.directory GIT_CONFIG_VALUE_0=$(CURDIR)

.DEFAULT_GOAL := test
.PHONY: test test-xen unit functional lint demo demo-guest demo-engine demo-xen bench docs config setup guest hosts-up hosts-down \
	cloud-up cloud-down cloud-status clean
# Targets that share the machine's network namespaces and two cores are not run side by side.
.NOTPARALLEL:

test: setup lint functional
	@$(PYTHON) -m pytest
	@$(PYTHON) -m pytest tests/xen -m "not long"

unit: $(VENV)/.stamp
	@$(PYTHON) -m pytest tests/unit

functional: $(VENV)/.stamp
	@$(PYTHON) -m stestr run --concurrency 2

lint: $(VENV)/.stamp
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/shellcheck tools/*.sh .ci/run
	$(VENV)/bin/mypy

# All of them, and Nova's: three quarters of an hour.
test-xen: setup
	@$(PYTHON) -m pytest tests/xen

demo: setup
	@$(PYTHON) -m demo

demo-guest: setup
	@$(PYTHON) -m demo.inside

demo-engine: setup
	@$(PYTHON) -m demo.engine

demo-xen: setup
	@$(PYTHON) -m demo.xen

bench: setup
	@$(PYTHON) -m bench

hosts-up: setup
	@$(PYTHON) -m tests.emulation up

hosts-down: $(VENV)/.stamp
	@$(PYTHON) -m tests.emulation down

cloud-up: setup
	@$(PYTHON) -m devstack.embedded up

cloud-down: $(VENV)/.stamp
	@$(PYTHON) -m devstack.embedded down

cloud-status: $(VENV)/.stamp
	@$(PYTHON) -m devstack.embedded status

docs: $(VENV)/.stamp docs/requirements.txt
	$(PYTHON) -m pip install --quiet --requirement docs/requirements.txt
	$(PYTHON) -m sphinx -W -b html docs build/docs

config: $(VENV)/.stamp
	$(VENV)/bin/oslo-config-generator --config-file etc/oslo-config-generator/nova-snowflock.conf

setup: $(VENV)/.stamp guest

guest: build/guest/initrd.gz

build/.packages: bindep.txt tools/install-packages.sh
	@tools/install-packages.sh
	@mkdir -p build && touch $@

$(VENV)/.stamp: build/.packages constraints.txt requirements.txt test-requirements.txt \
		devstack/embedded/requirements.txt setup.cfg pyproject.toml
	@test -x $(PYTHON) || /usr/bin/python3 -m venv $(VENV)
	@$(TRUST_CHECKOUT) $(PYTHON) -m pip install --quiet --disable-pip-version-check \
		--constraint constraints.txt \
		--requirement requirements.txt --requirement test-requirements.txt \
		--requirement devstack/embedded/requirements.txt --editable .
	@touch $@

build/guest/initrd.gz: build/.packages tools/build-guest.sh \
		tests/guest/build.py tests/guest/init tests/guest/net tests/guest/static.py tests/guest/workload.py \
		$(wildcard nova_snowflock/guest/*.py)
	@tools/build-guest.sh

clean:
	rm -rf build
