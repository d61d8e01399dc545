# SPDX-License-Identifier: MIT
import os
import threading
from pathlib import Path

import pytest

from blksnap_ublk.host.number import DeviceNumber
from blksnap_ublk.snapshot.storage import DescriptorRegistry, Identity

ONE, TWO = Identity(DeviceNumber(8, 0), 0), Identity(DeviceNumber(8, 0), 77)


def _is_open(descriptor: int) -> bool:
    return Path(f"/proc/self/fd/{descriptor}").is_symlink()


def _null() -> int:
    return os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)


def test_one_descriptor_serves_all_users_and_goes_with_the_last() -> None:
    registry = DescriptorRegistry()
    first = registry.acquire(ONE, _null)
    assert registry.acquire(ONE, lambda: pytest.fail("opened twice")) == first
    assert registry.acquire(TWO, _null) != first
    assert registry.held() == {ONE, TWO}
    registry.release(ONE)
    assert _is_open(first)
    registry.release(ONE)
    assert not _is_open(first)
    registry.release(TWO)
    with pytest.raises(KeyError):
        registry.release(ONE)


def test_a_failed_open_leaves_nothing() -> None:
    registry = DescriptorRegistry()
    with pytest.raises(FileNotFoundError):
        registry.acquire(ONE, lambda: os.open("/no/such/file", os.O_RDONLY))
    assert registry.held() == frozenset()


def test_an_adopted_descriptor_is_used_unless_there_is_one() -> None:
    registry = DescriptorRegistry()
    first, second = _null(), _null()
    assert registry.adopt(ONE, first) == first
    assert registry.adopt(ONE, second) == first
    assert not _is_open(second)
    assert registry.acquire(ONE, lambda: pytest.fail("opened twice")) == first
    for _ in range(3):
        registry.release(ONE)
    assert not _is_open(first)


def test_a_device_that_does_not_open_keeps_nobody_else_waiting() -> None:
    registry = DescriptorRegistry()
    opening, go = threading.Event(), threading.Event()

    def slowly() -> int:
        opening.set()
        go.wait()
        return _null()

    registry.acquire(ONE, _null)
    slow = threading.Thread(target=registry.acquire, args=(TWO, slowly))
    same = threading.Thread(target=registry.acquire, args=(TWO, lambda: pytest.fail("opened twice")))
    slow.start()
    assert opening.wait(60)
    same.start()
    registry.acquire(ONE, lambda: pytest.fail("opened twice"))
    registry.release(ONE)
    go.set()
    slow.join()
    same.join()
    registry.release(TWO)
    assert registry.held() == {ONE, TWO}
    registry.release(TWO)
    registry.release(ONE)
