"""The exceptions that `suite` prints as one line, with exit code 2."""


class UserError(Exception):
    """Input that cannot be used; the message names the file, the field, the value and what is allowed."""


class DiskFull(UserError):
    """A file for which its file system has no space; once there is space, the same command continues."""
