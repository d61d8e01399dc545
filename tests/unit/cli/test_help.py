# SPDX-License-Identifier: MIT
"""Help: everywhere, with an example that the command line itself accepts."""

import re
import shlex
from collections.abc import Iterator

import pytest
from typer.main import get_command

from blksnap_ublk.cli.main import app, run


def commands(command: object, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    yield path
    for name, inner in getattr(command, "commands", {}).items():
        yield from commands(inner, (*path, name))


WITHOUT_JSON = {("snapshot",), ("storage",), ("changes",), ("install",), ("uninstall",)}
ALL = list(commands(get_command(app)))


def test_the_commands_of_the_contract() -> None:
    assert {" ".join(path) for path in ALL} == {
        "",
        "attach",
        "detach",
        "resize",
        "list",
        "snapshot",
        "snapshot create",
        "snapshot list",
        "snapshot show",
        "snapshot check",
        "snapshot renew",
        "snapshot destroy",
        "storage",
        "storage show",
        "storage add",
        "storage limit",
        "storage rate",
        "changes",
        "changes show",
        "changes info",
        "changes mark",
        "changes dump",
        "events",
        "status",
        "doctor",
        "install",
        "uninstall",
        "serve",
        "version",
    }


@pytest.mark.parametrize("path", ALL, ids=" ".join)
@pytest.mark.parametrize("option", ["--help", "-h"])
def test_help_has_an_example(path: tuple[str, ...], option: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*path, option]) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    assert shown.out.startswith("Usage: blksnap-ublk")
    match = re.search(r"Example: blksnap-ublk (.*)", " ".join(shown.out.split()))
    assert match is not None
    example = shlex.split(match[1])
    assert tuple(example[: len(path)]) == path


@pytest.mark.parametrize("path", [path for path in ALL if len(path) > 0], ids=" ".join)
def test_json_everywhere(path: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    run([*path, "--help"])
    assert ("--json" in capsys.readouterr().out) == (path not in WITHOUT_JSON)
