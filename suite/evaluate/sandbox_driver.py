"""The code that runs inside the sandbox before and after the program; its text is passed to `python -c`.

Standard input holds the program's length (12 digits), the program, and a nonce of 32 bytes. The nonce is written to
standard output if the program ends normally.
"""

import os
import resource
import sys
from typing import Any

NONCE_BYTES = 32
BANNED = ("ctypes", "_posixsubprocess", "_xxsubinterpreters", "_interpreters", "_testcapi", "_socket")
"""Refused modules, by the end of their name, since a loader may put them into a package."""
REFUSED = (
    "cpython.PyInterpreterState_New",
    "ctypes.",
    "gc.get_",
    "os.exec",
    "os.fork",
    "os.kill",
    "os.posix_spawn",
    "os.system",
    "socket.",
    "subprocess.",
    "sys._current_",
    "sys.setprofile",
    "sys.settrace",
)


def limit(bounds: list[str]) -> None:
    """Set limits of the form NAME=NUMBER; names are those of the resource module, without RLIMIT_."""
    for bound in bounds:
        name, _, number = bound.partition("=")
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (int(number), int(number)))


def read(count: int) -> bytes:
    """Read exactly `count` bytes of standard input."""
    data = b""
    while len(data) < count:
        more = os.read(0, count - len(data))
        if not more:
            os._exit(3)
        data += more
    return data


def guard() -> None:
    """Refuse from now on all access to other processes and to the interpreter's internals."""

    native = tuple(path + "/" for path in sys.path if path.endswith("lib-dynload"))

    # bound as defaults, since the program may rebind the names of this module
    def hook(
        event: str,
        args: tuple[Any, ...],
        banned: tuple[str, ...] = BANNED,
        native: tuple[str, ...] = native,
        refused: tuple[str, ...] = REFUSED,
        text: type[str] = str,
        names: tuple[type, ...] = (str, bytes),
        is_a: Any = isinstance,
        decode: Any = os.fsdecode,
        error: type[Exception] = PermissionError,
        missing: type[Exception] = ImportError,
    ) -> None:
        if event == "import":
            name, path = args[:2]  # the path of native code, else None
            is_foreign = path is not None and (text.find(path, "..") >= 0 or not text.startswith(path, native))
            if text.endswith(name, banned) or is_foreign:
                raise missing("not available in the sandbox")
        elif event == "open":
            if is_a(args[0], names) and "/proc" in decode(args[0]):
                raise error("/proc is closed in the sandbox")
        elif text.startswith(event, refused):
            raise error("refused in the sandbox")

    sys.addaudithook(hook)


def main() -> None:
    """Run the program; write the nonce after it."""
    limit(sys.argv[1:])
    code = compile(read(int(read(12))), "program", "exec")
    module = type(sys)("program")
    sys.modules["program"] = module
    sys.argv = ["program"]
    guard()
    # Evaluated in this order: os.write, the nonce, the program, the call. While the program runs, both lie on the
    # interpreter's stack, where no name, frame or patched function reaches them.
    os.write(1, (b"\n" + read(NONCE_BYTES), exec(code, module.__dict__))[0])  # type: ignore[func-returns-value]
    os._exit(0)


if __name__ == "__main__":
    main()
