"""Runs programs that a model wrote so that they cannot do harm or forge a pass.

Three kinds of isolation, the strongest first:
- bubblewrap: own user, process, network, ipc and file name spaces; of the machine's files only the system libraries
  and the interpreter, read-only; one small writable folder in memory.
- unshare: the same name spaces and the same few files, made with util-linux alone.
- rlimits: limits without isolation. A program can read files, use the network and signal the evaluator, so it is used
  only if requested by name.

With every kind CPU time, memory, file size, open files and wall time are bounded, the environment is empty, and the
whole process group is killed at the end. A program is one process: an audit hook refuses to start others and to load
native code other than Python's own. (A limit on processes is a second barrier, but does not apply to root.)

A program passes only if a random nonce is written last. The nonce stays in a pipe until the program's text has been
read, and exists only on the interpreter's value stack while program and tests run: exit(0),
printing, reading its own source or walking up the frames do not find it, and the ways to look into the
interpreter (gc, ctypes, tracing, /proc, other processes) are refused by an audit hook. The isolation protects the
machine; the nonce protects the score against simple cheating. A test that compares with == is still passed by an
object that equals everything.
"""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal, get_args

from suite.errors import UserError
from suite.evaluate.sandbox_driver import NONCE_BYTES

Kind = Literal["bubblewrap", "unshare", "rlimits"]
RunCode = Literal["strongest", "bubblewrap", "unshare", "rlimits"]
"""The value of --run-code: the strongest sandbox that works on this machine (never rlimits), or a kind."""

_SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib64", "/lib32")
_DEVICES = ("/dev/null", "/dev/urandom")
_DRIVER = (Path(__file__).parent / "sandbox_driver.py").read_text(encoding="utf-8")


@dataclass(frozen=True)
class Limits:
    """Bounds of one program. `file_bytes` also bounds its output; `scratch_bytes` bounds all files together."""

    cpu_s: int = 10
    wall_s: float = 15.0
    memory_bytes: int = 1 << 30
    file_bytes: int = 1 << 20
    open_files: int = 64
    processes: int = 64
    scratch_bytes: int = 16 << 20


@dataclass(frozen=True)
class Outcome:
    """Whether the program's tests ran to their end, and the reason in one line if they did not."""

    passed: bool
    reason: str


