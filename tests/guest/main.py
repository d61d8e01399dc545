# SPDX-License-Identifier: MIT
"""The command line of tests/guest/run."""

import argparse
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import FrameType

from tests.guest import qemu, uml
from tests.guest.failure import CannotStart, Failure
from tests.guest.job import Job

CHECKOUT = Path(__file__).resolve().parents[2]


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="tests/guest/run",
        usage="%(prog)s [OPTION]... -- COMMAND [ARGUMENT]...",
        description="Run a command as root in a guest whose kernel has ublk, and exit with the command's status; 124 "
        "after the time limit or a panic of the guest, 125 where a guest cannot be started, 69 where this machine's "
        "distribution has no such kernel.",
        epilog="GUEST=uml with BLKSNAP_UML_KERNEL=FILE in the environment starts User-Mode Linux in place of QEMU.",
    )
    parser.add_argument(
        "--kernel", default="copy", help="QEMU: copy, zero-copy or a release such as 6.12 (default: copy)"
    )
    parser.add_argument("--accel", choices=["auto", "kvm", "tcg"], default="auto", help="QEMU: how the CPU is provided")
    parser.add_argument("-m", dest="memory", default="3G", help="memory of the guest (default: 3G)")
    parser.add_argument("-c", dest="cpus", type=int, default=2, help="CPUs of the guest (default: 2)")
    parser.add_argument("-t", dest="seconds", type=float, default=600, help="time limit in seconds (default: 600)")
    parser.add_argument(
        "-a", dest="kernel_arguments", action="append", default=[], help="a kernel argument; repeatable"
    )
    parser.add_argument("command", nargs="+")
    return parser.parse_args(arguments)


def end(number: int, _frame: FrameType | None) -> None:
    """Turns a signal into an exception, so that the guest is ended and what it left is removed."""
    sys.exit(128 + number)


def main() -> int:
    options = parse(sys.argv[1:])
    os.environ["PATH"] += ":/usr/sbin:/sbin"
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, end)
    job = Job(
        checkout=CHECKOUT,
        command=options.command,
        memory=options.memory,
        cpus=options.cpus,
        seconds=options.seconds,
        kernel_arguments=options.kernel_arguments,
    )
    try:
        kind = os.environ.get("GUEST", "qemu")
        if kind == "uml":
            return uml.run(job)
        if kind == "qemu":
            return qemu.run(job, wanted=options.kernel, accel=options.accel)
        raise CannotStart(f"GUEST={kind} is neither qemu nor uml")
    except Failure as error:
        print(f"tests/guest/run: {error}", file=sys.stderr)
        return error.exit_status
    except (FileNotFoundError, subprocess.CalledProcessError) as error:
        print(f"tests/guest/run: {error}; make setup installs what is needed", file=sys.stderr)
        return CannotStart.exit_status
    except KeyboardInterrupt:
        return 130
