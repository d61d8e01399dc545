# SPDX-License-Identifier: MIT
"""PostgreSQL under load, its data and its log on two filtered devices: a server can be started on every pair of images,
and has all that was committed."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from blksnap_ublk import forms
from blksnap_ublk.client import Client
from tests.filtered import filtered
from tests.loop_devices import loop_device, mounted
from tests.mounted_image import check, mounted_image

MIB = 1 << 20
TAKES = 50 if "BSU_SOAK_SECONDS" in os.environ else 2
DATA, LOG = 192 * MIB, 320 * MIB
STORAGE = 256 * MIB
USER = "postgres"
PROGRAMS = ("initdb", "pg_ctl", "pgbench", "pg_amcheck", "psql")
LIMIT = 300.0
"""Seconds for one command."""

# Checkpoints all the time, so that data files, log and recycled log files change under every snapshot.
SETTINGS = {
    "listen_addresses": "''",
    "max_connections": "20",
    "shared_buffers": "16MB",
    "max_wal_size": "8MB",
    "min_wal_size": "4MB",
    "checkpoint_timeout": "30s",
    "wal_keep_size": "0",
}
BALANCES = """
SELECT (SELECT sum(abalance) FROM pgbench_accounts), (SELECT sum(tbalance) FROM pgbench_tellers),
(SELECT sum(bbalance) FROM pgbench_branches), (SELECT coalesce(sum(delta), 0) FROM pgbench_history)
"""


def programs() -> Path | None:
    """Where the newest PostgreSQL has its programs; None where there is none."""
    for folder in sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True):
        if all((folder / name).exists() for name in PROGRAMS):
            return folder
    return None


def missing() -> str | None:
    """Why no server can be run here, or None."""
    if programs() is None:
        return "no PostgreSQL: the package postgresql has it"
    if not shutil.which("mkfs.xfs"):
        return "no mkfs.xfs: the package xfsprogs has it"
    try:
        pwd.getpwnam(USER)
    except KeyError:
        return f"no user {USER}: the package postgresql makes it"
    return None


why_not = missing()
pytestmark = pytest.mark.skipif(why_not is not None, reason=str(why_not))


def command(name: str, *arguments: str) -> list[str]:
    """A program of PostgreSQL, to be run as its user: it refuses to be root."""
    folder = programs()
    assert folder is not None
    group = str(pwd.getpwnam(USER).pw_gid)
    return ["setpriv", f"--reuid={USER}", f"--regid={group}", "--init-groups", str(folder / name), *arguments]


def run(name: str, *arguments: str) -> str:
    """Runs it and returns what it printed."""
    done = subprocess.run(
        command(name, *arguments),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=LIMIT,
        cwd="/",
        env=os.environ | {"LC_ALL": "C"},
    )
    assert done.returncode == 0, f"{name} {arguments}: {done.stdout}{done.stderr}"
    return done.stdout.strip()


def owned(path: Path) -> Path:
    """A directory of the server's own; made where it is missing."""
    path.mkdir(mode=0o700, exist_ok=True)
    shutil.chown(path, USER, USER)
    return path


@dataclass
class Server:
    """A server on the directory `data`, reached through a socket in `sockets`; it writes its log to `messages`."""

    data: Path
    sockets: Path
    messages: Path
    port: int
    options: str = ""

    @property
    def address(self) -> tuple[str, ...]:
        return "-h", str(self.sockets), "-p", str(self.port), "-U", USER

    def ask(self, question: str) -> list[str]:
        """The fields of an answer of one row."""
        return run("psql", "-X", "-A", "-t", *self.address, "-d", "bench", "-c", question).split("|")

    def committed(self) -> int:
        """Transactions of pgbench that have been committed."""
        return int(self.ask("SELECT count(*) FROM pgbench_history")[0])

    def expect_consistent(self) -> None:
        """Tables and indexes agree, and so do the four sums that each transaction changes."""
        run("pg_amcheck", *self.address, "--all", "--heapallindexed", "--parent-check")
        sums = self.ask(BALANCES)
        assert len(sums) == 4, sums
        assert len(set(sums)) == 1, sums

    @contextmanager
    def running(self) -> Iterator[None]:
        options = f"-p {self.port} -k {self.sockets} {self.options}"
        control = ("-D", str(self.data), "-w", "-t", str(int(LIMIT)))
        try:
            run("pg_ctl", "start", *control, "-l", str(self.messages), "-o", options)
            yield
            run("pg_ctl", "stop", *control, "-m", "fast")
        except BaseException:
            if self.messages.exists():
                print(self.messages.read_text()[-4000:])
            subprocess.run(command("pg_ctl", "stop", *control, "-m", "immediate"), capture_output=True, cwd="/")
            raise


