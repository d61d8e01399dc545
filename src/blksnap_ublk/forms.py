# SPDX-License-Identifier: MIT
"""The one JSON form of every object: on the command line, in varlink, in the Python client and in events.

Sizes, offsets and lengths are bytes, except where a field says sectors (512 bytes). Times are UTC in ISO 8601 with
microseconds and a final `Z`; see `timestamp`. Fields may be added; readers ignore fields that they do not know.
"""

from datetime import UTC, datetime
from enum import StrEnum
from typing import Any

import msgspec
from msgspec import Struct


class DeviceState(StrEnum):
    """State of a filtered device: it serves; its io process is being replaced; it is lost."""

    LIVE = "live"
    RECOVERING = "recovering"
    FAILED = "failed"


class DataPath(StrEnum):
    """How the data of a request travels: not at all through our memory, or by copies."""

    ZERO_COPY = "zero-copy"
    COPY = "copy"


class SnapshotState(StrEnum):
    """`active` can be trusted. The others are broken: their images answer EIO."""

    ACTIVE = "active"
    OVERFLOWN = "overflown"
    CORRUPTED = "corrupted"


class Freeze(StrEnum):
    """What to do with mounted file systems when a snapshot is taken."""

    TRY = "try"
    NO = "no"
    REQUIRE = "require"


