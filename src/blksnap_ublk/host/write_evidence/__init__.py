# SPDX-License-Identifier: MIT
"""Whether somebody wrote to a device while we did not look: what its file system, and the kernel, say of it."""

from blksnap_ublk.host.write_evidence.evidence import Evidence, read, refutation

__all__ = ["Evidence", "read", "refutation"]
