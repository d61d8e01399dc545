# SPDX-License-Identifier: MIT
"""The rules as a text, and where they are put. What they do is seen in tests/device/test_udev.py."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from blksnap_ublk.errors import Failed
from blksnap_ublk.install import Installable, install, udev_rules, uninstall
from blksnap_ublk.snapshot.role import MAX_OTHER_LINKS, Role


def _verifies() -> bool:
    if shutil.which("udevadm") is None:
        return False
    return "verify" in subprocess.run(["udevadm", "--help"], capture_output=True, text=True).stdout


@pytest.mark.skipif(not _verifies(), reason="udevadm cannot verify rules (systemd before 254)")
def test_udev_accepts_the_rules(tmp_path: Path) -> None:
    (path,) = install(Installable.UDEV, tmp_path)
    done = subprocess.run(["udevadm", "verify", str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_jump_has_one_label_that_comes_later() -> None:
    text = udev_rules.rules_text()
    jumps = [(match.start(), match[1]) for match in re.finditer(r'GOTO="(\w+)"', text)]
    for position, label in jumps:
        assert text.count(f'LABEL="{label}"') == 1
        assert text.index(f'LABEL="{label}"') > position


def test_rules_and_role_files_speak_of_the_same_properties() -> None:
    links = [f"disk/by-id/x-{n}" for n in range(MAX_OTHER_LINKS + 2)]
    roles = [Role.of_filtered("a", "/dev/a", links), Role.of_origin("a", "/dev/a"), Role.of_image("b", "a", "/dev/a")]
    written = {line.partition("=")[0] for role in roles for line in role.encode().splitlines()}
    used = set(re.findall(r"BLKSNAP_[A-Z_0-9]+", udev_rules.rules_text()))
    assert used <= written
    assert {key for key in written if key.startswith("BLKSNAP_LINK")} <= used


def test_installed_for_a_runtime_directory_and_taken_away(tmp_path: Path) -> None:
    (path,) = install(Installable.UDEV, tmp_path, Path("/run/elsewhere"))
    assert path == tmp_path / "etc/udev/rules.d/63-storage-blksnap-ublk.rules"
    text = path.read_text()
    assert "/run/elsewhere/udev/%k" in text
    assert udev_rules.DEFAULT_RUNTIME not in text
    assert udev_rules.rules_installed(tmp_path, Path("/run/elsewhere"))
    assert not udev_rules.rules_installed(tmp_path)
    assert install(Installable.UDEV, tmp_path) == [path]
    assert udev_rules.rules_installed(tmp_path)
    assert uninstall(Installable.UDEV, tmp_path) == [path]
    assert uninstall(Installable.UDEV, tmp_path) == []
    assert list(path.parent.iterdir()) == []


def test_what_cannot_be_written_is_an_error_of_one_line(tmp_path: Path) -> None:
    (tmp_path / "etc").write_text("a file")
    with pytest.raises(Failed, match=r"ENOTDIR|EEXIST"):
        install(Installable.UDEV, tmp_path)
