# SPDX-License-Identifier: MIT
"""A real io process with files for origins and storages: everything that needs no ublk."""

import errno
import mmap
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from blksnap_ublk import engine
from blksnap_ublk.ioproc import messages
from blksnap_ublk.ioproc.client import IoClient, IoRefused
from blksnap_ublk.ioproc.devices import bitmap_bytes
from blksnap_ublk.keeper.child import STANDS_BY, TURN
from blksnap_ublk.rpc.channel import listen

SIZE = 8 << 20
UNIT = 4096
TRACKING = 65536
PATIENCE = 30


class Files:
    """Makes state files, allocated ahead as control does, and other files; closes them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._opened = ExitStack()

    def state(self, name: str, size: int, *, holes: bool = False) -> int:
        descriptor = os.open(self.folder / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._opened.callback(os.close, descriptor)
        if holes:
            os.ftruncate(descriptor, size)
        elif size:
            os.posix_fallocate(descriptor, 0, size)
        return descriptor

    def bitmap(self, name: str) -> int:
        return self.state(name, bitmap_bytes(SIZE, TRACKING))

    def close(self) -> None:
        self._opened.close()


class Io:
    """An io process, started as the keeper does it."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "io.sock"
        hear, say = os.pipe()
        with listen(self.path) as listener:
            inherited = (listener.fileno(), say)
            arguments = ["--runtime", str(folder), "--listener", str(inherited[0]), "--ready", str(say)]
            self.process = subprocess.Popen(
                [sys.executable, "-m", "blksnap_ublk.ioproc.main", *arguments],
                pass_fds=inherited,
                stderr=subprocess.PIPE,
                text=True,
            )
        os.close(say)
        with open(hear) as pipe:
            assert pipe.readline().rstrip("\n") == STANDS_BY
            self.process.send_signal(TURN)
            self.said = pipe.readline()

    def descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def mappings(self) -> list[str]:
        """Files of the tests that are mapped."""
        lines = Path(f"/proc/{self.process.pid}/maps").read_text().splitlines()
        return [line.split(maxsplit=5)[5] for line in lines if str(self.path.parent) in line]

    def end(self) -> str:
        if self.process.poll() is None:
            self.process.kill()
        _, log = self.process.communicate(timeout=PATIENCE)
        return log


@pytest.fixture
def files(tmp_path: Path) -> Iterator[Files]:
    files = Files(tmp_path)
    yield files
    files.close()


@pytest.fixture
def io(tmp_path: Path) -> Iterator[Io]:
    io = Io(tmp_path)
    assert io.said == "ready\n"
    yield io
    io.end()


@pytest.fixture
def client(io: Io) -> Iterator[IoClient]:
    with IoClient(io.path, PATIENCE) as client:
        client.hello()
        yield client


def refused(function: Callable[..., object], *arguments: object) -> IoRefused:
    with pytest.raises(IoRefused) as caught:
        function(*arguments)
    return caught.value


def open_device(client: IoClient, files: Files, name: str = "d", **changes: int) -> None:
    sizes = {"size": SIZE, "block": 512, "unit": UNIT, "tracking_block": TRACKING} | changes
    origin = files.state(f"origin-{name}", SIZE)
    message = messages.OpenDevice(name, sizes["size"], sizes["block"], sizes["unit"], sizes["tracking_block"])
    client.call(message, [origin, files.bitmap(f"bitmap-{name}"), files.bitmap(f"swallowed-{name}")])


def open_storage(client: IoClient, files: Files, name: str = "s", areas: int = 1) -> None:
    client.call(messages.OpenStorage(name, UNIT), [files.state(f"storage-{name}", engine.STORAGE_STATE_BYTES)])
    area = files.state(f"area-{name}", areas << 20)
    for index in range(areas):
        records = files.state(f"records-{name}-{index}", 256 * 16)
        client.call(messages.AddArea(name, index << 20, 1 << 20), [area, records])


def open_image(
    client: IoClient, files: Files, name: str = "i", *, device: str = "d", storage: str = "s", serial: int = 1
) -> None:
    state = files.state(f"image-{name}", engine.Image.state_bytes(SIZE, UNIT))
    client.call(messages.OpenImage(name, device, storage, serial), [state])


def take(client: IoClient, files: Files, *members: tuple[str, str]) -> messages.Done:
    bitmaps = [files.bitmap(f"next-{image}") for _, image in members]
    message = messages.Take([messages.Member(device, image) for device, image in members], 1000)
    return client.call(message, [*bitmaps, files.state("commit", 4096)])


