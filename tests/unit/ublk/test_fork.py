# SPDX-License-Identifier: MIT
"""A device belongs to the process that made it."""

import os

from blksnap_ublk.ublk.device import Device
from blksnap_ublk.ublk.device_info import DeviceInfo
from blksnap_ublk.ublk.features import Features
from blksnap_ublk.ublk.negotiation import DataPath
from blksnap_ublk.ublk.target import Null


def test_a_device_cannot_be_used_after_a_fork() -> None:
    info = DeviceInfo(id=0, queues=1, depth=1, max_io_bytes=4096, flags=Features(0))
    device = Device(info, DataPath.COPY, Null(4096), 1.0)
    actions = (device.stop, device.close, device.detach, device.lost, device.serve, device.__enter__)
    pid = os.fork()
    if pid == 0:
        refused = 0
        for action in actions:
            try:
                action()
            except RuntimeError:
                refused += 1
        os._exit(refused)
    device._closed = True  # it never was open: nothing to warn of
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == len(actions)
