# SPDX-License-Identifier: MIT
"""How starting a guest, or the guest itself, can fail; each with the exit status of tests/guest/run."""


class Failure(Exception):
    """The text is for the user and says what would help."""

    exit_status = 1


class GuestDied(Failure):
    """The guest ended, or was ended, before its command did."""

    exit_status = 124


class CannotStart(Failure):
    """Something that a guest needs is missing or failed."""

    exit_status = 125


class NoSuchKernel(Failure):
    """This machine's distribution has no kernel of the kind that was asked for."""

    exit_status = 69
