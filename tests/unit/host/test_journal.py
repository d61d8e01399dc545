# SPDX-License-Identifier: MIT
"""File systems that write to a second device."""

from __future__ import annotations

from pathlib import Path

import pytest

from blksnap_ublk.host import blockdev, journal, stack
from blksnap_ublk.host.number import DeviceNumber
from tests.loop_devices import loop_device, missing_for_loops, mounted, run

MIB = 1 << 20


def test_the_external_journal_of_an_ext4_lies_beneath_its_files(tmp_path: Path) -> None:
    missing = missing_for_loops()
    if missing:
        pytest.skip(f"loop devices: {missing}")
    with loop_device(tmp_path / "journal", 64 * MIB) as other, loop_device(tmp_path / "disk", 256 * MIB) as disk:
        journals, number = blockdev.device_number(other), blockdev.device_number(disk)
        with mounted(disk, tmp_path / "mnt") as point:
            assert journal.external(number) == frozenset()
            assert stack.devices_beneath_file(str(point)) == {number}
        run("mke2fs", "-q", "-b", "4096", "-O", "journal_dev", other)
        with mounted(disk, tmp_path / "mnt", mkfs=("-b", "4096", "-J", f"device={other}")) as point:
            assert journal.external(number) == {journals}
            assert stack.devices_beneath_file(str(point)) == {number, journals}
            with loop_device(point / "upper", 8 * MIB) as upper:
                assert stack.underlying_devices(blockdev.device_number(upper)) >= {number, journals}
        assert journal.external(number) == frozenset()
    assert journal.external(DeviceNumber(4094, 1)) == frozenset()
