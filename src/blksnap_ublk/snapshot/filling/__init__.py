# SPDX-License-Identifier: MIT
"""What looks after difference storages while they fill: growth, policies for when they are full, warnings, damage."""

from blksnap_ublk.snapshot.filling.filling import Filling

__all__ = ["Filling"]
