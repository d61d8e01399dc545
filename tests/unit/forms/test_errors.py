# SPDX-License-Identifier: MIT
"""Errors: one line each, one exit code and one varlink name for each class."""

import errno
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blksnap_ublk.errors import (
    ERROR_CLASSES,
    BlksnapError,
    Busy,
    Failed,
    NotFound,
    Unsupported,
    Untrusted,
    UsageError,
    errno_symbol,
    from_os_error,
    with_exit_code,
)


def test_the_exit_codes_of_the_contract() -> None:
    codes = {Failed: 1, UsageError: 2, NotFound: 3, Busy: 4, Unsupported: 5, Untrusted: 6}
    assert {kind: kind.exit_code for kind in ERROR_CLASSES} == codes
    assert len({kind.error_name for kind in ERROR_CLASSES}) == len(ERROR_CLASSES)


def test_the_line_of_the_contract() -> None:
    error = Busy("in use by mount /data", subject="/dev/sdb", errno="EBUSY", advice="unmount it first")
    assert str(error) == error.message == "/dev/sdb: in use by mount /data (EBUSY); unmount it first"


@given(st.text(), st.text() | st.none(), st.text() | st.none())
def test_messages_are_one_line_and_can_be_written(text: str, subject: str | None, advice: str | None) -> None:
    message = BlksnapError(text, subject=subject, advice=advice).message
    assert len(message.splitlines()) <= 1
    message.encode()


def test_bytes_that_are_no_utf8_are_escaped() -> None:
    assert Failed("gone", subject=os.fsdecode(b"/\xff")).message == "/\\udcff: gone"


@pytest.mark.parametrize(
    ("number", "kind"),
    [
        (errno.EBUSY, Busy),
        (errno.ETXTBSY, Busy),
        (errno.EOPNOTSUPP, Unsupported),
        (errno.ENOSYS, Unsupported),
        (errno.ENOENT, Failed),
        (errno.EIO, Failed),
    ],
)
def test_system_errors(number: int, kind: type[BlksnapError]) -> None:
    error = from_os_error(OSError(number, os.strerror(number), "/a"), advice="look")
    assert type(error) is kind
    assert error.message == f"/a: {os.strerror(number)} ({errno.errorcode[number]}); look"
    assert from_os_error(OSError(number, "x", "/a"), subject="/b").message.startswith("/b: x (")


def test_a_system_error_without_number() -> None:
    assert from_os_error(OSError("AF_UNIX path too long")).message == "AF_UNIX path too long"
    assert errno_symbol(None) is None
    assert errno_symbol(99999) is None


def test_errors_by_exit_code() -> None:
    assert type(with_exit_code("x", 5)) is Unsupported
    assert type(with_exit_code("x", -9)) is Failed
