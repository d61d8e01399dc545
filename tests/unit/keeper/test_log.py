# SPDX-License-Identifier: MIT
"""The log: priorities for the journal, one file for all processes, bounded."""

import os
import subprocess
import sys
from pathlib import Path

from blksnap_ublk.keeper import log

SAY = (
    "import logging, os\n"
    "from blksnap_ublk.keeper.log import start_log\n"
    "status = os.fstat(2)\n"
    "os.environ['JOURNAL_STREAM'] = {stream}\n"
    "start_log('io')\n"
    "logging.warning('two\\nlines')\n"
    "logging.error('an error')\n"
    "logging.info('a word')\n"
    "logging.debug('not shown')\n"
)


def said(stream: str) -> list[str]:
    done = subprocess.run([sys.executable, "-c", SAY.format(stream=stream)], capture_output=True, text=True, check=True)
    return done.stderr.splitlines()


def test_the_journal_gets_a_priority_on_each_line() -> None:
    lines = said("f'{status.st_dev}:{status.st_ino}'")
    assert lines == ["<4>io: two", "<4>lines", "<3>io: an error", "<6>io: a word"]


def test_anything_else_gets_time_and_process() -> None:
    for stream in ("'1:1'", "''", "'odd'"):
        lines = said(stream)
        assert "io[" in lines[0]
        assert lines[0].endswith("WARNING: two")
        assert len(lines) == 4


def test_a_log_past_its_limit_is_moved_while_it_is_written_to(tmp_path: Path) -> None:
    path = tmp_path / "log"
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(descriptor, b"x" * log.LOG_LIMIT)
    log.bound_log(path)
    assert path.stat().st_size == log.LOG_LIMIT
    os.write(descriptor, b"y")
    log.bound_log(path)
    assert path.stat().st_size == 0
    assert (tmp_path / "log.1").stat().st_size == log.LOG_LIMIT + 1
    os.write(descriptor, b"z")
    os.close(descriptor)
    assert path.read_bytes() == b"z"
