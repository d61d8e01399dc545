# SPDX-License-Identifier: MIT
"""What a guest's kernel starts with in QEMU: busybox, the modules that the root needs, and the job."""

import stat
from pathlib import Path

from tests.guest.failure import CannotStart

BUSYBOX = (Path("/usr/bin/busybox"), Path("/bin/busybox"))
DIRECTORIES = ("bin", "dev", "guest", "layers", "modules", "proc", "root", "upper")
HERE = Path(__file__).parent


def build(target: Path, root_modules: Path, job: str) -> None:
    """Writes the initramfs for a job (Job.script) as a cpio archive."""
    busybox = next((path for path in BUSYBOX if path.exists()), None)
    if busybox is None:
        raise CannotStart("busybox is missing: install busybox-static (make setup)")
    entries = [entry(name, stat.S_IFDIR | 0o755) for name in DIRECTORIES]
    entries.append(entry("dev/console", stat.S_IFCHR | 0o600, device=(5, 1)))
    entries.append(entry("bin/busybox", stat.S_IFREG | 0o755, busybox.read_bytes()))
    entries.append(entry("init", stat.S_IFREG | 0o755, (HERE / "stage1").read_bytes()))
    entries.append(entry("guest/init", stat.S_IFREG | 0o755, (HERE / "init").read_bytes()))
    entries.append(entry("guest/job", stat.S_IFREG | 0o644, job.encode()))
    for module in sorted(root_modules.iterdir()):
        entries.append(entry(f"modules/{module.name}", stat.S_IFREG | 0o644, module.read_bytes()))
    target.write_bytes(b"".join(entries) + entry("TRAILER!!!", 0))


def entry(name: str, mode: int, data: bytes = b"", device: tuple[int, int] = (0, 0)) -> bytes:
    """One file in cpio's "newc" form: a header of hexadecimal fields, the name and the data, both padded to 4 bytes."""
    path = name.encode() + b"\0"
    inode, uid, gid, links, mtime, major, minor, check = 0, 0, 0, 1, 0, 0, 0, 0
    fields = (inode, mode, uid, gid, links, mtime, len(data), major, minor, *device, len(path), check)
    header = b"070701" + b"".join(b"%08X" % field for field in fields)
    return padded(header + path) + padded(data)


def padded(data: bytes) -> bytes:
    return data + b"\0" * (-len(data) % 4)
