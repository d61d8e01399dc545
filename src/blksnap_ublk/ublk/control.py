# SPDX-License-Identifier: MIT
"""The commands of `/dev/ublk-control`, each with a time limit and, when it fails, an error that says who holds what.

Commands that wait for the disk of a device (`start`, `stop`) must never be sent by the process that serves it: killed
meanwhile, it could not be reaped any more, and the device would be lost until a reboot. `helper` sends them from a
process of its own.
"""

from __future__ import annotations

import enum
import errno
import os
import struct
import threading
from pathlib import Path
from types import TracebackType

from blksnap_ublk import engine
from blksnap_ublk.ublk import holding
from blksnap_ublk.ublk.device_info import DeviceInfo, block_path
from blksnap_ublk.ublk.features import Features
from blksnap_ublk.ublk.params import PARAMS_SIZE, SECTOR, Params

CONTROL_PATH = "/dev/ublk-control"
CHAR_CLASS = Path("/sys/class/ublk-char")

DEFAULT_TIMEOUT = 10.0
"""Seconds."""

_NO_QUEUE = 0xFFFF


class Command(enum.IntEnum):
    """The encoded control commands (`UBLK_U_CMD_*`)."""

    GET_QUEUE_AFFINITY = 0x80207501
    GET_DEV_INFO = 0x80207502
    ADD_DEV = 0xC0207504
    DEL_DEV = 0xC0207505
    START_DEV = 0xC0207506
    STOP_DEV = 0xC0207507
    SET_PARAMS = 0xC0207508
    GET_PARAMS = 0x80207509
    START_USER_RECOVERY = 0xC0207510
    END_USER_RECOVERY = 0xC0207511
    GET_FEATURES = 0x80207513
    DEL_DEV_ASYNC = 0x80207514
    UPDATE_SIZE = 0xC0207515
    QUIESCE_DEV = 0xC0207516
    TRY_STOP_DEV = 0xC0207517


_ADVICE = {
    (Command.SET_PARAMS, errno.EACCES): "parameters can be set only before the start",
    (Command.START_DEV, errno.EINTR): "the server did not arm its queues",
    (Command.START_USER_RECOVERY, errno.EBUSY): "the old server is not gone yet, or its last I/O is not done",
    (Command.QUIESCE_DEV, errno.EBUSY): "no request ended in time; the device may refuse I/O until it is tried again",
}


