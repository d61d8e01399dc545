# SPDX-License-Identifier: MIT
PYTHON := .venv/bin/python
ENGINE := src/blksnap_ublk/engine/_engine.abi3.so
ENGINE_SOURCES := $(wildcard csrc/Makefile csrc/*.h csrc/*/*.[ch]) setup.py src/blksnap_ublk/engine/build.py
SHELL := /bin/bash

.PHONY: help setup build demo test soak soak-device mutants coverage lint bench clean
help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

setup: ## install what is missing: packages of the distribution, .venv
	@scripts/setup

.venv/.set-up: pyproject.toml setup.py scripts/setup
	@scripts/setup
	@touch $@

build: .venv/.set-up $(ENGINE) ## build the engine; quick where nothing changed

$(ENGINE): $(ENGINE_SOURCES)
	@mkdir -p build/plain
	@env -u BSU_SANITIZE -u BSU_COVERAGE -u BSU_MUTANTS $(PYTHON) setup.py -q build_ext --build-temp build/plain/temp --inplace
	@touch $@

demo: setup build ## snapshots and changed blocks on a real ublk device, told in plain words
	@scripts/with-ublk -m 4G -t 1800 -- $(PYTHON) demo/scenario.py

test: setup build ## everything: unit tests here, device tests on a kernel with ublk
	@scripts/test

soak: build ## the tests of chance for an hour, or for BSU_SOAK_SECONDS
	@BSU_SOAK_SECONDS=$${BSU_SOAK_SECONDS:-3600} $(PYTHON) -m pytest -q -s -o faulthandler_timeout=0 tests/unit/sim/test_any_order.py tests/unit/sim/test_dice.py tests/unit/speaking tests/unit/leaks

soak-device: build ## 1000 snapshots, 50 held, PostgreSQL on 50: on ublk devices, for an hour or more
	@scripts/setup soak
	@scripts/with-ublk -m 4G -t 14400 -- env BSU_SOAK_SECONDS=3600 $(PYTHON) -m pytest -q -s -o faulthandler_timeout=0 tests/device/test_many_snapshots.py tests/device/test_postgresql.py tests/device/test_speaking_sectors.py

mutants: build ## which test sees which seeded bug of csrc/core/mutant.h
	@BSU_MUTANTS=1 scripts/run-variant $(PYTHON) -m tests.unit.sim.mutants

coverage: build ## branches of csrc/core that the tests without a kernel take
	@scripts/core-coverage

lint: build ## ruff, mypy, and the C sources without a warning
	@scripts/lint

bench: setup build ## speeds, as ratios of runs side by side
	@scripts/with-ublk -m 4G -t 3600 -- $(PYTHON) bench/run.py

clean: ## remove what was built (.venv stays)
	rm -rf build $(ENGINE) src/*.egg-info
