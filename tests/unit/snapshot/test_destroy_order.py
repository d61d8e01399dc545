# SPDX-License-Identifier: MIT
"""An image that is half removed goes before anything older in its chain."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from blksnap_ublk.errors import Busy
from blksnap_ublk.snapshot import destroy, naming, state_files
from blksnap_ublk.snapshot.catalogue import Phase
from blksnap_ublk.snapshot.state_files import ImageStatus
from tests.unit.snapshot.test_broken import IMAGE, IMAGE_STATE, MAGIC, SNAPSHOT, STORAGE, UNIT, Machine


def test_an_older_snapshot_waits_for_a_younger_one_that_is_half_removed(tmp_path: Path) -> None:
    context = Machine(tmp_path).context
    younger = msgspec.structs.replace(IMAGE, key="k2", serial=2, change_number=2)
    going = msgspec.structs.replace(
        SNAPSHOT, id="0123abcd-0000-4000-8000-000000000002", phase=Phase.DESTROYING, images=[younger]
    )
    context.catalogue.put_storage(STORAGE)
    context.catalogue.put_snapshot(SNAPSHOT)
    context.catalogue.put_snapshot(going)
    head = IMAGE_STATE.pack(MAGIC, state_files._VERSION, IMAGE.size, UNIT, 2, ImageStatus.GONE, 0, 5, 4, 0)
    (context.state.directory / naming.image_state_name(younger)).write_bytes(head)
    with pytest.raises(Busy, match=f"the removal of snapshot {going.id}, which is younger, has not ended"):
        destroy.destroy_locked(context, SNAPSHOT, force=False)
    assert context.catalogue.snapshot(SNAPSHOT.id) == SNAPSHOT
