# SPDX-License-Identifier: MIT
"""A guest in User-Mode Linux: a kernel built as a program, on this machine's own file tree, which it can write to."""

import os
import subprocess
import tempfile
from pathlib import Path

from tests.guest.failure import CannotStart
from tests.guest.job import Job, wait

HERE = Path(__file__).parent
KERNEL_ARGUMENTS = (
    "root=/dev/root rootfstype=hostfs hostfs=/ rw seccomp=on loglevel=4 panic=-1 brd.rd_nr=0 null_blk.nr_devices=0"
)


def run(job: Job) -> int:
    """Runs a job on the kernel that BLKSNAP_UML_KERNEL names."""
    program = os.environ.get("BLKSNAP_UML_KERNEL", "")
    if not os.access(program, os.X_OK):
        raise CannotStart(
            f"GUEST=uml needs BLKSNAP_UML_KERNEL=FILE, an executable kernel; {program or 'nothing'} is none"
        )
    # Below /tmp or /run it would be hidden by the guest's own.
    with tempfile.TemporaryDirectory(prefix="guest-", dir="/var/tmp") as name:
        temporary = Path(name)
        status, console, script, init = (temporary / part for part in ("status", "console", "job", "init"))
        script.write_text(job.script(output="/dev/tty1", status=str(status), guest="uml"))
        init.write_text(f"#!/bin/sh\nexec /bin/bash {HERE}/init {script}\n")
        init.chmod(0o700)
        command = [program, *KERNEL_ARGUMENTS.split(), f"init={init}", f"mem={job.memory}", f"ncpus={job.cpus}"]
        # Kernel messages go to the console file, the job's output to our pipe.
        command += ["con=null", "con0=null,fd:2", "con1=null,fd:1", *job.kernel_arguments]
        print(f"Starting a guest in User-Mode Linux: {Path(program).name}.", flush=True)
        with console.open("wb") as log:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log, env=os.environ | {"TMPDIR": name}
            )
        return wait(process, job.seconds, status, console)
