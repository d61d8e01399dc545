# SPDX-License-Identifier: MIT
"""Rates of filtered devices: the difference of two readings of their counters."""

import msgspec

from blksnap_ublk.forms import Rates, Status, Traffic


def with_rates(before: Status, after: Status, seconds: float) -> Status:
    """`after`, read `seconds` later than `before`, with the rates of every device that both know."""
    earlier = {status.device.id: status for status in before.devices}
    devices = []
    for status in after.devices:
        reading = earlier.get(status.device.id)
        # A device id may have been given to another device in between.
        if reading is not None and reading.device.generation == status.device.generation:
            rates = _rates(reading.traffic, status.traffic, seconds)
            devices.append(msgspec.structs.replace(status, rates=rates))
        else:
            devices.append(status)
    return msgspec.structs.replace(after, devices=devices)


def _rates(before: Traffic, after: Traffic, seconds: float) -> Rates:
    return Rates(
        seconds=round(seconds, 3),
        reads=(after.reads - before.reads) / seconds,
        writes=(after.writes - before.writes) / seconds,
        read_bytes=(after.read_bytes - before.read_bytes) / seconds,
        written_bytes=(after.written_bytes - before.written_bytes) / seconds,
        preserved_bytes=(after.preserved_bytes - before.preserved_bytes) / seconds,
    )
