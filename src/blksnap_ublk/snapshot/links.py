# SPDX-License-Identifier: MIT
"""What leads to our devices by name: the symlinks below `/dev/blksnap`, and what udev is told of each device.

    /dev/blksnap/NAME                a filtered device
    /dev/blksnap/SNAPSHOT-ID/NAME    an image
    /dev/blksnap/origins/NAME        an origin: for filters, as LVM has them, that must know one by its path

Partitions have the same with `-partN`. The links are made here, so that they are there without udev; where udev runs
its rules make the same ones, so that it knows them too, and move those of `/dev/disk` from the origin to the filtered
device. The role files remember for whom links were made.
"""

from __future__ import annotations

import errno
import logging
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from blksnap_ublk.errors import NotFound
from blksnap_ublk.host import blockdev, sysfs, udev
from blksnap_ublk.host.number import DeviceNumber
from blksnap_ublk.host.udev import Udev
from blksnap_ublk.install.udev_rules import RULES_NAME
from blksnap_ublk.snapshot.catalogue import DeviceEntry
from blksnap_ublk.snapshot.role import TOKEN, Kind, Role

_UDEV_LIMIT = 10.0  # seconds for the rules to be applied to a device
_IDLE_LIMIT = 3.0  # seconds for a udev without our rules to have handled its events
_log = logging.getLogger(__name__)


