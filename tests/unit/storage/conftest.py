# SPDX-License-Identifier: MIT
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest

from blksnap_ublk.host.number import DeviceNumber
from blksnap_ublk.snapshot.spec import parse_spec
from blksnap_ublk.snapshot.storage import DescriptorRegistry, OpenAreas, UsedRange, open_storage
from tests.loop_devices import loop_device, missing_for_loops, mounted

MIB = 1 << 20


class Opener:
    """Opens storage by the texts of SPECs, with one registry for the whole test."""

    def __init__(self) -> None:
        self.registry = DescriptorRegistry()

    def __call__(
        self,
        *texts: str,
        limit: int | None = None,
        needed: int = 64 * MIB,
        off_limits: Sequence[DeviceNumber] = (),
        used: Sequence[UsedRange] = (),
    ) -> OpenAreas:
        specs = [parse_spec(text) for text in texts]
        return open_storage(specs, registry=self.registry, off_limits=off_limits, used=used, limit=limit, needed=needed)


@pytest.fixture
def opened() -> Iterator[Opener]:
    """The opener; at the end of the test nothing may be open any more."""
    opener = Opener()
    yield opener
    assert opener.registry.held() == frozenset()


@pytest.fixture
def make_loop(tmp_path: Path) -> Iterator[Callable[..., str]]:
    """Makes loop devices: `make_loop(name, size, *losetup options)`."""
    missing = missing_for_loops()
    if missing:
        pytest.skip(f"loop devices: {missing}")
    with ExitStack() as stack:
        yield lambda name, size, *options: stack.enter_context(loop_device(tmp_path / name, size, options))


@pytest.fixture
def make_mount(tmp_path: Path, make_loop: Callable[..., str]) -> Iterator[Callable[..., Path]]:
    """Mounts fresh file systems: `make_mount(name, size, kind, mkfs options, mount options)`."""
    with ExitStack() as stack:

        def make(
            name: str = "mnt", size: int = 64 * MIB, kind: str = "ext4", mkfs: Sequence[str] = (), options: str = "rw"
        ) -> Path:
            device = make_loop(f"{name}.img", size)
            return stack.enter_context(mounted(device, tmp_path / name, kind, mkfs, options))

        yield make


@pytest.fixture
def ext4(make_mount: Callable[..., Path]) -> Path:
    """A directory on a fresh ext4 of 64 MiB."""
    return make_mount()
