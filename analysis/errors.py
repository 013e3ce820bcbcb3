"""The one exception for a user's mistake: `python -m analysis` prints its single line and exits with code
2."""


class InputError(Exception):
    """Input that cannot be used; the message names the file, the field, the value and what is allowed."""
