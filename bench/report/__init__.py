# SPDX-License-Identifier: MIT
"""What is told of a result: ratios, aims, Markdown, plots. Nothing here measures."""
