# SPDX-License-Identifier: MIT
"""A disk in memory, 64 MiB by default: python ramdisk.py [MIB]. Ctrl-C removes it."""

import sys

from blksnap_ublk import ublk


class RamDisk(ublk.PyTarget):
    def __init__(self, size: int) -> None:
        self.size, self.data = size, bytearray(size)

    def read(self, offset: int, buf: memoryview) -> None:
        buf[:] = self.data[offset : offset + len(buf)]

    def write(self, offset: int, buf: memoryview) -> None:
        self.data[offset : offset + len(buf)] = buf


if __name__ == "__main__":
    with ublk.Device.add(RamDisk(int(sys.argv[1] if len(sys.argv) > 1 else 64) << 20)) as device:
        print(device.path, flush=True)
        device.serve()