class Sandbox:
    """Runs programs. `kind` None: the strongest kind that works on this machine, never rlimits.

    Raises:
        UserError: No sandbox works on this machine, or the requested kind does not.
    """

    def __init__(self, kind: Kind | None = None, limits: Limits | None = None) -> None:
        self.limits = limits or Limits()
        if kind is not None:
            if kind not in get_args(Kind):
                raise UserError(f"--run-code: got {kind!r}, allowed: {', '.join(get_args(Kind))}")
            if trouble := self._trouble(kind):
                raise UserError(f"--run-code: got {kind!r}, which does not work on this machine ({trouble})")
            return
        if (first := self._trouble("bubblewrap")) and (second := self._trouble("unshare")):
            raise UserError(
                f"--run-code: neither bubblewrap ({first}) nor unshare ({second}) works here; install bubblewrap, use a"
                " container without network and --run-code rlimits, or remove the tasks that run code"
            )

    def _trouble(self, kind: Kind) -> str:
        """Set the kind and run a program that must pass; return the reason in one line if it fails, else nothing."""
        self.kind: Kind = kind
        with tempfile.TemporaryFile() as errors:
            try:
                outcome = self.run("assert sum(range(10)) == 45", errors)
            except OSError as error:
                return f"{error.filename}: {error.strerror}"
            errors.seek(0)
            lines = errors.read().decode(errors="replace").strip().splitlines()
        return "" if outcome.passed else [outcome.reason, *lines][-1]

    def run(self, program: str, errors: IO[bytes] | int = subprocess.DEVNULL) -> Outcome:
        """Run one program to its end or its limits; `errors` receives its standard error."""
        nonce = secrets.token_hex(NONCE_BYTES // 2).encode()
        source = program.encode()
        with tempfile.TemporaryDirectory() as scratch, tempfile.TemporaryFile() as output:
            process = subprocess.Popen(
                _COMMANDS[self.kind](scratch, self.limits),
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=errors,
                env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/tmp"},
                cwd=scratch,
                start_new_session=True,
            )
            reason = self._wait(process, b"%012d" % len(source) + source + nonce)
            output.seek(0, os.SEEK_END)
            output.seek(max(0, output.tell() - len(nonce) - 1))
            passed = not reason and process.returncode == 0 and output.read() == b"\n" + nonce
        return Outcome(passed, "" if passed else reason or f"ended early (exit {process.returncode})")

    def _wait(self, process: subprocess.Popen[bytes], text: bytes) -> str:
        """Send the program and wait; return a reason if it ran out of wall time. All of its processes are killed."""
        try:
            process.communicate(text, timeout=self.limits.wall_s)
        except subprocess.TimeoutExpired:
            return f"out of time ({self.limits.wall_s:g} s)"
        except BrokenPipeError:
            return "ended before it was read"
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        return ""

    def run_all(self, programs: Sequence[str], jobs: int | None = None) -> list[Outcome]:
        """Run programs in parallel, by default one per core; returns the outcomes in order."""
        with ThreadPoolExecutor(jobs or len(os.sched_getaffinity(0))) as pool:
            return list(pool.map(self.run, programs))


def sandbox_of(run_code: RunCode | None) -> Sandbox | None:
    """Return the sandbox that `--run-code` requests; None without the option. Raises UserError like `Sandbox`."""
    if run_code is None:
        return None
    return Sandbox() if run_code == "strongest" else Sandbox(run_code)


def _python(limits: Limits) -> list[str]:
    """Return the interpreter with the driver, isolated: no environment, no site packages, no bytecode written."""
    bounds = {
        "CPU": limits.cpu_s,
        "AS": limits.memory_bytes,
        "FSIZE": limits.file_bytes,
        "NOFILE": limits.open_files,
        "NPROC": limits.processes,
        "CORE": 0,
    }
    executable = str(Path(sys.executable).resolve())
    return [executable, "-I", "-S", "-B", "-c", _DRIVER, *(f"{name}={bound}" for name, bound in bounds.items())]


def _visible() -> list[Path]:
    """Return the paths that a program may read: system libraries and the interpreter's own files."""
    own = [Path(sys.base_prefix).resolve(), Path(sys.executable).resolve().parent]
    outside = [path for path in own if not any(path.is_relative_to(system) for system in _SYSTEM)]
    needed = [path for path in dict.fromkeys(outside) if not any(p in path.parents for p in outside)]
    return [path for path in (*map(Path, _SYSTEM), *needed) if path.exists()]


def _bubblewrap(scratch: str, limits: Limits) -> list[str]:
    files: list[str] = []
    for path in _visible():
        if path.is_symlink():
            files += ["--symlink", os.readlink(path), str(path)]
        else:
            files += ["--ro-bind", str(path), str(path)]
    walls = ["--unshare-all", "--die-with-parent", "--new-session", "--cap-drop", "ALL", "--clearenv"]
    devices = [word for name in _DEVICES for word in ("--dev-bind", name, name)]
    scratch_in_memory = ["--size", str(limits.scratch_bytes), "--tmpfs", "/tmp", "--chdir", "/tmp"]
    # bubblewrap's root and /dev are unbounded memory file systems, so only /tmp stays writable
    rest = [*devices, *scratch_in_memory, "--remount-ro", "/"]
    return [os.environ.get("BWRAP", "bwrap"), *walls, *files, *rest, *_python(limits)]


# As root of a new user name space: build a root of read-only mounts on a memory file system, move into it, unmount
# the old one, drop every capability. (umount reads /proc.)
_BUILD_ROOT = """
set -e
root=$1; size=$2; count=$3; shift 3
mount --make-rprivate /
mount -t tmpfs -o size=1m,mode=755 none "$root"
while [ "$count" -gt 0 ]; do
    if [ -L "$1" ]; then
        ln -s "$(readlink "$1")" "$root$1"
    else
        mkdir -p "$root$1"
        mount --bind "$1" "$root$1"
        mount -o remount,bind,ro,nosuid,nodev "$root$1"
    fi
    shift; count=$((count - 1))
done
mkdir "$root/tmp" "$root/dev" "$root/old" "$root/proc"
mount -t proc proc "$root/proc" || mount --rbind /proc "$root/proc"
mount -t tmpfs -o "size=$size,mode=1777" none "$root/tmp"
for node in DEVICES; do touch "$root$node"; mount --bind "$node" "$root$node"; done
cd "$root"
pivot_root . old
umount -l /old
umount -l /proc
mount -o remount,ro /
cd /tmp
exec setpriv --no-new-privs --bounding-set=-all --inh-caps=-all --ambient-caps=-all "$@"
""".replace("DEVICES", " ".join(_DEVICES))


def _unshare(scratch: str, limits: Limits) -> list[str]:
    walls = ["--user", "--map-root-user", "--mount", "--pid", "--net", "--ipc", "--uts", "--fork", "--kill-child"]
    files = [str(path) for path in _visible()]
    build = ["sh", "-c", _BUILD_ROOT, "sh", scratch, str(limits.scratch_bytes), str(len(files)), *files]
    return ["unshare", *walls, *build, *_python(limits)]


_COMMANDS: dict[Kind, Callable[[str, Limits], list[str]]] = {
    "bubblewrap": _bubblewrap,
    "unshare": _unshare,
    "rlimits": lambda _, limits: _python(limits),
}