class FindingState(StrEnum):
    """What a finding of `doctor` means: nothing to do, works but look at it, does not work."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


class Device(Struct, kw_only=True, frozen=True):
    """A filtered device. `id` is the N of `/dev/ublkbN`; `change_number` that of the last snapshot taken, 0 before.

    `link` is a symlink to it in `/dev/blksnap` that keeps its name, null where there is none.
    """

    device: str
    name: str
    origin: str
    id: int
    size: int
    state: DeviceState
    data_path: DataPath
    queues: int
    depth: int
    generation: str
    change_number: int
    tracking_block: int
    unit: int
    snapshots: list[str]
    link: str | None = None


class Area(Struct, kw_only=True, frozen=True):
    """A range of one file or block device that holds preserved units; `start` and `count` in sectors."""

    path: str
    start: int
    count: int
    used: int


class Storage(Struct, kw_only=True, frozen=True):
    """Difference storage. `forecast_seconds`: until it is full at the present rate, null when nothing is preserved.

    `snapshots` are the ids of all the snapshots that share it. `wipe`: what it held is overwritten when it is given
    back. `copy_rate`: bytes per second that copy-on-write may write to it, null: no limit. `waiting`: requests that
    wait for room in it now. `growing`: it grows by itself, up to `limit`.
    """

    used: int
    capacity: int
    limit: int | None
    on_overflow: str
    areas: list[Area]
    forecast_seconds: float | None
    snapshots: list[str] = []
    wipe: bool = False
    copy_rate: int | None = None
    waiting: int = 0
    growing: bool = False


class Image(Struct, kw_only=True, frozen=True):
    """One member of a snapshot as it was; `cursor` is what a backup remembers; `link` as of a device."""

    image: str
    device: str
    origin: str
    size: int
    generation: str
    change_number: int
    cursor: str
    state: SnapshotState
    preserved_bytes: int
    link: str | None = None


class Snapshot(Struct, kw_only=True, frozen=True):
    """A snapshot. `error` says why it is broken, `lost_at` when that was found. `gate_us`: how long new writes were
    held, in microseconds, `gate_writes_us` how much of that until the last write in flight had ended.

    It ends by itself at `expires`, which is `ttl` seconds after it was taken or last renewed, and when the process
    `while_pid` has ended; null: it does not. With `partitions` its images show their partitions.
    """

    id: str
    created: str
    state: SnapshotState
    error: str | None
    frozen: bool
    gate_us: int
    images: list[Image]
    storage: Storage
    expires: str | None = None
    ttl: float | None = None
    while_pid: int | None = None
    partitions: bool = False
    gate_writes_us: int = 0
    lost_at: str | None = None


class SnapshotCheck(Struct, kw_only=True, frozen=True):
    """Whether a snapshot can be trusted, and if not, why."""

    id: str
    trusted: bool
    reason: str | None


class Range(Struct, kw_only=True, frozen=True, gc=False):
    """Bytes of a device."""

    start: int
    length: int


class Changes(Struct, kw_only=True, frozen=True):
    """What changed after the cursor `since` (null: since tracking began) up to the instant `until`.

    With `all` true everything counts as changed, for the `reason` given. `changed_bytes` is the sum of the lengths.
    """

    device: str
    since: str | None
    until: str
    tracking_block: int
    all: bool
    reason: str | None
    changed_bytes: int
    ranges: list[Range]


class ChangesInfo(Struct, kw_only=True, frozen=True):
    """Change tracking of a device; `changed_blocks` tracking blocks changed since the last snapshot was taken."""

    device: str
    generation: str
    change_number: int
    tracking_block: int
    blocks: int
    changed_blocks: int


class Event(Struct, kw_only=True, frozen=True):
    """A change of state. `seq` counts up by one for each event of a daemon; `data` depends on `type`."""

    seq: int
    time: str
    type: str
    snapshot: str | None
    device: str | None
    data: dict[str, Any]


class Finding(Struct, kw_only=True, frozen=True):
    """One thing that `doctor` looked at; `advice` says what to do about it."""

    name: str
    state: FindingState
    text: str
    advice: str | None


class Traffic(Struct, kw_only=True, frozen=True):
    """What a filtered device has done since it was attached: counts of requests, and bytes."""

    reads: int
    writes: int
    read_bytes: int
    written_bytes: int
    preserved_bytes: int


class Rates(Struct, kw_only=True, frozen=True):
    """What a filtered device does per second, measured over an interval of `seconds`."""

    seconds: float
    reads: float
    writes: float
    read_bytes: float
    written_bytes: float
    preserved_bytes: float


class DeviceStatus(Struct, kw_only=True, frozen=True):
    """A filtered device at work; `rates` is null where no interval was measured."""

    device: Device
    traffic: Traffic
    rates: Rates | None


class Status(Struct, kw_only=True, frozen=True):
    """Everything that the daemon serves, at one time."""

    time: str
    pid: int
    version: str
    devices: list[DeviceStatus]
    snapshots: list[Snapshot]


class Version(Struct, kw_only=True, frozen=True):
    """Version of the command line or library, and of the daemon; null where none is running."""

    version: str
    daemon: str | None


class TakenOver(Struct, kw_only=True, frozen=True):
    """Result of `serve --takeover`. `pause_ms`: for how long at most what the daemon serves waited."""

    pause_ms: int


class DeviceList(Struct, kw_only=True, frozen=True):
    """Result of `list`."""

    devices: list[Device]


class SnapshotList(Struct, kw_only=True, frozen=True):
    """Result of `snapshot list`."""

    snapshots: list[Snapshot]


class Findings(Struct, kw_only=True, frozen=True):
    """Result of `doctor`."""

    findings: list[Finding]


class Repaired(Struct, kw_only=True, frozen=True):
    """Result of `doctor --fix`: a line for each thing that was done or could not be, and what is found afterwards."""

    fixed: list[str]
    findings: list[Finding]


class Attached(Struct, kw_only=True, frozen=True):
    """Result of attach: the filtered device, and what its user should know."""

    device: Device
    warnings: list[str]


class Detached(Struct, kw_only=True, frozen=True):
    """Result of detach: the device that was, and the snapshots that `force` broke."""

    device: Device
    broken_snapshots: list[str]
    warnings: list[str]


class Resized(Struct, kw_only=True, frozen=True):
    """Result of `resize`: the filtered device, and the bytes that it had before."""

    device: Device
    former_size: int


class SnapshotCreated(Struct, kw_only=True, frozen=True):
    """Result of `snapshot create`: the snapshot, and what its user should know."""

    snapshot: Snapshot
    warnings: list[str]


class Destroyed(Struct, kw_only=True, frozen=True):
    """Result of `snapshot destroy`: the full ids of the snapshots that are gone."""

    destroyed: list[str]
    warnings: list[str]


class Marked(Struct, kw_only=True, frozen=True):
    """Result of `changes mark`: how many bytes were marked, in whole tracking blocks."""

    device: str
    marked_bytes: int


def timestamp(seconds: float) -> str:
    """`2026-01-31T12:00:00.000000Z` for seconds since the epoch."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def to_json(form: object) -> str:
    """The JSON text of a form, in one line; the fields in the order of the class."""
    return msgspec.json.encode(form).decode()
