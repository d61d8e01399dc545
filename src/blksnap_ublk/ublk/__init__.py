# SPDX-License-Identifier: MIT
"""Block devices in user space: a target in, `/dev/ublkbN` out. Knows nothing of snapshots.

    class RamDisk(ublk.PyTarget): ...

    with ublk.Device.add(RamDisk(64 << 20)) as device:
        print(device.path)
        device.serve()

`Device` is a device and its target in one process; `Null` and `Loop` are targets in C, `PyTarget` is the base of those
written in Python. `Control` sends single commands; `control_plane` and `serving` are the two halves of a device's life,
for programs that keep them in different processes.
"""

from blksnap_ublk.ublk.control import Control, device_ids, granted_features
from blksnap_ublk.ublk.device import Device
from blksnap_ublk.ublk.device_info import DeviceInfo, DeviceState
from blksnap_ublk.ublk.features import Features
from blksnap_ublk.ublk.loop import Loop
from blksnap_ublk.ublk.negotiation import DataPath, Recovery, Wish
from blksnap_ublk.ublk.params import Attributes, BasicParams, DiscardParams, Params, SegmentParams
from blksnap_ublk.ublk.pytarget import PyTarget
from blksnap_ublk.ublk.serving import Backend
from blksnap_ublk.ublk.target import Null, Target

__all__ = [
    "Attributes",
    "Backend",
    "BasicParams",
    "Control",
    "DataPath",
    "Device",
    "DeviceInfo",
    "DeviceState",
    "DiscardParams",
    "Features",
    "Loop",
    "Null",
    "Params",
    "PyTarget",
    "Recovery",
    "SegmentParams",
    "Target",
    "Wish",
    "device_ids",
    "granted_features",
]
