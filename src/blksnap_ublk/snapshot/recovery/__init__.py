# SPDX-License-Identifier: MIT
"""What an io process that has died left is given to the one that is there now.

In this order: everything is made known to it (`adoption`), devices are served (`devices`), what was left is checked
and images are served (`images`). A device waits for nothing of a snapshot; what cannot be adopted is `losing`.
"""
