# SPDX-License-Identifier: MIT
"""`blksnap-ublkd`: start the daemon.

In the foreground this process becomes the keeper. Otherwise the keeper runs in the background and logs to the runtime
directory's `log`, and this process ends as soon as the daemon serves, or with its last words.
"""

import argparse
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from blksnap_ublk.keeper.keeper import Keeper, KeeperConfig
from blksnap_ublk.keeper.log import start_log
from blksnap_ublk.keeper.runtime import RuntimePaths
from blksnap_ublk.keeper.state_mount import enter_host

DEFAULT_HOOKS = Path("/etc/blksnap-ublk/hooks")
DEFAULT_SAVED = "/var/lib/blksnap-ublk"
SAVED_VARIABLE = "BLKSNAP_UBLK_STATE"
CONTROL_NODE = Path("/dev/ublk-control")
MODPROBE = ("/usr/sbin/modprobe", "/sbin/modprobe")
NODE_WAIT = 2.0

LIFEBOAT_AFTER = 3
LIFEBOAT_VARIABLE = "BLKSNAP_UBLK_LIFEBOAT_AFTER"

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
        _enter(options.host_namespace)
        _check_system()
        paths = RuntimePaths.from_environment()
        try:
            if not options.successor:
                paths.create()
        except OSError as error:
            raise CannotStart(EXIT_FAILED, f"{error.filename}: {error.strerror}") from error
    except CannotStart as error:
        return _report(options.ready_fd, error.code, str(error))
    config = KeeperConfig(
        paths=paths,
        io_command=_python("blksnap_ublk.ioproc.main"),
        control_command=[
            *_python("blksnap_ublk.daemon.control"),
            *("--hooks", str(options.hooks)),
            *("--saved", os.path.abspath(os.environ.get(SAVED_VARIABLE) or DEFAULT_SAVED)),
        ],
        state_size=options.state_size,
        # A keeper that the service manager has started logs where that has told it to.
        log_to_file=not options.foreground and "NOTIFY_SOCKET" not in os.environ,
        successor=_successor(options),
        succeeds=options.successor,
        lifeboat_after=options.lifeboat_after,
        takeover=options.takeover,
    )
    if options.foreground:
        if options.ready_fd is not None:
            os.set_inheritable(options.ready_fd, False)
        start_log("keeper")
        keeper = Keeper(config, lambda code, text: _said(options.ready_fd, code, text, keeper.pause))
        return keeper.run()
    return _in_background(config, options.ready_fd)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="blksnap-ublkd",
        description="The daemon of blksnap-ublk. It goes to the background and ends this command when it serves.",
        epilog="The runtime directory is /run/blksnap-ublk, or what BLKSNAP_UBLK_RUN names; change maps of what is "
        "not attached are in /var/lib/blksnap-ublk, or what BLKSNAP_UBLK_STATE names. "
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
        "--takeover",
        action="store_true",
        help='replace the daemon that runs, while it is in use; prints {"pause_ms": N}, how long what it serves waited',
    )
    parser.add_argument(
        "--lifeboat-after",
        type=_count,
        default=_count(os.environ.get(LIFEBOAT_VARIABLE) or str(LIFEBOAT_AFTER)),
        metavar="N",
        help="after N deaths of the io process within a minute the next one gives up all snapshots and only passes "
        f"requests through; 0: never; default: {LIFEBOAT_AFTER}, or what {LIFEBOAT_VARIABLE} says",
    )
    parser.add_argument("--host-namespace", type=int, help=argparse.SUPPRESS)
    parser.add_argument(
        "--hooks",
        type=_absolute,
        default=DEFAULT_HOOKS,
        metavar="DIR",
        help=f"run the programs in DIR/before.d and DIR/after.d around each snapshot; default: {DEFAULT_HOOKS}",
    )
    parser.add_argument("--successor", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    # A directory that has gone meanwhile is no reason to be without a keeper.
    if options.hooks != DEFAULT_HOOKS and not options.successor and not options.hooks.is_dir():
        parser.error(f"argument --hooks: {str(options.hooks)!r} is not a directory")
    return options


def _successor(options: argparse.Namespace) -> list[str]:
    """The command of a keeper that adopts what this one starts."""
    command = [*_python("blksnap_ublk.daemon.main"), "--successor", "--hooks", str(options.hooks)]
    command += ["--lifeboat-after", str(options.lifeboat_after)]
    if options.state_size is not None:
        command += ["--state-size", str(options.state_size)]
    return command


def _enter(namespace: int | None) -> None:
    """Go to the host's mount namespace, which a process of the daemon has handed over."""
    if namespace is not None:
        try:
            enter_host(namespace)
        except OSError as error:
            raise CannotStart(EXIT_FAILED, f"{error.filename}: {error.strerror}") from error


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a number")
    return int(text)


def _absolute(text: str) -> Path:
    return Path(text).absolute()


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
        code, _, text = pipe.readline().strip().partition(" ")
        pause = pipe.readline().strip()
    if not code.isdecimal():
        code, text = str(EXIT_FAILED), f"the daemon died at its start; see {config.paths.log}"
    return _report(ready_fd, int(code), text, float(pause) if pause else None)


def _become_keeper(config: KeeperConfig, say: int) -> int:
    os.chdir("/")
    os.umask(0o077)
    nothing = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    for number in (0, 1, 2) if config.log_to_file else (0, 1):
        os.dup2(nothing, number)
    os.close(nothing)
    start_log("keeper")

    def tell(code: int, text: str) -> None:
        pause = "" if keeper.pause is None else str(keeper.pause)
        with suppress(BrokenPipeError):
            os.write(say, f"{code} {text}\n{pause}\n".encode())
        os.close(say)

    keeper = Keeper(config, tell)
    return keeper.run()


def _report(ready_fd: int | None, code: int, text: str, pause: float | None = None) -> int:
    """Pass the outcome of the start on; the exit status."""
    _said(ready_fd, code, text, pause)
    return code


def _said(ready_fd: int | None, code: int, text: str, pause: float | None = None) -> None:
    if code:
        print(f"blksnap-ublkd: {text}", file=sys.stderr)
    elif pause is not None:
        print(json.dumps({"pause_ms": round(pause * 1000)}), flush=True)
    if ready_fd is not None:
        with suppress(BrokenPipeError):
            os.write(ready_fd, text.encode() + b"\n")
        os.close(ready_fd)


if __name__ == "__main__":
    sys.exit(main())
