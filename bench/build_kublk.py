# SPDX-License-Identifier: MIT
"""Builds kublk, the ublk server of the kernel's own selftests, from the distribution's package of the kernel's source.

    python bench/build_kublk.py

The parts of the source that it needs are fetched once, with apt and without being installed, and kept in the cache
beside the guests' kernels. The program lies in the checkout's `build`, where guests see it.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.guest import cache
from tests.guest.archive import Archive
from tests.guest.failure import Failure
from tests.guest.kernel import numbers

PROGRAM = Path(__file__).resolve().parent.parent / "build" / "bench" / "kublk"
WHY_NOT = PROGRAM.with_name("kublk.why-not")
PACKAGE = re.compile(r"linux-source-\d+\.\d+(\.\d+)?")
SERVER = "tools/testing/selftests/ublk"
HEADERS = "include/uapi/linux"
# Those that are older on a machine than in the source, and those that these include.
HEADERS_WANTED = ("ublk_cmd.h", "io_uring.h", "fs.h", "stddef.h", "io_uring/query.h", "io_uring/zcrx.h")
SOURCES = ("kublk", "null", "file_backed", "common", "stripe", "fault_inject", "batch")
# As a test of offsets, it copies 2 KiB with each call where a server of any use copies all that a request has.
IN_PIECES = re.compile(r"(#define\s+UBLK_USER_COPY_LEN)\s+2048\b")
AT_ONCE = r"\1 (1U << 20)"
# liburing before 2.4 lacks what batch mode calls, which is not used here.
UNUSED = """
#include <stdlib.h>
void io_uring_setup_buf_ring(void) { abort(); }
void io_uring_free_buf_ring(void) { abort(); }
"""


class CannotBuild(Failure):
    """kublk cannot be had on this machine; the text says why."""


def build_kublk() -> str | None:
    """Why there is no kublk, or None; the same is written down beside where it would be."""
    PROGRAM.parent.mkdir(parents=True, exist_ok=True)
    try:
        if not PROGRAM.exists() or PROGRAM.stat().st_mtime < Path(__file__).stat().st_mtime:
            compile_server(fetch())
    except (Failure, subprocess.CalledProcessError, OSError) as error:
        reason = f"kublk cannot be built here: {str(error).splitlines()[0]}"
        WHY_NOT.write_text(f"{reason}\n")
        return reason
    WHY_NOT.unlink(missing_ok=True)
    return None


def fetch() -> Path:
    """The directory with the parts of the source; of the newest kernel that the distribution's archive has."""
    with cache.locked("kernels"):
        kept = sorted(cache.directory().glob("kublk-*"), key=lambda path: numbers(path.name))
        if kept:
            return kept[-1]
        archive = Archive()
        packages = sorted((match[0] for match in archive.names(PACKAGE)), key=numbers)
        if not packages:
            raise CannotBuild("this distribution's archive has no source of a kernel")
        package = packages[-1]
        target = cache.directory() / package.replace("linux-source", "kublk")
        print(f"Fetching {package}, about 160 MB, for kublk ...", flush=True)
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=cache.directory()) as temporary:
            archive.unpack([package], Path(temporary))
            tar = next(Path(temporary, "usr", "src").glob(f"{package}.tar.*"))
            parts = Path(temporary, "parts")
            parts.mkdir()
            command = ["tar", "-C", str(parts), "--strip-components=1", "-xf", str(tar), "--wildcards"]
            done = subprocess.run(
                [*command, f"*/{SERVER}/*", f"*/{HEADERS}/*"], capture_output=True, text=True, check=False
            )
            if done.returncode != 0 or not (parts / SERVER / "kublk.c").exists():
                raise CannotBuild(f"{package} has no ublk server among its selftests")
            parts.rename(target)
        return target


def compile_server(source: Path) -> None:
    """Compiles what `fetch` has fetched."""
    compiler = shutil.which("cc")
    if compiler is None:
        raise CannotBuild("no C compiler: make setup installs one")
    with tempfile.TemporaryDirectory(prefix="kublk-", dir=PROGRAM.parent) as temporary:
        for name in HEADERS_WANTED:
            header = source / HEADERS / name
            if header.exists():
                copy = Path(temporary, "linux", name)
                copy.parent.mkdir(parents=True, exist_ok=True)
                copy.write_text(for_programs(header.read_text()))
        unused = Path(temporary, "unused.c")
        unused.write_text(UNUSED)
        for path in (source / SERVER).glob("*.[ch]"):
            Path(temporary, path.name).write_text(IN_PIECES.sub(AT_ONCE, path.read_text()))
        sources = [str(path) for name in SOURCES if (path := Path(temporary, f"{name}.c")).exists()]
        program = Path(temporary, "kublk")
        # As the kernel's own makefile does, but for its warnings.
        command = [compiler, "-O3", "-w", "-D_GNU_SOURCE=", "-I", temporary, "-o", str(program), str(unused), *sources]
        done = subprocess.run([*command, "-lpthread", "-lm", "-luring"], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            said = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr[:200])
            raise CannotBuild(f"{source.name}: {said}")
        program.rename(PROGRAM)


def for_programs(header: str) -> str:
    """A header of the kernel as programs can include it."""
    header = re.sub(r"^#include <linux/compiler.*\n", "", header, flags=re.MULTILINE)
    return re.sub(r"\b__user\b", "", header)


if __name__ == "__main__":
    problem = build_kublk()
    if problem:
        print(f"bench: {problem}", file=sys.stderr)
    sys.exit(problem is not None)
