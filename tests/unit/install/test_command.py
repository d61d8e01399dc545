# SPDX-License-Identifier: MIT
"""The commands install and uninstall."""

from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from blksnap_ublk.cli import install

app = typer.Typer()
install.add_to(app)


@pytest.mark.parametrize("what", ["udev", "lvm"])
def test_the_file_is_printed(tmp_path: Path, what: str) -> None:
    runner = CliRunner()
    done = runner.invoke(app, ["install", what, "--root", str(tmp_path)])
    assert done.exit_code == 0, done.output
    path = Path(done.stdout.strip())
    assert path.is_relative_to(tmp_path)
    assert "blksnap" in path.read_text()
    assert runner.invoke(app, ["uninstall", what, "--root", str(tmp_path)]).stdout.strip() == str(path)


def test_nothing_else_can_be_installed(tmp_path: Path) -> None:
    assert CliRunner().invoke(app, ["install", "everything", "--root", str(tmp_path)]).exit_code == 2
