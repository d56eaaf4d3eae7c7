"""Errors that a user can cause.

Raise `InputError` for invalid arguments, configurations and files: one line that says what is wrong, which value was
given, and what to do. The command lines print that line without a traceback and exit with status 2.
"""


class CannotWrite(Exception):
    """Raised if a run directory cannot be written, on a full disk for instance; the message says what is lost."""


class InputError(ValueError):
    """Raised for a configuration, file or argument that cannot be used; the message is shown to the user."""
