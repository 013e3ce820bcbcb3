"""The C sources of the operators as one library, compiled once for this machine's CPU and kept in the user's cache.

A library's name is a hash of the sources and of the compiler's predefined macros, which identify the compiler and the
CPU it compiles for: machines that share a home folder do not share code. The compiler is `cc` unless CC names another.
Calls go through ctypes, which releases the GIL. The C code always uses one thread.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
import warnings
from pathlib import Path

from torch import Tensor

SOURCES = sorted(Path(__file__).parent.glob("*/native.c"))
FLAGS = ("-std=c11", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off")
"""No operation is contracted or reordered; where torch's kernels round once, the sources call fmaf."""


class Unavailable(RuntimeError):
    """The library cannot be compiled or loaded."""


@functools.cache
def available() -> bool:
    """Return whether the library can be used; warns if there is a compiler but it fails."""
    if shutil.which(_compiler()[0]) is None:
        return False
    try:
        library()
    except Unavailable as error:
        warnings.warn(f"{error}; the PyTorch path is used", stacklevel=2)
        return False
    return True


@functools.cache
def library() -> ctypes.CDLL:
    """Return the library, compiled if it is not in the cache; raises Unavailable if that fails."""
    if shutil.which(_compiler()[0]) is None:
        raise Unavailable(f"kernel backend native: no C compiler {_compiler()[0]!r} (CC names another)")
    macros = _run(*_compiler(), *FLAGS, "-dM", "-E", "-x", "c", os.devnull)
    identity = hashlib.sha256(macros + shlex.join(FLAGS).encode())
    for source in SOURCES:
        identity.update(source.read_bytes())
    path = _cache() / f"{identity.hexdigest()[:32]}.so"
    try:
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            _compile(path)
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise Unavailable(f"kernel backend native: {error}") from error


Argument = Tensor | int | ctypes.Structure | ctypes.c_void_p


def call(name: str, *arguments: Argument) -> int:
    """Run a C function that returns an int64_t; tensors and structures are passed as pointers, ints as int64_t.

    Only contiguity of the tensors is checked.
    """
    function = getattr(library(), name)
    function.restype = ctypes.c_int64
    return function(*(_as_c(argument) for argument in arguments))


def _as_c(argument: Argument) -> object:
    if isinstance(argument, Tensor):
        assert argument.is_contiguous()
        return ctypes.c_void_p(argument.data_ptr())
    if isinstance(argument, ctypes.Structure):
        return ctypes.byref(argument)
    return ctypes.c_int64(argument) if isinstance(argument, int) else argument


def _compile(path: Path) -> None:
    """Compile into a temporary folder and rename, so that other processes see a complete file or none."""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        built = Path(folder) / path.name
        _run(*_compiler(), *FLAGS, "-shared", "-fPIC", "-o", str(built), *map(str, SOURCES), "-lm")
        built.replace(path)


def _compiler() -> list[str]:
    return shlex.split(os.environ.get("CC") or "cc")


def _cache() -> Path:
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:  # no HOME, and a user id without an account, as in some containers
        raise Unavailable("kernel backend native: no home folder for the library; set XDG_CACHE_HOME") from None
    return folder / "next-parameter" / "kernels"


def _run(*command: str) -> bytes:
    done = subprocess.run(command, capture_output=True, check=False)
    if done.returncode:
        last = done.stderr.decode(errors="replace").strip().rpartition("\n")[2]
        raise Unavailable(f"kernel backend native: {command[0]} failed: {last}")
    return done.stdout
