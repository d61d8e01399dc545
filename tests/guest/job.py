# SPDX-License-Identifier: MIT
"""What a guest is to run, and waiting for its end; the same for every kind of guest."""

import os
import selectors
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from tests.guest.failure import GuestDied

# Of the caller's environment a guest sees these, and what begins with these.
PASSED = ("CI", "HOME", "LANG", "PATH")
PASSED_PREFIXES = ("BLKSNAP_", "BSU_", "HYPOTHESIS_", "OPENBLAS_", "PYTEST_", "PYTHON")
CONSOLE_LINES = 60


@dataclass(frozen=True)
class Job:
    """One command for one guest: memory as "3G", seconds of time limit, further arguments for the guest's kernel."""

    checkout: Path
    command: list[str]
    memory: str
    cpus: int
    seconds: float
    kernel_arguments: list[str]

    def script(self, *, output: str, status: str, guest: str) -> str:
        """The script that tests/guest/init reads: OUTPUT and STATUS are where output and exit status go, LIMIT is the
        time limit in whole seconds."""
        passed = {
            name: value
            for name, value in sorted(os.environ.items())
            if name in PASSED or name.startswith(PASSED_PREFIXES)
        }
        # All a command needs of its start is in the checkout; elsewhere only what the guest's own packages have.
        passed |= {"TERM": "dumb", "DM_DISABLE_UDEV": "1", "BLKSNAP_GUEST": guest}
        exports = "".join(f"export {name}={shlex.quote(value)}\n" for name, value in passed.items())
        return (
            f"{exports}OUTPUT={shlex.quote(output)}\nSTATUS={shlex.quote(status)}\n"
            f"LIMIT={int(self.seconds)}\n"
            f"job() {{ cd {shlex.quote(str(self.checkout))} && {shlex.join(self.command)}; }}\n"
        )


def wait(process: subprocess.Popen[bytes], seconds: float, status: Path, console: Path) -> int:
    """Streams the guest's output (process.stdout) to ours until it ends; returns the command's exit status.

    GuestDied, with the last lines of the console, when the guest ends without a status or the time limit passes: the
    guest is killed then, as it is when an exception interrupts.
    """
    assert process.stdout is not None
    deadline = time.monotonic() + seconds
    try:
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            while True:
                left = deadline - time.monotonic()
                if left <= 0:
                    raise GuestDied(f"the time limit of {seconds:g} s has passed; {console_tail(console)}")
                if not selector.select(left):
                    continue
                data = os.read(process.stdout.fileno(), 65536)
                if not data:
                    break
                sys.stdout.buffer.write(data)
                sys.stdout.buffer.flush()
        process.wait(max(1.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        raise GuestDied(f"the guest did not power off; {console_tail(console)}") from None
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
    text = status.read_text().strip() if status.exists() else ""
    if not text.isdecimal():
        raise GuestDied(f"the guest ended before its command did; {console_tail(console)}")
    return int(text)


def console_tail(console: Path) -> str:
    lines = console.read_text(errors="replace").splitlines() if console.exists() else []
    return "\n".join([f"the last lines of its console ({console.name}):", *lines[-CONSOLE_LINES:]])
