# SPDX-License-Identifier: MIT
"""The filter for LVM: what is added to its configuration, and when nothing is."""

import shutil
import subprocess
from pathlib import Path

import pytest

from blksnap_ublk.errors import Failed
from blksnap_ublk.install import Installable, install, lvm_filter, uninstall

LOCAL = "etc/lvm/lvmlocal.conf"
COMMENTS = 'local {\n\t# global_filter = [ "r|x|" ]\n}\n'


def _put(root: Path, name: str, text: str) -> Path:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


@pytest.mark.parametrize("before", [None, "", COMMENTS, "local {\n}", "devices {\n\tscan_lvs = 0\n}\n"])
def test_added_once_and_taken_away(tmp_path: Path, before: str | None) -> None:
    if before is not None:
        _put(tmp_path, LOCAL, before)
    (path,) = install(Installable.LVM, tmp_path)
    text = path.read_text()
    assert path == tmp_path / LOCAL
    assert text.startswith(before or "")
    assert install(Installable.LVM, tmp_path) == [path]
    assert path.read_text() == text
    assert uninstall(Installable.LVM, tmp_path) == [path]
    assert path.read_text().rstrip("\n") == (before or "").rstrip("\n")
    assert uninstall(Installable.LVM, tmp_path) == []


@pytest.mark.parametrize("name", ["etc/lvm/lvm.conf", LOCAL])
@pytest.mark.parametrize(
    "text", ['devices {\n\tglobal_filter = [ "a|[^/]|", "r|.*|" ]\n}\n', 'devices/global_filter="r|x|"\n']
)
def test_an_administrators_filter_is_left_alone(tmp_path: Path, name: str, text: str) -> None:
    path = _put(tmp_path, name, text)
    with pytest.raises(Failed, match="first in it"):
        install(Installable.LVM, tmp_path)
    assert path.read_text() == text
    path.write_text(text.replace("r|x|", lvm_filter.PATTERN).replace("a|[^/]|", lvm_filter.PATTERN))
    assert lvm_filter.lvm_settings(tmp_path).filters_ours
    install(Installable.LVM, tmp_path)
    assert lvm_filter.uninstall_filter(tmp_path) is None


@pytest.mark.skipif(shutil.which("lvmconfig") is None, reason="no lvm2")
@pytest.mark.parametrize("before", [COMMENTS, "devices {\n\tscan_lvs = 0\n}\n"])
def test_lvm_reads_what_was_written(tmp_path: Path, before: str) -> None:
    _put(tmp_path, "etc/lvm/lvm.conf", "devices {\n\tmd_component_detection = 0\n}\n")
    _put(tmp_path, LOCAL, before)
    install(Installable.LVM, tmp_path)
    command = ["lvmconfig", "--type", "current", "devices"]
    environment = {
        "LVM_SYSTEM_DIR": str(tmp_path / "etc/lvm"),
        "LVM_SUPPRESS_FD_WARNINGS": "1",
        "PATH": "/sbin:/usr/sbin",
    }
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert f'global_filter="{lvm_filter.PATTERN}"' in done.stdout.replace("[", "").replace("]", ""), done.stderr
    assert "md_component_detection=0" in done.stdout
    assert ("scan_lvs=0" in done.stdout) == ("scan_lvs" in before)
