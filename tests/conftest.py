# SPDX-License-Identifier: MIT
"""Which tests run where.

tests/unit runs on any machine. tests/device needs root and a kernel with ublk; elsewhere it is not collected. How many
of the device tests run is their budget: all of them (full), those marked quick or scenario (quick), or those marked
scenario. What a budget leaves out is printed, with the reason.
"""

import os
from pathlib import Path

import hypothesis
import pytest

# A guest may be slow: how long an example takes is no failure. What reproduces one is printed.
hypothesis.settings.register_profile("blksnap", deadline=None, print_blob=True)
hypothesis.settings.load_profile("blksnap")

DEVICE_TESTS = Path(__file__).parent / "device"
UBLK_CONTROL = Path("/dev/ublk-control")

REASONS = {
    "quick": "not marked quick or scenario, and an emulated CPU makes everything 10 to 30 times slower",
    "scenario": "not marked scenario, and all others run on the other kernel",
}
MARKERS = {"quick": {"quick", "scenario"}, "scenario": {"scenario"}}

left_out = pytest.StashKey[list[str]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--budget",
        choices=["auto", "full", *MARKERS],
        default="auto",
        help="device tests to run: auto is quick where the CPU is emulated, otherwise full",
    )


def missing_for_ublk() -> str | None:
    """Why no ublk device can be made here, or None."""
    if os.geteuid() != 0:
        return "not root"
    if not UBLK_CONTROL.exists():
        return f"no {UBLK_CONTROL} (tests/guest/run -- COMMAND runs a command where there is one)"
    return None


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    return True if collection_path == DEVICE_TESTS and missing_for_ublk() else None


def pytest_report_header() -> list[str]:
    missing = missing_for_ublk()
    return [f"tests/device: not collected: {missing}"] if missing else []


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    budget = config.getoption("--budget")
    if budget == "auto":
        budget = "quick" if os.environ.get("BLKSNAP_GUEST") == "tcg" else "full"
    wanted = MARKERS.get(budget)
    if wanted is None:
        return
    kept: list[pytest.Item] = []
    dropped: list[pytest.Item] = []
    for item in items:
        runs = not item.path.is_relative_to(DEVICE_TESTS) or any(item.get_closest_marker(name) for name in wanted)
        (kept if runs else dropped).append(item)
    items[:] = kept
    config.hook.pytest_deselected(items=dropped)
    if dropped:
        config.stash[left_out] = [f"{REASONS[budget]}:", *(f"  {item.nodeid}" for item in dropped)]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    lines = config.stash.get(left_out, [])
    if lines:
        terminalreporter.section("not run here")
        for line in lines:
            terminalreporter.write_line(line)
