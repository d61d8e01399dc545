# SPDX-License-Identifier: MIT
"""The command line: `main` puts it together, the other modules hold a group of commands each."""
