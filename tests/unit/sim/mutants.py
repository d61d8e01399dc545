# SPDX-License-Identifier: MIT
"""Runs the tests of the simulator with each seeded bug of csrc/core/mutant.h, and prints which test sees it.

    BSU_MUTANTS=1 scripts/run-variant .venv/bin/python -m tests.unit.sim.mutants [NAME...]

Exit status 1 if a bug stays unseen. `--first`: go on to the next bug as soon as one group of tests has seen it.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
GROUPS = {
    name: HERE / f"test_{name}.py"
    for name in (
        *(
            "rules",
            "written_images",
            "waiting",
            "room",
            "turns",
            "exempt",
            "yield",
            "death",
            "early_release",
            "adoption",
            "flips",
            "growing",
        ),
        *("fault_sweep", "any_order", "dice"),
    )
} | {"grace": HERE.parent / "engine" / "test_grace.py"}
LIMIT_SECONDS = 600
"""A test that is still running then has found a request that never ends."""


def mutants() -> dict[str, int]:
    """Names and numbers."""
    text = (ROOT / "csrc" / "core" / "mutant.h").read_text()
    return {name: int(number) for name, number in re.findall(r"BSU_MUTANT_(\w+) = (\d+)", text) if number != "0"}


def killer(number: int, group: Path) -> str:
    """The test of this group that fails with the bug; empty if none does."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", str(group)]
    try:
        run = subprocess.run(
            command,
            env={**os.environ, "BSU_MUTANT": str(number)},
            cwd=ROOT,
            timeout=LIMIT_SECONDS,
            capture_output=True,
            text=True,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return "never ends"
    if run.returncode == 0:
        return ""
    if run.returncode == 1:
        failed = re.search(r"^(?:FAILED|ERROR) \S+::(\S+?)(?:\[|$| )", run.stdout, re.MULTILINE)
        return failed[1] if failed else "fails"
    if run.returncode < 0:
        return f"dies with signal {-run.returncode}"
    raise SystemExit(f"pytest: exit status {run.returncode}\n{run.stdout}{run.stderr}")


def killers(number: int, first: bool) -> list[str]:
    """For each group the test that sees the bug, or the empty string."""
    found: list[str] = []
    for group in GROUPS.values():
        found.append("" if first and any(found) else killer(number, group))
    return found


def main(arguments: list[str]) -> int:
    first = "--first" in arguments
    chosen = [argument for argument in arguments if not argument.startswith("-")]
    print("| seeded bug |", " | ".join(GROUPS), "|")
    print("|---" * (1 + len(GROUPS)) + "|", flush=True)
    unseen = []
    begin = time.monotonic()
    names = {name: number for name, number in mutants().items() if not chosen or name in chosen}
    with ThreadPoolExecutor(os.cpu_count()) as workers:
        for name, found in zip(names, workers.map(lambda number: killers(number, first), names.values()), strict=True):
            print(f"| {name} |", " | ".join(found), "|", flush=True)
            if not any(found):
                unseen.append(name)
    print(f"\n{time.monotonic() - begin:.0f} seconds; unseen: {', '.join(unseen) or 'none'}")
    return 1 if unseen else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
