# SPDX-License-Identifier: MIT
"""Where the benches that need no ublk put a result."""

from __future__ import annotations

import os
import time
from pathlib import Path

import msgspec

RESULTS = Path(__file__).parent / "results"


def store(kind: str, document: msgspec.Struct, text: str) -> None:
    """JSON and Markdown to bench/results/, the latter to stdout as well."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{kind}-{time.strftime('%Y%m%dT%H%M%S')}-{os.uname().release}"
    path.with_name(path.name + ".json").write_bytes(msgspec.json.encode(document))
    path.with_name(path.name + ".md").write_text(text)
    print(text)
