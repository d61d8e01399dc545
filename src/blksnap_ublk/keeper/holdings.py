# SPDX-License-Identifier: MIT
"""Descriptors held by name."""

import errno
import os


class Holdings:
    """Descriptors that the keeper keeps open. Names are chosen by those who put them, by custom `kind:object`."""

    def __init__(self) -> None:
        self._held: dict[str, int] = {}

    def put(self, name: str, descriptor: int) -> None:
        """Hold `descriptor`, which is ours from now on; one held under `name` before is closed."""
        former = self._held.get(name)
        self._held[name] = descriptor
        if former is not None:
            os.close(former)

    def get(self, name: str) -> int:
        """The descriptor held under `name`; it stays ours. Raises OSError(ENOENT)."""
        try:
            return self._held[name]
        except KeyError:
            raise OSError(errno.ENOENT, f"no descriptor is held under {name!r}") from None

    def drop(self, name: str) -> None:
        """Close the descriptor held under `name`. Raises OSError(ENOENT)."""
        descriptor = self.get(name)
        del self._held[name]
        os.close(descriptor)

    def names(self) -> list[str]:
        """All names, sorted."""
        return sorted(self._held)

    def close(self) -> None:
        """Close everything."""
        while self._held:
            os.close(self._held.popitem()[1])
