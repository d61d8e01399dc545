# SPDX-License-Identifier: MIT
"""The keeper process itself: start, life and end of the daemon.

It starts the daemon; or it adopts what a keeper that has died left alive; or (`takeover`) it replaces a running one.
"""

import errno
import json
import logging
import os
import shutil
import signal
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from blksnap_ublk.keeper import memory
from blksnap_ublk.keeper.adoption import ROLES, adopted, former_children, held_by_io, listener_of, spare_of
from blksnap_ublk.keeper.child import EXIT_DEVICES_LEFT, EXIT_NOTHING_LEFT, READY
from blksnap_ublk.keeper.fd_store import FdStore
from blksnap_ublk.keeper.holdings import Holdings
from blksnap_ublk.keeper.layout import OtherLayout, write_layout
from blksnap_ublk.keeper.living import Living
from blksnap_ublk.keeper.log_writer import LogWriter
from blksnap_ublk.keeper.messages import (
    MESSAGE_LIMIT,
    Done,
    Drop,
    Ending,
    Get,
    HandOver,
    Leave,
    List,
    Message,
    Put,
    Refused,
    Stop,
)
from blksnap_ublk.keeper.process import Process, Start
from blksnap_ublk.keeper.processes import read_processes
from blksnap_ublk.keeper.ring_locks import RingLocks
from blksnap_ublk.keeper.role import Role, RoleEvents
from blksnap_ublk.keeper.runtime import AlreadyRunning, RuntimeLock, RuntimePaths
from blksnap_ublk.keeper.service_manager import ServiceManager, survive_shutdown
from blksnap_ublk.keeper.state_mount import StateMount
from blksnap_ublk.keeper.takeover import NothingToReplace, Takeover
from blksnap_ublk.rpc.channel import listen
from blksnap_ublk.rpc.descriptors import Descriptors
from blksnap_ublk.rpc.loop import Loop
from blksnap_ublk.rpc.server import Reply, Server

log = logging.getLogger(__name__)

EXIT_FAILED = 1
EXIT_BUSY = 4

IO_END = 5.0
CONTROL_END = 60.0
CONTROL_SILENCE = 60.0
"""Seconds without a sign of life after which control is killed, for its spare to take over."""
BEAT = 1.0

_NAME_LIMIT = 255
_HELD_AGAIN = 1.0


@dataclass(frozen=True)
class KeeperConfig:
    """How to run the keeper. `state_size`: bytes of the tmpfs, None for the default. `mount_state` False uses a plain
    directory, in the mount namespace as it is. `log_to_file`: the log goes to the runtime directory's log file, not to
    stderr. `successor`: the command that starts another keeper when this one dies; `succeeds`: this is such a one.
    `lifeboat_after`: after so many deaths of io within a minute the next one is a lifeboat; 0: never. `takeover`:
    replace the daemon that runs."""

    paths: RuntimePaths
    io_command: Sequence[str]
    control_command: Sequence[str]
    state_size: int | None = None
    mount_state: bool = True
    log_to_file: bool = False
    successor: Sequence[str] = ()
    succeeds: bool = False
    lifeboat_after: int = 3
    takeover: bool = False


