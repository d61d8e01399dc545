# SPDX-License-Identifier: MIT
"""Does the checker see what it is for? Stories whose images are wrong in one way, in memory."""

from __future__ import annotations

import time

from tests.speaking.checker import Instant, complaints, now
from tests.speaking.sectors import SECTOR
from tests.speaking.writers import MOST_SECTORS, Write, Writer

SECTORS = 2 * MOST_SECTORS


class Disks:
    """Two devices in memory, and a writer that has written every sector of them."""

    def __init__(self) -> None:
        self.content = [bytearray(SECTORS * SECTOR), bytearray(SECTORS * SECTOR)]
        self.writer = self.new_writer(0)
        self.writer.write_all()

    def new_writer(self, number: int) -> Writer:
        return Writer(number, [SECTORS] * 2, self.put, seed=number)

    def put(self, device: int, start: int, data: memoryview) -> None:
        self.content[device][start : start + len(data)] = data

    def image(self, device: int) -> bytes:
        return bytes(self.content[device])

    def images(self) -> list[bytes]:
        return [self.image(0), self.image(1)]


def instant(began: Write, returned: Write) -> Instant:
    """A take that began right after one write had ended, and returned right before another was submitted."""
    assert began.completed is not None
    return Instant(began.completed + 1, returned.submitted - 1)


def test_one_instant_is_right() -> None:
    disks = Disks()
    before = disks.writer.write(1, 3, 8)
    time.sleep(0.001)
    images = disks.images()
    after = disks.writer.write(0, 3, 8)
    assert complaints(instant(before, after), images, [disks.writer]) == []
    assert complaints(now(), disks.images(), [disks.writer]) == []


def test_what_was_written_meanwhile_may_be_there_or_not() -> None:
    disks = Disks()
    began = time.monotonic_ns()
    without = disks.images()
    disks.writer.write(0, 3, 8)
    images = disks.images()
    during = Instant(began, time.monotonic_ns())
    assert complaints(during, without, [disks.writer]) == complaints(during, images, [disks.writer]) == []


def test_one_without_the_other_before_it_is_wrong() -> None:
    """A to one device, then B to the other, both while the take is under way: the image has B alone."""
    disks = Disks()
    began = time.monotonic_ns()
    without_a = disks.image(0)
    disks.writer.write(0, 3, 2)
    disks.writer.write(1, 5, 1)
    images = [without_a, disks.image(1)]
    wrong = complaints(Instant(began, time.monotonic_ns()), images, [disks.writer])
    assert [line.partition(" holds")[0] for line in wrong] == ["device 0: sector 3", "device 0: sector 4"]


def test_two_writers_are_compared_with_each_other_too() -> None:
    disks = Disks()
    other = disks.new_writer(1)
    began = time.monotonic_ns()
    without_a = disks.image(0)
    disks.writer.write(0, 3, 1)
    other.write(1, 5, 1)
    during = Instant(began, time.monotonic_ns())
    assert len(complaints(during, [without_a, disks.image(1)], [disks.writer, other])) == 1
    assert complaints(during, disks.images(), [disks.writer, other]) == []


def test_a_lost_write_is_seen() -> None:
    disks = Disks()
    images = disks.images()
    disks.writer.write(0, 3, 1)
    time.sleep(0.001)
    (wrong,) = complaints(now(), images, [disks.writer])
    assert wrong.startswith("device 0: sector 3 holds write 0 of writer 0, but a later write")


def test_a_write_of_afterwards_is_seen() -> None:
    disks = Disks()
    taken = now()
    time.sleep(0.001)
    disks.writer.write(1, 7, 1)
    (wrong,) = complaints(taken, disks.images(), [disks.writer])
    assert wrong.startswith("device 1: sector 7 holds write")
    assert wrong.endswith("after the take")


def test_damage_is_seen() -> None:
    disks = Disks()
    first, second = disks.content
    first[5 * SECTOR + 100] ^= 1
    first[6 * SECTOR : 7 * SECTOR] = first[7 * SECTOR : 8 * SECTOR]
    first[8 * SECTOR : 9 * SECTOR] = second[8 * SECTOR : 9 * SECTOR]
    first[9 * SECTOR : 10 * SECTOR] = bytes(SECTOR)
    first[10 * SECTOR : 11 * SECTOR] = b"\x5a" * SECTOR
    wrong = complaints(now(), disks.images(), [disks.writer])
    for sector, what in {
        5: "is torn",
        6: "holds sector 7 of device 0",
        8: "holds sector 8 of device 1",
        9: "holds nothing",
        10: "holds what nobody wrote",
    }.items():
        assert any(line.startswith(f"device 0: sector {sector} {what}") for line in wrong), (sector, wrong)
    assert {int(line.split()[3]) for line in wrong} == {5, 6, 8, 9, 10}
