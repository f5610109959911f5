"""Errors that end a process at its start, told to the user without a traceback."""

from __future__ import annotations


class StartError(Exception):
    """This process can't serve as it was started. The message says why and what to do; trying again won't help."""
