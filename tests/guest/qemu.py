# SPDX-License-Identifier: MIT
"""A guest in QEMU, with a stock kernel of this machine's distribution."""

import dataclasses
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

from tests.guest import cache, initramfs, kernel, layers
from tests.guest.failure import CannotStart, GuestDied
from tests.guest.job import Job, wait

PROGRAM = "qemu-system-x86_64"
ACCELERATION = {
    "kvm": ["-accel", "kvm", "-cpu", "host"],
    "tcg": ["-accel", "tcg,thread=multi,tb-size=512", "-cpu", "max,la57=off"],
}
KERNEL_ARGUMENTS = "console=ttyS0 loglevel=5 panic=-1 oops=panic mitigations=off random.trust_cpu=on nokaslr"
PROBE_SECONDS = 12


def run(job: Job, *, wanted: str, accel: str) -> int:
    """Runs a job on the kernel `wanted` (kernel.find); accel is kvm, tcg or auto, which takes KVM where it works."""
    if shutil.which(PROGRAM) is None:
        raise CannotStart(f"{PROGRAM} is missing: install qemu-system-x86 (make setup), or set GUEST=uml")
    if platform.machine() != "x86_64":
        raise CannotStart(f"guests in QEMU are made for x86_64 only, and this is {platform.machine()}")
    found = kernel.find(wanted)
    with tempfile.TemporaryDirectory(prefix="guest-", dir=cache.directory()) as name:
        temporary = Path(name)
        images = [*layers.all_layers(job.checkout, temporary), found.modules_layer]
        if accel == "auto":
            accel = "kvm" if kvm_works(job, found, images, temporary) else "tcg"
        how = "KVM" if accel == "kvm" else "an emulated CPU, 10 to 30 times slower than this machine"
        print(f"Starting a guest in QEMU: Linux {found.release}, {how}.", flush=True)
        return start(job, found, images, accel, temporary)


def start(job: Job, found: kernel.Kernel, images: list[Path], accel: str, temporary: Path) -> int:
    """Starts the guest and waits for its end (job.wait); the uppermost layer is the first image."""
    initrd, status, console = temporary / "initrd", temporary / "status", temporary / "console"
    # The names of virtio ports need udev; their numbers do not.
    initramfs.build(initrd, found.root_modules, job.script(output="/dev/vport0p1", status="/dev/vport0p2", guest=accel))
    status.unlink(missing_ok=True)
    command = [PROGRAM, "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-machine", "q35"]
    command += [*ACCELERATION[accel], "-m", job.memory, "-smp", str(job.cpus), "-serial", f"file:{console}"]
    command += ["-kernel", str(found.image), "-initrd", str(initrd)]
    command += ["-append", " ".join([KERNEL_ARGUMENTS, *job.kernel_arguments])]
    command += ["-device", "virtio-serial-pci", "-chardev", "file,id=output,path=/dev/stdout"]
    command += ["-device", "virtserialport,chardev=output,nr=1", "-chardev", f"file,id=status,path={status}"]
    command += ["-device", "virtserialport,chardev=status,nr=2"]
    for index, image in enumerate(images):
        command += ["-drive", f"if=none,id=layer{index},format=raw,readonly=on,file={image}"]
        command += ["-device", f"virtio-blk-pci,drive=layer{index}"]
    with (temporary / "qemu.log").open("wb") as log:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log)
    try:
        return wait(process, job.seconds, status, console)
    except GuestDied as error:
        complaint = (temporary / "qemu.log").read_text(errors="replace").strip()
        raise GuestDied(f"{error}\n{complaint}".rstrip()) from None


def kvm_works(job: Job, found: kernel.Kernel, images: list[Path], temporary: Path) -> bool:
    """Whether this kernel runs under KVM here: /dev/kvm may exist and still fail. Tried once, and remembered."""
    if not Path("/dev/kvm").exists():
        return False
    remembered = cache.directory() / f"kvm-{found.release}-on-{platform.release()}"
    with cache.locked("kvm"):
        if not remembered.exists():
            print(f"Trying whether KVM works here ({PROBE_SECONDS} s at most) ...", flush=True)
            try:
                status = start(
                    dataclasses.replace(job, command=["true"], seconds=PROBE_SECONDS), found, images, "kvm", temporary
                )
            except GuestDied:
                status = 1
            remembered.write_text("yes\n" if status == 0 else "no\n")
    return remembered.read_text() == "yes\n"