class NothingToAdopt(Exception):
    """The daemon has ended in good order, and nobody is to be succeeded."""


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
        self._manager = ServiceManager.from_environment()
        self._store = FdStore(self._manager)
        self._holdings = Holdings(self._store)
        self._loop = Loop()
        self._log: LogWriter | None = None
        self._mount: StateMount | None = None
        self._takeover: Takeover | None = None
        self._roles: dict[str, Role] = {}
        self._stopping = False
        self._leaving = False
        self._owner = False
        self._served = False
        self._start_failed = 0
        self._control_status: int | None = None
        self._ended: set[str] = set()
        self._watchdog = 0.0
        self.pause: float | None = None
        """After a takeover: for how many seconds at most what is served stood still."""

    def run(self) -> int:
        """The exit status of the process: 0 after an end that was asked for."""
        survive_shutdown()
        try:
            with ExitStack() as stack:
                self._prepare(stack)
                self._loop.run()
        except AlreadyRunning as error:
            self._say(EXIT_BUSY, str(error))
        except (NothingToAdopt, NothingToReplace, OtherLayout) as error:
            self._say(EXIT_FAILED, str(error))
        except OSError as error:
            log.exception("the daemon cannot be started")
            self._say(EXIT_FAILED, f"the daemon cannot be started: {error}")
        self._say(EXIT_FAILED, "the daemon was ended before it served")
        return self._start_failed

    # ---- start ----

    def _prepare(self, stack: ExitStack) -> None:
        stack.callback(self._loop.close)
        for number in (signal.SIGTERM, signal.SIGINT):
            self._loop.on_signal(number, self._on_stop_signal)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        paths = self._paths
        self._expect_something_to_adopt()
        paths.create()
        if self._config.takeover:
            self._takeover = stack.enter_context(Takeover(self._loop, paths, self._manager.present))
            self._lock = RuntimeLock(paths, self._takeover.lock())
        else:
            self._lock = RuntimeLock(paths)
        stack.callback(self._release_lock)
        try:
            self._expect_something_to_adopt()
        except NothingToAdopt:
            paths.lock.unlink(missing_ok=True)  # taking it has made it again
            raise
        self._log = LogWriter(self._loop, paths.log if self._config.log_to_file else None)
        stack.callback(self._end_log, self._log)
        stack.callback(self._holdings.close)
        if self._config.mount_state:
            self._mount = StateMount(paths.state, self._config.state_size)
        else:
            paths.state.mkdir(mode=0o700, exist_ok=True)
        self._living = Living(paths.processes, self._roles, self._config.lifeboat_after, managed=self._manager.present)
        stack.callback(self._living.close)
        stack.callback(self._leave_state)
        memory.become_io_flusher()
        memory.protect_from_oom()
        memory.raise_limits()
        if self._takeover is None:
            self._begin(stack)
        else:
            self._begin_takeover(stack, self._takeover)
        self._log.start()
        self._loop.later(BEAT, self._beat)
        memory.lock_memory()

    def _expect_something_to_adopt(self) -> None:
        """One that succeeds another does not begin anew what has ended in good order while it started."""
        if self._config.succeeds and not read_processes(self._paths.processes).processes:
            raise NothingToAdopt("the daemon has ended in good order meanwhile")

    def _begin(self, stack: ExitStack) -> None:
        """Start everything, but for what a keeper that died has left alive."""
        processes = adopted(self._loop, former_children(self._living.former()))
        self._holdings.restore()
        self._own(stack)
        for role in ROLES:
            self._add_role(stack, role, listener_of(processes, role))
        if processes:
            self._adopt(processes)
        else:
            self._living.write()
            self._loop.later(0, self._roles["io"].start)

    def _own(self, stack: ExitStack) -> None:
        """Become the one that is reached at `keeper.sock`."""
        self._owner = True
        self._living.own()
        paths = self._paths
        write_layout(paths.layout)
        listener, message = listen(paths.keeper_socket), cast("type[Message]", Message)
        server = Server(self._loop, listener, message, self._handle, _refuse, MESSAGE_LIMIT)
        stack.callback(self._remove, paths.keeper_socket)
        stack.callback(server.close)

    def _add_role(self, stack: ExitStack, name: str, listener: socket.socket | None) -> None:
        is_io = name == "io"
        path = self._paths.io_socket if is_io else self._paths.varlink_socket
        if listener is None:
            listener = listen(path, socket.SOCK_SEQPACKET if is_io else socket.SOCK_STREAM)
        stack.callback(listener.close)
        stack.callback(self._remove, path)
        descriptors = {"--listener": listener.fileno()}
        command = [*(self._config.io_command if is_io else self._config.control_command)]
        command += ["--runtime", str(self._paths.root)]
        if not is_io:
            if self._config.successor and not self._manager.present:
                command += ["--successor", json.dumps(list(self._config.successor))]
            if self._mount is not None and self._mount.host >= 0:
                descriptors["--host"] = self._mount.host
        events = RoleEvents(
            changed=self._living.write,
            ready=self._on_io_ready if is_io else self._on_control_ready,
            failed=self._on_failed,
            ended=lambda status: self._on_ended(name, status),
            died=self._living.io_died if is_io else _nothing,
        )
        start = Start(command, descriptors, RingLocks(self._paths.state).create if is_io else None)
        role = Role(self._loop, name, start, events)
        if is_io:
            role.lifeboat = self._living.is_lifeboat_due
        self._roles[name] = role

    def _adopt(self, processes: dict[str, Process]) -> None:
        """Go on with what lives; start in its turn what does not."""
        log.info("adopting %s", ", ".join(f"{name} {process.member.pid}" for name, process in processes.items()))
        assert self._log is not None
        for process in processes.values():
            self._log.adopt(process.member.pid)
        self._served = True
        if "io" in processes:
            self._ask_io()
        else:
            self._living.io_died()
        control = processes.get("control")
        with self._living.at_once():
            self._roles["control"].adopt(control, processes.get(spare_of("control")))
            self._roles["io"].adopt(processes.get("io"), processes.get(spare_of("io")))
        if "io" not in processes:
            self._roles["io"].start()
        if control is None:
            self._roles["control"].start()

    def _ask_io(self) -> None:
        """Hold again what only io holds now."""
        try:
            for name, descriptor in held_by_io(self._paths.io_socket):
                self._holdings.put(name, descriptor)
        except OSError as error:
            # One that died has nothing any more; one that cannot say it now is asked again.
            log.warning("the io process was asked in vain for what it holds: %s", error)
            if self._roles and self._roles["io"].active is not None:
                self._loop.later(_HELD_AGAIN, self._ask_io)

    def _on_io_ready(self) -> None:
        if not self._stopping and not self._served:
            self._roles["control"].start()

    def _on_control_ready(self) -> None:
        self._served = True
        if self._takeover is not None:
            self.pause = self._takeover.pause()
            if self.pause is None:
                return  # it is the former one
        self._manager.ready()
        self._say(0, READY)

    def _on_failed(self, code: int, text: str) -> None:
        log.error("%s: %s", "the daemon cannot be started" if not self._served else "the daemon does not serve", text)
        self._say(code or EXIT_FAILED, text)
        if not self._served:
            self._stop()

    def _say(self, code: int, text: str) -> None:
        if not self._told:
            self._told = True
            self._start_failed = 0 if self._served else code
            self._tell(code, text)

    # ---- life ----

    def _beat(self) -> None:
        """What is due from time to time: signs of life for the service manager, those of control."""
        self._loop.later(BEAT, self._beat)
        now = time.monotonic()
        if self._owner and not self._leaving:
            self._manager.flush()
            interval = self._manager.watchdog_interval
            if interval is not None and now - self._watchdog >= interval:
                self._watchdog = now
                self._manager.alive()
        control = self._roles.get("control")
        if control is not None and not self._stopping and control.is_silent(CONTROL_SILENCE):
            log.error("the control process has not been heard of for %g s", CONTROL_SILENCE)
            control.signal(signal.SIGKILL)

    def _handle(self, message: Message, descriptors: Descriptors) -> Reply:
        if self._leaving and not isinstance(message, Get | List | Stop):
            raise OSError(errno.EAGAIN, "another keeper takes over; ask that one")
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
            case Ending(status):
                self._control_status = status
            case HandOver(managed):
                return self._hand_over(managed)
            case Leave(pid):
                self._leave(pid)
            case Stop():
                self._loop.later(0, self._loop.stop if self._leaving else self._stop)
        return Reply(Done())

    # ---- another keeper takes over from this one ----

    def _hand_over(self, managed: bool) -> Reply:
        if self._stopping or not self._served:
            raise OSError(errno.EBUSY, "the daemon is starting or ending")
        if self._manager.present and not managed:
            raise OSError(errno.EBUSY, "the service manager owns the daemon: systemctl reload blksnap-ublk")
        listeners = [role.start_with.descriptors["--listener"] for role in self._roles.values()]
        return Reply(Done(["lock", *self._roles]), [self._lock.descriptor, *listeners])

    def _leave(self, pid: int) -> None:
        if self._stopping or not self._served:
            raise OSError(errno.EBUSY, "the daemon is starting or ending")
        log.info("process %d takes over", pid)
        for role in self._roles.values():
            role.kill_spare()
        self._living.write()
        self._living.disown()
        self._leaving = True
        for role in self._roles.values():
            role.forget()
        self._holdings.forget()
        self._manager.main_pid(pid)
        self._loop.later(CONTROL_END, self._loop.stop)

    # ---- this keeper takes over from another one ----

    def _begin_takeover(self, stack: ExitStack, takeover: Takeover) -> None:
        for role in ROLES:
            self._add_role(stack, role, takeover.listener(role))
        waiting = set(ROLES)

        def stands_by(name: str) -> None:
            waiting.discard(name)
            if not waiting:
                self._replace(stack, takeover)

        for name in ROLES:
            self._roles[name].prepare(lambda name=name: stands_by(name))  # type: ignore[misc]

    def _replace(self, stack: ExitStack, takeover: Takeover) -> None:
        """The former keeper leaves, what it started is ours, and is replaced by what stands by."""
        try:
            takeover.check()
            held = takeover.leave()
        except (OSError, OtherLayout) as error:
            self._on_failed(EXIT_FAILED, f"the daemon that runs could not be replaced: {error}")
            return
        former = self._living.former()
        for name, descriptor in held.items():
            self._holdings.put(name, descriptor)
        self._own(stack)
        self._manager.main_pid(os.getpid())
        takeover.end_former()
        actives = {name: member for name, member in former_children(former).items() if name in ROLES}
        processes = adopted(self._loop, actives)
        self._served = True
        assert self._log is not None
        with self._living.at_once():
            for name in ROLES:
                self._roles[name].adopt(processes.get(name), None)
        takeover.switch(self._roles["io"], self._roles["control"])

    # ---- end ----

    def _on_stop_signal(self) -> None:
        if self._stopping:
            log.warning("told twice to end: leaving at once; devices are kept for recovery")
            for role in self._roles.values():
                role.kill()
            self._loop.stop()
        else:
            self._stop()

    def _stop(self) -> None:
        if self._stopping or self._leaving:
            return
        self._stopping = True
        log.info("ending")
        if self._owner:
            self._manager.stopping()
        # Control tells io when it may end.
        self._roles["io"].expect_end()
        self._roles["control"].stop()
        self._loop.later(CONTROL_END, self._still_waiting)

    def _on_ended(self, name: str, status: int | None) -> None:
        self._ended.add(name)
        if name == "control":
            if status is not None:
                self._control_status = status
            # A control process that ended in good order has told io to end.
            in_order = self._control_status in (EXIT_NOTHING_LEFT, EXIT_DEVICES_LEFT)
            self._loop.later(IO_END if in_order else 0, self._roles["io"].kill)
        if self._ended >= set(ROLES):
            self._loop.stop()

    def _still_waiting(self) -> None:
        if "control" not in self._ended:
            log.warning("the control process still works on its end; a second SIGTERM leaves at once")
            self._manager.extend_timeout(2 * CONTROL_END)
            self._loop.later(CONTROL_END, self._still_waiting)

    def _leave_state(self) -> None:
        if not self._owner or self._leaving:
            if self._mount:
                self._mount.close()
            return
        never_used = not self._served and not (self._mount and self._mount.found)
        if self._control_status != EXIT_NOTHING_LEFT and not never_used:
            log.warning("devices may be left for recovery: their state stays in %s", self._paths.state)
            self._living.clear()
            if self._mount:
                self._mount.close()
            return
        try:
            self._holdings.forget()
            self._holdings.close()
            RingLocks(self._paths.state).remove_free()
            self._living.remove()
            self._paths.layout.unlink(missing_ok=True)
            shutil.rmtree(self._paths.roles, ignore_errors=True)  # a half-made file may be in it
            if self._mount:
                self._mount.remove()
            else:
                self._paths.state.rmdir()
        except OSError as error:
            log.warning("state files are left over: %s", error)

    def _end_log(self, log_writer: LogWriter) -> None:
        """Also what a failed start has said is written."""
        log_writer.start()
        if self._owner and not self._leaving:
            log_writer.close()

    def _remove(self, path: Path) -> None:
        """Remove a socket, if nobody else is reached there."""
        if self._owner and not self._leaving:
            path.unlink(missing_ok=True)

    def _release_lock(self) -> None:
        self._lock.release(remove=self._owner and not self._leaving)


def _nothing() -> None:
    pass


def _refuse(error: OSError) -> Refused:
    return Refused(error.errno or errno.EIO, error.strerror or str(error))
