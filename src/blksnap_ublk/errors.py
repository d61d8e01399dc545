# SPDX-License-Identifier: MIT
"""The errors a user meets: one class for each exit code of the command line.

The same classes travel over varlink: each has an error name of the interface `io.blksnap.Ublk`, with the whole line of
text in its parameter `message`. So a client raises what the daemon raised.
"""

import errno as errno_names
from typing import ClassVar

ERROR_PREFIX = "io.blksnap.Ublk."


def one_line(text: str) -> str:
    """`text` with every run of white space, line ends included, as one space, and bytes that are no UTF-8 escaped."""
    return " ".join(text.encode("utf-8", "backslashreplace").decode().split())


def errno_symbol(number: int | None) -> str | None:
    """`"EBUSY"` for 16; None for None and for a number that has no name."""
    return None if number is None else errno_names.errorcode.get(number)


class BlksnapError(Exception):
    """An error with a one-line text that says what is wrong and, where possible, what to do.

    `BlksnapError("in use by mount /data", subject="/dev/sdb", errno="EBUSY", advice="unmount it first")` reads
    `/dev/sdb: in use by mount /data (EBUSY); unmount it first`. `message` is that whole line.
    """

    exit_code: ClassVar[int] = 1
    error_name: ClassVar[str] = ERROR_PREFIX + "Failed"

    def __init__(
        self, message: str, *, subject: str | None = None, errno: str | None = None, advice: str | None = None
    ) -> None:
        line = message if subject is None else f"{subject}: {message}"
        if errno is not None:
            line += f" ({errno})"
        if advice is not None:
            line += f"; {advice}"
        self.message = one_line(line)
        super().__init__(self.message)


class Failed(BlksnapError):
    """It was tried and did not work (exit code 1)."""


class UsageError(BlksnapError):
    """The call itself is wrong: a value that cannot be read, options that exclude one another (exit code 2)."""

    exit_code = 2
    error_name = ERROR_PREFIX + "UsageError"


class NotFound(BlksnapError):
    """No such device or snapshot (exit code 3)."""

    exit_code = 3
    error_name = ERROR_PREFIX + "NotFound"


class Busy(BlksnapError):
    """Somebody holds what is needed; the message names the holder (exit code 4)."""

    exit_code = 4
    error_name = ERROR_PREFIX + "Busy"


class Unsupported(BlksnapError):
    """This system, or this version, cannot do it; the message says what to do (exit code 5)."""

    exit_code = 5
    error_name = ERROR_PREFIX + "Unsupported"


class Untrusted(BlksnapError):
    """Data was to be delivered that cannot be trusted (exit code 6)."""

    exit_code = 6
    error_name = ERROR_PREFIX + "Untrusted"


ERROR_CLASSES: tuple[type[BlksnapError], ...] = (Failed, UsageError, NotFound, Busy, Unsupported, Untrusted)

_BUSY = {errno_names.EBUSY, errno_names.ETXTBSY, errno_names.EWOULDBLOCK}
_UNSUPPORTED = {errno_names.EOPNOTSUPP, errno_names.ENOSYS, errno_names.ENOTTY}


def from_os_error(error: OSError, *, subject: str | None = None, advice: str | None = None) -> BlksnapError:
    """The error of ours that stands for a failed system call: Busy, Unsupported or Failed, by its errno.

    A missing file is Failed: NotFound means a missing device or snapshot, which only the caller can tell.
    `subject` is the error's own file name where none is given.
    """
    kind: type[BlksnapError] = Failed
    if error.errno in _BUSY:
        kind = Busy
    elif error.errno in _UNSUPPORTED:
        kind = Unsupported
    if subject is None and isinstance(error.filename, str):
        subject = error.filename
    text = error.strerror or str(error) or type(error).__name__
    return kind(text, subject=subject, errno=errno_symbol(error.errno), advice=advice)


def with_exit_code(message: str, exit_code: int) -> BlksnapError:
    """The error whose class has `exit_code`; Failed where none has."""
    kind = next((kind for kind in ERROR_CLASSES if kind.exit_code == exit_code), Failed)
    return kind(message)
