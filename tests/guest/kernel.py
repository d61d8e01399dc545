# SPDX-License-Identifier: MIT
"""The distribution's own kernels that have ublk: choosing one, fetching it, and its part of a guest's root."""

import lzma
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from tests.guest import cache, squashfs
from tests.guest.archive import Archive
from tests.guest.failure import CannotStart, NoSuchKernel

RELEASE = re.compile(r"linux-image-(?P<release>\d+\.\d+\.\d+[+-][\w.~]+-(?:amd64|generic))")
PACKAGES = ("linux-image-{}", "linux-base-{}", "linux-binary-{}", "linux-modules-{}", "linux-modules-extra-{}")
FIRST_COPY = (6, 5)  # UBLK_F_USER_COPY
FIRST_ZERO_COPY = (6, 16)  # UBLK_F_AUTO_BUF_REG
# The modules without which there is no root; all others are loaded from it.
ROOT_MODULES = ("virtio_pci", "virtio_blk", "virtio_console", "squashfs", "overlay")


@dataclass(frozen=True)
class Kernel:
    """A kernel in the cache: its release (uname -r) and the directory that holds it."""

    release: str
    directory: Path

    @property
    def image(self) -> Path:
        return self.directory / "vmlinuz"

    @property
    def modules_layer(self) -> Path:
        """A squashfs with /usr/lib/modules/RELEASE."""
        return self.directory / "modules.squashfs"

    @property
    def root_modules(self) -> Path:
        """A directory of the modules that the root needs, uncompressed; sorted by name is the order of loading."""
        return self.directory / "root-modules"


def find(wanted: str) -> Kernel:
    """The kernel for `wanted`: copy, zero-copy or the beginning of a release; fetched unless the cache has one."""
    with cache.locked("kernels"):
        kernels = cache.directory() / "kernels"
        release = choose(wanted, [path.name for path in kernels.glob("*")])
        if release is None:
            archive = Archive()
            names = [match["release"] for match in archive.names(RELEASE)]
            release = choose(wanted, names)
            if release is None:
                raise NoSuchKernel(f"this distribution's archive has no kernel for --kernel {wanted}")
            print(f"Fetching kernel {release} ...", flush=True)
            fetch(archive, release, kernels / release)
        return Kernel(release, kernels / release)


def numbers(release: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", release)]


def choose(wanted: str, releases: list[str]) -> str | None:
    """Of the releases: for copy the oldest series that has it, for zero-copy the newest, of that the newest release."""
    releases = sorted((release for release in releases if release[0].isdecimal()), key=numbers)
    series = {release: (numbers(release)[0], numbers(release)[1]) for release in releases}
    if wanted == "copy":
        fit = [release for release in releases if FIRST_COPY <= series[release] < FIRST_ZERO_COPY]
        fit = [release for release in fit if series[release] == series[fit[0]]]
    elif wanted == "zero-copy":
        fit = [release for release in releases if series[release] >= FIRST_ZERO_COPY]
    else:
        fit = [release for release in releases if re.match(re.escape(wanted) + r"(?!\d)", release)]
    return fit[-1] if fit else None


def fetch(archive: Archive, release: str, target: Path) -> None:
    """Fetches a kernel into `target`, which comes into being complete or not at all."""
    target.parent.mkdir(exist_ok=True)
    names = {match[0] for match in archive.names(re.compile(r"linux-.*"))}
    packages = [name for name in (package.format(release) for package in PACKAGES) if name in names]
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=target.parent) as temporary:
        root, made = Path(temporary, "root"), Path(temporary, "made")
        made.mkdir()
        archive.unpack(packages, root)
        if (root / "lib").is_dir():
            shutil.copytree(root / "lib", root / "usr" / "lib", dirs_exist_ok=True, symlinks=True)
            shutil.rmtree(root / "lib")
        modules = Path("usr", "lib", "modules", release)
        image = next(
            (path for path in (root / "boot" / f"vmlinuz-{release}", root / modules / "vmlinuz") if path.exists()), None
        )
        if image is None:
            raise CannotStart(f"the packages {' '.join(packages)} hold no vmlinuz")
        shutil.move(image, made / "vmlinuz")
        subprocess.run(["depmod", "-b", str(root / "usr"), release], check=True)
        copy_root_modules(root / "usr", release, made / "root-modules")
        squashfs.build(
            made / "modules.squashfs", root, sorted(path.relative_to(root) for path in root.glob("usr/**/*"))
        )
        made.rename(target)


def copy_root_modules(base: Path, release: str, target: Path) -> None:
    """Puts the modules of ROOT_MODULES, and what they depend on, into `target`, uncompressed and numbered in order."""
    target.mkdir()
    files: list[str] = []
    for name in ROOT_MODULES:
        shown = subprocess.run(
            ["modprobe", "-d", str(base), "-S", release, "--show-depends", name],
            check=True,
            capture_output=True,
            text=True,
        )
        files += [line.split()[1] for line in shown.stdout.splitlines() if line.startswith("insmod ")]
    for index, file in enumerate(dict.fromkeys(files)):
        path = Path(file)
        data = path.read_bytes()
        if path.suffix == ".xz":
            data = lzma.decompress(data)
        elif path.suffix == ".zst":
            data = subprocess.run(["zstd", "-dc"], input=data, check=True, capture_output=True).stdout
        (target / f"{index:02}-{path.name.split('.')[0]}.ko").write_bytes(data)
