# SPDX-License-Identifier: MIT
"""What tests on real ublk devices share: a daemon of their own, a directory in memory, and a look at what they left."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from blksnap_ublk.client import Client
from tests.filtered import granted_ways
from tests.own_daemon import OwnDaemon, own_daemon

ROOT = Path(__file__).resolve().parents[2]


def _processes() -> set[str]:
    """Our processes, and those that tests leave running most easily; `pid command`."""
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
        except OSError:
            continue
        if "blksnap_ublk." in command or command.startswith("fio "):
            found.add(f"{folder.name} {command}")
    return found


def _left_over() -> dict[str, set[str]]:
    """Everything that a test could leave on the machine."""
    null_blocks = Path("/sys/kernel/config/nullb")
    return {
        "ublk devices": {path.name for path in Path("/sys/class/ublk-char").glob("*")},
        "disks": {path.name for path in Path("/dev").glob("ublk[bc]*")},
        "loop devices": {path.parts[3] for path in Path("/sys/block").glob("loop*/loop/backing_file")},
        "dm devices": {path.parent.parent.name for path in Path("/sys/block").glob("dm-*/dm/name")},
        "null_blk disks": {path.name for path in null_blocks.glob("*") if path.is_dir()},
        "mounts": {line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()},
        "processes": _processes(),
        "files in memory": set(os.listdir("/tmp/guest")) if os.path.ismount("/tmp/guest") else set(),
        "states of fio": {path.name for place in (ROOT, Path("/")) for path in place.glob("*-verify.state")},
    }


@pytest.fixture(scope="module", autouse=True)
def nothing_stays() -> Iterator[None]:
    """Fails a module that leaves anything on the machine when all of its own clean-up is done."""
    before = _left_over()
    yield
    after = _left_over()
    new = {kind: sorted(after[kind] - before[kind]) for kind in before if after[kind] - before[kind]}
    assert not new, f"left over: {new}"


@pytest.fixture(params=["copy", "zero-copy"])
def way(request: pytest.FixtureRequest) -> str:
    """The data ways, one after the other."""
    if request.param not in granted_ways():
        pytest.skip(f"this kernel does not grant what {request.param} needs")
    return str(request.param)


@pytest.fixture(scope="module")
def daemon() -> Iterator[OwnDaemon]:
    """A daemon of the module's own, which must leave nothing."""
    with own_daemon() as running:
        yield running


@pytest.fixture
def client(daemon: OwnDaemon) -> Iterator[Client]:
    with daemon.client() as connected:
        yield connected


@pytest.fixture
def folder() -> Iterator[Path]:
    """A directory of the test's own, in memory where the guest offers that."""
    base = "/tmp/guest" if os.path.ismount("/tmp/guest") else None
    with tempfile.TemporaryDirectory(dir=base) as path:
        yield Path(path)
