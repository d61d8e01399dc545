# SPDX-License-Identifier: MIT
"""The errors of the commands: exit code, one line that says what to do, and nothing lost or left over."""

import json
import mmap
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.loop_devices import mapped, mounted, run
from tests.own_daemon import Disks, OwnDaemon, disks, own_daemon, ublk_nodes

SIZE = 32 << 20
NO_SNAPSHOT = "ffffffff-ffff-4fff-8fff-ffffffffffff"


@pytest.fixture(scope="module")
def daemon() -> Iterator[OwnDaemon]:
    with own_daemon() as daemon:
        yield daemon


@pytest.fixture(scope="module")
def two(daemon: OwnDaemon) -> Iterator[Disks]:
    with disks(SIZE) as made:
        yield made


@pytest.fixture
def attached(daemon: OwnDaemon, two: Disks) -> Iterator[str]:
    """A device without a history: what an earlier test has left of one would come back with the same disk."""
    for saved in Path(daemon.environment["BLKSNAP_UBLK_STATE"]).glob("*.changes"):
        saved.unlink()
    with daemon.client() as client:
        path = client.attach(two.origin, name="data").device
    try:
        yield path
    finally:
        with daemon.client() as client:
            for snapshot in client.list_snapshots():
                client.destroy_snapshots([snapshot.id], force=True)
            client.detach("data", force=True)


@pytest.fixture
def storage(two: Disks) -> Path:
    path = two.directory / "storage"
    path.write_bytes(bytes(1 << 20))
    path.chmod(0o600)
    return path


def refused(daemon: OwnDaemon, code: int, *arguments: str) -> str:
    """The one line on stderr of a command that must end with `code` and print no result."""
    before = ublk_nodes(), daemon.state()
    done = daemon.cli(*arguments)
    assert done.returncode == code, f"{done.stdout}{done.stderr}{daemon.log()}"
    assert done.stdout == ""
    line = done.stderr.rstrip("\n")
    assert "\n" not in line
    assert line.startswith("blksnap-ublk: ")
    assert "Traceback" not in line
    assert (ublk_nodes(), daemon.state()) == before, "something was left over"
    return line


@contextmanager
def opened(path: str, flags: int) -> Iterator[None]:
    descriptor = os.open(path, flags)
    try:
        yield
    finally:
        os.close(descriptor)


def snapshot_of(daemon: OwnDaemon, storage: str | Path) -> dict[str, object]:
    done = daemon.cli("snapshot", "create", "data", "--storage", str(storage), "--json")
    assert done.returncode == 0, done.stderr
    document: dict[str, object] = json.loads(done.stdout)
    return document


def readable(descriptor: int) -> bool:
    """Whether a disk that is open has anything to read."""
    try:
        with mmap.mmap(-1, 4096) as buffer:
            return os.preadv(descriptor, [buffer], 0) > 0
    except OSError:
        return False


# attach


@pytest.mark.quick
def test_attach_of_what_is_mounted_names_the_mount(daemon: OwnDaemon, two: Disks) -> None:
    with mounted(two.other, two.directory / "mounted") as point:
        line = refused(daemon, 4, "attach", two.other)
    assert f"{two.other}: in use by mount {point}" in line
    assert "unmount it first" in line


def test_attach_of_what_a_process_claims_names_the_process(daemon: OwnDaemon, two: Disks) -> None:
    with opened(two.other, os.O_RDONLY | os.O_EXCL):
        assert f"process {os.getpid()}" in refused(daemon, 4, "attach", two.other)


def test_attach_of_what_has_a_device_above_it_names_that(daemon: OwnDaemon, two: Disks) -> None:
    with mapped("blksnap-test", f"0 2048 linear {two.other} 0") as above:
        assert above in refused(daemon, 4, "attach", two.other)


def test_attach_twice(daemon: OwnDaemon, two: Disks, attached: str) -> None:
    assert f"attached already, as {attached}" in refused(daemon, 4, "attach", two.origin)


def test_attach_under_a_name_that_is_taken(daemon: OwnDaemon, two: Disks, attached: str) -> None:
    assert "--name" in refused(daemon, 4, "attach", two.other, "--name", "data")


def test_attach_of_a_filtered_device(daemon: OwnDaemon, attached: str) -> None:
    assert "filtered device" in refused(daemon, 5, "attach", attached)


def test_attach_of_a_read_only_device(daemon: OwnDaemon, two: Disks) -> None:
    run("blockdev", "--setro", two.other)
    try:
        assert "read-only" in refused(daemon, 5, "attach", two.other)
    finally:
        run("blockdev", "--setrw", two.other)


def test_attach_of_nothing(daemon: OwnDaemon, two: Disks) -> None:
    refused(daemon, 3, "attach", "/dev/none")
    assert "not a block device" in refused(daemon, 2, "attach", str(two.directory / "origin"))


