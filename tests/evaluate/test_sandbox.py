"""Hostile programs neither pass nor do harm in any kind of sandbox that works on this machine."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from suite.errors import UserError
from suite.evaluate import sandbox
from suite.evaluate.sandbox import Kind, Limits, Sandbox

LIMITS = Limits(cpu_s=1, wall_s=1.5, memory_bytes=256 << 20)

# A program passes if it reaches its end or forges it.
HOSTILE = {
    "endless loop": "while True: pass",
    "endless sleep": "import time\ntime.sleep(1000)",
    "recursion without end": "def f(): return f()\nf()",
    "memory": "x = bytearray(8 << 30)",
    "memory in small pieces": "x = []\nwhile True: x.append(bytearray(1 << 20))",
    "fork bomb": "import os\nwhile True: os.fork()",
    "process bomb": "import subprocess, sys\nwhile True: subprocess.Popen([sys.executable, '-c', 'while True: pass'])",
    "thread bomb": "import threading, time\nwhile True: threading.Thread(target=time.sleep, args=(1000,)).start()",
    "one huge file": "open('big', 'wb').write(b'x' * (64 << 20))",
    "file flood": "n = 0\nwhile True:\n    open(f'f{n}', 'wb').write(b'x' * 500_000)\n    n += 1",
    "output flood": "while True: print('x' * 100_000)",
    "network": "import socket\nsocket.create_connection(('127.0.0.1', {port}), timeout=2).sendall(b'hello')",
    "reading secrets": "import os\nassert os.environ['SECRET']",
    "killing the parent": "import os, signal\nos.kill(os.getppid(), signal.SIGKILL)\nos.kill({pid}, signal.SIGKILL)",
    "exit(0)": "import sys\nsys.exit(0)",
    "a hard exit": "import os\nprint('passed')\nos._exit(0)",
    "forging from its own source": (
        "import os, sys\ntext = open(sys.argv[0]).read() if os.path.exists(sys.argv[0]) else ''\n"
        "os.write(1, os.read(0, 64) or text.encode())\nos._exit(0)"
    ),
    "forging from the frames": (
        "import os, sys\nframe, found = sys._getframe(), []\nwhile frame:\n"
        "    found += [v for v in (*frame.f_locals.values(), *frame.f_globals.values())"
        " if isinstance(v, bytes) and len(v.strip()) == 32]\n    frame = frame.f_back\n"
        "os.write(1, b'\\n' + (found or [b'0' * 32])[0].strip())\nos._exit(0)"
    ),
}
# These succeed only without isolation.
OUTSIDE = {
    "reading /etc/passwd": "assert open('/etc/passwd').read()",
    "writing outside its folder": "open({path!r}, 'w').write('was here')",
    "filling memory with files": (
        "written = 0\nfor folder in ('/', '/dev', '/dev/shm', '/run', '/var/tmp', '/usr', '/tmp'):\n"
        "    for n in range(40):\n        try:\n            open(f'{{folder}}/f{{n}}', 'wb').write(bytes(1_000_000))\n"
        "        except OSError:\n            break\n        written += 1\nassert written > 16"
    ),
}
NATIVE = """
import importlib.util, pathlib, shutil, sys
(folder,) = (path for path in sys.path if path.endswith('lib-dynload'))
(source,) = pathlib.Path(folder).glob('{name}'.rpartition('.')[2] + '.*.so')
spec = importlib.util.spec_from_file_location('{name}', str({path}))
importlib.util.module_from_spec(spec)
"""
# These try to inspect the interpreter or to load their own native code.
INTERPRETER = {
    "garbage collector": "import gc, sys\ngc.get_referents(sys._getframe().f_back)",
    "ctypes": "import ctypes",
    "memory file": "open('/proc/self/mem', 'rb')",
    "tracing": "import sys\nsys.settrace(lambda *_: None)",
    "another interpreter": "import _xxsubinterpreters",
    "a refused module under another name": NATIVE.format(name="other._posixsubprocess", path="source"),
    "native code of its own": NATIVE.format(name="_bisect", path="shutil.copy(source, '_bisect.so')"),
}


@pytest.fixture(scope="module", params=["bubblewrap", "unshare", pytest.param("rlimits", marks=pytest.mark.slow)])
def box(request: pytest.FixtureRequest) -> Sandbox:
    try:
        return Sandbox(request.param, LIMITS)
    except UserError as error:
        pytest.skip(str(error))


@pytest.fixture
def port() -> Iterator[int]:
    """A local server; a program that reaches it fails the test."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.1)
        reached: list[bool] = []
        stop = threading.Event()

        def listen() -> None:
            while not stop.is_set():
                try:
                    server.accept()[0].close()
                    reached.append(True)
                except TimeoutError:
                    pass

        thread = threading.Thread(target=listen)
        thread.start()
        yield server.getsockname()[1]
        stop.set()
        thread.join()
        assert not reached


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_programs_do_not_pass(name: str, box: Sandbox, port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "key")
    program = HOSTILE[name].replace("{port}", str(port)).replace("{pid}", str(os.getpid()))
    started = time.perf_counter()
    outcome = box.run(program)
    assert not outcome.passed
    assert outcome.reason
    assert time.perf_counter() - started < LIMITS.wall_s + 3
    assert box.run("assert 1 + 1 == 2").passed