class Links:
    """The role files and links of one daemon. Methods may be called from any thread.

    Those that write role files raise OSError; a link that cannot be made, or a udev that does not answer, is logged.
    """

    def __init__(self, runtime: Path, *, dev: Path = Path("/dev"), root: Path = Path("/")) -> None:
        """`runtime` is the runtime directory. Links are made below `dev`, udev is looked for below `root`."""
        self._runtime = runtime.absolute()
        self._roles = self._runtime / "udev"
        self._dev = dev
        self._udev = Udev(root)
        self._lock = threading.Lock()

    def filtered(self, entry: DeviceEntry) -> None:
        """To be called before the disk of a filtered device is started: tells what it and its origin are."""
        assert entry.served is not None
        number = DeviceNumber(*entry.number)
        role = Role.of_filtered(entry.name, entry.origin, self._udev.links(number))
        self._write(f"ublkb{entry.served.ublk_id}", role)
        self._write(str(number), Role.of_origin(entry.name, entry.origin))

    def image(self, snapshot: str, name: str, origin: str, ublk_id: int) -> None:
        """The same for an image of the device `name`."""
        self._write(f"ublkb{ublk_id}", Role.of_image(snapshot, name, origin))

    def appear(self, ublk_id: int) -> None:
        """To be called when the disk is there: makes its links, and waits until udev knows it.

        Nothing happens for a device without a role.
        """
        name = f"ublkb{ublk_id}"
        role = self._read(name)
        number = _number_of(name)
        if role is None or number is None:
            return
        self._link(role, number)
        self._wait(number, role.token)

    def origin_taken(self, number: DeviceNumber) -> None:
        """To be called when the filtered device is there: the links of its origin go, but for ours."""
        role = self._read(str(number))
        if role is not None:
            self._link(role, number)
            self._announce(number)
            self._wait(number, role.token)

    def origin_released(self, number: DeviceNumber) -> None:
        """To be called when the origin is free again: its links return."""
        role = self._read(str(number))
        if role is not None:
            self._remove_all(lambda other: (other.kind, other.origin) == (Kind.FILTERED, role.origin))
        self._remove(str(number))
        self._remove_dangling()
        self._announce(number)
        self._wait(number, None)

    def remove(self, ublk_id: int) -> None:
        """To be called when the disk of a filtered device or an image has gone."""
        self._remove(f"ublkb{ublk_id}")

    def snapshot_gone(self, snapshot: str) -> None:
        """To be called when a snapshot is forgotten: also images whose disks were removed by somebody else go."""
        self._remove_all(lambda role: role.snapshot == snapshot)

    def known(self) -> set[str]:
        """The names of all role files."""
        with suppress(OSError):
            return {name for name in os.listdir(self._roles) if not name.endswith(".writing")}
        return set()

    def sweep(self, stale: set[str], wanted: Mapping[str, Role]) -> None:
        """Removes the stale role files with their links, and makes again what is missing of the wanted ones."""
        for name in stale:
            role = self._read(name)
            self._remove(name)
            number = _number_of(name)
            if number is not None and (role is None or role.kind is Kind.ORIGIN):
                self._announce(number)
        for name, role in wanted.items():
            number = _number_of(name)
            if number is None:
                continue
            found = self._read(name)
            if found is None or not found.same_as(role):
                self._write(name, role)
                self._announce(number)
            self._link(role, number)
        self._remove_dangling()

    # Role files

    def _write(self, name: str, role: Role) -> None:
        self._remove(name)
        self._roles.mkdir(mode=0o700, exist_ok=True)
        path = self._roles / name
        writing = self._roles / f"{name}.writing"
        writing.write_text(role.encode())
        writing.rename(path)

    def _read(self, name: str) -> Role | None:
        try:
            return Role.decode((self._roles / name).read_text())
        except (OSError, ValueError):
            return None

    def _remove(self, name: str) -> None:
        role = self._read(name)
        (self._roles / name).unlink(missing_ok=True)
        if role is not None:
            self._unlink(role, name)

    def _remove_all(self, condition: Callable[[Role], bool]) -> None:
        for name in self.known():
            role = self._read(name)
            if role is not None and condition(role):
                self._remove(name)

    # Links

    def _link(self, role: Role, number: DeviceNumber) -> None:
        for node, suffix in _nodes(number):
            path = self._dev / (role.link + suffix)
            try:
                with self._lock:
                    _point(path, os.path.relpath(self._dev / node, path.parent))
            except OSError as error:
                _log.warning("the link %s cannot be made: %s", path, error)

    def _unlink(self, role: Role, name: str) -> None:
        """Only links to this device, or to nothing: another one may have taken the name."""
        number = _number_of(name)
        own = {node for node, _ in _nodes(number)} if number is not None else set()
        path = self._dev / role.link
        with self._lock, suppress(OSError):
            for link in [path, *path.parent.glob(f"{path.name}-part[0-9]*")]:
                if link.is_symlink() and (link.resolve().name in own | {name} or not link.exists()):
                    link.unlink()
            self._remove_if_empty(path.parent)

    def _remove_dangling(self) -> None:
        base = self._dev / "blksnap"
        with self._lock, suppress(OSError):
            for path in [*base.glob("*/*"), *base.glob("*")]:
                if path.is_symlink() and not path.exists():
                    path.unlink()
            for directory in [path for path in base.glob("*") if path.is_dir() and not path.is_symlink()]:
                self._remove_if_empty(directory)

    def _remove_if_empty(self, directory: Path) -> None:
        base = self._dev / "blksnap"
        for each in dict.fromkeys([directory, base]):
            try:
                each.rmdir()
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.ENOENT):
                    raise

    # udev

    def _announce(self, number: DeviceNumber) -> None:
        """The disk first: its partitions take from it what they are."""
        if self._udev.runs():
            for each in _with_partitions(number):
                with suppress(OSError):
                    udev.announce_change(each)

    def _wait(self, number: DeviceNumber, token: str | None) -> None:
        """Until udev has applied the rules to a device and its partitions since its role is what it is now."""
        if not self._udev.runs():
            return
        condition: Callable[[], bool] = self._udev.idle
        limit = _IDLE_LIMIT
        if str(self._runtime) in (self._udev.rules(RULES_NAME) or ""):
            limit = _UDEV_LIMIT

            def condition() -> bool:
                return all(self._udev.property(each, TOKEN) == token for each in _with_partitions(number))

        if not udev.wait_until(condition, limit):
            _log.warning("udev has not handled device %s within %g s; going on", number, limit)


def _point(path: Path, target: str) -> None:
    """Makes the symlink, atomically, in the place of one that leads elsewhere."""
    if path.is_symlink() and os.readlink(path) == target:
        return
    path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    making = path.with_name(f".{path.name}.making")
    making.unlink(missing_ok=True)
    making.symlink_to(target)
    making.rename(path)


def _number_of(name: str) -> DeviceNumber | None:
    """The device that a role file is called after; None where it is not there."""
    try:
        number = DeviceNumber.parse(name) if ":" in name else sysfs.number_of(Path("/sys/block") / name)
    except ValueError:
        return None
    return number if number is not None and (sysfs.BLOCK_DEVICES / str(number)).exists() else None


def _with_partitions(number: DeviceNumber) -> list[DeviceNumber]:
    try:
        return [number, *blockdev.partitions(number)]
    except (NotFound, OSError):
        return []  # it has just gone


def _nodes(number: DeviceNumber) -> Iterator[tuple[str, str]]:
    """The nodes of a device and of its partitions, below `/dev`, and what their links have at the end."""
    for each in _with_partitions(number):
        with suppress(NotFound):
            suffix = "" if each == number else f"-part{sysfs.integer(sysfs.directory(each), 'partition')}"
            yield sysfs.kernel_name(each), suffix
