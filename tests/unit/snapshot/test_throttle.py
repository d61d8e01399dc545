# SPDX-License-Identifier: MIT
"""How fast copies may write to a storage: kept with the storage, refused where no copy could be made in time."""

from pathlib import Path
from typing import Any, cast

import pytest

from blksnap_ublk.errors import NotFound, UsageError
from blksnap_ublk.snapshot import throttle
from blksnap_ublk.snapshot.catalogue import Catalogue, Phase, SnapshotEntry, StorageEntry
from blksnap_ublk.snapshot.context import Context

SNAPSHOT = SnapshotEntry(
    id="0123abcd", created="2026", phase=Phase.ACTIVE, frozen=True, gate_us=0, images=[], storage_key="s"
)
STORAGE = StorageEntry(key="s", unit=4096, limit=None, on_overflow="break", areas=[])


@pytest.fixture
def context(tmp_path: Path) -> Context:
    """No device is served: the rate is a matter of the catalogue."""
    none = cast(Any, None)
    catalogue = Catalogue(tmp_path)
    catalogue.put_storage(STORAGE)
    catalogue.put_snapshot(SNAPSHOT)
    return Context(io=none, keeper=none, disks=none, state=none, catalogue=catalogue, registry=none, emit=none)


def test_a_rate_is_kept(context: Context, tmp_path: Path) -> None:
    assert throttle.set_copy_rate(context, SNAPSHOT, 50 << 20).copy_rate == 50 << 20
    again = Catalogue(tmp_path).storage("s")
    assert again is not None
    assert again.copy_rate == 50 << 20
    assert throttle.set_copy_rate(context, SNAPSHOT, None).copy_rate is None
    assert context.catalogue.storage("s") == STORAGE


@pytest.mark.parametrize("rate", [-1, 0, 1, (1 << 20) - 1, 1 << 62])
def test_what_is_no_rate(context: Context, rate: int) -> None:
    with pytest.raises(UsageError, match=r"^--copy-rate: .* give at least 1048576 bytes \(1M\)"):
        throttle.set_copy_rate(context, SNAPSHOT, rate)
    assert context.catalogue.storage("s") == STORAGE


def test_a_storage_that_has_gone(context: Context) -> None:
    context.catalogue.remove_storage("s")
    with pytest.raises(NotFound):
        throttle.set_copy_rate(context, SNAPSHOT, 50 << 20)
