# SPDX-License-Identifier: MIT
PYTHON := .venv/bin/python
ENGINE := src/blksnap_ublk/engine/_engine.abi3.so
ENGINE_SOURCES := $(wildcard csrc/Makefile csrc/*.h csrc/*/*.[ch]) setup.py src/blksnap_ublk/engine/build.py
DRIVER_FLAGS := -std=gnu11 -O2 -g -Wall -Wextra -Werror -D_GNU_SOURCE -fvisibility=hidden -pthread
SHELL := /bin/bash

.PHONY: help setup build demo test soak soak-device mutants coverage lint bench bench-full bench-check bench-native clean
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

bench: build ## speeds, as ratios of runs side by side, in some minutes: tables and plots in bench/results
	@scripts/setup bench
	@$(PYTHON) bench/main.py

bench-full: build ## the same with all cells, long enough for figures to be quoted: for hours
	@scripts/setup bench
	@$(PYTHON) bench/main.py --full

build/bench/driver build/bench/local_load.so &: $(ENGINE) $(wildcard bench/driver/*.[ch])
	@mkdir -p build/bench
	@$(CC) $(DRIVER_FLAGS) -Icsrc -Wl,--wrap=io_uring_submit_and_wait_timeout,--wrap=io_uring_submit_and_wait bench/driver/*.c build/plain/csrc/libengine.a $$(pkg-config --cflags --libs liburing) -o build/bench/driver
	@$(CC) $(DRIVER_FLAGS) -fPIC -shared bench/driver/local_load.c -o build/bench/local_load.so

bench-check: build build/bench/driver ## instructions and system calls of each path, compared with bench/instructions.json
	@scripts/setup bench
	@$(PYTHON) bench/instructions.py

bench-native: build build/bench/driver ## the engine without ublk, side by side with fio; Python targets; change queries
	@scripts/setup bench
	@$(PYTHON) bench/native.py
	@$(PYTHON) bench/python_targets.py
	@$(PYTHON) bench/cbt_query.py

clean: ## remove what was built (.venv stays)
	rm -rf build $(ENGINE) src/*.egg-info
