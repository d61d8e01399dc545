# SPDX-License-Identifier: MIT
"""A ublk device and the target that it serves, in one process: from ADD_DEV to DEL_DEV."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import TracebackType

from blksnap_ublk import engine
from blksnap_ublk.ublk import control_plane, helper, holding
from blksnap_ublk.ublk.control import Control
from blksnap_ublk.ublk.device_info import ANY_ID, DeviceInfo, block_path, char_path
from blksnap_ublk.ublk.features import ALL_FEATURES, Features
from blksnap_ublk.ublk.negotiation import DataPath, Recovery, Wish, settle
from blksnap_ublk.ublk.params import Params
from blksnap_ublk.ublk.protection import protect_process
from blksnap_ublk.ublk.pyservice import PyService
from blksnap_ublk.ublk.pytarget import PyTarget
from blksnap_ublk.ublk.serving import UnfinishedQueues, finish_queues, open_char, start_queues
from blksnap_ublk.ublk.signals import TwoSignals
from blksnap_ublk.ublk.target import Target

log = logging.getLogger(__name__)

DEFAULT_TIMEOUT = 30.0
_POLL = 0.2


class Device:
    """A device that this process serves, made by `Device.add` or `Device.recover`; a context manager that removes it.

    Whoever serves a device must not wait for it: this process must not open its disk, nor keep its swap, logs or
    modules on it (docs/framework.md tells why).
    """

    def __init__(self, info: DeviceInfo, data_path: DataPath, target: Target, timeout: float) -> None:
        """Not to be called: see `add`."""
        self.info = info
        self.data_path = data_path
        self.params: Params | None = None
        self._target = target
        self._timeout = timeout
        self._pid = os.getpid()
        self._lock = threading.RLock()
        self._char_fd = -1
        self._threads: list[engine.Thread] = []
        self._queues: list[engine.UblkQueue] = []
        self._begun = False
        self._started = False
        self._wait_for_users = True
        self._closed = False

    @classmethod
    def add(
        cls,
        target: Target | PyTarget,
        *,
        queues: int = 1,
        depth: int = 128,
        data_path: str = DataPath.AUTO,
        id: int = ANY_ID,  # noqa: A002
        recovery: str = Recovery.REISSUE,
        part_scan: bool = True,
        max_io: int = control_plane.DEFAULT_MAX_IO,
        io_flusher: bool = True,
        lock_memory: bool = True,
        timeout: float = DEFAULT_TIMEOUT,
    ) -> Device:
        """Makes a device that serves `target`; its disk exists when this returns.

        `data_path`: "auto", "zero-copy" (refused with EOPNOTSUPP where impossible) or "copy". `recovery`: "reissue",
        "fail" or "off", what happens to requests when this process dies. `timeout` (seconds) limits each step here
        and at the end. Raises OSError, ValueError; nothing is left behind then.
        """
        served = _served(target)
        wish = Wish(DataPath(data_path), Recovery(recovery), part_scan)
        # what can only be copied does not ask for zero copy, which would cost it a registration for each request
        asked = replace(wish, data_path=DataPath.COPY) if served.needs_copy else wish
        with _ended_on_failure(served):
            if served.needs_copy:
                settle(wish, ALL_FEATURES, target_needs_copy=served.needs_copy)
            flusher = protect_process(io_flusher=io_flusher, lock_memory=lock_memory)
            with Control() as control:
                info = control_plane.create_device(
                    control, asked, queues=queues, depth=depth, max_io=max_io, device_id=id
                )
                device = cls(info, wish.data_path, served, timeout)
                try:
                    device.data_path = settle(asked, info.flags, target_needs_copy=served.needs_copy)
                    device.params = control.set_params(info.id, served.params(device.data_path, info.max_io_bytes))
                    device._serve_queues(flusher)
                    helper.start(info.id, os.getpid(), timeout=timeout)
                    device._started = True
                    control_plane.tune(info.id)
                    device.info, device.params = control.info(info.id), control.get_params(info.id)
                except BaseException:
                    device._abandon(control)
                    raise
        return device

    @classmethod
    def recover(
        cls,
        target: Target | PyTarget,
        id: int,  # noqa: A002
        *,
        io_flusher: bool = True,
        lock_memory: bool = True,
        timeout: float = DEFAULT_TIMEOUT,
    ) -> Device:
        """Takes over a device whose server has died or detached; `target` must be what it served.

        Waits until the last I/O of the old server has ended. Raises OSError: EBUSY when it has a server, ENODEV, EINVAL
        when it was made without recovery; the device stays as it was.
        """
        served = _served(target)
        with _ended_on_failure(served):
            flusher = protect_process(io_flusher=io_flusher, lock_memory=lock_memory)
            with Control() as control:
                info = control_plane.start_recovery(control, id, timeout=timeout)
                # what was granted then decides now, whatever this kernel can do
                data_path = settle(Wish(recovery=Recovery.OFF), info.flags, target_needs_copy=served.needs_copy)
                device = cls(info, data_path, served, timeout)
                try:
                    device.params = control.get_params(id)
                    size = served.params(data_path, info.max_io_bytes).basic.size
                    if size != device.params.basic.size:
                        text = f"{device.path} has {device.params.basic.size} bytes, its target {size}"
                        raise OSError(errno.EINVAL, text)
                    device._serve_queues(flusher)
                    helper.end_recovery(id, os.getpid(), timeout=timeout)
                    device._started = True
                    device.info, device.params = control.info(id), control.get_params(id)
                except BaseException:
                    device._attempt("release", device._release)
                    device._closed = True
                    raise
        return device

    @property
    def id(self) -> int:
        return self.info.id

    @property
    def path(self) -> str:
        """The disk: `/dev/ublkbN`."""
        return block_path(self.id)

    @property
    def char_path(self) -> str:
        return char_path(self.id)

    @property
    def features(self) -> Features:
        """What was granted."""
        return self.info.flags

    def lost(self) -> bool:
        """Whether the kernel has taken a queue back although nobody here asked for it (stopped from outside)."""
        self._check_process()
        return any(queue.status is not engine.UblkStatus.ARMED for queue in self._queues)

    def serve(self) -> None:
        """Waits until SIGINT or SIGTERM, or until the device is stopped from outside, and removes it.

        While the disk is in use at the first signal, it waits on, and tells who uses it. The second signal ends the
        process at once: with recovery, the device then waits for the next server. Main thread only.
        """
        self._check_process()
        with TwoSignals() as signals:
            while not signals.wait(_POLL):
                if self.lost():
                    log.warning("%s was stopped from outside", self.path)
                    self.close()
                    return
            told = ""
            while True:
                try:
                    self.stop()
                    return
                except OSError as error:
                    if error.errno != errno.EBUSY:
                        raise
                    if str(error.strerror) != told:
                        told = str(error.strerror)
                        log.warning("%s; waiting for the end of that (a second signal leaves at once)", told)
                time.sleep(_POLL)

    def stop(self) -> None:
        """Writes back what is cached, removes the disk and the device.

        Raises OSError: EBUSY naming the users while it is in use, EIO when writing back fails; the device goes on then.
        """
        self._end(force=False)

    def close(self) -> None:
        """As `stop`, but also when it is in use: what was written until then is kept, users get errors afterwards.

        The kernel then forgets the device when its last user has closed it.

        Raises TimeoutError when a step takes too long; it can be called again.
        """
        self._end(force=True)

    def detach(self) -> None:
        """Gives the device up for another server (`recover`): requests wait meanwhile.

        Raises OSError: EOPNOTSUPP without QUIESCE (Linux 6.16).
        """
        self._check_process()
        with self._lock:
            if self._closed:
                return
            if Features.QUIESCE not in self.features:
                raise OSError(errno.EOPNOTSUPP, f"{self.path}: this kernel cannot take a device from a living server")
            helper.quiesce(self.id, timeout=self._timeout)
            self._started = False
            self._release()
            self._closed = True

    def __enter__(self) -> Device:
        self._check_process()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if not getattr(self, "_closed", True) and self._pid == os.getpid():
            warnings.warn(f"{self.path} was neither closed nor detached", ResourceWarning, stacklevel=2)

    def _check_process(self) -> None:
        if os.getpid() != self._pid:
            raise RuntimeError("a Device cannot be used after a fork: its queues belong to the process that made it")

    def _serve_queues(self, io_flusher: bool) -> None:
        """Opens /dev/ublkcN and arms all queues, each on a thread of its own."""
        backend = self._target.begin(self.info.queues * self.info.depth, self.info.max_io_bytes)
        self._begun = True
        self._char_fd = open_char(self.id, timeout=self._timeout)
        for _ in range(self.info.queues):
            self._threads.append(engine.Thread(slots=self.info.depth, io_flusher=io_flusher))
        try:
            self._queues = start_queues(self._threads, self._char_fd, self.info, self.data_path, backend)
        except UnfinishedQueues as error:
            self._queues = error.queues
            raise

    def _end(self, *, force: bool) -> None:
        self._check_process()
        with self._lock:
            if self._closed:
                return
            if self._started:
                if force and (users := holding.disk_users(self.id)):
                    log.warning("%s: stopped while in use by %s", self.path, ", ".join(users))
                    self._wait_for_users = False
                self._stop_disk(force)
                self._started = False
            self._release()
            with Control() as control:
                wait = self._wait_for_users
                control_plane.delete_device(control, self.id, wait=wait, timeout=self._timeout)
            self._closed = True

    def _stop_disk(self, force: bool) -> None:
        try:
            helper.stop(self.id, force=force, timeout=self._timeout)
        except OSError as error:
            if error.errno != errno.ENODEV:  # deleted from outside
                raise

    def _abandon(self, control: Control) -> None:
        """Undoes a half-made device."""
        log.debug("device %d is given up", self.id)
        if self._queues:
            # gives the tags back; there is no disk, or nobody has had the time to write to it
            self._attempt("stop", lambda: helper.stop(self.id, force=True, timeout=self._timeout))
        self._attempt("release", self._release)
        control_plane.discard_unstarted(control, self.id)
        self._closed = True

    def _attempt(self, what: str, action: Callable[[], None]) -> None:
        try:
            action()
        except OSError as error:
            log.warning("device %d: %s: %s", self.id, what, error)

    def _release(self) -> None:
        """Frees everything here after the kernel has taken the tags back. Raises TimeoutError."""
        finish_queues(self._queues, timeout=self._timeout)
        while self._threads:
            self._threads[-1].stop(timeout_ms=int(self._timeout * 1000))
            self._threads.pop()
        if self._char_fd >= 0:
            os.close(self._char_fd)
            self._char_fd = -1
        self._target.end()


def _served(target: Target | PyTarget) -> Target:
    return PyService(target) if isinstance(target, PyTarget) else target


@contextlib.contextmanager
def _ended_on_failure(target: Target) -> Iterator[None]:
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):  # a queue that does not end keeps it busy
            target.end()
        raise
