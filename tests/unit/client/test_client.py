# SPDX-License-Identifier: MIT
"""Each method of the client, against a real server."""

import asyncio
import itertools
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from blksnap_ublk import forms
from blksnap_ublk.client import Client, connect
from blksnap_ublk.client.client import UNREAD_CALLS
from blksnap_ublk.errors import BlksnapError, Busy, Failed, NotFound, Unsupported, Untrusted, UsageError
from tests.unit.fake_service import GONE, SIZE, FakeService
from tests.unit.serving import serving, serving_ublk
from tests.unit.varlink.echo import Echo


class Daemon:
    """A served FakeService, a client of it, and what that warned of."""

    def __init__(self, service: FakeService, loop: asyncio.AbstractEventLoop, path: str) -> None:
        self.service = service
        self.loop = loop
        self.path = path
        self.warned: list[str] = []
        self.client = connect(path, warn=self.warned.append)


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    service = FakeService()
    with serving_ublk(tmp_path / "socket", service) as loop:
        served = Daemon(service, loop, str(tmp_path / "socket"))
        with served.client:
            yield served


@pytest.fixture
def client(daemon: Daemon) -> Client:
    return daemon.client


def test_devices(client: Client) -> None:
    device = client.attach("/dev/sdb", name="data", queues=3, depth=64, tracking_block=4096, unit=8192)
    assert (device.device, device.name, device.queues, device.depth) == ("/dev/ublkb0", "data", 3, 64)
    assert (device.tracking_block, device.unit) == (4096, 8192)
    assert client.list_devices() == [device]
    detached = client.detach("data")
    assert detached.device == device
    assert client.list_devices() == []


def test_snapshots(client: Client, daemon: Daemon) -> None:
    client.attach("/dev/sdb")
    snapshot = client.create_snapshot(
        ["sdb"], storage=["/var/a:0+8"], storage_files=["/var/b:c"], limit=1 << 30, freeze=forms.Freeze.REQUIRE
    )
    assert daemon.service.requests == [
        ("create_snapshot", (["/var/a:0+8"], ["/var/b:c"], 1 << 30, None, forms.Freeze.REQUIRE)),
        ("lifetime", (False, None, None)),
    ]
    assert client.list_snapshots() == [snapshot]
    assert client.show_snapshot(snapshot.id[:4]) == snapshot
    assert client.check_snapshot(snapshot.id).trusted
    daemon.service.break_snapshot(snapshot.id, forms.SnapshotState.OVERFLOWN, "the storage is full")
    check = client.check_snapshot(snapshot.id)
    assert (check.trusted, check.reason) == (False, "the storage is full")
    assert client.destroy_snapshots([snapshot.id]) == [snapshot.id]


def test_snapshots_that_end_by_themselves(client: Client, daemon: Daemon) -> None:
    client.attach("/dev/sdb")
    one = client.create_snapshot(["sdb"], storage=["/a"], ttl=90, while_pid=os.getpid(), partitions=True)
    assert daemon.service.requests[-1] == ("lifetime", (True, 90.0, os.getpid()))
    assert (one.ttl, one.while_pid, one.partitions) == (90.0, os.getpid(), True)
    assert one.expires is not None
    renewed = client.renew_snapshot(one.id[:8], ttl=0.5)
    assert renewed.ttl == 0.5
    assert renewed.expires is not None
    assert client.show_snapshot(one.id) == renewed == client.renew_snapshot(one.id)
    lasting = client.create_snapshot(["sdb"], storage=["/b"])
    assert (lasting.ttl, lasting.expires, lasting.while_pid) == (None, None, None)
    with pytest.raises(UsageError, match="no time to live"):
        client.renew_snapshot(lasting.id)
    with pytest.raises(UsageError, match="no such process"):
        client.create_snapshot(["sdb"], storage=["/c"], while_pid=GONE)


