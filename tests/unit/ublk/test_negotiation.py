# SPDX-License-Identifier: MIT
"""What is asked of each kernel, and what is made of its answer: drivers are stood for by what they granted."""

import errno
from dataclasses import dataclass

import pytest

from blksnap_ublk.ublk.features import ZERO_COPY, Features
from blksnap_ublk.ublk.negotiation import DataPath, Recovery, Wish, attempts, settle

RECOVERY = Features.USER_RECOVERY | Features.USER_RECOVERY_REISSUE
ALWAYS = Features.CMD_IOCTL_ENCODE | Features.URING_CMD_COMP_IN_TASK


NOTHING = Features(0)


@dataclass
class Driver:
    """ADD_DEV of one kernel: clears what it does not know, refuses what it cannot combine."""

    knows: Features
    possible: Features | None
    refuses: Features = NOTHING

    def add(self, asked: Features) -> Features | None:
        return None if asked & self.refuses else asked & self.knows | ALWAYS

    def make(self, wish: Wish) -> Features:
        for flags in attempts(wish, self.possible):
            granted = self.add(flags)
            if granted is not None:
                return granted
        pytest.fail("refused altogether")


OLD = RECOVERY | ALWAYS | Features.USER_COPY | Features.NEED_GET_DATA
LINUX_6_5 = Driver(knows=OLD, possible=OLD | Features.SUPPORT_ZERO_COPY)
LINUX_6_12 = Driver(knows=OLD | Features.ZONED, possible=OLD | Features.ZONED)
LINUX_6_15 = Driver(knows=OLD | Features.SUPPORT_ZERO_COPY, possible=OLD | Features.SUPPORT_ZERO_COPY)
MODERN = OLD | ZERO_COPY | Features.UPDATE_SIZE | Features.QUIESCE | Features.USER_RECOVERY_FAIL_IO
LINUX_6_16 = Driver(knows=MODERN, possible=MODERN)
LINUX_7_3 = Driver(
    knows=MODERN | Features.SAFE_STOP_DEV | Features.NO_AUTO_PART_SCAN,
    possible=MODERN | Features.SAFE_STOP_DEV | Features.NO_AUTO_PART_SCAN | Features.BATCH_IO,
)
OLD_KERNELS = [LINUX_6_5, LINUX_6_12, LINUX_6_15]
NEW_KERNELS = [LINUX_6_16, LINUX_7_3]


@pytest.mark.parametrize("driver", OLD_KERNELS)
def test_old_kernels_copy(driver: Driver) -> None:
    granted = driver.make(Wish())
    assert settle(Wish(), granted) is DataPath.COPY
    assert RECOVERY in granted


@pytest.mark.parametrize("driver", NEW_KERNELS)
def test_new_kernels_do_zero_copy(driver: Driver) -> None:
    granted = driver.make(Wish())
    assert settle(Wish(), granted) is DataPath.ZERO_COPY
    assert RECOVERY | Features.USER_COPY in granted


@pytest.mark.parametrize("driver", OLD_KERNELS)
def test_zero_copy_that_is_not_granted_is_an_error(driver: Driver) -> None:
    wish = Wish(data_path=DataPath.ZERO_COPY)
    with pytest.raises(OSError, match="AUTO_BUF_REG") as raised:
        settle(wish, driver.make(wish))
    assert raised.value.errno == errno.EOPNOTSUPP


def test_a_target_that_needs_copies() -> None:
    granted = LINUX_7_3.make(Wish())
    assert settle(Wish(), granted, target_needs_copy="it is slow") is DataPath.COPY
    with pytest.raises(OSError, match="it is slow"):
        settle(Wish(data_path=DataPath.ZERO_COPY), granted, target_needs_copy="it is slow")


def test_the_copy_way_does_not_ask_for_registered_buffers() -> None:
    granted = LINUX_7_3.make(Wish(data_path=DataPath.COPY))
    assert not granted & ZERO_COPY
    assert settle(Wish(data_path=DataPath.COPY), granted) is DataPath.COPY


def test_no_user_copy_is_an_error() -> None:
    with pytest.raises(OSError, match=r"6\.5"):
        settle(Wish(), RECOVERY)


def test_recovery_that_is_refused_is_an_error() -> None:
    wish = Wish(recovery=Recovery.FAIL)
    with pytest.raises(OSError, match="USER_RECOVERY_FAIL_IO"):
        settle(wish, LINUX_6_12.make(wish))
    assert settle(wish, LINUX_6_16.make(wish)) is DataPath.ZERO_COPY


@pytest.mark.parametrize("recovery", Recovery)
def test_recovery_sets_are_legal(recovery: Recovery) -> None:
    legal = {
        Features(0),
        RECOVERY,
        Features.USER_RECOVERY | Features.USER_RECOVERY_FAIL_IO,
    }
    mask = RECOVERY | Features.USER_RECOVERY_FAIL_IO
    for flags in attempts(Wish(recovery=recovery), LINUX_7_3.possible):
        assert flags & mask in legal
        assert Features.QUIESCE not in flags or Features.USER_RECOVERY in flags


@pytest.mark.parametrize("refused", [Features.AUTO_BUF_REG, Features.UPDATE_SIZE, ZERO_COPY | Features.QUIESCE])
def test_a_refusal_is_followed_by_a_smaller_wish(refused: Features) -> None:
    driver = Driver(LINUX_7_3.knows, LINUX_7_3.possible, refuses=refused)
    granted = driver.make(Wish())
    assert not granted & refused
    assert RECOVERY | Features.USER_COPY in granted


def test_attempts_shrink_and_end_with_the_least() -> None:
    tried = attempts(Wish(part_scan=False), LINUX_7_3.possible)
    assert Features.NO_AUTO_PART_SCAN in tried[0]
    assert tried[-1] == Features.USER_COPY | Features.CMD_IOCTL_ENCODE | RECOVERY
    assert len(tried) == len(set(tried))


def test_without_get_features_everything_is_tried() -> None:
    assert ZERO_COPY in attempts(Wish(), None)[0]
