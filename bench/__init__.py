# SPDX-License-Identifier: MIT
"""Speeds, as ratios of runs side by side on one machine."""
