# SPDX-License-Identifier: MIT
"""Command lines that are run in this process, against a served FakeService."""

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from blksnap_ublk.cli.main import run
from tests.unit.fake_service import FakeService
from tests.unit.serving import serving_ublk


@dataclass(frozen=True)
class Outcome:
    """What a command line did."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The one JSON document on stdout."""
        assert self.out.endswith("\n")
        assert self.out.count("\n") == 1
        return json.loads(self.out)


class Shell:
    """Runs command lines."""

    def __init__(
        self, service: FakeService, loop: asyncio.AbstractEventLoop, capture: pytest.CaptureFixture[str]
    ) -> None:
        self.service = service
        self._loop = loop
        self._capture = capture

    def __call__(self, line: str) -> Outcome:
        self._capture.readouterr()
        code = run(line.split())
        out, err = self._capture.readouterr()
        return Outcome(code, out, err)

    def good(self, line: str) -> Outcome:
        """Run a command line that is to succeed without a word on stderr."""
        outcome = self(line)
        assert (outcome.code, outcome.err) == (0, "")
        return outcome

    def in_loop(self, action: Callable[[], None]) -> None:
        """Do something in the thread of the service, and wait for it."""
        done = threading.Event()

        def act() -> None:
            action()
            done.set()

        self._loop.call_soon_threadsafe(act)
        assert done.wait(30)


@pytest.fixture
def shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Iterator[Shell]:
    monkeypatch.setenv("BLKSNAP_UBLK_RUN", str(tmp_path))
    service = FakeService()
    with serving_ublk(tmp_path / "io.blksnap.Ublk", service) as loop:
        yield Shell(service, loop, capfd)
