# SPDX-License-Identifier: MIT
"""Which process is meant: its number and when it started, because numbers are used again."""

import msgspec


class Identity(msgspec.Struct, frozen=True):
    """A process; `started` in clock ticks since boot, field 22 of /proc/PID/stat."""

    pid: int
    started: int

    @classmethod
    def of(cls, pid: int | str = "self") -> "Identity":
        """Process `pid` as it is now. Raises ProcessLookupError."""
        number, _, started = _stat(pid)
        return cls(number, started)

    @property
    def alive(self) -> bool:
        """Whether it runs; one that has ended and waits for its parent to ask does not."""
        try:
            _, state, started = _stat(self.pid)
        except ProcessLookupError:
            return False
        return started == self.started and state not in ("Z", "X")

    @property
    def stopped(self) -> bool:
        """Whether a debugger or a signal holds it."""
        try:
            return _stat(self.pid)[1] in ("T", "t")
        except ProcessLookupError:
            return False


def _stat(pid: int | str) -> tuple[int, str, int]:
    """Number, state and start."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            text = file.read()
    except (FileNotFoundError, ProcessLookupError):
        raise ProcessLookupError(f"there is no process {pid}") from None
    # The name of the program, in parentheses, may hold anything.
    number, _, rest = text.partition(" (")
    fields = rest.rpartition(") ")[2].split()
    return int(number), fields[0], int(fields[19])
