# SPDX-License-Identifier: MIT
"""What the configurations of all transports have in common."""

from __future__ import annotations

from typing import Any

from blksnap_ublk.engine._engine import ffi
from blksnap_ublk.engine.device import Device
from blksnap_ublk.engine.image import Image
from blksnap_ublk.engine.py_queue import PyQueue


def served(device: Device | None, image: Image | None, py: PyQueue | None) -> dict[str, Any]:
    """The fields `device`, `image`, `py` of a configuration; ValueError unless exactly one is given."""
    parts = {"device": device, "image": image, "py": py}
    if sum(part is not None for part in parts.values()) != 1:
        raise ValueError("a queue serves a device, an image or a Python queue: exactly one of them")
    return {name: ffi.NULL if part is None else part.pointer for name, part in parts.items()}
