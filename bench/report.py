# SPDX-License-Identifier: MIT
"""Results as ratios with their spread, in JSON and in Markdown."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
from dataclasses import asdict, dataclass, field
from pathlib import Path

from bench.measure import Speed
from bench.preserved import Cost
from blksnap_ublk.version import installed_version

PAIRS = [
    ("loop", "raw"),
    ("idle", "raw"),
    ("idle", "loop"),
    ("first", "idle"),
    ("later", "idle"),
    ("image", "idle"),
    ("image-stored", "idle"),
]
"""Which contender is compared with which."""


@dataclass(frozen=True)
class Ratio:
    """Requests per second of one contender in units of another's: the median over all turns, the least, the most."""

    median: float
    least: float
    most: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.least:.2f}–{self.most:.2f})"


def ratio(one: list[Speed], other: list[Speed]) -> Ratio:
    """Each turn is one pair."""
    pairs = [a.iops / b.iops for a, b in zip(one, other, strict=True)]
    return Ratio(statistics.median(pairs), min(pairs), max(pairs))


@dataclass
class Results:
    """`runs`: for each disk and cell the speeds of each contender, turn by turn."""

    settings: dict[str, object]
    machine: dict[str, object] = field(default_factory=lambda: machine())
    runs: dict[str, dict[str, dict[str, list[Speed]]]] = field(default_factory=dict)
    cost: Cost | None = None

    def ratios(self) -> dict[str, dict[str, dict[str, Ratio]]]:
        """For each disk and cell, by `one/other`."""
        return {
            disk: {
                cell: {
                    f"{one}/{other}": ratio(speeds[one], speeds[other])
                    for one, other in PAIRS
                    if one in speeds and other in speeds
                }
                for cell, speeds in cells.items()
            }
            for disk, cells in self.runs.items()
        }

    def to_json(self) -> str:
        """Everything, single runs included."""
        document = asdict(self) | {
            "ratios": {
                disk: {cell: {pair: asdict(found) for pair, found in pairs.items()} for cell, pairs in cells.items()}
                for disk, cells in self.ratios().items()
            }
        }
        return json.dumps(document, indent=1)

    def to_markdown(self) -> str:
        """Tables for people."""
        lines = [
            "# Speeds",
            "",
            f"{', '.join(f'{key} {value}' for key, value in self.machine.items())};"
            f" {', '.join(f'{key} {value}' for key, value in self.settings.items())}.",
            "",
            "Requests per second as ratios of runs in turn: median (least–most). `loop`: our plain loop target; `idle`:"
            " filter without a snapshot; `first`, `later`: first and later overwrites under a snapshot; `image`: image"
            " of which nothing is overwritten; `image-stored`: everything is.",
        ]
        for disk, cells in self.ratios().items():
            pairs = [pair for pair in (f"{a}/{b}" for a, b in PAIRS) if any(pair in found for found in cells.values())]
            lines += ["", f"## {disk}", "", f"| cell | raw, requests/s | {' | '.join(pairs)} |"]
            lines.append("|---" * (2 + len(pairs)) + "|")
            for cell, found in cells.items():
                raw = statistics.median(speed.iops for speed in self.runs[disk][cell]["raw"])
                shown = (str(found[pair]) if pair in found else "" for pair in pairs)
                lines.append(f"| {cell} | {raw:.0f} | {' | '.join(shown)} |")
            lines += self._times(disk)
        if self.cost is not None:
            lines += self._bytes(self.cost)
        return "\n".join(lines) + "\n"

    def _times(self, disk: str) -> list[str]:
        cells = {cell: speeds for cell, speeds in self.runs[disk].items() if cell.endswith("qd1")}
        lines = ["", "Completion times at depth 1 in µs, p50 / p99, medians of all turns:", ""]
        names = list(dict.fromkeys(name for speeds in cells.values() for name in speeds))
        lines += [f"| cell | {' | '.join(names)} |", "|---" * (1 + len(names)) + "|"]
        for cell, speeds in cells.items():
            shown = []
            for name in names:
                found = speeds.get(name, [])
                p50 = statistics.median(speed.p50_us for speed in found) if found else None
                p99 = statistics.median(speed.p99_us for speed in found) if found else None
                shown.append("" if p50 is None else f"{p50:.0f} / {p99:.0f}")
            lines.append(f"| {cell} | {' | '.join(shown)} |")
        return lines

    def _bytes(self, cost: Cost) -> list[str]:
        ideal = cost.writes * 4096
        shown = {name: value / ideal for name, value in asdict(cost).items() if name != "writes"}
        return [
            "",
            "## Bytes",
            "",
            f"For {cost.writes} random first overwrites of 4 KiB, in units of what they wrote ({ideal} bytes):",
            "",
            f"| {' | '.join(name.replace('_', ' ') for name in shown)} |",
            "|---" * len(shown) + "|",
            f"| {' | '.join(f'{value:.4f}' for value in shown.values())} |",
        ]


def machine() -> dict[str, object]:
    """What the figures were measured on."""
    fio = subprocess.run(["fio", "--version"], capture_output=True, text=True, check=True).stdout.strip()
    return {
        "blksnap-ublk": installed_version(),
        "kernel": platform.release(),
        "guest": os.environ.get("BLKSNAP_GUEST") or "none",
        "machine": platform.machine(),
        "cpu": _cpu(),
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
        "fio": fio.removeprefix("fio-"),
    }


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")
