# SPDX-License-Identifier: MIT
"""The calls of the varlink interface `io.blksnap.Ublk`: parameters of each method, and the replies that are no form.

Paths are absolute: the daemon has another working directory than its callers.
"""

from msgspec import Struct

from blksnap_ublk.forms import Event, Freeze, Range, Storage

INTERFACE = "io.blksnap.Ublk"


class Attach(Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """Parameters of Attach; null means the default. `tracking_block` and `unit` in bytes."""

    device: str
    name: str | None = None
    queues: int | None = None
    depth: int | None = None
    tracking_block: int | None = None
    unit: int | None = None
    trust_offline: bool | None = None


class Detach(Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """Parameters of Detach."""

    device: str
    force: bool | None = None


class CreateSnapshot(Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """Parameters of CreateSnapshot. `limit` in bytes, `ttl` in seconds, `copy_rate` in bytes per second."""

    devices: list[str]
    storage: list[str] | None = None
    storage_files: list[str] | None = None
    limit: int | None = None
    on_overflow: str | None = None
    freeze: Freeze | None = None
    partitions: bool | None = None
    ttl: float | None = None
    while_pid: int | None = None
    wipe: bool | None = None
    copy_rate: int | None = None


class OneSnapshot(Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """Parameters of ShowSnapshot, CheckSnapshot and ShowStorage."""

    snapshot: str


class RenewSnapshot(Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """Parameters of RenewSnapshot; `ttl` in seconds, null: as before."""

    snapshot: str
    ttl: float | None = None


class DestroySnapshots(Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """Parameters of DestroySnapshots."""

    snapshots: list[str]
    force: bool | None = None


class AddStorage(Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """Parameters of AddStorage: SPECs, and plain paths."""

    snapshot: str
    storage: list[str] | None = None
    storage_files: list[str] | None = None


class LimitStorage(Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """Parameters of LimitStorage; `limit` in bytes."""

    snapshot: str
    limit: int


class ThrottleStorage(Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """Parameters of ThrottleStorage; `copy_rate` in bytes per second, null: no limit."""

    snapshot: str
    copy_rate: int | None = None


class ShowChanges(Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """Parameters of ShowChanges."""

    device: str
    since: str | None = None
    until: str | None = None


class OneDevice(Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """Parameters of Resize, DescribeChanges and DumpChanges."""

    device: str


class MarkChanges(Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """Parameters of MarkChanges; the ranges in bytes."""

    device: str
    ranges: list[Range]


class ShowStatus(Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """Parameters of ShowStatus: over how many milliseconds rates are measured."""

    interval: int | None = None


class ReadEvents(Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """Parameters of ReadEvents: the `seq` of the last event that is not wanted, and of which snapshot."""

    since: int | None = None
    follow: bool | None = None
    snapshot: str | None = None


class NoParameters(Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """Parameters of the methods that take none."""


class StorageReply(Struct, kw_only=True, frozen=True):
    """Reply of the methods about storage."""

    storage: Storage


class DumpPortion(Struct, kw_only=True, frozen=True):
    """Reply of DumpChanges: the next bytes of a `.npy` file of `size` bytes, in base64."""

    size: int
    data: str


class EventBatch(Struct, kw_only=True, frozen=True):
    """Reply of ReadEvents: the next events, oldest first, maybe none; `seq`: from which number on to go on reading."""

    events: list[Event]
    seq: int


class DaemonVersion(Struct, kw_only=True, frozen=True):
    """Reply of GetVersion: version and process of the daemon."""

    version: str
    pid: int


class Nothing(Struct, kw_only=True, frozen=True):
    """Reply of the methods that only do something."""
