# SPDX-License-Identifier: MIT
"""What a device is to us, in the form that udev rules read: a file of KEY=VALUE lines for each origin, filtered device
and image, in the folder `udev` of the runtime directory.

The file of a ublk device is called `ublkbN`, that of an origin `MAJOR:MINOR`. The rules need no program of ours, and
are right also while the daemon is down.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum

TOKEN = "BLKSNAP_TOKEN"
MAX_OTHER_LINKS = 8
"""So many links of an origin move to its filtered device; the rules have a line for each."""

_MOVING = ("disk/by-id/", "disk/by-path/", "disk/by-partuuid/", "disk/by-partlabel/")
_STAYING = ("disk/by-id/dm-", "disk/by-id/lvm-pv-uuid-", "disk/by-id/md-")


class Kind(StrEnum):
    """The three kinds of devices."""

    ORIGIN = "origin"
    FILTERED = "filtered"
    IMAGE = "image"


@dataclass(frozen=True)
class Role:
    """`link` is our symlink to the device, below `/dev`. `token` differs for each file: it shows what udev has read.

    `other_links`: those that udev had made to the origin, and that lead to the filtered device now.
    """

    kind: Kind
    name: str
    origin: str
    link: str
    snapshot: str = ""
    other_links: tuple[str, ...] = ()
    token: str = field(default_factory=lambda: secrets.token_hex(8))

    @classmethod
    def of_origin(cls, name: str, origin: str) -> Role:
        return cls(Kind.ORIGIN, name, origin, f"blksnap/origins/{name}")

    @classmethod
    def of_filtered(cls, name: str, origin: str, links_of_origin: Sequence[str] = ()) -> Role:
        """`links_of_origin`: all that lead to the origin now."""
        moving = [link for link in links_of_origin if link.startswith(_MOVING) and not link.startswith(_STAYING)]
        return cls(Kind.FILTERED, name, origin, f"blksnap/{name}", other_links=tuple(moving[:MAX_OTHER_LINKS]))

    @classmethod
    def of_image(cls, snapshot: str, name: str, origin: str) -> Role:
        return cls(Kind.IMAGE, name, origin, f"blksnap/{snapshot}/{name}", snapshot)

    def same_as(self, other: Role) -> bool:
        """Whether the two say the same of the same device."""
        return replace(self, token="", other_links=()) == replace(other, token="", other_links=())

    def encode(self) -> str:
        """The text of the file."""
        values = {
            "BLKSNAP_ROLE": self.kind.value,
            "BLKSNAP_NAME": self.name,
            "BLKSNAP_ORIGIN": self.origin,
            "BLKSNAP_SNAPSHOT": self.snapshot,
            "BLKSNAP_LINK": self.link,
            TOKEN: self.token,
        }
        values |= {f"BLKSNAP_LINK_{n}": link for n, link in enumerate(self.other_links, 1)}
        return "".join(f"{key}={value}\n" for key, value in values.items() if value)

    @classmethod
    def decode(cls, text: str) -> Role:
        """From the text of a file. Raises ValueError for one that is damaged."""
        values = dict(line.partition("=")[::2] for line in text.splitlines())
        try:
            return cls(
                kind=Kind(values["BLKSNAP_ROLE"]),
                name=values["BLKSNAP_NAME"],
                origin=values["BLKSNAP_ORIGIN"],
                link=values["BLKSNAP_LINK"],
                snapshot=values.get("BLKSNAP_SNAPSHOT", ""),
                other_links=tuple(
                    values[key] for n in range(1, MAX_OTHER_LINKS + 1) if (key := f"BLKSNAP_LINK_{n}") in values
                ),
                token=values[TOKEN],
            )
        except KeyError as error:
            raise ValueError(f"{error.args[0]} is missing") from None
