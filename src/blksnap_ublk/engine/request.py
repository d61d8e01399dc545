# SPDX-License-Identifier: MIT
"""The words of a request, with the values of the C core."""

import enum

from blksnap_ublk.engine._engine import lib


class Op(enum.IntEnum):
    """What a request does; values are those of UBLK_IO_OP_*."""

    READ = lib.BSU_OP_READ
    WRITE = lib.BSU_OP_WRITE
    FLUSH = lib.BSU_OP_FLUSH
    DISCARD = lib.BSU_OP_DISCARD
    WRITE_ZEROES = lib.BSU_OP_WRITE_ZEROES


class Flags(enum.IntFlag):
    """FUA: on stable media before completion. NOUNMAP: write zeroes without giving up the space."""

    NONE = 0
    FUA = lib.BSU_FUA
    NOUNMAP = lib.BSU_NOUNMAP
