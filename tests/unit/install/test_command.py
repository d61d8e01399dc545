# SPDX-License-Identifier: MIT
"""The commands install and uninstall."""

from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from blksnap_ublk.cli import install

app = typer.Typer()
install.add_to(app)


@pytest.mark.parametrize("what", ["udev", "lvm", "systemd"])
def test_the_files_are_printed(tmp_path: Path, what: str) -> None:
    runner = CliRunner()
    done = runner.invoke(app, ["install", what, "--root", str(tmp_path)])
    assert done.exit_code == 0, done.output
    paths = [Path(line) for line in done.stdout.splitlines()]
    assert all(path.is_relative_to(tmp_path) for path in paths)
    assert "blksnap" in paths[0].read_text()
    assert runner.invoke(app, ["uninstall", what, "--root", str(tmp_path)]).stdout == done.stdout


def test_nothing_else_can_be_installed(tmp_path: Path) -> None:
    assert CliRunner().invoke(app, ["install", "everything", "--root", str(tmp_path)]).exit_code == 2
