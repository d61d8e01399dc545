# SPDX-License-Identifier: MIT
"""The keeper process itself: start, life and end of the daemon."""

import errno
import logging
import os
import signal
import socket
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from blksnap_ublk.keeper import log as keeper_log
from blksnap_ublk.keeper import memory
from blksnap_ublk.keeper.child import EXIT_DEVICES_LEFT, EXIT_NOTHING_LEFT, READY
from blksnap_ublk.keeper.children import Child, ChildEvents
from blksnap_ublk.keeper.holdings import Holdings
from blksnap_ublk.keeper.messages import MESSAGE_LIMIT, Done, Drop, Get, List, Message, Put, Refused, Stop
from blksnap_ublk.keeper.ring_locks import RingLocks
from blksnap_ublk.keeper.runtime import AlreadyRunning, RuntimeLock, RuntimePaths
from blksnap_ublk.keeper.state_mount import StateMount
from blksnap_ublk.rpc.channel import listen
from blksnap_ublk.rpc.descriptors import Descriptors
from blksnap_ublk.rpc.loop import Loop
from blksnap_ublk.rpc.server import Reply, Server

log = logging.getLogger(__name__)

EXIT_FAILED = 1
EXIT_BUSY = 4

LOG_CHECK = 30.0
IO_END = 5.0
CONTROL_END = 60.0

_NAME_LIMIT = 255


@dataclass(frozen=True)
class KeeperConfig:
    """How to run the keeper. `state_size`: bytes of the tmpfs, None for the default. `mount_state` False uses a plain
    directory, in the mount namespace as it is. `log_to_file`: stderr is the runtime directory's log file."""

    paths: RuntimePaths
    io_command: Sequence[str]
    control_command: Sequence[str]
    state_size: int | None = None
    mount_state: bool = True
    log_to_file: bool = False