@pytest.mark.parametrize("name", OUTSIDE)
def test_files_outside_the_sandbox_are_out_of_reach(name: str, box: Sandbox, tmp_path: Path) -> None:
    if box.kind == "rlimits":
        pytest.skip("rlimits does not isolate, so it must be requested by name")
    target = tmp_path / "target"
    assert not box.run(OUTSIDE[name].format(path=str(target))).passed
    assert not target.exists()


@pytest.mark.parametrize("name", INTERPRETER)
def test_inspecting_the_interpreter_is_refused(name: str, box: Sandbox) -> None:
    assert not box.run(INTERPRETER[name]).passed


def test_all_processes_are_killed_at_the_end(box: Sandbox) -> None:
    mark = f"mark-{os.getpid()}-{time.time_ns()}"
    box.run(f"import time\nname = {mark!r}\ntime.sleep(1000)")
    alive = [p for p in Path("/proc").glob("[0-9]*/cmdline") if "NONCE_BYTES" in _read(p) and _started_by_us(p.parent)]
    assert not alive


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def _started_by_us(process: Path) -> bool:
    status = _read(process / "stat").rpartition(")")[2].split()
    return bool(status) and int(status[1]) == os.getpid()


def test_honest_programs_pass(box: Sandbox) -> None:
    honest = [
        "import math, re, collections, heapq, itertools, typing, string, copy, datetime, functools, bisect, hashlib",
        "from dataclasses import dataclass\n@dataclass\nclass P:\n    x: int\nassert P(1) == P(1)",
        "import collections\nN = collections.namedtuple('N', 'a b')\nassert N(1, 2).a == 1",
        "open('own', 'w').write('text')\nassert open('own').read() == 'text'",
        "print('a lot to say')\nassert sorted([2, 1]) == [1, 2]",
        "assert 'é' == '\\u00e9'",
    ]
    assert [outcome.reason for outcome in box.run_all(honest)] == [""] * len(honest)


def test_failing_and_broken_programs_fail(box: Sandbox) -> None:
    outcomes = box.run_all(["assert False", "raise KeyError", "def f(:", "", "x = 1"])
    assert [outcome.passed for outcome in outcomes] == [False, False, False, True, True]


def test_without_isolation_programs_are_refused_unless_rlimits_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sandbox._COMMANDS, "bubblewrap", lambda *_: [str(tmp_path / "bwrap")])
    monkeypatch.setitem(sandbox._COMMANDS, "unshare", lambda *_: ["sh", "-c", "echo no spaces left >&2; exit 1"])
    absent = rf"\({tmp_path}/bwrap: No such file or directory\)"
    reasons = rf"neither bubblewrap {absent} nor unshare \(no spaces left\) works here"
    with pytest.raises(UserError, match=reasons):
        Sandbox()
    assert Sandbox("rlimits").run("x = 1").passed
    with pytest.raises(UserError, match=rf"does not work on this machine {absent}"):
        Sandbox("bubblewrap")


@pytest.mark.parametrize("kind", ["docker", "none"])
def test_unknown_kinds_are_named(kind: Kind) -> None:
    with pytest.raises(UserError, match=f"--run-code: got '{kind}', allowed: bubblewrap, unshare, rlimits"):
        Sandbox(kind)