def add_map_memory(client: IoClient, files: Files, *names: str) -> None:
    portions = [files.state(f"portion-{name}", engine.ARENA_PORTION) for name in names]
    client.call(messages.AddMapMemory(list(names)), portions)


def test_the_inventory_of_an_empty_process(io: Io, client: IoClient) -> None:
    inventory = client.status()
    assert inventory == messages.Inventory(
        version=messages.VERSION,
        pid=io.process.pid,
        devices=[],
        images=[],
        storages=[],
        map_memory=0,
        map_memory_free=0,
        portions=[],
    )


def test_another_version_is_refused(client: IoClient) -> None:
    error = refused(client.call, messages.Hello(messages.VERSION + 1))
    assert error.errno == errno.EPROTO
    assert client.connected


def test_a_snapshot_from_open_to_drop_leaves_nothing(io: Io, client: IoClient, files: Files) -> None:
    add_map_memory(client, files, "p0")
    before = io.descriptors()
    for _ in range(3):
        open_device(client, files)
        open_storage(client, files, areas=3)
        open_image(client, files)
        inventory = client.status()
        assert inventory.devices == [messages.DeviceReport("d", None, serving=False)]
        assert inventory.images == [messages.ImageReport("i", None, False, False, "active", 0, 0)]
        assert inventory.storages == [messages.StorageReport("s", 0, 3 << 20, [0, 0, 0])]
        done = take(client, files, ("d", "i"))
        assert done.gate_us >= 0
        assert (files.folder / "commit").read_bytes()[:4] == b"\1\0\0\0"
        (files.folder / "commit").write_bytes(bytes(4096))
        assert client.status().images[0].taken
        # The interval that begins with the instant is marked in its own bitmap, the one before is left as it was.
        client.call(messages.Mark("d", [(TRACKING, 1), (3 * TRACKING, TRACKING)]))
        assert (files.folder / "next-i").read_bytes()[:2] == b"\x0a\0"
        assert not any((files.folder / "bitmap-d").read_bytes())
        client.call(messages.Drop("i"))
        client.call(messages.CloseStorage("s"))
        client.call(messages.CloseDevice("d"))
        inventory = client.status()
        assert not inventory.devices
        assert not inventory.images
        assert not inventory.storages
        assert io.descriptors() == before
        assert [Path(name).name for name in io.mappings()] == ["portion-p0"]
        for path in files.folder.iterdir():
            if path.name.startswith("next-"):
                path.unlink()


def test_the_replaced_bitmap_is_unmapped(io: Io, client: IoClient, files: Files) -> None:
    open_device(client, files)
    open_storage(client, files)
    add_map_memory(client, files, "p0")
    for number in range(1, 4):
        open_image(client, files, f"i{number}", serial=number)
        take(client, files, ("d", f"i{number}"))

    def bitmaps() -> set[str]:
        return {Path(name).name for name in io.mappings() if "next-" in name or "bitmap-" in name}

    # Writes to an image are marked in the interval before it and the one after.
    assert {"next-i1", "next-i2", "next-i3"} <= bitmaps()
    client.call(messages.Drop("i1"))
    client.call(messages.Drop("i2"))
    assert bitmaps() == {"next-i2", "next-i3"}
    client.call(messages.Drop("i3"))
    assert bitmaps() == {"next-i3"}
    client.call(messages.CloseDevice("d"))
    assert not any("next-" in name for name in io.mappings())


def test_one_instant_for_two_devices(client: IoClient, files: Files) -> None:
    open_storage(client, files)
    add_map_memory(client, files, "p0")
    for name in ("a", "b"):
        open_device(client, files, name)
        open_image(client, files, f"i{name}", device=name, serial=ord(name))
    take(client, files, ("a", "ia"), ("b", "ib"))
    assert [image.taken for image in client.status().images] == [True, True]


def test_what_is_in_use_cannot_be_closed(client: IoClient, files: Files) -> None:
    open_device(client, files)
    open_storage(client, files)
    add_map_memory(client, files, "p0")
    open_image(client, files)
    for _ in range(2):
        error = refused(client.call, messages.CloseDevice("d"))
        assert error.errno == errno.EBUSY
        assert "'d' has the images i" in str(error)
        assert refused(client.call, messages.CloseStorage("s")).errno == errno.EBUSY
        if not client.status().images[0].taken:
            take(client, files, ("d", "i"))
    client.call(messages.Drop("i"))
    client.call(messages.CloseDevice("d"))
    client.call(messages.CloseStorage("s"))


