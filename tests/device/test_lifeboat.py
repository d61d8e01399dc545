# SPDX-License-Identifier: MIT
"""Three deaths of io within a minute: the next one serves the origins, and nothing else of what was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from blksnap_ublk import forms
from blksnap_ublk.client import Client
from blksnap_ublk.daemon.main import LIFEBOAT_AFTER
from blksnap_ublk.forms import FindingState
from demo import blocks
from tests.a_then_b import CountingWriters, expect_one_instant, numbers
from tests.fio_load import fio_load
from tests.killing import kill_and_wait
from tests.loop_devices import loop_device, missing_for_loops
from tests.own_daemon import OwnDaemon, own_daemon, wait_until

MIB = 1 << 20
SIZE = 32 * MIB
WRITERS = 2
WHY = "io processes died again and again"

missing = missing_for_loops()
pytestmark = pytest.mark.skipif(missing is not None, reason=str(missing))


@pytest.fixture
def daemon() -> Iterator[OwnDaemon]:
    with own_daemon(lifeboat=True) as running:
        yield running


def taken(client: Client, devices: list[str], folder: Path, writers: CountingWriters) -> forms.Snapshot:
    """A snapshot that shows one instant."""
    before = writers.ended()
    snapshot = client.create_snapshot(devices, storage=[str(folder)], limit=3 * SIZE)
    started = writers.started()
    expect_one_instant([numbers(image.image, WRITERS) for image in snapshot.images], before, started)
    return snapshot


def states(client: Client, snapshots: list[forms.Snapshot]) -> list[str]:
    return [client.show_snapshot(each.id).state.value for each in snapshots]


def findings(client: Client) -> list[str]:
    """What `doctor` finds about snapshots that are held in vain."""
    return [each.text for each in client.doctor() if each.name == "snapshots" and each.state is not FindingState.OK]


def test_three_deaths_make_a_lifeboat_and_then_all_is_as_new(daemon: OwnDaemon, folder: Path) -> None:
    with ExitStack() as stack:
        origins = [stack.enter_context(loop_device(folder / name, SIZE)) for name in ("first", "second")]
        client = stack.enter_context(daemon.client())
        devices = [client.attach(origin).device for origin in origins]
        stack.callback(lambda: [client.detach(device, force=True) for device in devices])
        with (
            CountingWriters(devices, WRITERS, folder) as writers,
            fio_load(devices[0], "--offset=1m", size="8m") as load,
        ):
            lost = [taken(client, devices, folder, writers) for _ in range(2)]
            for _ in range(LIFEBOAT_AFTER):
                assert states(client, lost) == ["active"] * 2, daemon.log()
                kill_and_wait(daemon, "io")
            wait_until("a lifeboat serves", lambda: "as a lifeboat" in daemon.log())
            # The origins are served, and nobody has seen an error.
            writers.check()
            load.wait_for_round()
            wait_until("control has seen it", lambda: states(client, lost) != ["active"] * 2)
            expect_lost(client, lost)
            # What happened since then is known again.
            first = taken(client, devices, folder, writers)
            for index, device in enumerate(devices):
                changes = client.changes(device, since=lost[0].images[index].cursor, until=first.id)
                assert (changes.all, changes.reason) == (True, "lifeboat")
            copy = folder / "copy"
            blocks.full_copy(first.images[0].image, SIZE, copy)
            load.wait_for_round()
            second = taken(client, devices, folder, writers)
            changes = client.changes(devices[0], since=first.images[0].cursor, until=second.id)
            assert not changes.all, changes.reason
            blocks.apply(second.images[0].image, [(int(start), int(length)) for start, length in changes.ranges], copy)
            assert blocks.first_difference(second.images[0].image, SIZE, copy) is None, "a change was missed"
            acknowledged = writers.ended()
        # B over A: the last number that was acknowledged, or a later one, is what is read for ever.
        written = numbers(origins[0], WRITERS)
        assert all(map(int.__le__, acknowledged, written))
        for device, origin in zip(devices, origins, strict=True):
            assert numbers(device, WRITERS) == numbers(origin, WRITERS) == written
            assert blocks.sha256(device, SIZE) == blocks.sha256(origin, SIZE)
        # What was lost is named, and goes when it is told to.
        (found,) = findings(client)
        assert all(each.id in found for each in lost)
        client.destroy_snapshots([each.id for each in lost])
        assert findings(client) == []
        assert states(client, [first, second]) == ["active"] * 2
        client.destroy_snapshots([first.id, second.id])


def expect_lost(client: Client, snapshots: list[forms.Snapshot]) -> None:
    """It is said which snapshots are gone and why, and none of their images gives any data."""
    for snapshot in snapshots:
        shown, check = client.show_snapshot(snapshot.id), client.check_snapshot(snapshot.id)
        assert shown.state.value == "corrupted"
        assert WHY in str(shown.error)
        assert not check.trusted
        assert WHY in str(check.reason)
        for image in snapshot.images:
            assert held_by(image.image) == b""


def held_by(image: str) -> bytes:
    """What can be read at its beginning; nothing where that fails, or its disk is empty or gone."""
    try:
        with open(image, "rb") as file:
            return file.read(1)
    except OSError:
        return b""
