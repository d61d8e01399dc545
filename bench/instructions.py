# SPDX-License-Identifier: MIT
"""Instructions and system calls that a request costs, path by path, compared with a stored table.

    python bench/instructions.py [--store] [--hot] [--paths PATTERN]

Counted by callgrind and strace in user space, on a device that ends each I/O at once (/dev/zero), with requests made
by the queue's own thread: the same comes out in each run. Instructions are those of 2 N requests less those of N:
start and end do not count. Exit status 1 when a path has grown by more than 5 %, or by three tenths of a system call.
Needs valgrind and strace.
"""

from __future__ import annotations

import argparse
import fnmatch
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import msgspec

from bench.driver import LIMIT, Options, arguments, run

TABLE = Path(__file__).parent / "instructions.json"
GROWN = 1.05
MORE_CALLS = 0.3
DEPTHS = (1, 32)
MIB = 1 << 20
REQUESTS = 2000
HOTTEST = 10
NOT_FUNCTIONS = {"PROGRAM", "TOTALS", "(below", "clone", "start_thread"}
"""What callgrind_annotate lists too: totals, and functions that were under way when counting began."""

FILLED: Options = {"filled": 1, "area": 32 * MIB}
IMAGE: Options = {"op": "read", "target": "image", "area": 32 * MIB}
LARGE: Options = {"length": 128 << 10, "order": "sequential", "requests": 500}

PATHS: dict[str, Options] = {
    "null device": {"op": "read", "target": "null"},
    "idle read 4k": {"op": "read"},
    "idle write 4k": {"op": "write"},
    "idle write 4k, copy way": {"op": "write", "way": "copy"},
    "first overwrite 4k": {"op": "write", "held": 1},
    "first overwrite 4k, 50 snapshots": {"op": "write", "held": 50},
    "first overwrite 4k, in order": {"op": "write", "held": 1, "order": "sequential"},
    "first overwrite 128k": {"op": "write", "held": 1, **LARGE},
    "later overwrite 4k": {"op": "write", "held": 1, **FILLED},
    "later overwrite 4k, 50 snapshots": {"op": "write", "held": 50, **FILLED},
    "image read 4k, not stored": {"held": 1, **IMAGE},
    "image read 4k, not stored, 50 snapshots": {"held": 50, **IMAGE},
    "image read 4k, stored": {"held": 1, **IMAGE, **FILLED},
    "image read 4k, stored, 50 snapshots": {"held": 50, **IMAGE, **FILLED},
    "Python target, the engine's part": {"op": "read", "target": "python"},
}
"""What each path is, in the driver's options."""


class Cost(msgspec.Struct, frozen=True):
    """What one request costs in user space."""

    instructions: float
    enters: float
    """Calls of io_uring_enter."""
    others: float
    """Other system calls."""

    @property
    def calls(self) -> float:
        return self.enters + self.others


class Table(msgspec.Struct, frozen=True):
    """Costs by `path, depth D`, and what they depend on."""

    made_with: dict[str, str]
    costs: dict[str, Cost]


def made_with() -> dict[str, str]:
    """What the figures depend on besides the sources."""

    def first_line(*command: str) -> str:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0]

    cpu = re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())
    return {
        "compiler": first_line("cc", "--version"),
        "machine": platform.machine(),
        "processor": cpu[1] if cpu else "unknown",
        "kernel": platform.release(),
        "libc": " ".join(platform.libc_ver()),
        "liburing": first_line("pkg-config", "--modversion", "liburing"),
        "valgrind": first_line("valgrind", "--version"),
    }


def callgrind(options: Options, out: Path) -> int:
    """Instructions of the whole program from its first request on."""
    run(options, under=["valgrind", "-q", "--tool=callgrind", f"--callgrind-out-file={out}"])
    found = re.search(r"^(?:totals|summary): (\d+)", out.read_text(), re.MULTILINE)
    if not found:
        raise RuntimeError(f"no total in what callgrind wrote for {' '.join(arguments(options))}")
    return int(found[1])


def system_calls(options: Options, out: Path) -> tuple[int, int]:
    """Calls of io_uring_enter, and all others, between the marks that the driver sets around its requests."""
    run(options, under=["strace", "-f", "-o", str(out)])
    calls = re.findall(r"^\d+ +(\w+)\(", out.read_text(), re.MULTILINE)
    begin, end = (number for number, name in enumerate(calls) if name == "getppid")
    between = calls[begin + 1 : end]
    enters = between.count("io_uring_enter")
    return enters, len(between) - enters