def test_a_refused_device_changes_nothing(io: Io, client: IoClient, files: Files) -> None:
    before = io.descriptors()
    origin, bitmap, swallowed = files.state("o", SIZE), files.bitmap("b"), files.bitmap("s")
    good = messages.OpenDevice("d", SIZE, 512, UNIT, TRACKING)
    cases: list[tuple[messages.OpenDevice, list[int], str]] = [
        (good, [origin, bitmap], "came with 2 descriptors, not 3"),
        (good, [origin, files.state("short", 100), swallowed], "active bitmap: 100 bytes"),
        (good, [origin, bitmap, files.state("hole", 1 << 20, holes=True)], "swallowed trims: only 0 of"),
        (
            messages.OpenDevice("d", 2 * SIZE, 512, UNIT, TRACKING),
            [origin, bitmap, swallowed],
            f"the origin has {SIZE}",
        ),
        (messages.OpenDevice("d", SIZE, 512, 3000, TRACKING), [origin, bitmap, swallowed], "device"),
        (messages.OpenDevice("d", 0, 512, UNIT, TRACKING), [origin, bitmap, swallowed], "size 0"),
        (messages.OpenDevice("d", SIZE, 512, UNIT, 0), [origin, bitmap, swallowed], "tracking block 0"),
    ]
    for message, descriptors, text in cases:
        assert text in str(refused(client.call, message, descriptors))
    with socket.socket() as unsuitable:
        refused(client.call, good, [unsuitable.fileno(), bitmap, swallowed])
    assert client.status().devices == []
    assert io.descriptors() == before
    assert io.mappings() == []
    client.call(good, [origin, bitmap, swallowed])
    assert refused(client.call, good, [origin, bitmap, swallowed]).errno == errno.EEXIST


def test_refused_storages_areas_and_portions_change_nothing(io: Io, client: IoClient, files: Files) -> None:
    open_storage(client, files)
    before, mapped = io.descriptors(), io.mappings()
    area, records = files.state("area", 1 << 20), files.state("records", 8192)
    state = files.state("state", 4096)
    portion = files.state("portion", engine.ARENA_PORTION)
    cases: list[tuple[messages.Message, list[int], str]] = [
        (messages.OpenStorage("s", UNIT), [state], "there is a storage 's' already"),
        (messages.OpenStorage("t", UNIT), [files.state("empty", 0)], "storage state: 0 bytes"),
        (messages.AddArea("x", 0, 1 << 20), [area, records], "there is no storage 'x'"),
        (messages.AddArea("s", 0, 2 << 20), [area, records], "lies outside"),
        (messages.AddArea("s", 1 << 20, 4096), [area, records], "lies outside"),
        (messages.AddArea("s", -4096, 4096), [area, records], "is no area"),
        (messages.AddArea("s", 100, 8192), [area, records], "not at a multiple of 512"),
        (messages.AddArea("s", 0, 1 << 20), [area, files.state("few", 16)], "records: 16 bytes"),
        (messages.AddArea("s", 0, 100), [area, records], "Invalid argument"),
        (messages.AddMapMemory(["p"]), [state], "portion p: 4096 bytes"),
        (messages.AddMapMemory(["p", "p"]), [portion, portion], "named twice"),
        (messages.AddMapMemory(["p"]), [], "came with 0 descriptors"),
        (messages.CloseStorage("x"), [], "there is no storage 'x'"),
    ]
    for message, descriptors, text in cases:
        assert text in str(refused(client.call, message, descriptors))
    inventory = client.status()
    assert inventory.storages == [messages.StorageReport("s", 0, 1 << 20, [0])]
    assert inventory.map_memory == 0
    assert io.descriptors() == before
    assert io.mappings() == mapped


