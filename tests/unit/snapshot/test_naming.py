# SPDX-License-Identifier: MIT
"""Which device or snapshot a user means."""

from pathlib import Path

import msgspec
import pytest

from blksnap_ublk.errors import NotFound, UsageError
from blksnap_ublk.snapshot import naming
from blksnap_ublk.snapshot.catalogue import Catalogue, DeviceEntry, Phase, Served, SnapshotEntry

FIRST = "0123abcd-0000-4000-8000-000000000001"
SECOND = "0123abff-0000-4000-8000-000000000002"


@pytest.fixture
def catalogue(tmp_path: Path) -> Catalogue:
    catalogue = Catalogue(tmp_path / "catalogue")
    served = Served(ublk_id=7, queues=1, depth=1, desc_size=24, flags=0, zero_copy=False)
    entry = DeviceEntry(
        key="k",
        name="data",
        origin=str(tmp_path / "origin"),
        number=(0, 0),
        size=1,
        block=512,
        unit=4096,
        tracking_block=65536,
        phase=Phase.ACTIVE,
        served=served,
    )
    catalogue.put_device(entry)
    catalogue.put_device(
        msgspec.structs.replace(entry, key="half", name="half", origin="/nowhere", phase=Phase.CREATING)
    )
    for number, snapshot_id in enumerate((FIRST, SECOND)):
        catalogue.put_snapshot(
            SnapshotEntry(
                id=snapshot_id,
                created=f"2026-01-0{number + 1}",
                phase=Phase.ACTIVE,
                frozen=True,
                gate_us=0,
                images=[],
                storage_key="s",
            )
        )
    return catalogue


def test_a_device_is_found_by_name_and_by_each_path(catalogue: Catalogue, tmp_path: Path) -> None:
    (tmp_path / "origin").touch()
    (tmp_path / "link").symlink_to(tmp_path / "origin")
    for text in ("data", str(tmp_path / "origin"), str(tmp_path / "link"), "/dev/ublkb7", "/dev/../dev/ublkb7"):
        assert naming.find_device(catalogue, text).key == "k", text


@pytest.mark.parametrize("text", ["other", "half", "/nowhere", "/dev/ublkb70", "", "/dev/null"])
def test_what_is_no_device_is_not_found(catalogue: Catalogue, text: str) -> None:
    with pytest.raises(NotFound, match="no such filtered device"):
        naming.find_device(catalogue, text)


@pytest.mark.parametrize("text", [FIRST, FIRST.upper(), FIRST[:8], "0123abcd-"])
def test_a_snapshot_is_found_by_a_prefix(catalogue: Catalogue, text: str) -> None:
    assert naming.find_snapshot(catalogue, text).id == FIRST


def test_a_prefix_of_two_is_refused(catalogue: Catalogue) -> None:
    with pytest.raises(UsageError, match="2 snapshots begin like this"):
        naming.find_snapshot(catalogue, "0123ab")


@pytest.mark.parametrize("text", ["", "012", "0123xyz", "*", FIRST + "0"])
def test_what_is_no_prefix_is_refused(catalogue: Catalogue, text: str) -> None:
    with pytest.raises(UsageError, match="4 characters"):
        naming.find_snapshot(catalogue, text)


def test_a_snapshot_that_is_not_there_is_not_found(catalogue: Catalogue) -> None:
    with pytest.raises(NotFound, match="no such snapshot"):
        naming.find_snapshot(catalogue, "ffff")
