# SPDX-License-Identifier: MIT
"""`blksnap-ublkd`: start the daemon.

In the foreground this process becomes the keeper. Otherwise the keeper runs in the background, with its stderr in the
runtime directory's `log`, and this process ends as soon as the daemon serves, or with its last words.
"""

import argparse
import logging
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from blksnap_ublk.keeper.keeper import Keeper, KeeperConfig
from blksnap_ublk.keeper.log import start_log, stderr_to_file
from blksnap_ublk.keeper.runtime import RuntimePaths

DEFAULT_HOOKS = Path("/etc/blksnap-ublk/hooks")
CONTROL_NODE = Path("/dev/ublk-control")
MODPROBE = ("/usr/sbin/modprobe", "/sbin/modprobe")
NODE_WAIT = 2.0

EXIT_FAILED = 1
EXIT_UNSUPPORTED = 5

UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


class CannotStart(Exception):
    """Why the daemon cannot be started, in one line; `code` as in the table of the command line."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self.code = code


def main(arguments: Sequence[str] | None = None) -> int:
    """Start the daemon; the exit status."""
    options = _options(arguments)
    try:
        _check_system()
        paths = RuntimePaths.from_environment()
        try:
            paths.create()
        except OSError as error:
            raise CannotStart(EXIT_FAILED, f"{error.filename}: {error.strerror}") from error
    except CannotStart as error:
        return _report(options.ready_fd, error.code, str(error))
    config = KeeperConfig(
        paths=paths,
        io_command=_python("blksnap_ublk.ioproc.main"),
        control_command=[*_python("blksnap_ublk.daemon.control"), "--hooks", str(options.hooks)],
        state_size=options.state_size,
        log_to_file=not options.foreground,
    )
    if options.foreground:
        if options.ready_fd is not None:
            os.set_inheritable(options.ready_fd, False)
        start_log("keeper")
        return Keeper(config, lambda code, text: _said(options.ready_fd, code, text)).run()
    return _in_background(config, options.ready_fd)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="blksnap-ublkd",
        description="The daemon of blksnap-ublk. It goes to the background and ends this command when it serves.",
        epilog="The runtime directory is /run/blksnap-ublk, or what BLKSNAP_UBLK_RUN names. "
        "Example: blksnap-ublkd --foreground",
    )
    parser.add_argument("--foreground", action="store_true", help="stay in the foreground and log to stderr")
    parser.add_argument(
        "--ready-fd", type=int, metavar="N", help='write "ready", or in one line why not, to this descriptor'
    )
    parser.add_argument(
        "--state-size", type=_size, metavar="SIZE", help="memory that state may take; default: a quarter, at most 16G"
    )
    parser.add_argument(
        "--hooks",
        type=_directory,
        default=DEFAULT_HOOKS,
        metavar="DIR",
        help=f"run the programs in DIR/before.d and DIR/after.d around each snapshot; default: {DEFAULT_HOOKS}",
    )
    return parser.parse_args(arguments)


def _directory(text: str) -> Path:
    path = Path(text).absolute()
    if not path.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is not a directory")
    return path


def _size(text: str) -> int:
    unit = text[-1:].upper() if text[-1:].isalpha() else ""
    number = text[: len(text) - len(unit)]
    if unit not in UNITS or not number.isdecimal() or int(number) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 512M or 4G")
    return int(number) * UNITS[unit]


def _check_system() -> None:
    if os.geteuid() != 0:
        raise CannotStart(EXIT_FAILED, "the daemon needs root; run it with sudo")
    if CONTROL_NODE.exists():
        return
    refusal = _load_module()
    deadline = time.monotonic() + NODE_WAIT
    while not CONTROL_NODE.exists():
        if refusal or time.monotonic() > deadline:
            reason = refusal or f"{CONTROL_NODE} does not appear"
            advice = "a kernel of 6.5 or later with CONFIG_BLK_DEV_UBLK and its module ublk_drv are needed"
            raise CannotStart(EXIT_UNSUPPORTED, f"this system has no ublk ({reason}); {advice}")
        time.sleep(0.02)


def _load_module() -> str | None:
    """Load ublk_drv; None, or in a few words why that failed."""
    modprobe = next((path for path in MODPROBE if os.access(path, os.X_OK)), None)
    if modprobe is None:
        return "modprobe is not installed"
    try:
        done = subprocess.run([modprobe, "ublk_drv"], capture_output=True, text=True, errors="replace", timeout=30)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"modprobe ublk_drv: {error}"
    if done.returncode == 0:
        return None
    lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
    return f"modprobe ublk_drv: {lines[-1]}"


def _python(module: str) -> list[str]:
    # -P: the directory that the daemon is started in is no place to import from.
    return [sys.executable, "-P", "-m", module]


def _in_background(config: KeeperConfig, ready_fd: int | None) -> int:
    hear, say = os.pipe2(os.O_CLOEXEC)
    child = os.fork()
    if child == 0:
        # Never into the caller's code again, whatever happens.
        status = EXIT_FAILED
        try:
            os.close(hear)
            if ready_fd is not None:
                os.close(ready_fd)
            os.setsid()
            if os.fork() != 0:
                os._exit(0)
            status = _become_keeper(config, say)
        except BaseException:
            logging.exception("the keeper failed")
        finally:
            os._exit(status)
    os.close(say)
    os.waitpid(child, 0)
    with open(hear, encoding="utf-8", errors="replace") as pipe:
        code, _, text = pipe.read().strip().partition(" ")
    if not code.isdecimal():
        code, text = str(EXIT_FAILED), f"the daemon died at its start; see {config.paths.log}"
    return _report(ready_fd, int(code), text)


def _become_keeper(config: KeeperConfig, say: int) -> int:
    os.chdir("/")
    os.umask(0o077)
    try:
        nothing = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        os.dup2(nothing, 0)
        os.dup2(nothing, 1)
        os.close(nothing)
        stderr_to_file(config.paths.log)
    except OSError as error:
        os.write(say, f"{EXIT_FAILED} {error}\n".encode())
        return EXIT_FAILED
    start_log("keeper")

    def tell(code: int, text: str) -> None:
        with suppress(BrokenPipeError):
            os.write(say, f"{code} {text}\n".encode())
        os.close(say)

    return Keeper(config, tell).run()


def _report(ready_fd: int | None, code: int, text: str) -> int:
    """Pass the outcome of the start on; the exit status."""
    _said(ready_fd, code, text)
    return code


def _said(ready_fd: int | None, code: int, text: str) -> None:
    if code:
        print(f"blksnap-ublkd: {text}", file=sys.stderr)
    if ready_fd is not None:
        with suppress(BrokenPipeError):
            os.write(ready_fd, text.encode() + b"\n")
        os.close(ready_fd)


if __name__ == "__main__":
    sys.exit(main())
