"""The exceptions that `suite` prints as one line, with exit code 2."""

import json


class UserError(Exception):
    """Input that cannot be used; the message names the file, the field, the value and what is allowed."""


class DiskFull(UserError):
    """A file for which its file system has no space; once there is space, the same command continues."""


def reason(error: Exception) -> str:
    """Return in one line why text cannot be parsed, without a position and Python's advice to programmers."""
    text = error.msg if isinstance(error, json.JSONDecodeError) else str(error).splitlines()[0]
    return text.partition("; use sys.")[0]
