# SPDX-License-Identifier: MIT
"""The scenario: everything that blksnap-ublk is for, once, on real devices."""
