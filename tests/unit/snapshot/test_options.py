# SPDX-License-Identifier: MIT
"""Options that cannot be are refused before anything is touched."""

import pytest

from blksnap_ublk.errors import UsageError
from blksnap_ublk.snapshot.attach import AttachOptions
from blksnap_ublk.snapshot.create import CreateOptions
from blksnap_ublk.snapshot.spec import parse_specs


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("name", ""),
        ("name", "a/b"),
        ("name", "-x"),
        ("name", "x" * 65),
        ("queues", 0),
        ("queues", 65),
        ("depth", 0),
        ("depth", 4097),
        ("tracking_block", 2048),
        ("tracking_block", 65535),
        ("tracking_block", 128 << 20),
        ("unit", 256),
        ("unit", 5000),
        ("unit", 128 << 10),
    ],
)
def test_attach_refuses(field: str, value: object) -> None:
    option = "--" + field.replace("_", "-")
    with pytest.raises(UsageError, match=option):
        AttachOptions(**{field: value})  # type: ignore[arg-type]


def test_attach_takes_what_is_in_bounds() -> None:
    AttachOptions("sdb", 4, 4096, 64 << 20, 512)


def test_create_needs_storage() -> None:
    with pytest.raises(UsageError, match="--storage"):
        CreateOptions([])


def test_create_refuses_a_limit_that_is_none() -> None:
    with pytest.raises(UsageError, match="--limit"):
        CreateOptions(parse_specs(["/x"]), limit=0)


@pytest.mark.parametrize(
    ("field", "value"),
    [("on_overflow", "pause"), ("on_overflow", "pause:0"), ("copy_rate", 0), ("copy_rate", 4096)],
)
def test_create_refuses_what_storage_cannot_do(field: str, value: object) -> None:
    option = "--" + field.replace("_", "-")
    with pytest.raises(UsageError, match=option):
        CreateOptions(parse_specs(["/x"]), **{field: value})  # type: ignore[arg-type]


def test_create_takes_what_storage_can_do() -> None:
    options = CreateOptions(parse_specs(["/x"]), limit=1 << 30, on_overflow="pause:5", wipe=True, copy_rate=1 << 20)
    storage = options.storage("key", 4096)
    assert (storage.on_overflow, storage.limit, storage.wipe, storage.copy_rate) == ("pause:5", 1 << 30, True, 1 << 20)
    assert CreateOptions(parse_specs(["/x"])).storage("key", 4096).on_overflow == "break"


def test_create_joins_one_storage_or_has_its_own() -> None:
    CreateOptions(join="0123abcd-0000-4000-8000-000000000001")
    with pytest.raises(UsageError, match="joins the storage"):
        CreateOptions(parse_specs(["/x"]), join="0123")
    with pytest.raises(UsageError, match="--limit"):
        CreateOptions(limit=1 << 30, join="0123")
    for said in ({"on_overflow": "break"}, {"wipe": True}, {"copy_rate": 1 << 20}):
        with pytest.raises(UsageError, match="joins the storage"):
            CreateOptions(join="0123", **said)
