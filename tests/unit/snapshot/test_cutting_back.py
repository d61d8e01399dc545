# SPDX-License-Identifier: MIT
"""Files of a storage as they were before, and nothing that others have done to them is lost."""

from __future__ import annotations

import contextlib
import fcntl
import os
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from blksnap_ublk.host.number import DeviceNumber
from blksnap_ublk.snapshot import adopting, storages
from blksnap_ublk.snapshot.catalogue import AreaEntry, Catalogue, StorageEntry
from blksnap_ublk.snapshot.context import Context
from blksnap_ublk.snapshot.cutting_back import held_files, restore
from blksnap_ublk.snapshot.keyed_locks import KeyedLocks
from blksnap_ublk.snapshot.storage import DescriptorRegistry, Identity, Planned

MIB = 1 << 20


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """It has 2 MiB."""
    path = tmp_path / "file"
    path.write_bytes(b"d" * 2 * MIB)
    return path


def _area(path: Path, former: int | None, longest: int, length: int = MIB) -> AreaEntry:
    status = os.stat(path)
    device = DeviceNumber.of(status.st_dev)
    number = (device.major, device.minor)
    return AreaEntry(str(path), "", number, status.st_ino, 0, length, former_size=former, longest=longest)


def _identity(path: Path) -> Identity:
    status = os.stat(path)
    return Identity(DeviceNumber.of(status.st_dev), status.st_ino)


def test_what_was_made_longer_is_cut_back(file: Path) -> None:
    assert restore([_area(file, None, 2 * MIB)]) == []
    assert file.stat().st_size == 2 * MIB
    assert restore([_area(file, MIB, MIB), _area(file, MIB, 2 * MIB)]) == []
    assert file.stat().st_size == MIB
    assert restore([_area(file, 2 * MIB, 4 * MIB)]) == []
    assert file.stat().st_size == MIB
    assert restore([_area(file, -1, MIB)]) == []
    assert not file.exists()
    assert restore([AreaEntry(str(file), "", (0, 1), 1, 0, 0, former_size=-1)]) == []


def test_what_others_have_appended_stays(file: Path) -> None:
    assert restore([_area(file, MIB, MIB)]) == [], "it was never made longer"
    assert file.stat().st_size == 2 * MIB
    (warning,) = restore([_area(file, MIB // 2, MIB)])
    assert "others have written to it" in warning
    assert file.stat().st_size == 2 * MIB


@pytest.mark.parametrize("former", [MIB, -1])
def test_what_somebody_else_has_locked_stays(file: Path, former: int) -> None:
    with file.open("rb") as theirs:
        fcntl.flock(theirs, fcntl.LOCK_EX)
        (warning,) = restore([_area(file, former, 2 * MIB)])
    assert "locked" in warning
    assert file.stat().st_size == 2 * MIB


def test_what_another_storage_uses_stays(file: Path) -> None:
    (warning,) = restore([_area(file, MIB, 2 * MIB)], {_identity(file)})
    assert "another storage" in warning
    assert file.stat().st_size == 2 * MIB


def test_another_file_of_that_name_stays_and_nothing_is_waited_for(file: Path) -> None:
    area = _area(file, MIB, 2 * MIB)
    former = file.rename(file.with_name("former"))
    (warning,) = restore([area])
    assert "another name" in warning
    file.write_bytes(bytes(2 * MIB))
    assert restore([area]) == []
    file.unlink()
    os.mkfifo(file)
    done = threading.Thread(target=restore, args=([area],), daemon=True)
    done.start()
    done.join(60)
    hangs = done.is_alive()
    os.close(os.open(file, os.O_RDONLY | os.O_NONBLOCK))
    assert not hangs
    assert former.stat().st_size == 2 * MIB


def test_a_symlink_leads_to_it(file: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(file)
    assert restore([_area(link, MIB, 2 * MIB)]) == []
    assert file.stat().st_size == MIB


def test_what_is_held_is_found_under_any_name(file: Path) -> None:
    """And the lock that is held with it is ours."""
    registry = DescriptorRegistry()
    context = cast("Context", SimpleNamespace(registry=registry))
    area = _area(file, MIB, 2 * MIB)
    identity = _identity(file)
    fcntl.flock(registry.acquire(identity, lambda: os.open(file, os.O_RDWR)), fcntl.LOCK_EX)
    moved = file.rename(file.with_name("moved"))
    with contextlib.ExitStack() as closing:
        held = held_files(context, [area], closing)
        registry.release(identity)
        assert restore([area], (), held) == []
    assert moved.stat().st_size == MIB


def test_a_restart_leaves_the_files_of_other_storages_alone(file: Path, tmp_path: Path) -> None:
    catalogue = Catalogue(tmp_path / "catalogue")
    catalogue.put_storage(StorageEntry("other", 4096, None, "break", [_area(file, MIB, 2 * MIB, 2 * MIB)]))
    _restart(catalogue, file, MIB, {})
    assert file.stat().st_size == 2 * MIB


@pytest.mark.parametrize("former", [MIB, -1])
def test_what_the_keeper_got_of_an_addition_is_no_lock_of_others(file: Path, tmp_path: Path, former: int) -> None:
    """Control died between that and the entry of the area: what the keeper holds is locked, and is dropped."""
    descriptor = os.open(file, os.O_RDWR)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    held = {"storage:key:1": descriptor, "storage:other:0": descriptor}
    _restart(Catalogue(tmp_path / "catalogue"), file, former, held)
    assert list(held) == ["storage:other:0"]
    os.close(descriptor)
    assert file.stat().st_size == former if former >= 0 else not file.exists()


def _restart(catalogue: Catalogue, file: Path, former: int, held: dict[str, int]) -> None:
    """Of control, with a file that was announced for a storage; `held`: what the keeper has."""
    planned = Planned(str(file), _identity(file), former, 2 * MIB, None)
    catalogue.put_storage(StorageEntry("key", 4096, None, "break", [], announced=storages.announced([planned])))
    context = SimpleNamespace(
        catalogue=catalogue,
        open_storages=set(),
        unheld=set(),
        registry=DescriptorRegistry(),
        storage_locks=KeyedLocks(),
        state=SimpleNamespace(storage_state=lambda name: None),
        keeper=SimpleNamespace(names=lambda: list(held), get=lambda name: os.dup(held[name]), drop=held.pop),
    )
    adopting.adopt(cast("Context", context), "key")
    settled = catalogue.storage("key")
    assert settled is not None
    assert settled.announced == []
    assert context.open_storages == {"key"}
