# SPDX-License-Identifier: MIT
"""Packages of this machine's distribution, fetched and unpacked without being installed.

apt does the work, with a configuration of its own: the addresses are those that this machine's apt uses, with the
suites added that have the kernels we want. The signatures are checked as for every package.
"""

import os
import platform
import re
import subprocess
from pathlib import Path

from tests.guest import cache
from tests.guest.failure import CannotStart

INDEX = re.compile(r"^'(?P<address>\S+)/dists/(?P<suite>[^/']+)/InRelease'", re.MULTILINE)
KEYRINGS = ("debian-archive-keyring.gpg", "debian-archive-keyring.pgp", "ubuntu-archive-keyring.gpg")
# Suites wanted beyond those configured, for each release, from the address that has the release itself.
MORE_SUITES = {
    "bookworm": ["bookworm-backports", "trixie-backports"],
    "trixie": ["trixie-backports"],
    "noble": ["noble-updates"],
}


class Archive:
    """The packages that this machine's package archive offers."""

    def __init__(self) -> None:
        """Reads the package lists; CannotStart where there is no apt or the archive cannot be read."""
        self._directory = cache.directory() / "apt"
        self._configuration = self._directory / "apt.conf"
        for name in ("lists/partial", "archives/partial"):
            (self._directory / name).mkdir(parents=True, exist_ok=True)
        self._configuration.write_text(
            f'Dir::Etc::SourceList "{self._directory}/archive.sources";\n'
            'Dir::Etc::SourceParts "/dev/null";\n'
            f'Dir::State::Lists "{self._directory}/lists";\n'
            f'Dir::Cache "{self._directory}";\n'
            'APT::Sandbox::User "root";\n'
            'Acquire::Languages "none";\n'
        )
        (self._directory / "archive.sources").write_text("\n".join(self._sources()))
        self._apt("apt-get", "-q", "-o", "APT::Update::Error-Mode=any", "update")

    def names(self, pattern: re.Pattern[str]) -> list[re.Match[str]]:
        """The names of all packages that match as a whole."""
        names = self._apt("apt-cache", "pkgnames", "linux-").split()
        return [match for name in names if (match := pattern.fullmatch(name))]

    def unpack(self, names: list[str], target: Path) -> None:
        """Downloads the packages and unpacks their files below `target`."""
        self._apt("apt-get", "-q", "download", *names)
        for package in self._directory.glob("*.deb"):
            subprocess.run(["dpkg-deb", "-x", str(package), str(target)], check=True)
            package.unlink()

    def _sources(self) -> list[str]:
        codename = platform.freedesktop_os_release().get("VERSION_CODENAME", "")
        if codename not in MORE_SUITES:
            raise CannotStart(
                f"no kernel with ublk is known for this distribution ({codename or 'unnamed'}): "
                "use Debian 12, 13 or Ubuntu 24.04, or GUEST=uml with BLKSNAP_UML_KERNEL=FILE"
            )
        configured = run(["apt-get", "update", "--print-uris"], {})
        suites = [(match["suite"], match["address"]) for match in INDEX.finditer(configured)]
        main = next((address for suite, address in suites if suite == codename), None)
        if main is None:
            raise CannotStart(f"apt on this machine is not set up for {codename}, so no kernel can be fetched")
        suites = [(suite, address) for suite, address in suites if suite.split("-")[0] == codename]
        suites += [(suite, main) for suite in MORE_SUITES[codename] if (suite, main) not in suites]
        keyring = next((path for name in KEYRINGS if (path := Path("/usr/share/keyrings", name)).exists()), None)
        signed = f"Signed-By: {keyring}\n" if keyring else ""
        return [
            f"Types: deb\nURIs: {address}\nSuites: {suite}\nComponents: main\n{signed}" for suite, address in suites
        ]

    def _apt(self, *command: str) -> str:
        return run(list(command), {"APT_CONFIG": str(self._configuration)}, self._directory)


def run(command: list[str], environment: dict[str, str], directory: Path | None = None) -> str:
    """The output of a command of apt; CannotStart, with its own error, when it fails."""
    try:
        done = subprocess.run(command, env=os.environ | environment, cwd=directory, capture_output=True, text=True)
    except FileNotFoundError:
        raise CannotStart(f"{command[0]} is missing: kernels are fetched with apt") from None
    if done.returncode != 0:
        raise CannotStart(f"{' '.join(command[:3])} failed: {done.stderr.strip()}")
    return done.stdout
