"""What a person reads when their input cannot be used.

Raise `InputError` for anything a person typed, configured or pointed at: one line that says what is wrong,
what came, and what to do. The command lines print that line and leave with status 2; no traceback.
"""


class CannotWrite(Exception):
    """A run's folder that cannot be written, because the disk is full for instance; its text says what is lost."""


class InputError(ValueError):
    """A configuration, file or argument that cannot be used; its text is shown to the person as it is."""
