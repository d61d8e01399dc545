# SPDX-License-Identifier: MIT
"""The cffi builder of blksnap_ublk.engine._engine (API mode), used by setup.py and by nothing at run time.

What Python may call is declared in csrc/engine.cdef.h; the compiler checks it against the headers in HEADERS. The C
sources themselves are built by csrc/Makefile into one archive, which the extension is linked with.

Three switches in the environment, read by csrc/Makefile too, choose a *variant*; each has a directory of its own:

BSU_SANITIZE=address,undefined or thread   with these sanitizers
BSU_COVERAGE=1                             with gcov's counters
BSU_MUTANTS=1                              with the seeded bugs that tests must find (defines BSU_MUTANTS)
"""

import os
import shlex
import subprocess
from pathlib import Path

import cffi

ROOT = Path(__file__).resolve().parents[3]
CSRC = ROOT / "csrc"
HEADERS = ("core/core.h", "io/io.h", "sim/sim.h")

SANITIZE = os.environ.get("BSU_SANITIZE", "")
COVERAGE = os.environ.get("BSU_COVERAGE", "") == "1"
MUTANTS = os.environ.get("BSU_MUTANTS", "") == "1"

VARIANT = "-".join(filter(None, (SANITIZE, "coverage" * COVERAGE, "mutants" * MUTANTS))) or "plain"
ARCHIVE = ROOT / "build" / VARIANT / "csrc" / "libengine.a"

# Code that cffi generates has unused parameters; ours, in the archive, is compiled with every warning.
PREAMBLE = '#pragma GCC diagnostic ignored "-Wunused-parameter"\n#pragma GCC diagnostic ignored "-Wunused-function"\n'


def _variant_flags() -> list[str]:
    """The compiler and linker flags that a variant adds to those of csrc/Makefile."""
    flags = [f"-fsanitize={SANITIZE}"] if SANITIZE else []
    flags += ["--coverage"] if COVERAGE else []
    return flags


def _pkg_config(*options: str) -> list[str]:
    """liburing's flags; CalledProcessError where its development files are missing."""
    return shlex.split(subprocess.run(["pkg-config", *options, "liburing"], check=True, text=True, stdout=-1).stdout)


def _builder() -> cffi.FFI:
    includes = "".join(f'#include "{header}"\n' for header in HEADERS)
    ffi = cffi.FFI()
    ffi.cdef((CSRC / "engine.cdef.h").read_text())
    ffi.set_source(
        "blksnap_ublk.engine._engine",
        PREAMBLE + includes,
        include_dirs=[str(CSRC)],
        define_macros=[("_GNU_SOURCE", None), *([("BSU_MUTANTS", "1")] if MUTANTS else [])],
        extra_compile_args=[
            *("-std=gnu11", "-O2", "-g", "-Wall", "-Wextra", "-Werror", "-fvisibility=hidden", "-pthread"),
            *_pkg_config("--cflags"),
            *_variant_flags(),
        ],
        extra_objects=[str(ARCHIVE)],
        extra_link_args=["-pthread", *_pkg_config("--libs"), *_variant_flags()],
        depends=[str(ARCHIVE), *(str(CSRC / header) for header in HEADERS)],
    )
    return ffi


ffibuilder = _builder()
