# SPDX-License-Identifier: MIT
"""The log: priorities for the journal, one file for all processes, bounded, and nobody waits for it."""

import subprocess
import sys
from pathlib import Path

from tests.own_daemon import wait_until

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


def test_a_log_past_its_limit_is_moved(tmp_path: Path) -> None:
    path = tmp_path / "log"
    code = (
        "import logging, sys\n"
        "from pathlib import Path\n"
        "from blksnap_ublk.keeper import log, log_writer\n"
        "from blksnap_ublk.rpc.loop import Loop\n"
        "log_writer.LOG_LIMIT = 100_000\n"
        "log_writer.LogWriter(Loop(), Path(sys.argv[1])).start()\n"
        "log.start_log('io')\n"
        "def is_written(text):\n"
        "    return any(text in each.read_text() for each in Path(sys.argv[1]).parent.glob('log*'))\n"
        "for number in range(3000):\n"
        "    logging.info('%d %s', number, 'x' * 50)\n"
        # No more than the pipe takes at once: what it does not take is dropped.
        "    while number % 200 == 0 and not is_written(f' {number} '):\n"
        "        pass\n"
    )
    subprocess.run([sys.executable, "-c", code, str(path)], check=True)
    wait_until("the last line is written", lambda: path.exists() and " 2999 " in path.read_text())
    former = path.with_name("log.1").read_text()
    assert 100_000 < len(former) < 300_000
    assert len(path.read_text()) < 300_000
    numbers = [int(line.split(" INFO: ")[1].split()[0]) for line in (former + path.read_text()).splitlines()]
    assert numbers == list(range(numbers[0], 3000))


def test_what_a_full_pipe_does_not_take_is_counted() -> None:
    code = (
        "import logging, os\n"
        "from blksnap_ublk.keeper import log\n"
        "pipe, _ = log.become_stderr_of_all()\n"
        "log.start_log('io')\n"
        "for number in range(5000):\n"
        "    logging.info('%s', 'x' * 1000)\n"
        "text = b''\n"
        "while len(text) < 500_000:\n"
        "    text += os.read(pipe, 1 << 16)\n"
        "logging.info('again')\n"
        "print((text + os.read(pipe, 1 << 20)).decode())\n"
    )
    lines = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.splitlines()
    assert "again" in lines[-2]
    missing = int(lines[-3].split("WARNING: ")[1].split()[0])
    assert "messages are missing here" in lines[-3]
    assert missing + len(lines) - 3 == 5000
    assert min(map(len, lines[:-3])) > 1000
