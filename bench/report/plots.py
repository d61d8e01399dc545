# SPDX-License-Identifier: MIT
"""A result as plots; needs matplotlib, and no display."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bench.document import CellRuns, Document
from bench.report.ratios import base_of, ratio, times

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 12.0
"""Inches."""


def missing_for_plots() -> str | None:
    """Why there can be no plots, or None."""
    try:
        import matplotlib
    except ImportError:
        return "no matplotlib: scripts/setup bench installs it"
    matplotlib.use("Agg")
    return None


def plot_all(document: Document, stem: Path) -> list[Path]:
    """Writes STEM-….png, one for each group of cells and data way; returns their paths."""
    written = []
    for group, way in dict.fromkeys((cell.group, cell.way) for cell in document.speeds):
        cells = [cell for cell in document.speeds if (cell.group, cell.way) == (group, way)]
        written.append(_plot_speeds(cells, f"{group}, data way {way}", _path(stem, group, way)))
    at_depth_1 = [cell for cell in document.speeds if cell.cell.endswith("qd1")]
    if at_depth_1:
        written.append(_plot_times(at_depth_1, _path(stem, "completion-times")))
    if document.held:
        written.append(_plot_speeds(document.held, "snapshots held", _path(stem, "held")))
    if document.gates:
        written.append(_plot_gates(document, _path(stem, "gates")))
    return written


def _path(stem: Path, *words: str) -> Path:
    return stem.with_name("-".join([stem.name, *words]).replace(" ", "-") + ".png")


def _plot_speeds(cells: Sequence[CellRuns], title: str, path: Path) -> Path:
    figure, axes = _rows(len(cells))
    for axis, cell in zip(axes, cells, strict=True):
        base = base_of(cell) or next(iter(cell.runs))
        found = [ratio(speeds, cell.runs[base]) for speeds in cell.runs.values()]
        middle = [each.median for each in found]
        errors = [[each.median - each.low for each in found], [each.high - each.median for each in found]]
        axis.bar(list(cell.runs), middle, yerr=errors, capsize=3, color=_colours(cell.runs))
        axis.axhline(1.0, color="black", linewidth=0.8, linestyle=":")
        axis.set_title(f"{cell.disk}: {cell.cell}", fontsize=9)
        axis.set_ylabel(f"requests/s, {base} = 1", fontsize=8)
        axis.tick_params(labelsize=8)
    return _save(figure, title, path)


def _plot_times(cells: Sequence[CellRuns], path: Path) -> Path:
    figure, axes = _rows(len(cells))
    for axis, cell in zip(axes, cells, strict=True):
        base = base_of(cell) or next(iter(cell.runs))
        unit = times(cell, base)[0]
        for index, name in enumerate(cell.runs):
            p50, p99 = times(cell, name)
            axis.bar(index - 0.2, p50 / unit, 0.4, color="tab:blue", label="p50" if index == 0 else None)
            axis.bar(index + 0.2, p99 / unit, 0.4, color="tab:orange", label="p99" if index == 0 else None)
        axis.set_xticks(range(len(cell.runs)), list(cell.runs))
        axis.set_yscale("log")
        axis.set_title(f"{cell.disk}, {cell.way}: {cell.cell}", fontsize=9)
        axis.set_ylabel(f"p50 of {base} = 1", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.legend(fontsize=8)
    return _save(figure, "completion times at depth 1", path)


def _plot_gates(document: Document, path: Path) -> Path:
    figure, (axis,) = _rows(1)
    names = [f"{gate.setting}\n{gate.load}" for gate in document.gates]
    found = [gate.beyond for gate in document.gates]
    middle = [statistics.median(each) for each in found]
    errors = [
        [value - min(each) for value, each in zip(middle, found, strict=True)],
        [max(each) - value for value, each in zip(middle, found, strict=True)],
    ]
    axis.bar(names, middle, yerr=errors, capsize=3)
    axis.axhline(1000, color="tab:red", linewidth=0.8, linestyle=":")
    axis.set_ylabel("µs beyond the last write in flight", fontsize=8)
    axis.tick_params(labelsize=7)
    return _save(figure, "gates", path)


def _rows(count: int) -> tuple[Figure, Sequence[Axes]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, 2.6 * count + 0.6), layout="constrained")
    return figure, [figure.add_subplot(count, 1, index + 1) for index in range(count)]


def _colours(names: Iterable[str]) -> list[str]:
    others = {"raw": "tab:gray", "loop": "tab:olive", "qemu": "tab:purple"}
    return [
        others.get(name) or ("tab:green" if name.startswith("dm-") else "tab:cyan" if "kublk" in name else "tab:blue")
        for name in names
    ]


def _save(figure: Figure, title: str, path: Path) -> Path:
    figure.suptitle(title)
    figure.savefig(path, dpi=100)
    return path
