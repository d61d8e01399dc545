# SPDX-License-Identifier: MIT
"""What is compared: each contender has disks of its own of the same kind, and is ready to be measured at any time."""
