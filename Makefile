# Everything a newcomer or CI runs. `make` alone lists the targets. The virtual environment is .venv, installed from the
# hash-pinned lock files and made anew when they change. Missing programs are installed through apt, nothing else is.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.NOTPARALLEL:
.DEFAULT_GOAL := help

PYTHON ?= python3
BIN := .venv/bin
PIP := python -m pip --disable-pip-version-check --quiet
export PIP_ROOT_USER_ACTION := ignore
SOURCES := agent.py overlay subnet_lease tests

# program:package
PROGRAMS := ip:iproute2 bridge:iproute2 etcd:etcd-server nft:nftables ping:iputils-ping
test: PROGRAMS += etcdctl:etcd-client openssl:openssl ethtool:ethtool dhcpcd:dhcpcd-base systemd-analyze:systemd iptables-legacy:iptables chromium:chromium promtool:prometheus

# What "CORE" means stands once, in the first import contract.
CORE = $(shell $(BIN)/python -c 'import tomllib; \
  contracts = tomllib.load(open("pyproject.toml", "rb"))["tool"]["importlinter"]["contracts"]; \
  print(",".join(name.replace(".", "/") + ".py" for name in contracts[0]["source_modules"]))')

.PHONY: help demo test unit lint types kernels soak bench docs pictures lock wheel install install-files visible uninstall clean root system
help:
	@sed -nE 's/^([a-z]+):.*## (.*)/  make \1\t\2/p' Makefile | expand -t 17

demo: root system .venv/run.stamp ## a cluster of three hosts on this machine, shown and taken down again; needs root
	@$(BIN)/overlay-agent lab demo

# Tests of clusters wait for their agents more than they compute: half as many more at once as there are cores.
test: root system lint types unit ## all checks and tests; needs root
	$(BIN)/python -m pytest -n $$(($$(nproc) * 3 / 2)) --dist loadfile tests/netns tests/packet tests/faults

unit: .venv/dev.stamp ## tests without root or network, with the branch coverage of the pure code
	$(BIN)/python -m pytest -n auto --dist loadfile --cov --cov-report= tests/unit
	$(BIN)/coverage report --include="$(CORE)" --show-missing --skip-covered --fail-under=100

lint: .venv/dev.stamp ## format, style and layering
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/lint-imports

types: .venv/dev.stamp ## mypy --strict
	$(BIN)/mypy

bench: PROGRAMS += iperf3:iperf3
bench: root system .venv-bench/run.stamp ## measure all that docs/benchmarks.md, docs/scale.md and docs/network.md say; needs root
	.venv-bench/bin/python -m tests.bench \
	  --json docs/benchmarks.json --markdown docs/benchmarks.md --scale docs/scale.md \
	  --network docs/network.md

soak: PROGRAMS += etcdctl:etcd-client
soak: root system .venv/dev.stamp ## random faults for MINUTES (10), under pings that may not be lost; needs root
	$(BIN)/python -m tests.faults.soak --minutes $(or $(MINUTES),10) $(if $(SEED),--seed $(SEED))

kernels: PROGRAMS += qemu-system-x86_64:qemu-system-x86 busybox:busybox-static
kernels: root system .venv/dev.stamp ## the core scenarios, and bad links, on Debian's kernel in an emulator; needs root
	$(BIN)/python -m tests.kernels $(if $(PACKAGE),--package $(PACKAGE))

docs: .venv/run.stamp ## regenerate the references of options and metrics, and the example
	$(BIN)/python -m overlay.reference > docs/configuration.md
	$(BIN)/python -m overlay.reference example > deploy/overlay-agent.toml
	$(BIN)/python -m overlay.reference metrics > docs/metrics.md

pictures: PROGRAMS += chromium:chromium
pictures: system .venv/dev.stamp ## take the pictures of docs/page.md anew, in a headless Chromium
	$(BIN)/python -m tests.netns.screenshots docs/pictures

# `make lock UV_OPTIONS=--upgrade` moves to the newest versions; without it only what pyproject.toml calls for changes.
lock: ## bring the lock files in line with pyproject.toml
	@uv=$$(mktemp -d); trap 'rm -rf "$$uv"' EXIT; \
	$(PYTHON) -m venv "$$uv"; "$$uv/bin/pip" --disable-pip-version-check install --quiet uv; \
	compile=("$$uv/bin/uv" pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header); \
	echo setuptools | "$${compile[@]}" $(UV_OPTIONS) pyproject.toml - -o requirements.lock; \
	echo setuptools | "$${compile[@]}" $(UV_OPTIONS) pyproject.toml - --group dev -c requirements.lock -o requirements-dev.lock

