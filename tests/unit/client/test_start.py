# SPDX-License-Identifier: MIT
"""The daemon is started when it is needed, once, and when it cannot start the user learns why."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from blksnap_ublk.client import Client, connect, runtime, start
from blksnap_ublk.errors import BlksnapError, Busy, Failed, Unsupported
from tests.unit.fake_service import FakeService
from tests.unit.serving import serving_ublk

ROOT = Path(__file__).parents[3]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    directory = tmp_path / "run"
    monkeypatch.setenv("BLKSNAP_UBLK_RUN", str(directory))
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{ROOT / 'src'}")
    monkeypatch.setenv("SMALL_DAEMON", "serve")
    monkeypatch.setattr(start, "DAEMON_MODULE", "tests.unit.client.small_daemon")
    yield directory
    if (directory / "io.blksnap.Ublk").exists():
        with connect(start=False) as client:
            client.stop()


def test_a_client_starts_the_daemon_and_leaves_it_running(run: Path) -> None:
    with connect() as client:
        assert client.list_devices() == []
        client.attach("/dev/sdb")
    with connect(start=False) as client:
        assert len(client.list_devices()) == 1
        pid = client.daemon_version().pid
    # It holds no directory busy, and does not hear its starter's Ctrl-C.
    assert (run / "started").read_text() == f"{pid} / True\n"
    assert (run.stat().st_mode & 0o777) == 0o700
    assert set(os.listdir(run)) == {"io.blksnap.Ublk", "started"}


def test_hooks_are_named_to_the_daemon_that_is_started(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with Client(None, start=True, warn=print, hooks="hooks.d") as client:
        assert client.list_devices() == []
    assert (run / "hooks").read_text() == f"{tmp_path}/hooks.d"


def test_clients_that_start_it_at_once_share_one(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SMALL_DAEMON", "slow")
    pids: list[object] = []

    def one() -> None:
        try:
            with connect() as client:
                pids.append(client.daemon_version().pid)
        except BlksnapError as error:
            pids.append(error)

    threads = [threading.Thread(target=one) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(pids) == 6
    assert len(set(pids)) == 1
    assert len((run / "started").read_text().splitlines()) == 1


def test_one_that_was_started_meanwhile_is_as_good(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SMALL_DAEMON", "say:4:another one runs (pid 1)")
    run.mkdir(mode=0o700)
    path = run / "io.blksnap.Ublk"
    ended = threading.Event()

    def other() -> None:
        # Begins to listen after the client looked for it and before the client's own daemon gives up.
        started.wait()
        with serving_ublk(path, FakeService()):
            ended.wait()
        path.unlink()

    started = threading.Event()
    thread = threading.Thread(target=other)
    thread.start()
    starting = start._start

    def start_later(listens: Callable[[], bool], options: Sequence[str]) -> None:
        started.set()
        starting(listens, options)

    monkeypatch.setattr(start, "_start", start_later)
    try:
        with connect() as client:
            assert client.daemon_version().pid == os.getpid()
    finally:
        ended.set()
        thread.join()


@pytest.mark.parametrize(
    ("what", "kind", "text"),
    [
        ("say:5:no ublk; modprobe ublk_drv", Unsupported, "the daemon did not start: no ublk; modprobe ublk_drv"),
        ("say:1:the tmpfs cannot be mounted", Failed, "the daemon did not start: the tmpfs cannot be mounted"),
        ("complain:1:ImportError: no engine", Failed, "the daemon did not start: ImportError: no engine"),
        ("complain:5:blksnap-ublkd: too old", Unsupported, "the daemon did not start: too old"),
        ("die", Failed, "the daemon did not start: it ended with status -6"),
    ],
)
def test_the_last_words_of_a_failed_start_arrive(
    run: Path, monkeypatch: pytest.MonkeyPatch, what: str, kind: type[BlksnapError], text: str
) -> None:
    monkeypatch.setenv("SMALL_DAEMON", what)
    with pytest.raises(BlksnapError) as caught:
        connect()
    assert type(caught.value) is kind
    assert caught.value.message == text
    assert os.listdir(run) == ["started"]


def test_a_daemon_that_says_it_is_busy_and_is_not_there(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SMALL_DAEMON", "say:4:another one runs (pid 1)")
    monkeypatch.setattr(start, "OTHERS_START_SECONDS", 0.1)
    with pytest.raises(Busy, match="another one runs"):
        connect()


def test_a_daemon_that_hangs_is_ended(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SMALL_DAEMON", "hang")
    monkeypatch.setattr(start, "READY_SECONDS", 0.3)
    with pytest.raises(Failed, match="was not ready after"):
        connect()


def test_a_socket_that_was_left_over_is_no_daemon(run: Path) -> None:
    run.mkdir(mode=0o700)
    with serving_ublk(run / "io.blksnap.Ublk", FakeService()):
        pass
    with pytest.raises(Failed, match=r"no daemon listens on .*; start one: blksnap-ublk serve"):
        connect(start=False)
    (run / "io.blksnap.Ublk").unlink()


def test_nothing_is_started_for_a_socket_that_was_named(run: Path, tmp_path: Path) -> None:
    with pytest.raises(Failed, match="no daemon listens on"):
        connect(str(tmp_path / "elsewhere"))
    assert not run.exists()


def test_a_client_outlives_its_daemon(run: Path) -> None:
    with connect() as client:
        first = client.daemon_version().pid
        with connect() as other:
            other.stop()
        second = client.daemon_version().pid
        assert first != second


def test_stop_returns_when_it_has_ended(run: Path) -> None:
    with connect() as client:
        client.stop()
    assert not (run / "io.blksnap.Ublk").exists()


def test_doctor_answers_without_a_daemon(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SMALL_DAEMON", "say:5:no ublk; modprobe ublk_drv")
    with Client(None, start=True, warn=print) as client:
        findings = client.doctor()
    assert (findings[0].name, findings[0].state) == ("daemon", "fail")
    assert "modprobe ublk_drv" in findings[0].text
    assert "kernel" in [finding.name for finding in findings]


def test_somebody_who_is_not_root_is_told_so(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root to become somebody else")
    (tmp_path / "run").mkdir(mode=0o700)
    program = f"""
import os, sys
sys.path[:0] = [{str(ROOT / "src")!r}]
from blksnap_ublk.client import connect, start
from blksnap_ublk.errors import Failed
import blksnap_ublk.client.client
os.setresuid(65534, 65534, 65534)
try:
    connect()
except Failed as error:
    print(error.message)
"""
    environment = os.environ | {"BLKSNAP_UBLK_RUN": str(tmp_path / "run")}
    said = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=60)
    assert said.stdout == "needs root (EACCES); use sudo\n", said.stderr


def test_where_systemd_owns_the_daemon_nobody_else_starts_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not os.path.isdir("/run/systemd/system"):
        pytest.skip("systemd does not run here")
    monkeypatch.setattr(start, "UNIT_DIRECTORIES", (str(tmp_path),))
    (tmp_path / start.UNIT).touch()
    with pytest.raises(Failed, match="systemctl start"):
        start.start_daemon(runtime.DEFAULT_RUNTIME, lambda: False)


def test_the_starter_is_reaped(run: Path) -> None:
    with connect() as client:
        pid = client.daemon_version().pid
        client.stop()
    deadline = time.monotonic() + 30
    while os.path.exists(f"/proc/{pid}"):
        assert time.monotonic() < deadline
        start._started[:] = [process for process in start._started if process.poll() is None]
        time.sleep(0.01)
