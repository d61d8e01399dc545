# SPDX-License-Identifier: MIT
"""The six steps of the scenario. Each tells what it does, and raises NotAsPromised when it finds something else."""

from __future__ import annotations

import hashlib
import os
import time
from dataclasses import dataclass, field
from pathlib import Path

from blksnap_ublk import connect
from demo import blocks
from demo.commands import blksnap, blksnap_json, run
from demo.disks import Bench, is_mounted, mounted
from demo.load import Load
from demo.narration import check, mib, tell

SMALL_STORAGE_SECTORS = 2048
ROUND_LIMIT = 600.0
OVERFLOW_LIMIT = 600.0


@dataclass
class Found:
    """What steps tell the following ones. `checksums`: of the files that the load leaves alone."""

    device: str = ""
    checksums: dict[str, str] = field(default_factory=dict)
    first_cursor: str = ""


def make_file_system(bench: Bench, found: Found) -> None:
    """Step 1: attach, ext4, files with known checksums."""
    found.device = blksnap("attach", bench.origin, "--name", "demo").stdout.strip()
    listed = blksnap_json("list")["devices"][0]
    tell(f"{bench.origin} is now {found.device}, data goes by {listed['data_path']}")
    run("mkfs.ext4", "-q", found.device)
    run("mount", found.device, str(bench.mount_point))
    known = bench.mount_point / "known"
    known.mkdir()
    for n in range(8):
        (known / f"file{n}").write_bytes(os.urandom(bench.size // 512 + n))
    os.sync()
    # The first trim of a mount covers all free space, which would count as changed; later ones what was freed since.
    run("fstrim", str(bench.mount_point))
    found.checksums = _checksums(known)
    tell(f"ext4 on it, with {len(found.checksums)} files whose checksums are known")


def first_snapshot(bench: Bench, found: Found) -> str:
    """Step 2: a snapshot under load, full copy of its image, file system check, checksums; its id."""
    # Two ranges of the first file and all of the second.
    half = bench.storage[0].stat().st_size // 512 // 2 // 8 * 8
    specs = [f"{bench.storage[0]}:0+{half},{half}+{half}", f"{bench.storage[1]}:0+{2 * half}"]
    taken = blksnap_json("snapshot", "create", "demo", "--storage", specs[0], "--storage", specs[1])
    image = taken["images"][0]
    found.first_cursor = image["cursor"]
    tell(f"image {image['image']}, cursor {found.first_cursor}, writes were held for {taken['gate_us']} µs")
    check("the file system was frozen for the instant", taken["frozen"])
    blocks.full_copy(image["image"], bench.size, bench.copy)
    tell(f"full copy of the image made: {mib(bench.size)}")
    _check_image(bench, found, image["image"])
    return str(taken["id"])


def image_stays(bench: Bench, snapshot: str, load: Load) -> None:
    """Step 3: the image does not change while the writes go on."""
    image = _image_of(snapshot)
    hashes = []
    for _ in range(3):
        hashes.append(blocks.sha256(image, bench.size))
        load.wait_for_round(ROUND_LIMIT)
    check("the hash of the image, taken three times under load, is the same", len(set(hashes)) == 1, hashes)
    different = blocks.first_difference(image, bench.size, bench.copy)
    check("the image is still what was copied", different is None, f"they differ at {different}")
    shown = blksnap_json("snapshot", "show", snapshot)
    check("the snapshot is active", shown["state"] == "active", shown["error"])
    tell(f"the storage holds {mib(shown['storage']['used'])} of old data")
    tell(f"so far {load.rounds} rounds of fio verified, {load.files} file operations, {load.trims} times fstrim")


def incremental_copy(bench: Bench, found: Found, first: str, load: Load) -> None:
    """Step 4: a second snapshot; the changes since the first make its copy equal to the second image."""
    blksnap("snapshot", "destroy", first)
    load.wait_for_round(ROUND_LIMIT)
    taken = blksnap_json("snapshot", "create", "demo", "--storage", str(bench.storage[0]))
    image = taken["images"][0]["image"]
    with connect() as client:
        changes = client.changes("demo", since=found.first_cursor)
    check("the changes since the first cursor are known", not changes.all, changes.reason)
    read = blocks.apply(image, [(int(start), int(length)) for start, length in changes.ranges], bench.copy)
    tell(f"{len(changes.ranges)} changed ranges read: {mib(read)}, {100 * read / bench.size:.1f} % of the disk")
    different = blocks.first_difference(image, bench.size, bench.copy)
    check("first copy + changes = second image, byte for byte", different is None, f"they differ at {different}")
    _check_image(bench, found, image)
    blksnap("snapshot", "destroy", taken["id"])


def overflow(bench: Bench, load: Load) -> None:
    """Step 5: a storage that is too small harms the snapshot, and nobody else."""
    spec = f"{bench.storage[1]}:0+{SMALL_STORAGE_SECTORS}"
    taken = blksnap_json("snapshot", "create", "demo", "--storage", spec)
    end = time.monotonic() + OVERFLOW_LIMIT
    shown = taken
    with connect() as client:
        while shown["state"] == "active" and time.monotonic() < end:
            load.check()
            time.sleep(0.2)
            shown = {"state": client.show_snapshot(taken["id"]).state.value}
    shown = blksnap_json("snapshot", "show", taken["id"])
    check("the snapshot says overflown", shown["state"] == "overflown", shown["state"])
    tell(f"its error: {shown['error']}")
    failed = blocks.read_error(shown["images"][0]["image"], bench.size)
    check("its image answers EIO", failed == "EIO", failed)
    blksnap("snapshot", "check", taken["id"], expected=6)
    load.wait_for_round(ROUND_LIMIT)
    check("fio noticed nothing: it goes on and verifies", True)
    blksnap("snapshot", "destroy", taken["id"])


def leave(bench: Bench, found: Found) -> None:
    """Step 6: detach refuses while mounted; afterwards the origin holds all the data."""
    refused = blksnap("detach", "demo", expected=4)
    point = str(bench.mount_point)
    check("detach refuses while mounted, and names the mount", point in refused.stderr, refused.stderr)
    last = bench.mount_point / "known" / "last"
    last.write_bytes(os.urandom(bench.size // 256))  # not synced: dirty in the page cache
    found.checksums = _checksums(bench.mount_point / "known")
    run("umount", point)
    blksnap("detach", "demo")
    run("e2fsck", "-fn", bench.origin)
    with mounted(bench.origin, bench.mount_point, "-o", "ro"):
        same = _checksums(bench.mount_point / "known") == found.checksums
    check("the origin, mounted directly, holds all the data", same)


def unmount_all(bench: Bench) -> None:
    """For cleaning up after a failure."""
    for point in (bench.image_mount_point, bench.mount_point):
        if is_mounted(point):
            run("umount", str(point))


def _check_image(bench: Bench, found: Found, image: str) -> None:
    run("e2fsck", "-fn", image)
    tell("the file system check of the image finds nothing wrong")
    with mounted(image, bench.image_mount_point, "-o", "ro"):
        same = _checksums(bench.image_mount_point / "known") == found.checksums
    check("the known files in the image have their checksums", same)


def _image_of(snapshot: str) -> str:
    return str(blksnap_json("snapshot", "show", snapshot)["images"][0]["image"])


def _checksums(directory: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(directory.iterdir())}