wheel: .venv/run.stamp ## build dist/overlay_agent-*.whl
	@$(BIN)/$(PIP) wheel --no-deps --no-build-isolation --no-index --wheel-dir dist .
	@ls dist/*.whl

# Where things go; DESTDIR= stages all of it below another directory. deploy/overlay-agent.service names $(prefix)/bin.
prefix ?= /usr/local
sysconfdir ?= /etc
PROGRAM = $(prefix)/lib/overlay-agent
UNIT = $(sysconfdir)/systemd/system/overlay-agent.service
EXAMPLE = $(sysconfdir)/overlay-agent/overlay-agent.toml
# file:destination; docs/host.md says what each is for.
NETWORK = deploy/network/NetworkManager.conf:$(sysconfdir)/NetworkManager/conf.d/90-overlay-agent.conf \
  deploy/network/overlay-agent.network:$(sysconfdir)/systemd/network/05-overlay-agent.network \
  deploy/network/overlay-agent.link:$(sysconfdir)/systemd/network/05-overlay-agent.link \
  deploy/network/networkd.conf:$(sysconfdir)/systemd/networkd.conf.d/90-overlay-agent.conf

# The new program is complete before it takes the place of the old one; its paths are those it has in the end.
install: visible wheel install-files ## put the program, its unit and the files of docs/host.md in place; starts nothing
	@new="$(DESTDIR)$(PROGRAM).new"; rm -rf "$$new"; \
	$(PYTHON) -m venv --without-pip "$$new"; \
	$(BIN)/$(PIP) --python "$$new/bin/python" install --require-hashes -r requirements.lock; \
	$(BIN)/$(PIP) --python "$$new/bin/python" install --no-deps --no-index "$$(ls -t dist/*.whl | head -1)"; \
	sed -i "s|$$new|$(PROGRAM)|" "$$new/bin/overlay-agent"; \
	rm -rf "$(DESTDIR)$(PROGRAM)"; mv "$$new" "$(DESTDIR)$(PROGRAM)"; \
	install -d "$(DESTDIR)$(prefix)/bin"; ln -sfn "$(PROGRAM)/bin/overlay-agent" "$(DESTDIR)$(prefix)/bin/overlay-agent"
	@echo "Installed. Next: edit $(EXAMPLE), then systemctl daemon-reload && systemctl enable --now overlay-agent"

visible:
	@home=$$($(PYTHON) -c 'import sys; print(sys.base_prefix)'); \
	if [[ -z "$(DESTDIR)" && "$$home" =~ ^/(root|home)/ ]]; then \
	  echo "The service cannot see $$home (ProtectHome=yes). Name another Python: make install PYTHON=/usr/bin/python3"; \
	  exit 1; fi

install-files: # the part that needs neither Python nor a network
	@for pair in $(NETWORK); do install -D -m 644 "$${pair%:*}" "$(DESTDIR)$${pair#*:}"; done
	@install -d "$(DESTDIR)$(dir $(UNIT))"
	@sed 's|^ExecStart=/usr/local/bin/|ExecStart=$(prefix)/bin/|' deploy/overlay-agent.service > "$(DESTDIR)$(UNIT)"
	@chmod 644 "$(DESTDIR)$(UNIT)"
	@[ -e "$(DESTDIR)$(EXAMPLE)" ] || install -D -m 644 deploy/overlay-agent.toml "$(DESTDIR)$(EXAMPLE)"

uninstall: ## remove what install has put in place, but for the options; the dataplane stays as it is
	@rm -rf "$(DESTDIR)$(PROGRAM)" "$(DESTDIR)$(PROGRAM).new"
	@rm -f "$(DESTDIR)$(prefix)/bin/overlay-agent" "$(DESTDIR)$(UNIT)"
	@for pair in $(NETWORK); do rm -f "$(DESTDIR)$${pair#*:}"; done

clean: ## remove .venv and all that was built
	rm -rf .venv .venv-bench build dist *.egg-info .coverage .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

root:
	@[ "$$(id -u)" = 0 ] || { echo "Network namespaces need root: sudo make $(MAKECMDGOALS)"; exit 1; }

# Debian's etcd-server and prometheus start services of their own as they are installed. A mask set before keeps systemd
# from doing so, RUNLEVEL=1 an older init; then the unit is as any other that nobody has enabled.
system:
	@missing=$$(for pair in $(PROGRAMS); do command -v "$${pair%:*}" >/dev/null || echo "$${pair#*:}"; done | sort -u); \
	$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || missing+=" python3-venv"; \
	if [ -n "$$missing" ]; then \
	  echo "Installing through apt:" $$missing; quiet=(); \
	  command -v apt-get >/dev/null || { echo "There is no apt-get here; install them your own way."; exit 1; }; \
	  if command -v systemctl >/dev/null; then \
	    [[ $$missing = *etcd-server* ]] && quiet+=(etcd.service); \
	    [[ $$missing = *prometheus* ]] && quiet+=(prometheus.service); fi; \
	  if (($${#quiet[@]})); then \
	    echo "What comes with the packages will not be started or enabled:" $${quiet[@]}; \
	    systemctl mask --quiet $${quiet[@]}; fi; \
	  apt-get update --quiet --quiet; \
	  RUNLEVEL=1 DEBIAN_FRONTEND=noninteractive apt-get install --yes --quiet --quiet --no-install-recommends $$missing; \
	  if (($${#quiet[@]})); then systemctl unmask --quiet $${quiet[@]}; systemctl disable --quiet $${quiet[@]}; fi; \
	fi

# What is measured has nothing in its environment but what a host has: a tool of ours may change what a library imports.
.venv/run.stamp .venv-bench/run.stamp: requirements.lock pyproject.toml
	@$(call install,requirements.lock)

.venv/dev.stamp: requirements-dev.lock pyproject.toml
	@$(call install,requirements-dev.lock)

define install
$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || { \
  echo "overlay-agent needs Python 3.11, 3.12 or 3.13; $(PYTHON) is $$($(PYTHON) --version). Name one: make PYTHON=python3.12"; \
  exit 1; }; \
echo "Installing $(1) into $(@D)"; \
[ -x $(@D)/bin/python ] || $(PYTHON) -m venv $(@D); \
$(@D)/bin/$(PIP) install --require-hashes -r $(1); \
$(@D)/bin/$(PIP) install --no-deps --no-build-isolation --no-index --config-settings editable_mode=compat --editable .; \
touch $@
endef
