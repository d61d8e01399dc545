# SPDX-License-Identifier: MIT
"""Each finding in the state that each condition of the host deserves."""

import resource
from pathlib import Path

import msgspec
import pytest

from blksnap_ublk.forms import FindingState
from blksnap_ublk.host import doctor, repair
from blksnap_ublk.host.kernel import KernelVersion, traps_of
from blksnap_ublk.host.left_over import LeftOvers, UnknownDisk, left_over_findings
from blksnap_ublk.install import Installable, install

RULES = "etc/udev/rules.d/63-storage-blksnap-ublk.rules"
OK, WARN, FAIL = FindingState.OK, FindingState.WARN, FindingState.FAIL
COPY = 1 << 7 | 1 << 3 | 1 << 4


def _put(root: Path, name: str, text: str = "") -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.mark.parametrize(
    ("release", "state", "words"),
    [
        ("6.1.0-18-amd64", FAIL, "too old"),
        ("6.5.0", OK, "data is copied"),
        ("6.12.9+deb12-amd64", OK, "data is copied"),
        ("6.16.1", OK, "zero copy is possible"),
        ("7.3.4", OK, "zero copy is possible"),
        ("strange", WARN, "strange"),
    ],
)
def test_kernel(release: str, state: FindingState, words: str) -> None:
    finding = doctor.kernel_findings(release)[0]
    assert finding.state is state
    assert words in finding.text
    assert finding.advice or state is not FAIL


def test_traps_belong_to_versions() -> None:
    assert any("ublks_max" in trap.text for trap in traps_of(KernelVersion(6, 12)))
    assert not any("ublks_max" in trap.text for trap in traps_of(KernelVersion(6, 15)))
    assert traps_of(KernelVersion(7, 3)) == []
    assert [finding.state for finding in doctor.kernel_findings("6.12.1")[1:]] == [WARN, WARN]


def test_driver(tmp_path: Path) -> None:
    assert "CONFIG_BLK_DEV_UBLK" in (doctor.driver_finding(tmp_path, "7.3.4").advice or "")
    _put(tmp_path, "lib/modules/7.3.4/modules.dep", "kernel/drivers/block/ublk_drv.ko.xz:")
    assert doctor.driver_finding(tmp_path, "7.3.4").advice == "modprobe ublk_drv"
    _put(tmp_path, "sys/module/ublk_drv/refcnt", "0")
    assert "devtmpfs" in (doctor.driver_finding(tmp_path, "7.3.4").advice or "")
    _put(tmp_path, "dev/ublk-control")
    assert doctor.driver_finding(tmp_path, "7.3.4").state is OK


@pytest.mark.parametrize(
    ("features", "state", "words"),
    [
        (None, FAIL, "could not be asked"),
        (0, FAIL, "USER_COPY"),
        (1 << 7, FAIL, "USER_RECOVERY_REISSUE"),
        (COPY, OK, "data is copied"),
        (COPY | 1, OK, "data is copied"),
        (COPY | 1 | 1 << 11, OK, "zero copy"),
    ],
)
def test_features(features: int | None, state: FindingState, words: str) -> None:
    finding = doctor.features_finding(features)
    assert finding.state is state
    assert words in finding.text


def test_capabilities(tmp_path: Path) -> None:
    _put(tmp_path, "proc/self/status", "Name:\tx\nCapEff:\t000001ffffffffff\n")
    assert doctor.capabilities_finding(tmp_path).state is OK
    _put(tmp_path, "proc/self/status", f"CapEff:\t{1 << 21:016x}\n")
    assert doctor.capabilities_finding(tmp_path).text == "missing: CAP_IPC_LOCK, CAP_SYS_RESOURCE"


def test_memlock() -> None:
    assert doctor.memlock_finding(65536, resource.RLIM_INFINITY).state is OK
    assert doctor.memlock_finding(65536, 65536).state is WARN


@pytest.mark.parametrize(("value", "state"), [(None, OK), ("0\n", OK), ("1\n", OK), ("2\n", FAIL)])
def test_io_uring(tmp_path: Path, value: str | None, state: FindingState) -> None:
    if value is not None:
        _put(tmp_path, "proc/sys/kernel/io_uring_disabled", value)
    assert doctor.io_uring_finding(tmp_path).state is state


def test_memory(tmp_path: Path) -> None:
    assert doctor.memory_finding(tmp_path).state is WARN
    _put(tmp_path, "proc/meminfo", "MemTotal: 1 kB\nMemAvailable:   102400 kB\n")
    assert doctor.memory_finding(tmp_path).state is WARN
    _put(tmp_path, "proc/meminfo", "MemAvailable:   10240000 kB\n")
    assert doctor.memory_finding(tmp_path).state is OK


