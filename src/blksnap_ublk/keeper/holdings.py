# SPDX-License-Identifier: MIT
"""Descriptors held by name."""

import errno
import os

from blksnap_ublk.keeper.fd_store import FdStore


class Holdings:
    """Descriptors that the keeper keeps open. Names are chosen by those who put them, by custom `kind:object`.

    `store`: where the service manager keeps them as well.
    """

    def __init__(self, store: FdStore) -> None:
        self._held: dict[str, int] = {}
        self._store = store

    def restore(self) -> None:
        """Begin with what the service manager has kept for a keeper before this one."""
        self._held.update(self._store.restore())

    def put(self, name: str, descriptor: int) -> None:
        """Hold `descriptor`, which is ours from now on; one held under `name` before is closed."""
        former = self._held.get(name)
        self._held[name] = descriptor
        self._store.put(name, descriptor)
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
        self._store.drop(name)
        os.close(descriptor)

    def names(self) -> list[str]:
        """All names, sorted."""
        return sorted(self._held)

    def forget(self) -> None:
        """Let the service manager keep nothing any more: another keeper puts it, or nobody needs it."""
        self._store.forget()

    def close(self) -> None:
        """Close everything."""
        while self._held:
            os.close(self._held.popitem()[1])
