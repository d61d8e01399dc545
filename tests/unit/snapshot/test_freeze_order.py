# SPDX-License-Identifier: MIT
"""Which file systems are frozen and in which order, on mount tables and device stacks that are made up."""

import pytest

from blksnap_ublk.errors import Unsupported
from blksnap_ublk.host import mounts, stack
from blksnap_ublk.host.number import DeviceNumber
from blksnap_ublk.snapshot.freeze_order import FileSystem, file_systems, in_freezing_order

DISK, OTHER = DeviceNumber(259, 0), DeviceNumber(259, 1)
PART = DeviceNumber(259, 2)
DM = DeviceNumber(253, 0)
LOOP, LOOP2 = DeviceNumber(7, 0), DeviceNumber(7, 1)
BENEATH = {PART: {DISK}, DM: {PART}, LOOP: {DM}, LOOP2: {LOOP}, DISK: set(), OTHER: set()}


def mount(device: DeviceNumber, point: str, kind: str = "ext4", options: str = "rw") -> str:
    return f"1 0 {device} / {point} rw - {kind} /dev/x {options}"


def table(*lines: str, pid: int | None = None) -> list[mounts.Mount]:
    return mounts.parse_mountinfo("\n".join(lines), pid)


def devices_of(mount: mounts.Mount) -> frozenset[DeviceNumber]:
    return frozenset({mount.device} if mount.device.major else ())


def found(lines: list[mounts.Mount], *devices: DeviceNumber) -> list[list[str]]:
    return [[str(m.point) for m in system.mounts] for system in file_systems(lines, devices, devices_of)]


def system(point: str, *devices: DeviceNumber) -> FileSystem:
    return FileSystem(tuple(table(mount(devices[0], point))), frozenset(devices))


def points(systems: list[FileSystem]) -> list[str]:
    return [each.point for each in systems]


def test_bind_mounts_and_namespaces_make_one_file_system() -> None:
    lines = table(mount(DISK, "/a"), mount(OTHER, "/b"), mount(DISK, "/a/bind"))
    lines += table(mount(DISK, "/in/container"), mount(PART, "/only/there"), pid=77)
    assert found(lines, DISK) == [["/a", "/a/bind", "/in/container"]]
    assert found(lines, DISK, PART) == [["/a", "/a/bind", "/in/container"], ["/only/there"]]
    assert lines[-1].path == "/proc/77/root/only/there"


def test_a_read_only_mount_of_a_writable_file_system_counts_and_a_read_only_file_system_does_not() -> None:
    lines = table(f"1 0 {DISK} / /bind ro - ext4 /dev/x rw", mount(OTHER, "/ro", options="ro,norecovery"))
    assert found(lines, DISK, OTHER) == [["/bind"]]


def test_what_is_in_use_without_a_mount_that_is_seen_is_found() -> None:
    lines = table(mount(DISK, "/a"), mount(OTHER, "/ro", options="ro"))
    (_, unseen) = file_systems(lines, {DISK, OTHER, PART}, devices_of, {DISK, OTHER, PART, LOOP})
    assert unseen == FileSystem((), frozenset({PART}))


def test_an_overlay_has_nothing_to_freeze_of_its_own() -> None:
    overlay = DeviceNumber(0, 50)
    lines = table(mount(DISK, "/upper"), mount(overlay, "/merged", "overlay"))
    assert [each.point for each in file_systems(lines, {DISK}, lambda m: frozenset({DISK}))] == ["/upper"]


def test_a_file_system_with_an_anonymous_number_is_asked_until_one_mount_knows_its_devices() -> None:
    anonymous = DeviceNumber(0, 44)
    lines = table(mount(anonymous, "/here", "btrfs")) + table(mount(anonymous, "/there", "btrfs"), pid=5)
    knows = {"/here": frozenset[DeviceNumber](), "/there": frozenset({DISK, OTHER})}
    (only,) = file_systems(lines, {OTHER}, lambda m: knows[m.point])
    assert only.devices == {DISK, OTHER}
    assert only.number == anonymous


def test_the_upper_is_frozen_before_what_it_rests_on() -> None:
    lower, middle, upper = system("/lower", DM), system("/middle", LOOP), system("/upper", LOOP2)
    for order in ([lower, middle, upper], [upper, lower, middle], [middle, upper, lower]):
        assert points(in_freezing_order(order, BENEATH)) == ["/upper", "/middle", "/lower"]


def test_those_side_by_side_keep_their_order() -> None:
    one, two = system("/one", DM), system("/two", OTHER)
    assert points(in_freezing_order([one, two], BENEATH)) == ["/one", "/two"]
    assert points(in_freezing_order([two, one], BENEATH)) == ["/two", "/one"]


def test_what_holds_difference_storage_comes_last() -> None:
    storage, lower, upper = system("/storage", OTHER), system("/lower", DM), system("/upper", LOOP)
    order = in_freezing_order([storage, lower, upper], BENEATH, [OTHER])
    assert points(order) == ["/upper", "/lower", "/storage"]


def test_several_with_difference_storage_are_ordered_among_themselves() -> None:
    lower, upper, other = system("/lower", DM), system("/upper", LOOP), system("/other", OTHER)
    order = in_freezing_order([lower, upper, other], BENEATH, [DM, LOOP])
    assert points(order) == ["/other", "/upper", "/lower"]


def test_difference_storage_above_what_it_serves_is_a_circle() -> None:
    with pytest.raises(Unsupported, match=r"circle.*/upper.*; use --no-freeze"):
        in_freezing_order([system("/lower", DM), system("/upper", LOOP)], BENEATH, [LOOP])


def test_a_circle_of_two_is_refused() -> None:
    beneath = {LOOP: {OTHER}, LOOP2: {DISK}, DISK: {LOOP}, OTHER: {LOOP2}}
    with pytest.raises(Unsupported, match="in a circle"):
        in_freezing_order([system("/one", DISK), system("/two", OTHER)], beneath)


def test_a_file_system_that_rests_on_itself_is_refused() -> None:
    beneath = {LOOP: {DM}, DM: {LOOP, DISK}}
    with pytest.raises(Unsupported, match="/dm -> /dm"):
        in_freezing_order([system("/dm", DM)], beneath)


def test_a_btrfs_that_keeps_one_of_its_own_devices_is_refused() -> None:
    with pytest.raises(Unsupported, match="in a circle"):
        in_freezing_order([system("/btrfs", DM, LOOP)], BENEATH)


def test_what_is_above_and_beneath_ends_in_circles_too() -> None:
    beneath = {LOOP: {DM}, DM: {LOOP, DISK}}
    assert stack.all_above([DISK], beneath) == {DM, LOOP}
    assert stack.all_beneath([LOOP], beneath) == {DM, LOOP, DISK}
    assert stack.all_beneath([LOOP2], BENEATH) == {LOOP, DM, PART, DISK}
