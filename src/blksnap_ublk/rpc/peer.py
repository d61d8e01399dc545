# SPDX-License-Identifier: MIT
"""Who is at the other end of a Unix socket."""

import os
import socket
import struct
from dataclasses import dataclass

_UCRED = struct.Struct("=iII")


@dataclass(frozen=True)
class Peer:
    """The process that connected (or listened), as it was at that time."""

    pid: int
    uid: int
    gid: int

    @property
    def trusted(self) -> bool:
        """Root, or the user that this process runs as."""
        return self.uid in (0, os.geteuid())


def peer_of(connection: socket.socket) -> Peer:
    """The peer by SO_PEERCRED. Raises OSError."""
    return Peer(*_UCRED.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)))
