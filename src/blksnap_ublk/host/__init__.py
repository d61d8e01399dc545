# SPDX-License-Identifier: MIT
"""Facts about this host: its block devices, mounts, files and who uses them. Knows nothing of snapshots."""