def test_refused_images_and_takes_change_nothing(io: Io, client: IoClient, files: Files) -> None:
    open_device(client, files)
    open_device(client, files, "e")
    open_storage(client, files)
    client.call(messages.OpenStorage("odd", 8192), [files.state("odd", engine.STORAGE_STATE_BYTES)])
    add_map_memory(client, files, "p0")
    open_image(client, files)
    before, mapped = io.descriptors(), io.mappings()
    state = files.state("state", engine.Image.state_bytes(SIZE, UNIT))
    bitmap, commit = files.bitmap("next"), files.state("commit", 4096)
    member = messages.Member("d", "i")
    cases: list[tuple[messages.Message, list[int], str]] = [
        (messages.OpenImage("i", "d", "s", 1), [state], "there is an image 'i' already"),
        (messages.OpenImage("j", "x", "s", 1), [state], "there is no device 'x'"),
        (messages.OpenImage("j", "d", "x", 1), [state], "there is no storage 'x'"),
        (messages.OpenImage("j", "d", "odd", 1), [state], "Invalid argument"),
        (messages.OpenImage("j", "d", "s", 0), [state], "Invalid argument"),
        (messages.OpenImage("j", "d", "s", 1), [files.state("empty", 0)], "image state: 0 bytes"),
        (messages.Take([], 100), [commit], "needs members"),
        (messages.Take([member], 100), [commit], "came with 1 descriptors, not 2"),
        (messages.Take([member, member], 100), [bitmap, bitmap, commit], "each of another device"),
        (messages.Take([messages.Member("e", "i")], 100), [bitmap, commit], "is one of device 'd'"),
        (messages.Take([messages.Member("d", "x")], 100), [bitmap, commit], "there is no image 'x'"),
        (messages.Take([member], 100), [files.state("empty", 0), commit], "next active bitmap: 0 bytes"),
        (messages.Take([member], 100), [bitmap, files.state("empty", 0)], "commit file: 0 bytes"),
        (messages.ServeImage("i", 0, 8, 24, 0, False), [], "is not taken"),
        (messages.ServeDevice("x", 0, 1, 8, 24, 0, False), [], "there is no device 'x'"),
        (messages.ServeDevice("d", 0, 1, 8, 64, 0, False), [], "descriptors of 64 bytes"),
        (messages.ServeDevice("d", 0, 0, 8, 24, 0, False), [], "queues: 0"),
        (messages.Drop("x"), [], "there is no image 'x'"),
        (messages.Mark("d", [(0, 4096), (SIZE - 1, 2)]), [], "not within"),
        (messages.Mark("x", []), [], "there is no device 'x'"),
        (messages.FinishImage("x"), [], "there is no image 'x'"),
    ]
    for message, descriptors, text in cases:
        assert text in str(refused(client.call, message, descriptors))
    assert not any((files.folder / "bitmap-d").read_bytes())
    assert (files.folder / "commit").read_bytes() == bytes(4096)
    assert [image.image for image in client.status().images] == ["i"]
    assert io.descriptors() == before
    assert io.mappings() == mapped
    # A take after all that works, and an image is taken once.
    client.call(messages.Take([member], 1000), [bitmap, commit])
    error = refused(client.call, messages.Take([member], 100), [files.bitmap("next2"), commit])
    assert "was taken already" in str(error)
    assert "is not served" in str(refused(client.call, messages.ServeImage("i", 0, 8, 24, 0, False)))
    client.call(messages.FinishImage("i"))


def test_connections_come_and_go_and_state_stays(io: Io, client: IoClient, files: Files) -> None:
    open_device(client, files)
    client.close()
    with IoClient(io.path, PATIENCE) as second, IoClient(io.path, PATIENCE) as third:
        assert [device.device for device in second.hello().devices] == ["d"]
        third.call(messages.CloseDevice("d"))
        assert second.status().devices == []