@pytest.mark.parametrize(
    "options",
    [
        ["--tracking-block", "5000"],
        ["--unit", "100"],
        ["--queues", "0"],
        ["--depth", "9999"],
        ["--unit", "64K", "--tracking-block", "4K"],
    ],
)
def test_attach_with_options_that_cannot_be(daemon: OwnDaemon, two: Disks, options: list[str]) -> None:
    assert options[0] in refused(daemon, 2, "attach", two.other, *options) or "--tracking-block" in options


def test_attach_warns_of_those_who_write_past_the_filter(daemon: OwnDaemon, two: Disks) -> None:
    with opened(two.other, os.O_RDONLY):
        done = daemon.cli("attach", two.other)
    assert done.returncode == 0
    assert f"process {os.getpid()}" in done.stderr
    assert daemon.cli("detach", two.other).returncode == 0


# detach


@pytest.mark.quick
def test_detach_while_open_or_mounted_names_the_user(daemon: OwnDaemon, two: Disks, attached: str) -> None:
    with opened(attached, os.O_RDONLY):
        assert f"process {os.getpid()}" in refused(daemon, 4, "detach", "data")
    with mounted(attached, two.directory / "mounted") as point:
        assert f"mount {point}" in refused(daemon, 4, "detach", two.origin)


def test_detach_while_in_a_snapshot_names_it(daemon: OwnDaemon, attached: str, storage: Path) -> None:
    taken = snapshot_of(daemon, storage)
    assert str(taken["id"]) in refused(daemon, 4, "detach", "data")


def test_detach_of_nothing(daemon: OwnDaemon) -> None:
    for text in ("none", "/dev/none", "/dev/ublkb77"):
        assert "blksnap-ublk list" in refused(daemon, 3, "detach", text)


def test_detach_by_force_breaks_the_snapshot_and_says_so(daemon: OwnDaemon, two: Disks, storage: Path) -> None:
    with daemon.client() as client:
        path = client.attach(two.origin, name="data").device
    taken = snapshot_of(daemon, storage)
    with opened(path, os.O_RDONLY):
        done = daemon.cli("detach", "data", "--force")
        assert done.returncode == 0, done.stderr
        assert str(taken["id"]) in done.stderr
        assert f"process {os.getpid()}" in done.stderr
    assert json.loads(daemon.cli("snapshot", "list", "--json").stdout) == {"snapshots": []}
    assert daemon.state() == set()


# snapshot


@pytest.mark.quick
def test_create_with_wrong_storage(daemon: OwnDaemon, two: Disks, attached: str, storage: Path) -> None:
    create = ("snapshot", "create", "data", "--storage")
    refused(daemon, 2, *create, f"{storage}:0+8,4+8")
    refused(daemon, 2, *create, f"{storage}:0+99999999")
    refused(daemon, 2, *create, "/no/such/file")
    assert "filtered" in refused(daemon, 5, *create, attached) or "snapshotted" in refused(daemon, 5, *create, attached)
    assert storage.stat().st_size == 1 << 20


def test_create_on_storage_in_use(daemon: OwnDaemon, two: Disks, attached: str, storage: Path) -> None:
    snapshot_of(daemon, storage)
    with daemon.client() as client:
        client.attach(two.other, name="other")
    try:
        line = refused(daemon, 4, "snapshot", "create", "other", "--storage", str(storage))
        assert "another snapshot" in line
    finally:
        daemon.cli("detach", "other")


def test_create_on_storage_that_cannot_be_shared(daemon: OwnDaemon, two: Disks, attached: str, storage: Path) -> None:
    taken = snapshot_of(daemon, storage)
    share = ("snapshot", "create", "data", "--storage", f"@{taken['id']}")
    assert "no such snapshot" in refused(daemon, 3, "snapshot", "create", "data", "--storage", f"@{NO_SNAPSHOT}")
    assert "at least 4 characters" in refused(daemon, 2, "snapshot", "create", "data", "--storage", "@")
    assert "--limit" in refused(daemon, 2, *share, "--limit", "1M")
    refused(daemon, 2, *share, "--storage", str(two.directory))
    refused(daemon, 2, *share, "--storage-file", str(storage))
    assert "more than once" in refused(daemon, 2, *share, "--storage", f"@{taken['id']}")


def test_create_of_a_device_twice_or_of_one_that_is_none(
    daemon: OwnDaemon, two: Disks, attached: str, storage: Path
) -> None:
    create = ("snapshot", "create", "data")
    assert "twice" in refused(daemon, 2, *create, attached, "--storage", str(storage))
    assert two.other in refused(daemon, 3, *create, two.other, "--storage", str(storage))


def test_create_with_a_lifetime_that_is_none(daemon: OwnDaemon, attached: str, storage: Path) -> None:
    create = ("snapshot", "create", "data", "--storage", str(storage))
    assert "--ttl" in refused(daemon, 2, *create, "--ttl", "0")
    assert "--ttl" in refused(daemon, 2, *create, "--ttl", "99999d")
    assert "no such process" in refused(daemon, 2, *create, "--while-pid", str(1 << 22))
    assert storage.stat().st_size == 1 << 20