def test_storage(client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    client.attach("/dev/sdb")
    options = {"on_overflow": "pause:30", "wipe": True, "copy_rate": 8 << 20}
    snapshot = client.create_snapshot(["sdb"], storage=["/a"], limit=1 << 30, **options)  # type: ignore[arg-type]
    storage = client.show_storage(snapshot.id[:8])
    assert storage == snapshot.storage
    assert (storage.on_overflow, storage.wipe, storage.copy_rate) == ("pause:30", True, 8 << 20)
    added = client.add_storage(snapshot.id, ["b:0+8", "@c"], storage_files=["d"])
    assert [area.path for area in added.areas] == ["/a", f"{tmp_path}/b:0+8", f"{tmp_path}/@c", f"{tmp_path}/d"]
    assert client.limit_storage(snapshot.id, 2 << 30).limit == 2 << 30
    assert client.throttle_storage(snapshot.id, None).copy_rate is None
    with pytest.raises(UsageError, match="no rate for copies"):
        client.throttle_storage(snapshot.id, 1)
    assert client.show_storage(snapshot.id).copy_rate is None


def test_storage_that_is_shared_is_no_path(
    client: Client, daemon: Daemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    client.attach("/dev/sdb")
    client.create_snapshot(["sdb"], storage=["@abcd"])
    client.create_snapshot(["sdb"], storage=["./@abcd"], storage_files=["@abcd"])
    asked = [what for name, what in daemon.service.requests if name == "create_snapshot"]
    assert asked == [
        (["@abcd"], [], None, None, forms.Freeze.TRY),
        ([f"{tmp_path}/./@abcd"], [f"{tmp_path}/@abcd"], None, None, forms.Freeze.TRY),
    ]


def test_relative_paths_are_the_callers(
    client: Client, daemon: Daemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert client.attach("disk").origin == f"{tmp_path}/disk"
    client.create_snapshot([f"{tmp_path}/disk"], storage=["a:0+8"], storage_files=["b"])
    assert daemon.service.requests[0][1] == ([f"{tmp_path}/a:0+8"], [f"{tmp_path}/b"], None, None, forms.Freeze.TRY)
    with pytest.raises(NotFound, match=f"{tmp_path}/other/disk"):
        client.detach("other/disk")
    with pytest.raises(NotFound, match=r"^nothing: "):
        client.detach("nothing")


def test_warnings_reach_the_user(client: Client, daemon: Daemon) -> None:
    daemon.service.warnings.append("also open by mc (pid 3)")
    client.attach("/dev/sdb")
    client.create_snapshot(["sdb"], storage=["/a"])
    client.detach("sdb", force=True)
    assert daemon.warned == ["also open by mc (pid 3)"] * 2 + [
        "snapshot abcd0000-0000-0000-0000-000000000000 is broken"
    ]


def test_changes_are_an_array(client: Client) -> None:
    device = client.attach("/dev/sdb")
    client.create_snapshot(["sdb"], storage=["/a"])
    changes = client.changes("sdb")
    assert changes.ranges.dtype == np.int64
    assert changes.ranges.tolist() == [[0, 65536], [1 << 20, 131072]]
    assert (changes.device, changes.since, changes.until) == ("/dev/ublkb0", None, f"{device.generation}:1")
    assert (changes.all, changes.reason, changes.changed_bytes) == (False, None, 196608)
    lost = client.changes("sdb", since="11111111-0000-0000-0000-000000000000:7")
    assert (lost.all, lost.reason, lost.ranges.tolist()) == (True, "new-generation", [[0, SIZE]])


@pytest.mark.parametrize("count", [0, 1, (1 << 14) - 1, 1 << 14, (1 << 14) + 1, 50_000])
def test_any_number_of_changes(client: Client, daemon: Daemon, count: int) -> None:
    client.attach("/dev/sdb")
    daemon.service.ranges = np.stack([np.arange(count) * 131072, np.full(count, 65536)], axis=1).astype(np.int64)
    changes = client.changes("sdb")
    assert changes.ranges.shape == (count, 2)
    assert np.array_equal(changes.ranges, daemon.service.ranges)
    portions = list(client.changes_in_portions("sdb"))
    assert len(portions) == max(1, -(-count // (1 << 14)))


def test_changes_up_to_a_broken_snapshot(client: Client, daemon: Daemon) -> None:
    client.attach("/dev/sdb")
    snapshot = client.create_snapshot(["sdb"], storage=["/a"])
    daemon.service.break_snapshot(snapshot.id, forms.SnapshotState.CORRUPTED, "checksum")
    with pytest.raises(Untrusted):
        client.changes("sdb", until=snapshot.id)


def test_describe_and_mark(client: Client, daemon: Daemon) -> None:
    client.attach("/dev/sdb")
    assert client.describe_changes("sdb").changed_blocks == 3
    marked = client.mark_changes("sdb", [(0, 65536), forms.Range(start=1 << 20, length=65536)])
    assert marked == forms.Marked(device="/dev/ublkb0", marked_bytes=131072)
    assert [r.start for r in daemon.service.marked] == [0, 1 << 20]
    with pytest.raises(UsageError, match="outside of the device"):
        client.mark_changes("sdb", [(SIZE, 1)])


def test_many_ranges_are_marked(client: Client, daemon: Daemon) -> None:
    client.attach("/dev/sdb")
    assert client.mark_changes("sdb", [(number * 4096, 4096) for number in range(10_000)]).marked_bytes == 40_960_000
    assert len(daemon.service.marked) == 10_000
    assert client.mark_changes("sdb", []).marked_bytes == 0


@pytest.mark.parametrize("blocks", [0, 1, 3 << 16, (3 << 16) + 1, 500_000])
def test_dump(client: Client, daemon: Daemon, tmp_path: Path, blocks: int) -> None:
    client.attach("/dev/sdb")
    daemon.service.last = np.arange(blocks, dtype=np.uint32)
    path = tmp_path / "last.npy"
    path.write_text("something older")
    client.dump_changes("sdb", str(path))
    loaded = np.load(path)
    assert loaded.dtype == np.uint32
    assert np.array_equal(loaded, daemon.service.last)
    assert np.array_equal(client.last_change("sdb"), daemon.service.last)


def test_a_dump_that_fails_leaves_what_was_there(client: Client, tmp_path: Path) -> None:
    path = tmp_path / "last.npy"
    path.write_text("something older")
    with pytest.raises(NotFound):
        client.dump_changes("nothing", str(path))
    client.attach("/dev/sdb")
    with pytest.raises(Failed, match=f"{tmp_path}/none/last.npy: No such file or directory"):
        client.dump_changes("sdb", str(tmp_path / "none" / "last.npy"))
    assert path.read_text() == "something older"
    assert {entry.name for entry in tmp_path.iterdir()} == {"last.npy", "socket"}


def test_a_dump_into_a_pipe(client: Client, daemon: Daemon, tmp_path: Path) -> None:
    client.attach("/dev/sdb")
    os.mkfifo(tmp_path / "pipe")
    read: list[bytes] = []
    reader = threading.Thread(target=lambda: read.append((tmp_path / "pipe").read_bytes()))
    reader.start()
    client.dump_changes("sdb", str(tmp_path / "pipe"))
    reader.join()
    assert read[0].endswith(daemon.service.last.tobytes())


def test_status_and_doctor(client: Client) -> None:
    client.attach("/dev/sdb")
    status = client.status()
    assert status.version == "9.9"
    rates = status.devices[0].rates
    assert rates is not None
    assert (rates.reads, rates.written_bytes) == (0, 0)
    followed = list(itertools.islice(client.follow_status(0.01), 3))
    assert len(followed) == 3
    assert [finding.state.value for finding in client.doctor()] == ["ok", "fail"]
    assert client.repair().fixed == ["udev: wrote /etc/rules"]
    assert client.daemon_version().pid == os.getpid()


def test_events(client: Client, daemon: Daemon) -> None:
    client.attach("/dev/sdb")
    snapshot = client.create_snapshot(["sdb"], storage=["/a"])
    assert [event.type for event in client.events()] == ["attached", "taken"]
    assert [event.type for event in client.events(since=1)] == ["taken"]
    assert [event.type for event in client.events(snapshot=snapshot.id)] == ["taken"]
    assert list(client.events(since=2)) == []


def test_many_events(client: Client, daemon: Daemon) -> None:
    for _ in range(1000):
        daemon.service.tell("storage-grown")
    assert [event.seq for event in client.events()] == list(range(1, 1001))


def test_events_are_followed_while_other_calls_go_on(client: Client, daemon: Daemon) -> None:
    following = client.events(since=0, follow=True)
    seen = []
    for number in range(5):
        client.attach(f"/dev/sd{number}")
        seen.append(next(following).device)
    assert seen == [f"/dev/ublkb{number}" for number in range(5)]
    following.close()  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("device", "kind", "text"),
    [
        ("/dev/gone", NotFound, "/dev/gone: no such block device (ENOENT)"),
        ("/dev/zoned", Unsupported, "/dev/zoned: zoned devices cannot be filtered"),
        ("/dev/data", Busy, "/dev/data: in use by mount /data (EBUSY); unmount it first"),
        ("/dev/bug", Failed, "internal error: ZeroDivisionError: a bug; the daemon's log has more"),
        (os.fsdecode(b"/dev/\xff"), UsageError, "not valid UTF-8: /dev/\\udcff; rename it, or use a symlink"),
    ],
)
def test_errors_are_exceptions(
    client: Client, daemon: Daemon, device: str, kind: type[BlksnapError], text: str
) -> None:
    daemon.service.mounted["/dev/data"] = "/data"
    with pytest.raises(BlksnapError) as caught:
        client.attach(device)
    assert type(caught.value) is kind
    assert caught.value.message == text
    assert client.list_devices() == []


def test_a_service_of_another_kind(tmp_path: Path) -> None:
    with (
        serving(tmp_path / "socket", Echo().interface()),
        connect(str(tmp_path / "socket")) as client,
        pytest.raises(Unsupported, match="it may be another version"),
    ):
        client.list_devices()


def test_a_file_that_lies_elsewhere_cannot_be_marked(client: Client, tmp_path: Path) -> None:
    client.attach("/dev/sdb")
    with pytest.raises(UsageError, match="not a regular file"):
        client.mark_file("sdb", str(tmp_path))
    with pytest.raises(Failed, match="No such file"):
        client.mark_file("sdb", str(tmp_path / "none"))


def test_a_connection_can_be_used_again_after_close(client: Client) -> None:
    client.close()
    assert client.list_devices() == []


@contextmanager
def dying(daemon: Daemon, deaths: int, *, reads: bool = False) -> Iterator[str]:
    """The path of a service so many processes of which end when a call comes, and the one after them is `daemon`.

    `reads`: they end once they have read it.
    """
    path, successor = f"{daemon.path}-dying", f"{daemon.path}-successor"
    os.symlink(daemon.path, successor)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(path)
        listener.listen()

        def serve() -> None:
            for left in reversed(range(deaths)):
                connection, _ = listener.accept()
                with connection:
                    connection.recv(1 << 16, 0 if reads else socket.MSG_PEEK)
                    if not left:
                        os.replace(successor, path)

        thread = threading.Thread(target=serve)
        thread.start()
        yield path
        thread.join()
        os.unlink(path)


def unconnected(path: str) -> Client:
    return Client(path, start=False, warn=pytest.fail)


def test_a_call_that_nobody_read_is_made_again(daemon: Daemon) -> None:
    with dying(daemon, 2) as path, unconnected(path) as client:
        client.attach("/dev/sdb")
        assert len(client.list_devices()) == 1
    with dying(daemon, 2) as path, unconnected(path) as client:
        assert [event.type for event in client.events(since=0)] == ["attached"]


def test_a_stream_that_nobody_read_is_asked_for_again(daemon: Daemon, tmp_path: Path) -> None:
    daemon.client.attach("/dev/sdb")
    daemon.client.dump_changes("sdb", str(tmp_path / "expected"))
    with dying(daemon, 2) as path, unconnected(path) as client:
        client.dump_changes("sdb", str(tmp_path / "dump"))
    assert (tmp_path / "dump").read_bytes() == (tmp_path / "expected").read_bytes()


def test_a_call_that_somebody_read_is_not_made_again(daemon: Daemon) -> None:
    with dying(daemon, 1, reads=True) as path, connect(path) as client:
        with pytest.raises(Failed, match="no answer from the daemon"):
            client.attach("/dev/sdb")
        assert client.list_devices() == []


def test_nobody_is_asked_for_ever(daemon: Daemon) -> None:
    with dying(daemon, UNREAD_CALLS) as path, connect(path) as client:
        with pytest.raises(Failed, match="no answer from the daemon"):
            client.list_devices()
        assert client.list_devices() == []
