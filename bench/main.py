# SPDX-License-Identifier: MIT
"""`make bench`: measures on a kernel with ublk, here or in a guest, and stores the result as JSON, Markdown and plots.

    python bench/main.py [--report RESULT.json] [OPTION OF run.py]...

Everything goes to bench/results/. With --report nothing is measured: what an earlier result says is told again.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import msgspec

from bench.build_kublk import build_kublk
from bench.document import Document, read, to_json
from bench.report.markdown import to_markdown
from bench.report.plots import missing_for_plots, plot_all
from bench.run import BEGIN, END
from bench.signals import exit_when_told

CHECKOUT = Path(__file__).resolve().parent.parent
RESULTS = CHECKOUT / "bench" / "results"
SHORT_LIMIT, FULL_LIMIT = 3600, 6 * 3600
NO_SUCH_KERNEL = 69


def main() -> int:
    """The exit status."""
    arguments = sys.argv[1:]
    if "--report" in arguments:
        return report(Path(arguments[arguments.index("--report") + 1]))
    problem = build_kublk()
    if problem:
        print(f"bench: {problem}; it is left out", file=sys.stderr)
    exit_when_told()
    measured = Measured(os.getloadavg()[1])
    try:
        status = measured.measure("zero-copy", arguments)
        if status == NO_SUCH_KERNEL:
            status = measured.measure("copy", arguments)
    finally:
        measured.store()
    if status != 0:
        print(f"bench: it ended early (exit status {status})", file=sys.stderr)
    return status


@dataclass
class Measured:
    """What was measured so far, as JSON; `load` of this machine before."""

    load: float
    text: str | None = None

    def measure(self, kernel: str, arguments: list[str]) -> int:
        """Runs run.py where there is ublk, and returns its exit status; `kernel` is the guest's, if one is needed."""
        limit = FULL_LIMIT if "--full" in arguments else SHORT_LIMIT
        command = [str(CHECKOUT / "scripts" / "with-ublk"), "--kernel", kernel, "-m", "6G", "-t", str(limit), "--"]
        command += [sys.executable, "bench/run.py", "--marked", *arguments]
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, cwd=CHECKOUT)
        try:
            assert process.stdout is not None
            self._read(process.stdout)
            return process.wait()
        finally:
            if process.poll() is None:
                process.terminate()
            process.wait()

    def _read(self, lines: Iterable[str]) -> None:
        """Keeps the last complete result, and prints what is none."""
        inside: list[str] | None = None
        for line in lines:
            if line.strip() == BEGIN:
                inside = []
            elif line.strip() == END and inside is not None:
                self.text, inside = "".join(inside), None
            elif inside is not None:
                inside.append(line)
            else:
                print(line, end="", flush=True)

    def store(self) -> None:
        """Stores and reports it."""
        if self.text is None:
            print("bench: nothing was measured", file=sys.stderr)
            return
        document = msgspec.json.decode(self.text, type=Document)
        document.load = self.load
        RESULTS.mkdir(exist_ok=True)
        result = RESULTS / f"{document.started}.json"
        result.write_bytes(to_json(document))
        report(result)


def report(result: Path) -> int:
    """Markdown and plots beside a result; the exit status."""
    document = read(result)
    markdown = result.with_suffix(".md")
    markdown.write_text(to_markdown(document))
    print(markdown.read_text())
    problem = missing_for_plots()
    plots = [] if problem else plot_all(document, result.with_suffix(""))
    if problem:
        print(f"bench: no plots: {problem}", file=sys.stderr)
    for path in (result, markdown, *plots):
        print(f"bench: {path.relative_to(CHECKOUT) if path.is_relative_to(CHECKOUT) else path}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
