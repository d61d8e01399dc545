# SPDX-License-Identifier: MIT
"""The guest's root in QEMU: read-only images of this machine's own files, each at its own path, laid over one another.

system: the packages of SYSTEM_PACKAGES and all that they depend on; venv: .venv; checkout: all else of the project. The
first two are kept and made again when what they hold has changed; the checkout's is made for each guest.
"""

import hashlib
import os
import re
import subprocess
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from tests.guest import cache, squashfs
from tests.guest.failure import CannotStart

# Those that are not installed here are absent in the guest too.
SYSTEM_PACKAGES = (
    *(
        "base-files",
        "bash",
        "coreutils",
        "diffutils",
        "findutils",
        "gawk",
        "grep",
        "gzip",
        "hostname",
        "iproute2",
        "kmod",
    ),
    *(
        "libc-bin",
        "login",
        "mawk",
        "mount",
        "passwd",
        "procps",
        "psmisc",
        "sed",
        "strace",
        "tar",
        "util-linux",
        "xz-utils",
    ),
    *("btrfs-progs", "dmsetup", "e2fsprogs", "fdisk", "fio", "lvm2", "thin-provisioning-tools", "udev", "xfsprogs"),
    *("libc6", "libgcc-s1", "libstdc++6", "liburing2", "python3", "zlib1g"),
)
# What dpkg does not list, because scripts of packages or the distribution's installer make it.
SYSTEM_EXTRAS = ("passwd", "group", "nsswitch.conf", "mtab", "ld.so.cache", "alternatives", "machine-id")
LEFT_OUT = re.compile(r"/usr/share/(doc|info|locale|man|bug|lintian)/.+|/usr/lib/python3/dist-packages/.+")
CHECKOUT_LEFT_OUT = {".git", ".venv", ".mypy_cache", ".ruff_cache", ".pytest_cache", ".hypothesis"}
PYTHON_LEFT_OUT = {"test", "tests", "include", "share", "idlelib", "tkinter"}


def all_layers(checkout: Path, temporary: Path) -> list[Path]:
    """The images for one guest, the uppermost first; the one made for it alone is in `temporary`."""
    venv = checkout / ".venv"
    if not (venv / "bin" / "python").exists():
        raise CannotStart(f"{venv} is missing: run make setup")
    own = temporary / "checkout.squashfs"
    build(own, walk(checkout, CHECKOUT_LEFT_OUT))
    venv_files = walk(venv, set())
    venv_layer = kept("venv", fingerprint(venv_files), lambda: venv_files)
    return [own, venv_layer, system_layer((venv / "bin" / "python").resolve().parents[1])]


def system_layer(python: Path) -> Path:
    """The image of the system's packages, and of the Python installed at `python` where that is not one of them."""
    packages = closure(SYSTEM_PACKAGES)
    foreign = [] if python == Path("/usr") else walk(python, PYTHON_LEFT_OUT)
    content = "\n".join([*(f"{name} {version}" for name, version in packages.items()), fingerprint(foreign)])
    key = content + Path(__file__).read_text()
    return kept("system", key, lambda: [*package_files(packages), *foreign, *shared_libraries(foreign)])


def kept(name: str, key: str, files: Callable[[], Iterable[Path]]) -> Path:
    """The image in the cache that was made for `key`, otherwise one of `files` made now."""
    target = cache.directory() / f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.squashfs"
    with cache.locked(name):
        cache.remove_unused(f"{name}-*.squashfs")
        if target.exists():
            os.utime(target)
        else:
            print(f"Making the guest's {name} image ...", flush=True)
            build(target, files())
    return target


def build(target: Path, files: Iterable[Path]) -> None:
    """An image of the files, each at its real path, and of the directories above them."""
    wanted: set[Path] = set()
    for path in files:
        # /bin/sh is /usr/bin/sh: a directory must not be in the image under a second name.
        path = path.parent.resolve() / path.name
        wanted.add(path)
        wanted.update(path.parents)
    wanted.discard(Path("/"))
    squashfs.build(target, Path("/"), sorted(path.relative_to("/") for path in wanted if os.path.lexists(path)))


def walk(top: Path, left_out: set[str]) -> list[Path]:
    """All files and directories below `top`, without those of a left-out name; links are not followed."""
    found = [top]
    for directory, names, files in os.walk(top):
        names[:] = sorted(name for name in names if name not in left_out)
        found += [Path(directory, name) for name in (*names, *sorted(files))]
    return found


def fingerprint(files: Iterable[Path]) -> str:
    """Changes when a file's name, size or time does."""
    lines = []
    for path in files:
        status = path.lstat()
        lines.append(f"{path} {status.st_mode} {0 if path.is_dir() else status.st_size} {int(status.st_mtime)}")
    return "\n".join(lines)


def closure(wanted: Iterable[str]) -> dict[str, str]:
    """The installed packages among those wanted, and all that they depend on: name to version."""
    show = "${db:Status-Status}\t${Package}\t${Version}\t${Provides}\t${Pre-Depends}, ${Depends}\n"
    output = subprocess.run(["dpkg-query", "-W", "-f", show], check=True, capture_output=True, text=True).stdout
    version: dict[str, str] = {}
    depends: dict[str, list[str]] = {}
    providers: dict[str, list[str]] = {}
    for line in output.splitlines():
        status, name, number, provides, needs = line.split("\t")
        if status == "installed":
            version[name] = number
            depends[name] = names_in(needs)
            for provided in (name, *names_in(provides)):
                providers.setdefault(provided, []).append(name)
    found: dict[str, str] = {}
    ahead = list(wanted)
    while ahead:
        for name in providers.get(ahead.pop(), []):
            if name not in found:
                found[name] = version[name]
                ahead += depends[name]
    return dict(sorted(found.items()))


def names_in(relations: str) -> list[str]:
    """The package names of a Depends or Provides field, without versions and architectures."""
    return [part.split()[0].split(":")[0] for part in re.split(r"[,|]", relations) if part.split()]


def package_files(packages: Iterable[str]) -> Iterator[Path]:
    """What the packages installed, with compiled Python beside its source, and what their scripts made."""
    listed = subprocess.run(["dpkg-query", "-L", *packages], check=True, capture_output=True, text=True).stdout
    for line in listed.splitlines():
        if not line.startswith("/") or LEFT_OUT.fullmatch(line):
            continue
        path = Path(line)
        yield path
        if path.suffix == ".py":
            yield from (path.parent / "__pycache__").glob(f"{path.stem}.*.pyc")
    for name in SYSTEM_EXTRAS:
        yield from walk(Path("/etc", name), set())
    for directory in ("/usr/bin", "/usr/sbin"):
        for entry in os.scandir(directory):
            if entry.is_symlink() and os.readlink(entry.path).startswith("/etc/alternatives/"):
                yield Path(entry.path)
    # The directories of the root itself, and links such as /bin into /usr.
    yield from (path for path in Path("/").iterdir() if path.is_symlink() or path.is_dir())


def shared_libraries(files: Iterable[Path]) -> Iterator[Path]:
    """The system's libraries that programs and libraries among the files are linked with, as links and as files."""
    linked = [str(path) for path in files if ".so" in path.suffixes or path.parent.name == "bin"]
    if not linked:
        return
    output = subprocess.run(["ldd", *linked], check=False, capture_output=True, text=True).stdout
    for name in sorted(set(re.findall(r"=> (/\S+) \(", output))):
        yield Path(name)
        yield Path(name).resolve()