def cost(options: Options, directory: Path) -> Cost:
    """Of one request."""
    requests = int(options["requests"])
    out = directory / "counted"
    once, twice = (callgrind(options | {"requests": times * requests}, out) for times in (1, 2))
    enters, others = system_calls(options, out)
    return Cost(round((twice - once) / requests, 1), round(enters / requests, 2), round(others / requests, 2))


def hottest(options: Options, directory: Path) -> list[str]:
    """The functions that most instructions are in, as `share function`."""
    out = directory / "counted"
    callgrind(options, out)
    command = ["callgrind_annotate", "--auto=no", "--threshold=100", str(out)]
    text = subprocess.run(command, capture_output=True, text=True, check=True, timeout=LIMIT).stdout
    shares: dict[str, int] = {}
    # A function appears once for each file that it has code of; the name stands after the last colon.
    for count, place in re.findall(r"^\s*([\d,]+) \([^)]*\)\s+(\S+)", text, re.MULTILINE):
        name = place.rpartition(":")[2]
        if name not in NOT_FUNCTIONS:
            shares[name] = shares.get(name, 0) + int(count.replace(",", ""))
    total = sum(shares.values())
    ranked = sorted(shares.items(), key=lambda item: -item[1])[:HOTTEST]
    return [f"{count / total:6.1%} {count / int(options['requests']):9.0f}  {name}" for name, count in ranked]


def wanted(pattern: str) -> dict[str, Options]:
    """The runs to be made, by name."""
    return {
        f"{name}, depth {depth}": {"requests": REQUESTS, **options, "depth": depth}
        for name, options in PATHS.items()
        for depth in DEPTHS
        if fnmatch.fnmatch(name, pattern)
    }


def row(name: str, before: Cost | None, now: Cost) -> tuple[str, bool]:
    """A line of Markdown, and whether the path has grown."""
    calls = f"{now.enters:.2f} + {now.others:.2f}"
    if before is None:
        return f"| {name} | | {now.instructions:.0f} | | {calls} | |", False
    factor = now.instructions / before.instructions
    grown = factor > GROWN or now.calls > before.calls + MORE_CALLS
    was = f"{before.enters:.2f} + {before.others:.2f}"
    shown = f"{before.instructions:.0f} | {now.instructions:.0f} | {factor - 1:+.1%}"
    return f"| {name} | {shown} | {calls} | {'**grown**' if grown else '' if was == calls else f'was {was}'} |", grown


def main() -> int:
    """The exit status."""
    parser = argparse.ArgumentParser(description="Instructions and system calls that a request costs.")
    parser.add_argument("--store", action="store_true", help=f"write {TABLE.name} anew: the costs that now count")
    parser.add_argument("--hot", action="store_true", help="show the functions that most instructions are in")
    parser.add_argument("--paths", default="*", metavar="PATTERN", help=f"which of: {'; '.join(PATHS)}")
    options = parser.parse_args()
    for tool in ("valgrind", "strace"):
        if shutil.which(tool) is None:
            print(f"bench-check: install {tool} first", file=sys.stderr)
            return 1
    stored = msgspec.json.decode(TABLE.read_bytes(), type=Table) if TABLE.exists() else Table({}, {})
    here = made_with()
    differs = [key for key in here if stored.costs and stored.made_with.get(key) != here[key]]
    if differs:
        print(f"The stored table was made with another {', '.join(differs)}: small differences may come from that.\n")
    print("| path | stored | now | change | io_uring_enter + other calls | |\n|---|---|---|---|---|---|")
    costs, grown, hot = dict(stored.costs), [], {}
    with tempfile.TemporaryDirectory(prefix="blksnap-bench-") as temporary:
        for name, each in wanted(options.paths).items():
            costs[name] = cost(each, Path(temporary))
            line, more = row(name, stored.costs.get(name), costs[name])
            print(line, flush=True)
            grown += [name] * more
            if options.hot:
                hot[name] = hottest(each, Path(temporary))
    for name, lines in hot.items():
        print(f"\n{name}: share, instructions of a request, function\n", *lines, sep="\n    ")
    if options.store:
        TABLE.write_bytes(msgspec.json.format(msgspec.json.encode(Table(here, costs)), indent=1) + b"\n")
    elif grown:
        print(f"\nGrown by more than {GROWN - 1:.0%}, or {MORE_CALLS} calls: {'; '.join(grown)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