def test_bitmaps_are_shared_with_whoever_maps_them(client: IoClient, files: Files) -> None:
    open_device(client, files)
    with mmap.mmap(files.bitmap("bitmap-d"), 4096) as shared:
        client.call(messages.Mark("d", [(0, SIZE)]))
        assert shared[: SIZE // TRACKING // 8] == b"\xff" * (SIZE // TRACKING // 8)
        assert not any(shared[SIZE // TRACKING // 8 :])


def test_it_ends_when_told(io: Io, client: IoClient, files: Files) -> None:
    open_device(client, files)
    client.call(messages.Shutdown())
    io.process.wait(PATIENCE)
    assert io.process.returncode == 0
    with pytest.raises(OSError, match=r"."):
        client.status()
    assert not client.connected


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_all_processes_does_not_end_it(io: Io, client: IoClient, number: int) -> None:
    io.process.send_signal(number)
    assert client.status().pid == io.process.pid


def _adopt(client: IoClient, files: Files, serial: int = 1) -> None:
    """What `test_another_process_adopts` left."""
    origin, bitmap = files.state("origin-d", SIZE), files.bitmap("bitmap-d")
    message = messages.OpenDevice("d", SIZE, 512, UNIT, TRACKING, held="origin:d")
    client.call(message, [origin, files.bitmap("next-i"), files.bitmap("swallowed-d")])
    storage = files.state("storage-s", engine.STORAGE_STATE_BYTES)
    client.call(messages.OpenStorage("s", UNIT, adopt=True), [storage])
    area = messages.AddArea("s", 0, 1 << 20, held="storage:s:0")
    client.call(area, [files.state("area-s", 1 << 20), files.state("records-s-0", 256 * 16)])
    client.call(messages.AddMapMemory(["p0"], adopt=True), [files.state("portion-p0", engine.ARENA_PORTION)])
    state = files.state("image-i", engine.Image.state_bytes(SIZE, UNIT))
    image = messages.OpenImage("i", "d", "s", serial, SIZE, adopt=True)
    client.call(image, [state, bitmap, files.bitmap("next-i")])


def test_another_process_adopts_what_one_left(tmp_path: Path, files: Files) -> None:
    former = Io(tmp_path)
    with IoClient(former.path, PATIENCE) as client:
        client.hello()
        open_device(client, files)
        open_storage(client, files)
        add_map_memory(client, files, "p0")
        open_image(client, files)
        take(client, files, ("d", "i"))
        assert client.status().swept
    former.end()
    former.path.unlink()
    io = Io(tmp_path)
    with IoClient(io.path, PATIENCE) as client:
        client.hello()
        assert refused(_adopt, client, files, 2).errno == errno.EBADMSG
    io.end()
    io.path.unlink()
    io = Io(tmp_path)
    with IoClient(io.path, PATIENCE) as client:
        client.hello()
        _adopt(client, files)
        assert not client.status().swept
        [image] = client.status().images
        assert (image.taken, image.status) == (True, "active")
        assert refused(client.call, messages.Drop("i")).errno == errno.EBUSY
        late = messages.AddMapMemory(["late"], adopt=True)
        add_map_memory(client, files, "p1")
        assert refused(client.call, late, [files.state("late", engine.ARENA_PORTION)]).errno == errno.EBUSY
        client.call(messages.Sweep([]))
        client.call(messages.EndQuarantine())
        while not client.status().swept:
            pass
        assert refused(client.call, messages.Sweep([])).errno == errno.EALREADY
        inventory = client.status()
        assert inventory.map_memory_free == inventory.map_memory == 2 * engine.ARENA_PORTION
        client.call(messages.Drop("i"))
        client.call(messages.CloseStorage("s"))
        client.call(messages.CloseDevice("d"))
    io.end()


def test_a_keeper_gets_back_what_it_held(client: IoClient, files: Files) -> None:
    origin = files.state("origin-d", SIZE)
    message = messages.OpenDevice("d", SIZE, 512, UNIT, TRACKING, held="origin:d")
    client.call(message, [origin, files.bitmap("bitmap-d"), files.bitmap("swallowed-d")])
    client.call(messages.OpenStorage("s", UNIT), [files.state("storage-s", engine.STORAGE_STATE_BYTES)])
    area = files.state("area-s", 2 << 20)
    for number in range(2):
        records = files.state(f"records-{number}", 256 * 16)
        client.call(messages.AddArea("s", number << 20, 1 << 20, held="storage:s:0"), [area, records])
    assert client.call(messages.Held(0)).held == ["origin:d", "storage:s:0"]
    assert client.call(messages.Held(1)).held == ["storage:s:0"]
    client.call(messages.CloseStorage("s"))
    assert client.call(messages.Held(0)).held == ["origin:d"]


def test_a_device_grows(client: IoClient, files: Files) -> None:
    open_device(client, files)
    larger = [files.state(name, bitmap_bytes(2 * SIZE, TRACKING)) for name in ("larger", "swallowed")]
    message = messages.ResizeDevice("d", 2 * SIZE)
    client.call(messages.Mark("d", [(0, 1)]))
    assert "the 8388608 of its origin" in str(refused(client.call, message, larger))
    os.posix_fallocate(files.state("origin-d", SIZE), 0, 2 * SIZE)
    for _ in range(2):
        client.call(message, larger)
    assert (files.folder / "larger").read_bytes()[:32] == b"\1" + bytes(15) + b"\xff" * 16
    smaller = messages.ResizeDevice("d", SIZE)
    assert refused(client.call, smaller, larger).errno == errno.EINVAL
