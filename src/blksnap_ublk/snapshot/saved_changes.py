# SPDX-License-Identifier: MIT
"""Change maps that outlive the daemon: saved at a detach, restored at the next attach of the same origin.

One file for each origin, named after its identity. While the origin is attached a mark stands there, so that after a
crash nobody takes an old map for good: it is written, durably, before the first write can pass. A saved map is used
only where the origin itself shows that nobody wrote to it meanwhile, or the user vouches for that.
"""

from __future__ import annotations

import hashlib
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

import msgspec

from blksnap_ublk.cbt import History, HistoryDamaged, HistoryError, saved_file
from blksnap_ublk.cbt.saved_file import Saved
from blksnap_ublk.errors import BlksnapError, Failed, errno_symbol
from blksnap_ublk.host import write_evidence
from blksnap_ublk.host.blockdev import BlockDevice
from blksnap_ublk.host.identity import identity
from blksnap_ublk.host.number import DeviceNumber
from blksnap_ublk.host.write_evidence import Evidence
from blksnap_ublk.snapshot import naming
from blksnap_ublk.snapshot.catalogue import DeviceEntry, Phase
from blksnap_ublk.snapshot.context import Context

UNCLEAN = "unclean"
RESIZED = "resized"
OTHER_BLOCKS = "tracking-block"
DAMAGED = "damaged"

_ALL = "what changed before this attach counts as all"
_VOUCH = "--trust-offline vouches for it"
_log = logging.getLogger(__name__)


class Note(msgspec.Struct, frozen=True):
    """What is saved with a map: the identity of its origin, and the evidence on it."""

    origin: str
    evidence: Evidence


@dataclass(frozen=True)
class Wanted:
    """What an attach asks for: blocks of `tracking_block` bytes (None: no matter) and no smaller than `unit`, and
    whether the user says that nobody wrote to the origin (`trust`). `in_use`: others have it open.
    """

    tracking_block: int | None
    unit: int
    trust: bool
    in_use: bool


@dataclass(frozen=True)
class Recall:
    """What is known of an origin from before. `saved`: a map that may be restored. `former`: a generation that was
    lost, and why. `text`: the same for people. `path` is None where nothing is ever saved.
    """

    path: Path | None = None
    there: bool = False
    saved: Saved | None = None
    former: tuple[UUID, str] | None = None
    text: str | None = None

    @property
    def tracking_block(self) -> int | None:
        """That of the map that may be restored."""
        return None if self.saved is None or self.saved.history is None else self.saved.history.tracking_block


def recall(context: Context, origin: BlockDevice, descriptor: int, wanted: Wanted) -> Recall:
    """What was saved of an origin, and whether it still holds.

    `descriptor`: the origin, claimed, with its cached pages written back. Raises NotFound.
    """
    path = _path_of(context, origin.number)
    if path is None:
        return Recall()
    try:
        saved = saved_file.read(path)
    except (HistoryDamaged, OSError) as error:
        return Recall(path, there=True, text=f"{_ALL}: {error}")
    if saved is None:
        return Recall(path)
    record = saved.history
    if record is None:
        text = f"{_ALL}: it was not detached the last time that it was attached"
        return Recall(path, there=True, former=(saved.generation, UNCLEAN), text=text)
    refused: tuple[str, str] | None = None
    if record.size != origin.size:
        refused = RESIZED, f"it had {record.size} bytes when it was detached"
    elif wanted.tracking_block not in (None, record.tracking_block) or record.tracking_block < wanted.unit:
        refused = OTHER_BLOCKS, f"it was tracked in blocks of {record.tracking_block} bytes"
    elif not wanted.trust and wanted.in_use:
        refused = UNCLEAN, f"others have it open; {_VOUCH}"
    elif not wanted.trust and (why := _refutation(saved, origin.number, descriptor)) is not None:
        refused = UNCLEAN, f"{why}; {_VOUCH}"
    if refused is not None:
        reason, why = refused
        return Recall(path, there=True, former=(saved.generation, reason), text=f"{_ALL}: {why}")
    return Recall(path, there=True, saved=saved)


def begin(recalled: Recall, directory: Path, size: int, tracking_block: int) -> tuple[History, str | None]:
    """The history of a device in an empty directory: that which was saved, or another one; and why not that.

    Raises ValueError, OSError.
    """
    former, text = recalled.former, recalled.text
    if recalled.saved is not None and recalled.path is not None:
        try:
            return saved_file.restore(recalled.path, recalled.saved, directory), None
        except (HistoryDamaged, FileNotFoundError) as error:
            former, text = (recalled.saved.generation, DAMAGED), f"{_ALL}: {error}"
    return History.create(directory, size, tracking_block, former=former), text


def mark_in_use(recalled: Recall, generation: UUID) -> list[str]:
    """Before the first write can pass: what is saved of the origin no longer holds; warnings.

    Raises Failed where an older map would stay.
    """
    if recalled.path is None:
        return []
    try:
        recalled.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        saved_file.write_mark(recalled.path, generation)
    except OSError as error:
        text = f"cannot be written ({error.strerror})"
        if recalled.there:
            advice = "make it writable, or remove it: it no longer holds once the origin is written to"
            raise Failed(text, subject=str(recalled.path), errno=errno_symbol(error.errno), advice=advice) from None
        return [f"{recalled.path}: {text}: changes may be forgotten at the detach"]
    return []


def save(context: Context, entry: DeviceEntry) -> list[str]:
    """After the last write of a device has passed, while its origin is still claimed; warnings.

    Nothing is saved of one that was never served, or whose claim was lost meanwhile: others may have written.
    """
    history = context.histories.get(entry.key)
    if history is None or entry.served is None or entry.phase is Phase.CREATING:
        return []
    try:
        number = DeviceNumber(*entry.number)
        path = _path_of(context, number)
        if path is None:
            return []
        descriptor = context.keeper.get(naming.origin_descriptor_name(entry.key))
        try:
            evidence = write_evidence.read(descriptor, number)
        finally:
            os.close(descriptor)
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        saved_file.save(history, path, msgspec.json.encode(Note(identity(number), evidence)))
    except (BlksnapError, HistoryError, OSError) as error:
        return [f"{entry.origin}: its change map could not be saved, the next attach knows nothing of it: {error}"]
    _log.info("%s: its change map was saved as %s", entry.origin, path)
    return []


def _refutation(saved: Saved, number: DeviceNumber, descriptor: int) -> str | None:
    """Why it is not proved that nobody has written since a map was saved."""
    try:
        note = msgspec.json.decode(saved.note, type=Note)
        now = write_evidence.read(descriptor, number)
    except (msgspec.MsgspecError, OSError) as error:
        return f"what it shows of writes could not be read ({error})"
    if note.origin != identity(number):
        return "it was saved of another device"
    return write_evidence.refutation(note.evidence, now)


def _path_of(context: Context, number: DeviceNumber) -> Path | None:
    if context.saved is None:
        return None
    name = hashlib.sha256(identity(number).encode()).hexdigest()[:32]
    return context.saved / f"{name}.changes"
