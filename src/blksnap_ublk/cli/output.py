# SPDX-License-Identifier: MIT
"""What is written where: results to stdout, everything else to stderr."""

import sys
from collections.abc import Sequence

from blksnap_ublk.cli.sizes import size_text
from blksnap_ublk.errors import one_line
from blksnap_ublk.forms import to_json


def say(line: str) -> None:
    """Write one line of the result to stdout, at once."""
    print(line, flush=True)


def say_json(form: object) -> None:
    """Write a form to stdout as one line of JSON, at once."""
    say(to_json(form))


def complain(text: str, command_path: str) -> None:
    """Write one line to stderr: `blksnap-ublk: attach: text` for the command path `blksnap-ublk attach`."""
    program, _, command = command_path.partition(" ")
    words = [program, command, one_line(text)] if command else [program, one_line(text)]
    print(": ".join(words), file=sys.stderr, flush=True)


def say_table(header: Sequence[str], rows: Sequence[Sequence[str | int]]) -> None:
    """Write a table to stdout. Columns whose cells are numbers are aligned to the right."""
    texts = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(header, *texts, strict=True)]
    right = [bool(rows) and all(isinstance(row[i], int) for row in rows) for i in range(len(header))]
    for line in [list(header), *texts]:
        cells = [
            cell.rjust(width) if to_right else cell.ljust(width)
            for cell, width, to_right in zip(line, widths, right, strict=True)
        ]
        print("  ".join(cells).rstrip())
    sys.stdout.flush()


def say_fields(fields: Sequence[tuple[str, str | int]]) -> None:
    """Write a table of two columns to stdout: what it is, and its value."""
    width = max(len(name) for name, _ in fields)
    for name, value in fields:
        print(f"{name.ljust(width)}  {value}")
    sys.stdout.flush()


def fill_text(used: int, capacity: int) -> str:
    """`1.5G of 4G (37 %)`."""
    percent = f" ({used * 100 // capacity} %)" if capacity else ""
    return f"{size_text(used)} of {size_text(capacity)}{percent}"