@pytest.mark.parametrize(
    ("found", "name", "words"),
    [
        (LeftOvers(disks=[UnknownDisk("/dev/ublkb7")]), "left-over", ["/dev/ublkb7", "--fix"]),
        (
            LeftOvers(disks=[UnknownDisk("/dev/ublkb7", ["mount /x"])]),
            "left-over",
            ["used by mount /x", "end what uses"],
        ),
        (LeftOvers(foreign_disks=["/dev/ublkb8"]), "other-daemons", ["/dev/ublkb8", "BLKSNAP_UBLK_RUN"]),
        (LeftOvers(runtimes=[Path("/run/x")]), "other-daemons", ["BLKSNAP_UBLK_RUN=/run/x blksnap-ublk serve"]),
        (LeftOvers(lost_snapshots=["abcd"]), "snapshots", ["blksnap-ublk snapshot destroy abcd"]),
        (LeftOvers(pinned_files=["/data/file"]), "storage-files", ["/data/file", "chattr -i"]),
        (LeftOvers(problems=["mounts could not be looked at"]), "left-over", ["mounts could not"]),
    ],
)
def test_what_is_left_over_is_named(found: LeftOvers, name: str, words: list[str]) -> None:
    warnings = [finding for finding in left_over_findings(found) if finding.state is WARN]
    assert [finding.name for finding in warnings] == [name]
    assert all(word in f"{warnings[0].text} {warnings[0].advice}" for word in words)


def test_nothing_left_over() -> None:
    assert {finding.state for finding in left_over_findings(LeftOvers())} == {OK}


def test_change_maps_that_wait_for_their_origin_are_no_fault() -> None:
    paths = [Path(f"/var/lib/x/{n}.changes") for n in range(9)]
    (found,) = [each for each in left_over_findings(LeftOvers(saved_changes=paths)) if each.advice]
    assert found.state is OK
    assert "and 4 more" in found.text


def test_systemd(tmp_path: Path) -> None:
    runtime = Path("/run/somewhere")
    assert doctor.systemd_finding(tmp_path, runtime).state is OK
    (tmp_path / "run/systemd/system").mkdir(parents=True)
    finding = doctor.systemd_finding(tmp_path, runtime)
    assert finding.state is OK
    assert "install systemd" in (finding.advice or "")
    install(Installable.SYSTEMD, tmp_path, runtime)
    assert doctor.systemd_finding(tmp_path, runtime).text == "runs the daemon"
    unit = tmp_path / "etc/systemd/system/blksnap-ublk.service"
    unit.write_text("another version's")
    finding = doctor.systemd_finding(tmp_path, runtime)
    assert finding.state is WARN
    (said,) = repair.fix([finding], root=tmp_path, runtime=runtime)
    assert said.startswith(f"systemd: wrote {unit}")
    assert doctor.systemd_finding(tmp_path, runtime).text == "runs the daemon"


def test_udev(tmp_path: Path) -> None:
    runtime = Path("/run/somewhere")
    assert "does not run" in doctor.udev_finding(tmp_path, runtime).text
    _put(tmp_path, "run/udev/control")
    finding = doctor.udev_finding(tmp_path, runtime)
    assert finding.state is WARN
    assert repair.fix([finding], root=tmp_path, runtime=runtime) == [f"udev: wrote {tmp_path}/{RULES}"]
    assert doctor.udev_finding(tmp_path, runtime).state is OK
    assert doctor.udev_finding(tmp_path, Path("/run/elsewhere")).state is WARN


def test_lvm(tmp_path: Path) -> None:
    assert doctor.lvm_finding(tmp_path).state is OK
    _put(tmp_path, "usr/sbin/lvm")
    _put(tmp_path, "etc/lvm/lvm.conf", '# global_filter = [ "r|/dev/blksnap/|" ]\n')
    finding = doctor.lvm_finding(tmp_path)
    assert finding.state is WARN
    assert repair.fix([finding], root=tmp_path) == [f"lvm: wrote {tmp_path}/etc/lvm/lvmlocal.conf"]
    assert doctor.lvm_finding(tmp_path).state is OK


def test_lvm_with_a_filter_of_the_administrator(tmp_path: Path) -> None:
    _put(tmp_path, "usr/sbin/lvm")
    _put(tmp_path, "etc/lvm/lvm.conf", 'devices {\n\tglobal_filter = [ "a|/dev/sd|" ]\n}\n')
    finding = doctor.lvm_finding(tmp_path)
    assert "put" in (finding.advice or "")
    (said,) = repair.fix([finding], root=tmp_path)
    assert said.startswith("lvm: not done")
    assert not (tmp_path / "etc/lvm/lvmlocal.conf").exists()


def test_lvm_with_a_devices_file(tmp_path: Path) -> None:
    _put(tmp_path, "usr/sbin/lvm")
    _put(tmp_path, "etc/lvm/lvm.conf", "devices {\n\tuse_devicesfile = 1\n}\n")
    assert doctor.lvm_finding(tmp_path).state is OK


def test_left_overs_are_taken_away_only_when_there_are_some() -> None:
    none, some = (left_over_findings(LeftOvers(disks=disks)) for disks in ([], [UnknownDisk("/dev/ublkb3")]))
    assert repair.fix(none, take_away=lambda: ["left-over: deleted /dev/ublkb4"]) == []
    assert repair.fix(some, take_away=lambda: ["left-over: deleted /dev/ublkb3"]) == ["left-over: deleted /dev/ublkb3"]


def test_this_host_can_be_examined_and_sent_as_json() -> None:
    findings = doctor.examine(None, LeftOvers(disks=[UnknownDisk("/dev/ublkb3")]))
    assert {finding.name for finding in findings} >= {
        "kernel",
        "ublk",
        "features",
        "io_uring",
        "left-over",
        "lvm",
        "systemd",
    }
    assert all(finding.advice for finding in findings if finding.state is FAIL)
    assert msgspec.json.decode(msgspec.json.encode(findings), type=list[dict[str, str | None]])
