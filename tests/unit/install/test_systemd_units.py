# SPDX-License-Identifier: MIT
"""The units as texts, and where they are put. What keeps descriptors is seen in tests/unit/keeper."""

import configparser
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from blksnap_ublk.install import Installable, install, systemd_units, uninstall

VERIFIER = shutil.which("systemd-analyze")


@pytest.mark.skipif(VERIFIER is None, reason="systemd-analyze is not installed")
@pytest.mark.parametrize("runtime", ["/run/blksnap-ublk", "/run/else where/50%"])
def test_systemd_accepts_the_units(tmp_path: Path, runtime: str) -> None:
    assert VERIFIER is not None
    paths = install(Installable.SYSTEMD, tmp_path, Path(runtime))
    services = [str(path) for path in paths if path.suffix == ".service"]
    assert len(services) == 3
    done = subprocess.run([VERIFIER, "verify", "--man=no", *services], capture_output=True, text=True)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


@pytest.mark.skipif(shutil.which("systemd-escape") is None, reason="systemd-escape is not installed")
@pytest.mark.parametrize("path", ["/", "/run/blksnap-ublk/state", "/a//b c/", "/.x/.y/ä-1_2:3\\", "/mnt/50%"])
def test_paths_are_escaped_as_systemd_does(path: str) -> None:
    done = subprocess.run(["systemd-escape", "--path", path], capture_output=True, text=True, check=True)
    assert systemd_units.escaped_path(Path(path)) == done.stdout.rstrip("\n")


def test_written_enabled_and_taken_away(tmp_path: Path) -> None:
    assert systemd_units.units_installed(tmp_path) is None
    paths = install(Installable.SYSTEMD, tmp_path)
    assert systemd_units.units_installed(tmp_path) is True
    assert install(Installable.SYSTEMD, tmp_path) == paths
    directory = tmp_path / "etc/systemd/system"
    enabled = {str(path.relative_to(directory)): os.readlink(path) for path in directory.glob("*.wants/*")}
    assert enabled == {
        "multi-user.target.wants/blksnap-ublk.service": "/etc/systemd/system/blksnap-ublk.service",
        "final.target.wants/blksnap-ublk-shutdown.service": "/etc/systemd/system/blksnap-ublk-shutdown.service",
    }
    assert not list(directory.rglob("*.writing"))
    paths[0].write_text("another version's")
    assert systemd_units.units_installed(tmp_path) is False
    assert uninstall(Installable.SYSTEMD, tmp_path) == paths
    assert uninstall(Installable.SYSTEMD, tmp_path) == []
    assert list(directory.iterdir()) == []


def test_what_others_have_put_there_stays(tmp_path: Path) -> None:
    directory = tmp_path / "etc/systemd/system"
    theirs = [directory / "multi-user.target.wants/other.service", directory / "blksnap-ublk.service.d/own.conf"]
    install(Installable.SYSTEMD, tmp_path)
    for path in theirs:
        path.parent.mkdir(exist_ok=True)
        path.touch()
    uninstall(Installable.SYSTEMD, tmp_path)
    assert [path.exists() for path in theirs] == [True, True]


def _settings(version: int, runtime: str = systemd_units.DEFAULT_RUNTIME) -> configparser.RawConfigParser:
    text = systemd_units.unit_texts(Path(runtime), version=version)[systemd_units.DAEMON]
    parser = configparser.RawConfigParser(strict=False)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read_string(text)
    return parser


@pytest.mark.parametrize("version", [0, 252, 254, 255, 257])
def test_what_an_older_systemd_does_not_know_is_left_out(version: int) -> None:
    settings = _settings(version)
    assert settings.has_option("Service", "FileDescriptorStorePreserve") == (version >= 254)
    assert settings.has_option("Unit", "SurviveFinalKillSignal") == (version >= 255)


def test_nothing_that_systemd_does_ends_what_serves() -> None:
    """Neither a shutdown, nor the end of another unit, nor a death of the keeper."""
    settings = _settings(257)
    unit, service = settings["Unit"], settings["Service"]
    assert unit["DefaultDependencies"] == "no"
    assert not {"Conflicts", "Requires", "BindsTo", "PartOf", "RequiresMountsFor", "Requisite"} & set(unit)
    # These would require a mount.
    assert not {"StateDirectory", "LogsDirectory", "CacheDirectory", "ConfigurationDirectory"} & set(service)
    # These would hide from the host what is mounted by the daemon.
    hiding = ("Private", "Protect", "Mount", "ReadOnly", "ReadWrite", "Temporary")
    assert not any(name.startswith(hiding) for name in service)
    assert (service["KillMode"], service["SendSIGKILL"], service["OOMPolicy"]) == ("process", "no", "continue")
    assert int(service["FileDescriptorStoreMax"]) > 1000
    assert service["RuntimeDirectoryPreserve"] == "yes"
    assert service["ExecStart"].startswith(sys.executable)


def test_another_runtime_directory() -> None:
    settings = _settings(252, "/var/tmp/x y")
    assert settings["Service"]["Environment"] == '"BLKSNAP_UBLK_RUN=/var/tmp/x y"'
    assert not settings.has_option("Service", "RuntimeDirectory")
    assert not _settings(252).has_option("Service", "Environment")
    assert _settings(252, "/run/mine")["Service"]["RuntimeDirectory"] == "mine"
