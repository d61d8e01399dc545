# SPDX-License-Identifier: MIT
"""What a service manager is told and given, seen from its side of the socket."""

import array
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from blksnap_ublk.keeper.fd_store import FdStore
from blksnap_ublk.keeper.service_manager import ServiceManager, survive_shutdown

HANDED_OVER = """
import os, sys
from blksnap_ublk.keeper.fd_store import FdStore
from blksnap_ublk.keeper.service_manager import ServiceManager
os.environ["LISTEN_PID"] = str(os.getpid())
manager = ServiceManager.from_environment()
store = FdStore(manager)
found = store.restore()
for name, number in sorted(found.items()):
    assert not os.get_inheritable(number)
    print(name, os.fstat(number).st_ino)
for step in sys.argv[1:]:
    kind, _, name = step.partition(" ")
    if kind == "drop":
        store.drop(name)
    else:
        store.put(name, os.open(kind, os.O_RDONLY))
assert not any(name.startswith("LISTEN_") or name == "NOTIFY_SOCKET" for name in os.environ)
"""


@dataclass
class Manager:
    """Keeps descriptors as systemd does: one for each open file, the first name that it came with."""

    address: str
    socket: socket.socket
    said: list[str] = field(default_factory=list)
    kept: list[tuple[str, int]] = field(default_factory=list)

    def hear(self) -> None:
        """Take all that was sent."""
        with suppress(BlockingIOError):
            while True:
                data, passed, _, _ = self.socket.recvmsg(4096, 4096, socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC)
                numbers = array.array("i", b"".join(content for _, _, content in passed))
                self._take(dict(line.partition("=")[::2] for line in data.decode().split("\n")), list(numbers))

    def hear_all(self, service: ServiceManager) -> None:
        """Take what the service could not send at once, too."""
        self.hear()
        while not service.flush():
            self.hear()
        self.hear()

    def look(self) -> list[str]:
        """What a service would find that were started now; nothing changes."""
        kept, said = [(name, os.dup(number)) for name, number in self.kept], list(self.said)
        found = self.start()
        for _, number in self.kept:
            os.close(number)
        self.kept, self.said = kept, said
        return found

    def start(self, *steps: str) -> list[str]:
        """Start a process as a service, let it take the steps, and end it; what it said of what was handed over."""
        names = ":".join(name for name, _ in self.kept)
        moved = [os.dup(number) for _, number in self.kept]
        program = "import os, sys\nmoved = " + repr(moved) + "\n"
        program += "".join(f"os.dup2({number}, {200 + n})\n" for n, number in enumerate(moved))
        program += "".join(f"os.dup2({200 + n}, {3 + n})\n" for n in range(len(moved))) + HANDED_OVER
        environment = {"NOTIFY_SOCKET": self.address, "LISTEN_FDS": str(len(moved)), "LISTEN_FDNAMES": names}
        done = subprocess.run(
            [sys.executable, "-c", program, *steps],
            env={**os.environ, **environment},
            pass_fds=moved,
            capture_output=True,
            text=True,
            timeout=30,
        )
        for number in moved:
            os.close(number)
        assert done.returncode == 0, done.stderr
        self.hear()
        return done.stdout.split("\n")[:-1]

    def close(self) -> None:
        for _, number in self.kept:
            os.close(number)
        self.socket.close()

    def _take(self, message: dict[str, str], numbers: list[int]) -> None:
        self.said += [f"{name}={value}" for name, value in message.items()]
        name = message.get("FDNAME", "stored")
        assert len(name) < 256
        assert ":" not in name
        if "FDSTORE" in message:
            (number,) = numbers
            if any(_same(number, kept) for _, kept in self.kept):
                os.close(number)
            else:
                self.kept.append((name, number))
        elif "FDSTOREREMOVE" in message:
            for entry in [entry for entry in self.kept if entry[0] == name]:
                self.kept.remove(entry)
                os.close(entry[1])
        else:
            assert not numbers


def _same(one: int, other: int) -> bool:
    """Whether they are one open file: its position is common to all descriptors of it."""
    if not os.path.samestat(os.fstat(one), os.fstat(other)):
        return False
    before = os.lseek(one, 0, os.SEEK_CUR)
    os.lseek(one, before + 1, os.SEEK_SET)
    same = os.lseek(other, 0, os.SEEK_CUR) == before + 1
    os.lseek(one, before, os.SEEK_SET)
    return same


@pytest.fixture(params=["a path", "an abstract name"])
def manager(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Manager]:
    address = str(tmp_path / "notify") if request.param == "a path" else f"@test-{os.getpid()}"
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    listening.bind("\0" + address[1:] if address.startswith("@") else address)
    found = Manager(address, listening)
    yield found
    found.close()


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / f"file{n}" for n in range(3)]
    for path in paths:
        path.write_text("x" * 10)
    return paths