def test_create_that_must_freeze_what_cannot_be_frozen(
    daemon: OwnDaemon, two: Disks, attached: str, storage: Path
) -> None:
    """A file system that somebody else froze is frozen; one whose freezing fails is named. Here: frozen already."""
    with mounted(attached, two.directory / "mounted") as point:
        run("fsfreeze", "--freeze", str(point))
        try:
            done = daemon.cli("snapshot", "create", "data", "--storage", str(storage), "--require-freeze")
        finally:
            run("fsfreeze", "--unfreeze", str(point))
        assert done.returncode == 0, done.stderr
        assert "already frozen" in done.stderr


def test_snapshots_that_are_not_there(daemon: OwnDaemon, attached: str, storage: Path) -> None:
    for command in (["show"], ["check"], ["destroy"]):
        refused(daemon, 3, "snapshot", *command, NO_SNAPSHOT)
        refused(daemon, 2, "snapshot", *command, "ff")
    refused(daemon, 3, "snapshot", "create", "none", "--storage", str(storage))
    refused(daemon, 2, "snapshot", "create", "data")


def test_destroy_while_an_image_is_open(daemon: OwnDaemon, attached: str, storage: Path) -> None:
    taken = snapshot_of(daemon, storage)
    image = json.loads(daemon.cli("snapshot", "show", str(taken["id"]), "--json").stdout)["images"][0]["image"]
    reader = os.open(image, os.O_RDONLY | os.O_DIRECT)
    try:
        assert f"process {os.getpid()}" in refused(daemon, 4, "snapshot", "destroy", str(taken["id"]))
        done = daemon.cli("snapshot", "destroy", str(taken["id"]), "--force")
        assert done.returncode == 0, done.stderr
        assert f"process {os.getpid()}" in done.stderr
        assert not readable(reader), "the disk is gone, and has nothing to read"
    finally:
        os.close(reader)
    assert storage.stat().st_size == 1 << 20


# changes


@pytest.mark.quick
def test_cursors(daemon: OwnDaemon, attached: str, storage: Path) -> None:
    refused(daemon, 3, "changes", "show", "data", "--since", "none")
    snapshot_of(daemon, storage)
    assert "silently wrong" in refused(daemon, 2, "changes", "show", "data", "--since", "1")
    refused(daemon, 2, "changes", "show", "data", "--since", "rubbish")
    refused(daemon, 3, "changes", "show", "data", "--since", "none", "--until", NO_SNAPSHOT)
    foreign = daemon.cli("changes", "show", "data", "--since", f"{NO_SNAPSHOT}:1", "--json")
    assert foreign.returncode == 0
    answer = json.loads(foreign.stdout)
    assert (answer["all"], answer["reason"], answer["changed_bytes"]) == (True, "new-generation", SIZE)


def test_changes_up_to_a_broken_snapshot(daemon: OwnDaemon, attached: str, storage: Path) -> None:
    taken = snapshot_of(daemon, f"{storage}:0+2048")
    images = taken["images"]
    assert isinstance(images, list)
    subprocess.run(["dd", "if=/dev/urandom", f"of={attached}", "bs=1M", "count=4", "oflag=direct"], check=True)
    snapshot = str(taken["id"])
    shown = json.loads(daemon.cli("snapshot", "show", snapshot, "--json").stdout)
    assert shown["state"] == "overflown"
    assert shown["error"].startswith("difference storage was full: 1 MiB, no limit (break); next time ")
    assert shown["lost_at"] >= shown["created"]
    assert "overflown" in refused(daemon, 6, "snapshot", "check", snapshot)
    refused(daemon, 6, "changes", "show", "data", "--since", "none")
    refused(daemon, 6, "changes", "show", "data", "--since", "none", "--until", snapshot)
    events = [json.loads(line)["type"] for line in daemon.cli("events", "--snapshot", snapshot).stdout.splitlines()]
    assert [kind for kind in events if kind != "storage-low"] == ["taken", "overflow"]
    # The cursor of a broken snapshot is still right: from then on everything was tracked.
    daemon.cli("snapshot", "destroy", snapshot)
    snapshot_of(daemon, f"{storage}:0+2048")
    since = json.loads(daemon.cli("changes", "show", "data", "--since", images[0]["cursor"], "--json").stdout)
    assert (since["all"], since["changed_bytes"]) == (False, 4 << 20)


def test_mark_outside_of_the_device(daemon: OwnDaemon, attached: str, storage: Path) -> None:
    refused(daemon, 2, "changes", "mark", "data", "--range", f"{SIZE - 4096}+8192")
    before = json.loads(daemon.cli("changes", "info", "data", "--json").stdout)["changed_blocks"]
    assert daemon.cli("changes", "mark", "data", "--range", "0+1").returncode == 0
    after = json.loads(daemon.cli("changes", "info", "data", "--json").stdout)["changed_blocks"]
    assert after == before + 1


def test_commands_without_a_device(daemon: OwnDaemon) -> None:
    for command in (["changes", "info"], ["changes", "show", "--since", "none"], ["changes", "mark", "--range", "0+1"]):
        refused(daemon, 3, command[0], command[1], "none", *command[2:])
