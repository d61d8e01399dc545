# SPDX-License-Identifier: MIT
"""What a keeper takes over of one before it that has died: the children that live, the descriptors that io holds."""

import logging
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import msgspec

from blksnap_ublk.keeper.process import Process
from blksnap_ublk.keeper.processes import Member, Record
from blksnap_ublk.rpc.channel import DESCRIPTOR_LIMIT
from blksnap_ublk.rpc.client import Client
from blksnap_ublk.rpc.loop import Loop

log = logging.getLogger(__name__)

ROLES = ("io", "control")

_ASK_LIMIT = 5.0  # seconds for the io process to answer


class _Held(msgspec.Struct, tag="held", frozen=True):
    """As in ioproc/messages.py."""

    first: int


class _Answer(msgspec.Struct, frozen=True):
    """`Done` and `Refused` of ioproc/messages.py, as far as they matter here."""

    type: str
    held: list[str] = []
    text: str = ""


def spare_of(role: str) -> str:
    """The name under which the spare of a role is recorded."""
    return f"{role}-spare"


def former_children(record: Record) -> dict[str, Member]:
    """The processes of a former keeper that live, by the name of their place in the record."""
    found = {}
    for role in ROLES:
        for name in (role, spare_of(role)):
            member = record.living(name)
            if member is not None:
                found[name] = member
    return found


def adopted(loop: Loop, members: dict[str, Member]) -> dict[str, Process]:
    """Those of `members` that still live, watched from now on."""
    processes = {}
    for name, member in members.items():
        try:
            processes[name] = Process.adopt(loop, member)
        except OSError as error:
            log.warning("%s process %d cannot be adopted: %s", name, member.pid, error)
    return processes


def listener_of(processes: dict[str, Process], role: str) -> socket.socket | None:
    """A duplicate of the socket on which the processes of a role listen, None where no process has one."""
    for name in (role, spare_of(role)):
        process = processes.get(name)
        if process is not None:
            try:
                return process.listener()
            except OSError as error:
                log.warning("the socket of the %s process cannot be had: %s", name, error)
    return None


def held_by_io(path: Path) -> Iterator[tuple[str, int]]:
    """The descriptors of origins and storages that the io process at `path` has, with the names under which a keeper
    held them. They are the caller's. Raises OSError."""
    client: Client[_Answer] = Client(path, _Answer)
    try:
        first = 0
        while True:
            answer, descriptors = client.call(_Held(first), (), _ASK_LIMIT)
            with descriptors:
                if answer.type != "done":
                    raise OSError(f"the io process refuses to say what it holds: {answer.text}")
                count = min(len(answer.held), len(descriptors), DESCRIPTOR_LIMIT)
                for index in range(count):
                    # One that was added without a name was not held.
                    if answer.held[index]:
                        yield answer.held[index], descriptors.take(index)
            if count == 0:
                return
            first += count
    finally:
        client.close()


def close_all(numbers: dict[str, int]) -> None:
    """Close descriptors that were not needed."""
    while numbers:
        os.close(numbers.popitem()[1])