def new_server(data: Path, log: Path, folder: Path) -> Server:
    """A fresh cluster below the directories `data` and `log`, not running."""
    shutil.chown(data, USER, USER)
    shutil.chown(log, USER, USER)
    server = Server(data / "cluster", owned(folder / "sockets"), owned(folder / "messages") / "first", 5432)
    run(
        "initdb",
        *("-D", str(server.data), f"--waldir={log / 'wal'}", "-U", USER, "-A", "trust", "-E", "UTF8", "--locale=C"),
        *("--data-checksums", "--wal-segsize=1"),
    )
    with (server.data / "postgresql.conf").open("a") as file:
        file.writelines(f"{name} = {value}\n" for name, value in SETTINGS.items())
        file.flush()
        os.fsync(file.fileno())
    return server


@contextmanager
def pgbench(server: Server) -> Iterator[None]:
    """Transactions of four clients, without end."""
    process = subprocess.Popen(
        command("pgbench", *server.address, "-n", "-c", "4", "-j", "2", "-T", "100000", "bench"),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        cwd="/",
    )
    try:
        yield
        assert process.poll() is None, process.communicate()[1]
    finally:
        process.kill()
        process.communicate()


def check_images(snapshot: forms.Snapshot, devices: list[str], server: Server, folder: Path) -> int:
    """Starts a server on a pair of images, data and log, which must be consistent; the transactions that it has."""
    images = {image.device: image.image for image in snapshot.images}
    data, log = (images[device] for device in devices)
    messages = folder / "messages" / snapshot.id
    # It is only to be looked at: what it writes takes the place of what the origin overwrites.
    second = Server(folder / "image-data" / "cluster", server.sockets, messages, 5433, "-c autovacuum=off")
    with (
        mounted_image("ext4", data, folder / "image-data"),
        mounted_image("xfs", log, folder / "image-log") as log_top,
    ):
        # The copy of the link leads to the log of the server that is running.
        link = second.data / "pg_wal"
        link.unlink()
        link.symlink_to(log_top / "wal")
        (second.data / "postmaster.pid").unlink()
        with second.running():
            second.expect_consistent()
            committed = second.committed()
        assert "automatic recovery in progress" in second.messages.read_text()
    check("ext4", data)
    check("xfs", log)
    return committed


def test_a_server_starts_on_every_pair_of_images(client: Client, folder: Path, way: str) -> None:
    folder.chmod(0o755)
    with ExitStack() as stack:
        origins = [stack.enter_context(loop_device(folder / name, size)) for name, size in (("d", DATA), ("l", LOG))]
        devices = [stack.enter_context(filtered(client, origin, way, folder)).path for origin in origins]
        data = stack.enter_context(mounted(devices[0], folder / "data", "ext4"))
        log = stack.enter_context(mounted(devices[1], folder / "log", "xfs"))
        server = new_server(data, log, folder)
        stack.enter_context(server.running())
        run("psql", "-X", *server.address, "-d", "postgres", "-c", "CREATE DATABASE bench")
        run("pgbench", *server.address, "-i", "-q", "-s", "2", "bench")
        run("pg_amcheck", *server.address, "--all", "--install-missing")
        recovered = []
        with pgbench(server):
            for n in range(TAKES):
                freeze = forms.Freeze.REQUIRE if n % 5 == 1 else forms.Freeze.NO
                before = server.committed()
                snapshot = client.create_snapshot(devices, storage=[str(folder)], limit=STORAGE, freeze=freeze)
                after = server.committed()
                assert snapshot.frozen == (freeze is forms.Freeze.REQUIRE)
                recovered.append(check_images(snapshot, devices, server, folder))
                assert before <= recovered[-1] <= after
                assert client.show_snapshot(snapshot.id).state is forms.SnapshotState.ACTIVE
                client.destroy_snapshots([snapshot.id])
                print(f"{way}: snapshot {n}: {recovered[-1]} transactions, gate {snapshot.gate_us} µs", flush=True)
        server.expect_consistent()
        assert server.committed() >= recovered[-1] > recovered[0]
