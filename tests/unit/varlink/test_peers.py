# SPDX-License-Identifier: MIT
"""Other implementations of varlink understand the daemon's interface: the PyPI package, and systemd's varlinkctl."""

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.unit.fake_service import FakeService
from tests.unit.serving import serving_ublk

varlink = pytest.importorskip("varlink", reason="the PyPI package varlink is not installed")

INTERFACE = "io.blksnap.Ublk"


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    with serving_ublk(tmp_path / "socket", FakeService()):
        yield str(tmp_path / "socket")


@pytest.fixture
def peer(address: str) -> Iterator[Any]:
    with varlink.Client.new_with_address(f"unix:{address}") as client, client.open(INTERFACE) as connection:
        yield connection


def test_the_package_calls(peer: Any) -> None:
    attached = peer.Attach(device="/dev/sdb", depth=64)
    assert attached["device"]["device"] == "/dev/ublkb0"
    assert attached["device"]["depth"] == 64
    created = peer.CreateSnapshot(devices=["sdb"], storage=["/var/diff"], freeze="no")
    identity = created["snapshot"]["id"]
    assert peer.ListSnapshots()["snapshots"][0]["images"][0]["cursor"].endswith(":1")
    assert peer.ShowChanges(device="sdb", since=None)["ranges"][0] == {"start": 0, "length": 65536}
    assert peer.CheckSnapshot(snapshot=identity[:4])["trusted"] is True
    assert peer.DestroySnapshots(snapshots=[identity])["destroyed"] == [identity]


def test_the_package_gets_errors(peer: Any) -> None:
    with pytest.raises(varlink.VarlinkError) as caught:
        peer.Attach(device="/dev/gone")
    assert caught.value.error() == f"{INTERFACE}.NotFound"
    assert caught.value.parameters()["message"] == "/dev/gone: no such block device (ENOENT)"
    with pytest.raises(varlink.InvalidParameter):
        peer.CheckSnapshot()
    assert peer.ListDevices()["devices"] == []


def test_the_package_streams(peer: Any) -> None:
    peer.Attach(device="/dev/sdb")
    batches = list(peer.ReadEvents(_more=True))
    assert [event["type"] for batch in batches for event in batch["events"]] == ["attached"]
    portions = list(peer.DumpChanges(device="sdb", _more=True))
    assert len({portion["size"] for portion in portions}) == 1


def test_the_package_reads_the_description(address: str) -> None:
    with varlink.Client.new_with_address(f"unix:{address}") as client:
        described = client.get_interface(INTERFACE)
        assert {"Attach", "Device", "NotFound"} <= set(described.members)


def test_varlinkctl(address: str) -> None:
    program = shutil.which("varlinkctl")
    if program is None:
        pytest.skip("varlinkctl is not installed (systemd 255 or later has it)")

    def run(*arguments: str) -> str:
        done = subprocess.run([program, *arguments], capture_output=True, text=True, check=True, timeout=60)
        return done.stdout

    assert INTERFACE in run("info", address)
    assert "method Attach" in run("introspect", address, INTERFACE)
    devices = json.loads(run("call", "--json=short", address, f"{INTERFACE}.ListDevices", "{}"))
    assert devices == {"devices": []}