def test_the_life_of_a_service_is_told(manager: Manager) -> None:
    environment = {"NOTIFY_SOCKET": manager.address, "WATCHDOG_USEC": "60000000", "WATCHDOG_PID": "1", "HOME": "/"}
    service = ServiceManager.from_environment(environment)
    assert environment == {"HOME": "/"}
    assert service.present
    assert service.watchdog_interval == 20
    service.ready("two devices\nare served")
    service.alive()
    service.status("ending")
    service.extend_timeout(2.5)
    service.main_pid(17)
    service.stopping()
    service.close()
    manager.hear()
    assert manager.said == [
        *("READY=1", "STATUS=two devices are served", "WATCHDOG=1", "STATUS=ending"),
        *("EXTEND_TIMEOUT_USEC=2500000", "MAINPID=17", "STOPPING=1"),
    ]


def test_nobody_is_told_where_there_is_no_manager(files: list[Path]) -> None:
    service = ServiceManager.from_environment({"WATCHDOG_USEC": "1000000"})
    assert not service.present
    assert service.watchdog_interval is None
    service.ready()
    store = FdStore(service)
    assert store.restore() == {}
    with files[0].open() as file:
        store.put("origin:a", file.fileno())
    store.drop("origin:a")
    store.forget()
    store.close()
    service.close()


def test_descriptors_come_back_by_their_names(manager: Manager, files: list[Path]) -> None:
    inodes = [path.stat().st_ino for path in files]
    assert manager.start(f"{files[0]} origin:a/b c", f"{files[1]} area:" + "n" * 250, f"{files[2]} area:2") == []
    expected = [f"area:2 {inodes[2]}", f"area:{'n' * 250} {inodes[1]}", f"origin:a/b c {inodes[0]}"]
    assert manager.start() == expected
    assert manager.start("drop area:2", f"{files[2]} origin:a/b c") == expected
    assert manager.start() == [expected[1], f"origin:a/b c {inodes[2]}"]
    assert len(manager.kept) == 3  # two files and an index


def test_one_open_file_has_many_names(manager: Manager, files: list[Path]) -> None:
    service = ServiceManager(manager.address)
    store = FdStore(service)
    with files[0].open() as file, files[0].open() as other:
        for n in range(20):
            store.put(f"area:{n}", os.dup(file.fileno()))
        store.put("other", other.fileno())
        manager.hear_all(service)
        assert len(manager.kept) == 3
        for n in range(1, 20):
            store.drop(f"area:{n}")
        manager.hear_all(service)
        assert [line.split()[0] for line in manager.look()] == ["area:0", "other"]
        store.drop("area:0")
        manager.hear_all(service)
        assert [line.split()[0] for line in manager.look()] == ["other"]
        store.forget()
        manager.hear_all(service)
        assert manager.kept == []
    store.close()
    service.close()


def test_death_between_two_messages_loses_nothing(manager: Manager, files: list[Path]) -> None:
    """Each message alone leaves a store from which all that was put before, and not dropped, comes back."""
    service = ServiceManager(manager.address)
    store = FdStore(service)
    messages: list[tuple[bytes, int | None]] = []
    sending = service.send

    def send(*lines: str, descriptor: int | None = None) -> None:
        sending(*lines, descriptor=descriptor)
        manager.hear()
        found = {line.split()[0] for line in manager.look()}
        assert expected <= found <= allowed
        messages.append((b"", None))

    service.send = send  # type: ignore[method-assign]
    expected: set[str] = set()
    for n, path in enumerate(files):
        with path.open() as file:
            allowed = {*expected, f"area:{n}"}
            store.put(f"area:{n}", file.fileno())
            expected = allowed
    expected = allowed - {"area:1"}
    store.drop("area:1")
    assert len(messages) >= 3 * 2 + 2


def test_a_manager_that_does_not_read_holds_nobody_up(manager: Manager, files: list[Path]) -> None:
    service = ServiceManager(manager.address)
    store = FdStore(service)
    with files[0].open() as file:
        for n in range(2000):
            service.status(str(n))
        store.put("origin:a", file.fileno())
    assert not service.flush()
    manager.hear_all(service)
    assert [line for line in manager.said if line.startswith("STATUS")] == [f"STATUS={n}" for n in range(2000)]
    assert [line.split()[0] for line in manager.start()] == ["origin:a"]
    store.close()
    service.close()


def test_an_index_that_cannot_be_read_is_given_up(manager: Manager, files: list[Path]) -> None:
    manager.start(f"{files[0]} origin:a")
    (position,) = [n for n, (name, _) in enumerate(manager.kept) if name.startswith("index-")]
    os.ftruncate(manager.kept[position][1], 5)
    assert manager.start() == []
    assert manager.kept == []


def test_a_manager_that_is_gone_is_no_error(tmp_path: Path) -> None:
    service = ServiceManager(str(tmp_path / "nobody"))
    service.ready()
    service.alive()
    service.close()


def test_what_was_handed_to_another_process_is_left_alone() -> None:
    environment = {"LISTEN_PID": "1", "LISTEN_FDS": "5", "LISTEN_FDNAMES": "a:b:c:d:e"}
    assert ServiceManager.from_environment(environment).take_handed_over() == []
    assert environment == {}


def test_a_process_is_marked_for_the_end_of_a_shutdown() -> None:
    text = "from blksnap_ublk.keeper.service_manager import *; survive_shutdown(); survive_shutdown();"
    text += "print(open('/proc/self/cmdline').read().split('\\0')[0])"
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=True)
    assert done.stdout == "@" + sys.executable[1:] + "\n"
    assert callable(survive_shutdown)
