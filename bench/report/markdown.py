# SPDX-License-Identifier: MIT
"""A result as tables for people."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence

from bench.document import CellRuns, Document, Times
from bench.report.aims import ANOTHER_ONE, MANY, ONE, verdicts
from bench.report.ratios import PAIRS, base_of, median_iops, ratio, ratios, times


def to_markdown(document: Document) -> str:
    """Everything but single runs."""
    parts = [_head(document), _aims(document), _speeds(document), _latencies(document), _held(document.held)]
    parts += [_gates(document), _pauses(document), _bytes(document), _left_out(document)]
    return "\n\n".join("\n".join(part) for part in parts if part) + "\n"


def _head(document: Document) -> list[str]:
    said = [f"{key} {value}" for key, value in {**document.machine, **document.settings}.items()]
    lines = [
        f"# Speeds, {document.form} form",
        "",
        f"{document.started}; {'; '.join(said)}.",
        "",
        "Ratios of requests per second in runs next to one another: median over all turns (quartiles).",
    ]
    if document.disturbed:
        lines += [
            "",
            f"The machine had other things to do (load {document.load:.1f}): **do not quote these figures**.",
        ]
    if not document.complete:
        lines += ["", "It ended early: not everything was measured."]
    if document.emulated:
        lines += ["", "In this guest a request costs much more than elsewhere: absolute figures are left out."]
    return lines


def _aims(document: Document) -> list[str]:
    rows = [[each.aim, each.where, each.wanted, each.measured, each.outcome.value] for each in verdicts(document)]
    return ["## Aims", "", *_table(["what", "where", "aim", "measured", ""], rows)] if rows else []


def _speeds(document: Document) -> list[str]:
    lines: list[str] = []
    for group, disk, way in dict.fromkeys((cell.group, cell.disk, cell.way) for cell in document.speeds):
        cells = [cell for cell in document.speeds if (cell.group, cell.disk, cell.way) == (group, disk, way)]
        found = [ratios(cell) for cell in cells]
        pairs = [pair for pair in (f"{a}/{b}" for a, b in PAIRS[group]) if any(pair in each for each in found)]
        rows = []
        for cell, each in zip(cells, found, strict=True):
            row = [cell.cell, *(str(each.get(pair, "")) for pair in pairs)]
            if not document.emulated:
                base = base_of(cell)
                row.insert(1, f"{median_iops(cell.runs[base]):.0f} ({base})" if base else "")
            rows.append(row)
        head = ["cell", *([] if document.emulated else ["requests/s"]), *pairs]
        lines += [*([""] if lines else []), f"## {_titled(group)}: {disk}, data way {way}", "", *_table(head, rows)]
    return lines


def _latencies(document: Document) -> list[str]:
    lines: list[str] = []
    for group, disk, way in dict.fromkeys((cell.group, cell.disk, cell.way) for cell in document.speeds):
        cells = [
            cell
            for cell in document.speeds
            if (cell.group, cell.disk, cell.way) == (group, disk, way) and cell.cell.endswith("qd1")
        ]
        names = list(dict.fromkeys(name for cell in cells for name in cell.runs))
        rows = []
        for cell in cells:
            base = base_of(cell)
            if base is None:
                continue
            unit = times(cell, base)[0] if document.emulated else 1.0
            row = [f"{cell.cell}" + (f", in p50 of {base}" if document.emulated else ", µs")]
            for name in names:
                shown = [f"{time / unit:.3g}" for time in times(cell, name)] if name in cell.runs else []
                row.append(" / ".join(shown))
            rows.append(row)
        if rows:
            lines += [f"{_titled(group)}: {disk}, data way {way}", "", *_table(["cell", *names], rows), ""]
    return ["## Completion times at depth 1: p50 / p99", "", *lines[:-1]] if lines else []


def _held(held: Sequence[CellRuns]) -> list[str]:
    if not held:
        return []
    others = [name for name in held[0].runs if name != ONE]
    rows = [
        [cell.disk, f"{cell.group} {cell.cell}", *(str(ratio(cell.runs[name], cell.runs[ONE])) for name in others)]
        for cell in held
    ]
    text = f"`{ANOTHER_ONE}` differs from `{ONE}` by chance alone: a smaller difference of `{MANY}` means nothing."
    head = ["disk", "overwrites", *(f"{name} / {ONE}" for name in others)]
    return ["## Snapshots held", "", *_table(head, rows), "", text]


def _gates(document: Document) -> list[str]:
    if not document.gates:
        return []
    rows = []
    for gate in document.gates:
        held = [f"{statistics.median(values):.0f} / {max(values)}" for values in (gate.gates, gate.beyond)]
        rows.append([gate.setting, gate.load, str(len(gate.gates)), *held, _times(gate.between), _times(gate.during)])
    head = ["disks", "load", "takes", "gate", "beyond writes in flight", "writes between takes", "writes during takes"]
    text = "In µs. Gates: median / longest; completion times of writes: p50 / p99 / longest."
    return ["## Taking a snapshot", "", text, "", *_table(head, rows)]


def _times(times: Times | None) -> str:
    return "–" if times is None else f"{times.p50:.0f} / {times.p99:.0f} / {times.longest:.0f}"


def _pauses(document: Document) -> list[str]:
    rows = [
        [each.setting, str(len(each.seconds)), f"{statistics.median(each.seconds):.2f}", f"{max(each.seconds):.2f}"]
        for each in document.pauses
    ]
    text = "Seconds from kill -9 of the io process under load to the end of the first read after it."
    return ["## Pauses", "", text, "", *_table(["", "deaths", "median", "longest"], rows)] if rows else []


def _bytes(document: Document) -> list[str]:
    cost = document.cost
    if cost is None:
        return []
    ideal = cost.writes * 4096
    columns = {
        "origin read": cost.origin_read,
        "origin written": cost.origin_written,
        "storage read": cost.storage_read,
        "storage written": cost.storage_written,
        "used": cost.used,
    }
    text = f"For {cost.writes} random first overwrites of 4 KiB, in units of what they wrote ({ideal} bytes):"
    return ["## Bytes", "", text, "", *_table(list(columns), [[f"{value / ideal:.4f}" for value in columns.values()]])]


def _left_out(document: Document) -> list[str]:
    rows = [[each.what, each.reason.replace("\n", " ").replace("|", "¦")] for each in document.left_out]
    return ["## Left out", "", *_table(["what", "why"], rows)] if rows else []


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    return lines + [f"| {' | '.join(row)} |" for row in rows]


def _titled(group: str) -> str:
    return group[0].upper() + group[1:]
