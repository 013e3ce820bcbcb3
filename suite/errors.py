"""The exceptions that `suite` prints as one line, with exit code 2."""

import json
import re

LENGTH = re.compile(r"(?:Tuple|List) should have (at least|at most) (\d+) items?.*")
"""Pydantic's message for a list of another length."""
MAPPING = re.compile(r"a valid dictionary(?: or instance of \w+)?")
"""Pydantic's words for a mapping, with the name of its class where it has one."""
NUMBER = re.compile(r"a valid (integer|number), unable to parse string as an? (integer|number)")
"""Pydantic's words for a number that the command line states."""


class UserError(Exception):
    """Input that cannot be used; the message names the file, the field, the value and what is allowed."""


class DiskFull(UserError):
    """A file for which its file system has no space; once there is space, the same command continues."""


def reason(error: Exception) -> str:
    """Return in one line why text cannot be parsed, without a position and Python's advice to programmers."""
    text = error.msg if isinstance(error, json.JSONDecodeError) else str(error).splitlines()[0]
    return text.partition("; use sys.")[0]


def allowed_by(message: str) -> str:
    """Return what is allowed, from pydantic's message on a value that is not."""
    allowed = message.removeprefix("Input should be ").removeprefix("Value error, ")
    allowed = LENGTH.sub(r"a list of \1 \2", allowed)
    allowed = allowed.replace("String should have at least 1 character", "a text that is not empty")
    allowed = MAPPING.sub("a mapping of fields to values", allowed)
    allowed = NUMBER.sub(r"a valid \1", allowed).replace("greater than or equal to", "at least")
    allowed = allowed.replace("less than or equal to", "at most")
    return allowed.replace("a valid boolean", "true or false").replace("a valid tuple", "a list")