class Keeper:
    """Runs the daemon until it is told to end.

    `tell(code, text)` is called exactly once: with (0, "ready") when control serves, or with an exit code and the one
    line that says why the start failed.
    """

    def __init__(self, config: KeeperConfig, tell: Callable[[int, str], None]) -> None:
        self._config = config
        self._tell = tell
        self._told = False
        self._paths = config.paths
        self._holdings = Holdings()
        self._loop = Loop()
        self._children: list[Child] = []
        self._mount: StateMount | None = None
        self._stopping = False
        self._served = False
        self._start_failed = 0
        self._control_status: int | None = None
        self._ended: set[str] = set()

    def run(self) -> int:
        """The exit status of the process: 0 after an end that was asked for."""
        try:
            with ExitStack() as stack:
                self._prepare(stack)
                self._loop.later(0, self._io.start)
                self._loop.run()
        except AlreadyRunning as error:
            self._say(EXIT_BUSY, str(error))
        except OSError as error:
            log.exception("the daemon cannot be started")
            self._say(EXIT_FAILED, f"the daemon cannot be started: {error}")
        self._say(EXIT_FAILED, "the daemon was ended before it served")
        return self._start_failed

    def _prepare(self, stack: ExitStack) -> None:
        stack.callback(self._loop.close)
        for number in (signal.SIGTERM, signal.SIGINT):
            self._loop.on_signal(number, self._on_stop_signal)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        paths = self._paths
        paths.create()
        self._lock = RuntimeLock(paths.lock)
        stack.callback(self._release_lock)
        self._lock.name("keeper", os.getpid())
        stack.callback(self._holdings.close)
        if self._config.mount_state:
            self._mount = StateMount(paths.state, self._config.state_size)
        else:
            paths.state.mkdir(mode=0o700, exist_ok=True)
        stack.callback(self._leave_state)
        memory.protect_from_oom()
        memory.raise_limits()
        listener, message = listen(paths.keeper_socket), cast("type[Message]", Message)
        server = Server(self._loop, listener, message, self._handle, _refuse, MESSAGE_LIMIT)
        stack.callback(paths.keeper_socket.unlink, missing_ok=True)
        stack.callback(server.close)
        self._io = self._child(stack, "io", self._config.io_command, paths.io_socket, socket.SOCK_SEQPACKET)
        self._control = self._child(
            stack, "control", self._config.control_command, paths.varlink_socket, socket.SOCK_STREAM
        )
        if self._config.log_to_file:
            self._loop.later(LOG_CHECK, self._bound_log)
        memory.lock_memory()

    def _child(self, stack: ExitStack, role: str, command: Sequence[str], path: Path, kind: socket.SocketKind) -> Child:
        listener = listen(path, kind)
        stack.callback(listener.close)
        stack.callback(path.unlink, missing_ok=True)
        child = Child(
            self._loop,
            role,
            command,
            runtime=self._paths.root,
            listener=listener,
            lock=self._lock.descriptor,
            events=ChildEvents(
                started=lambda pid: self._lock.name(role, pid),
                ready=self._on_io_ready if role == "io" else self._on_control_ready,
                failed=self._on_failed,
                ended=lambda status: self._on_ended(role, status),
            ),
            ring_lock=RingLocks(self._paths.state).create if role == "io" else None,
        )
        self._children.append(child)
        return child

    # ---- start ----

    def _on_io_ready(self) -> None:
        if not self._stopping:
            self._control.start()

    def _on_control_ready(self) -> None:
        self._served = True
        self._say(0, READY)

    def _on_failed(self, code: int, text: str) -> None:
        log.error("the daemon cannot be started: %s", text)
        self._say(code or EXIT_FAILED, text)
        self._stop()

    def _say(self, code: int, text: str) -> None:
        if not self._told:
            self._told = True
            self._start_failed = code
            self._tell(code, text)

    # ---- messages ----

    def _handle(self, message: Message, descriptors: Descriptors) -> Reply:
        match message:
            case Put(name):
                if len(descriptors) != 1 or not 0 < len(name) <= _NAME_LIMIT:
                    raise OSError(errno.EINVAL, f"put needs a name of 1 to {_NAME_LIMIT} characters and one descriptor")
                self._holdings.put(name, descriptors.take(0))
            case Get(name):
                return Reply(Done(), [self._holdings.get(name)])
            case Drop(name):
                self._holdings.drop(name)
            case List():
                return Reply(Done(self._holdings.names()))
            case Stop():
                self._loop.later(0, self._stop)
        return Reply(Done())

    # ---- end ----

    def _on_stop_signal(self) -> None:
        if self._stopping:
            log.warning("told twice to end: leaving at once; devices are kept for recovery")
            self._control.kill()
            self._io.kill()
            self._loop.stop()
        else:
            self._stop()

    def _stop(self) -> None:
        if self._stopping:
            return
        self._stopping = True
        log.info("ending")
        # Control tells io when it may end.
        self._io.expect_end()
        self._control.stop()
        self._loop.later(CONTROL_END, self._still_waiting)

    def _on_ended(self, role: str, status: int | None) -> None:
        self._ended.add(role)
        if role == "control":
            self._control_status = status
            # A control process that ended in good order has told io to end.
            in_order = status in (EXIT_NOTHING_LEFT, EXIT_DEVICES_LEFT)
            self._loop.later(IO_END if in_order else 0, self._io.kill)
        if self._ended >= {"io", "control"}:
            self._loop.stop()

    def _still_waiting(self) -> None:
        if "control" not in self._ended:
            log.warning("the control process still works on its end; a second SIGTERM leaves at once")
            self._loop.later(CONTROL_END, self._still_waiting)

    def _leave_state(self) -> None:
        never_used = not self._served and not (self._mount and self._mount.found)
        if self._control_status != EXIT_NOTHING_LEFT and not never_used:
            log.warning("devices may be left for recovery: their state stays in %s", self._paths.state)
            if self._mount:
                self._mount.close()
            return
        try:
            self._holdings.close()
            RingLocks(self._paths.state).remove_free()
            with suppress(FileNotFoundError):
                self._paths.roles.rmdir()
            if self._mount:
                self._mount.remove()
            else:
                self._paths.state.rmdir()
        except OSError as error:
            log.warning("state files are left over: %s", error)

    def _release_lock(self) -> None:
        self._lock.release(remove=not any(child.running for child in self._children))

    def _bound_log(self) -> None:
        self._loop.later(LOG_CHECK, self._bound_log)
        keeper_log.bound_log(self._paths.log)


def _refuse(error: OSError) -> Refused:
    return Refused(error.errno or errno.EIO, error.strerror or str(error))