class Control:
    """The control device of ublk. Any thread; one command at a time. Closed by `close()` or as a context manager.

    Every method raises TimeoutError when the command has not ended after `timeout` seconds (it may still take effect),
    OSError with the driver's errno otherwise: ENODEV for a device that does not exist.
    """

    def __init__(self) -> None:
        """Raises FileNotFoundError without ublk, PermissionError without root; the texts say what to do."""
        try:
            self._control = engine.Control()
        except OSError as error:
            raise _explain_open(error) from None
        self._lock = threading.Lock()
        self._pid = os.getpid()

    def close(self) -> None:
        """Commands that are past their limits are cancelled where the kernel can do that."""
        if os.getpid() == self._pid:
            self._control.close()

    def __enter__(self) -> Control:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def features(self, *, timeout: float = DEFAULT_TIMEOUT) -> Features:
        """What the driver can do; EOPNOTSUPP or EINVAL before Linux 6.5."""
        data = bytearray(8)
        self._send(Command.GET_FEATURES, -1, data, timeout=timeout)
        return Features(struct.unpack("=Q", data)[0])

    def add(self, info: DeviceInfo, *, timeout: float = DEFAULT_TIMEOUT) -> DeviceInfo:
        """Makes a device like `info` and returns it as granted. EEXIST: the id is taken, EINVAL: flags are refused."""
        data = bytearray(info.pack())
        self._send(Command.ADD_DEV, info.id, data, timeout=timeout)
        return DeviceInfo.unpack(data)

    def info(self, device_id: int, *, timeout: float = DEFAULT_TIMEOUT) -> DeviceInfo:
        """The device as it is now."""
        data = bytearray(DeviceInfo.LAYOUT.size)
        self._send(Command.GET_DEV_INFO, device_id, data, timeout=timeout)
        return DeviceInfo.unpack(data)

    def devices(self, *, timeout: float = DEFAULT_TIMEOUT) -> list[DeviceInfo]:
        """All devices, whoever serves them, by id."""
        found = []
        for device_id in device_ids():
            try:
                found.append(self.info(device_id, timeout=timeout))
            except OSError as error:
                if error.errno != errno.ENODEV:
                    raise
        return found

    def set_params(self, device_id: int, params: Params, *, timeout: float = DEFAULT_TIMEOUT) -> Params:
        """Sets the parameters of a device that is not started; returns those in force. EINVAL when one is refused."""
        self._send(Command.SET_PARAMS, device_id, bytearray(params.pack()), timeout=timeout)
        return self.get_params(device_id, timeout=timeout)

    def get_params(self, device_id: int, *, timeout: float = DEFAULT_TIMEOUT) -> Params:
        """The parameters in force."""
        data = bytearray(PARAMS_SIZE)
        struct.pack_into("=I", data, 0, PARAMS_SIZE)
        self._send(Command.GET_PARAMS, device_id, data, timeout=timeout)
        return Params.unpack(data)

    def queue_cpus(self, device_id: int, queue: int, *, timeout: float = DEFAULT_TIMEOUT) -> list[int]:
        """The CPUs whose requests go to a queue."""
        data = bytearray(512)
        self._send(Command.GET_QUEUE_AFFINITY, device_id, data, data=queue, timeout=timeout)
        mask = int.from_bytes(data, "little")
        return [cpu for cpu in range(len(data) * 8) if mask >> cpu & 1]

    def start(self, device_id: int, pid: int, *, timeout: float = DEFAULT_TIMEOUT) -> None:
        """Waits until process `pid` has armed every tag, then makes the disk. Not to be sent by the server itself."""
        self._send(Command.START_DEV, device_id, data=pid, timeout=timeout)

    def stop(self, device_id: int, *, timeout: float = DEFAULT_TIMEOUT) -> None:
        """Removes the disk, open or not. With recovery flags, dirty page cache is thrown away: see `stopping`."""
        self._send(Command.STOP_DEV, device_id, timeout=timeout)

    def try_stop(self, device_id: int, *, timeout: float = DEFAULT_TIMEOUT) -> None:
        """Removes the disk unless it is open: then EBUSY (Linux 7.0, SAFE_STOP_DEV)."""
        self._send(Command.TRY_STOP_DEV, device_id, timeout=timeout)

    def delete(self, device_id: int, *, wait: bool = True, timeout: float = DEFAULT_TIMEOUT) -> None:
        """Forgets a device; with `wait`, returns when every descriptor of it is closed."""
        self._send(Command.DEL_DEV if wait else Command.DEL_DEV_ASYNC, device_id, timeout=timeout)

    def start_recovery(self, device_id: int, *, timeout: float = DEFAULT_TIMEOUT) -> None:
        """Lets another server in. EBUSY until the last I/O of the old one is done."""
        self._send(Command.START_USER_RECOVERY, device_id, timeout=timeout)

    def end_recovery(self, device_id: int, pid: int, *, timeout: float = DEFAULT_TIMEOUT) -> None:
        """Waits until process `pid` has armed all queues; the device is live again."""
        self._send(Command.END_USER_RECOVERY, device_id, data=pid, timeout=timeout)

    def quiesce(self, device_id: int, *, timeout: float = DEFAULT_TIMEOUT) -> None:
        """Takes the queues from a running server so that another one can recover the device.

        EBUSY does not mean that nothing happened: the device may refuse I/O until it is tried again or stopped.
        """
        self._send(Command.QUIESCE_DEV, device_id, data=max(1, int(timeout * 1000)), timeout=timeout + 1)

    def update_size(self, device_id: int, size: int, *, timeout: float = DEFAULT_TIMEOUT) -> None:
        """Gives a live device another size in bytes. ENODEV when it has no disk: before 7.0 the driver would crash."""
        if size <= 0 or size % SECTOR:
            raise ValueError(f"size: {size} is not a positive multiple of {SECTOR}")
        if not os.path.exists(block_path(device_id)):
            raise OSError(errno.ENODEV, f"UPDATE_SIZE: {block_path(device_id)} does not exist")
        self._send(Command.UPDATE_SIZE, device_id, data=size // SECTOR, timeout=timeout)

    def _send(
        self,
        command: Command,
        device_id: int,
        buffer: bytearray | None = None,
        *,
        data: int = 0,
        timeout: float,
    ) -> None:
        if os.getpid() != self._pid:
            raise RuntimeError("a Control cannot be used after a fork: open another one")
        try:
            with self._lock:
                self._control.command(
                    command,
                    device_id & 0xFFFFFFFF,
                    queue_id=_NO_QUEUE,
                    buffer=buffer,
                    data=data,
                    timeout_ms=max(1, int(timeout * 1000)),
                )
        except OSError as error:
            raise _explain(command, device_id, error, timeout) from None


def device_ids() -> list[int]:
    """The ids of all devices that exist."""
    try:
        names = os.listdir(CHAR_CLASS)
    except FileNotFoundError:
        return []
    return sorted(int(name.removeprefix("ublkc")) for name in names)


def granted_features() -> Features | None:
    """What the driver of this kernel can do; None where there is no ublk or it may not be used."""
    try:
        with Control() as control:
            return control.features()
    except OSError:
        return None


def _explain_open(error: OSError) -> OSError:
    if error.errno in (errno.ENOENT, errno.ENODEV, errno.ENXIO):
        text = "this system has no ublk: load the module (modprobe ublk_drv), or use a kernel from 6.5 on that has it"
    elif error.errno in (errno.EACCES, errno.EPERM):
        text = "ublk devices can be made by root only, and where io_uring is allowed (kernel.io_uring_disabled = 0)"
    else:
        text = os.strerror(error.errno or 0)
    return OSError(error.errno, text, CONTROL_PATH)


def _explain(command: Command, device_id: int, error: OSError, timeout: float) -> OSError:
    number = error.errno or errno.EIO
    of_device = f"{command.name} of device {device_id}" if device_id >= 0 else command.name
    late = number in (errno.ETIME, errno.ETIMEDOUT)
    text = f"{of_device}: {f'not done after {timeout:g} s' if late else os.strerror(number)}"
    if advice := _ADVICE.get((command, number)):
        text += f": {advice}"
    if (late or number == errno.EBUSY) and (held := holding.describe(device_id)):
        text += f"; {held}"
    return OSError(errno.ETIMEDOUT if late else number, text)
