# SPDX-License-Identifier: MIT
"""Role files and symlinks, with a block device of this machine in the place of a filtered device's."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blksnap_ublk.host import sysfs
from blksnap_ublk.host.number import DeviceNumber
from blksnap_ublk.snapshot.links import Links
from blksnap_ublk.snapshot.role import Role

ABSENT = "/dev/disk-of-nobody"


@pytest.fixture
def number() -> DeviceNumber:
    """Some disk of this machine that has no partitions; nothing is done to it."""
    for each in sysfs.all_numbers():
        where = sysfs.directory(each)
        if not (where / "partition").exists() and not list(where.glob("*/partition")):
            return each
    pytest.skip("this machine has no block device")


@pytest.fixture
def links(tmp_path: Path, number: DeviceNumber) -> Links:
    """In a directory that has the node of that disk."""
    for name in ("run", "dev", "root"):
        (tmp_path / name).mkdir()
    node = tmp_path / "dev" / sysfs.kernel_name(number)
    node.parent.mkdir(exist_ok=True)
    node.touch()
    return Links(tmp_path / "run", dev=tmp_path / "dev", root=tmp_path / "root")


_WORDS = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_.:+-]{0,63}", fullmatch=True)


@given(_WORDS, _WORDS, st.lists(_WORDS.map("disk/by-id/".__add__), max_size=12, unique=True))
def test_a_role_is_read_as_it_was_written(name: str, origin: str, others: list[str]) -> None:
    roles = [Role.of_filtered(name, origin, others), Role.of_origin(name, origin), Role.of_image("1-2", name, origin)]
    assert [Role.decode(role.encode()) for role in roles] == roles


@pytest.mark.parametrize("text", ["", "BLKSNAP_ROLE=other\n", "BLKSNAP_ROLE=image\nBLKSNAP_NAME=x\n", "\x00\n="])
def test_a_damaged_role_is_a_value_error(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011
        Role.decode(text)


def test_which_links_of_the_origin_move() -> None:
    there = ["disk/by-diskseq/9", "disk/by-id/dm-name-x", "disk/by-id/wwn-1", "disk/by-path/p", "disk/by-uuid/u"]
    assert Role.of_filtered("a", "/dev/a", there).other_links == ("disk/by-id/wwn-1", "disk/by-path/p")


def test_links_of_an_origin_come_and_go(links: Links, number: DeviceNumber, tmp_path: Path) -> None:
    links.sweep(set(), {str(number): Role.of_origin("data", "/dev/x")})
    path = tmp_path / "dev/blksnap/origins/data"
    assert os.readlink(path) == f"../../{sysfs.kernel_name(number)}"
    assert links.known() == {str(number)}
    links.origin_taken(number)
    links.origin_released(number)
    assert not (tmp_path / "dev/blksnap").exists()
    assert links.known() == set()


def test_a_sweep_makes_what_is_missing_and_removes_what_is_stale(
    links: Links, number: DeviceNumber, tmp_path: Path
) -> None:
    base = tmp_path / "dev/blksnap"
    wanted = {str(number): Role.of_origin("data", "/dev/x")}
    links.image("2-3", "gone", "/dev/x", 4242)
    (base / "2-3").mkdir(parents=True)
    (base / "2-3/gone").symlink_to("../../ublkb4242")
    (base / "nobody").symlink_to("../nobody")
    links.sweep({"ublkb4242"}, wanted)
    assert sorted(str(path.relative_to(base)) for path in base.rglob("*")) == ["origins", "origins/data"]
    (base / "origins/data").unlink()
    links.sweep(set(), wanted)
    assert (base / "origins/data").is_symlink()


def test_a_name_that_another_device_has_taken_is_left_to_it(links: Links, number: DeviceNumber, tmp_path: Path) -> None:
    links.sweep(set(), {str(number): Role.of_origin("data", "/dev/x")})
    path = tmp_path / "dev/blksnap/origins/data"
    path.unlink()
    (tmp_path / "dev/another").touch()
    path.symlink_to("../../another")
    links.origin_released(number)
    assert path.is_symlink()


def test_nothing_is_known_of_devices_without_a_role(links: Links, number: DeviceNumber) -> None:
    links.appear(4242)
    links.remove(4242)
    links.origin_taken(number)
    assert links.known() == set()
