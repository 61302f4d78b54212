"""Errors that a user can mend. Their text is the whole message; the command line prints it without a traceback."""

from __future__ import annotations


class UserError(Exception):
    """Bad configuration, data or surroundings: says which key or file, its value, what would be valid, and the fix."""


class Advice(UserWarning):
    """A warning that says what to do; a run shows it on the console and in log.txt, once."""
