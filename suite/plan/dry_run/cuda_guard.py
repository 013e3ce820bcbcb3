"""Loads a CUDA device guard that does nothing into a torch that was built without CUDA. Imports no torch itself."""

from __future__ import annotations

import ctypes
import importlib.util
import shlex
import subprocess
import sysconfig
import tempfile
from pathlib import Path

SOURCE = Path(__file__).with_name("cuda_guard.cpp")


def load() -> None:
    """Compile and load the guard; a process calls it before it imports torch.

    Raises:
        RuntimeError: There is no C++ compiler, or it fails.
    """
    spec = importlib.util.find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    root = Path(spec.origin).parent
    libraries = root / "lib"
    compiler = shlex.split(sysconfig.get_config_var("CXX") or "c++")[0]
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "guard.so"
        options = ["-O0", "-std=c++20", "-shared", "-fPIC", f"-I{root / 'include'}", f"-L{libraries}"]
        options += [str(SOURCE), "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{libraries}", "-o", str(library)]
        try:
            subprocess.run([compiler, *options], check=True, capture_output=True, text=True)
        except (OSError, subprocess.CalledProcessError) as error:
            output = getattr(error, "stderr", None) or str(error)
            raise RuntimeError(f"a C++ compiler is needed: {compiler}: {output.splitlines()[-1]}") from error
        ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)
