"""Compile the Triton kernels for CUDA devices that this machine does not have.

    with capture(90) as launches:
        embedding_bag(table, indices, weights, sink, backend="triton")   # ordinary CPU tensors
    launches[0].cubin                                                    # machine code for sm_90; nothing has run

A stand-in takes the place of Triton's driver: it names the architecture, accepts the compiled code and records each
launch instead of running it. Everything before that is Triton's own: signature, constants, warps and the
specialization of each argument are those of the real call. Outputs of the operators are uninitialized memory.

Must not run under TRITON_INTERPRET=1, where kernels are never compiled.
"""

# mypy: allow-untyped-defs, allow-untyped-calls
from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver


@dataclass(frozen=True)
class Device:
    """A device's limits per multiprocessor (SM), and what a speed prediction needs."""

    name: str
    multiprocessors: int
    clock_hz: float
    bytes_per_s: float
    shared_per_block: int
    shared_per_multiprocessor: int


DEVICES = {
    80: Device("A100", 108, 1.41e9, 2.04e12, 166_912, 167_936),
    90: Device("H100", 132, 1.755e9, 3.35e12, 232_448, 233_472),
    100: Device("B200", 148, 1.965e9, 8.0e12, 232_448, 233_472),
}
"""By compute capability (times 10): 80 is sm_80."""


@dataclass(frozen=True)
class Launch:
    """One launch of a compiled kernel. `variant` names what was compiled: kernel, constants and specialization."""

    kernel: str
    architecture: int
    grid: tuple[int, int, int]
    warps: int
    shared: int
    cubin: bytes
    constants: dict[str, Any]
    variant: str


@contextmanager
def capture(architecture: int) -> Iterator[list[Launch]]:
    """Within the block, launches are compiled for sm_<architecture> and appended to the list instead of run."""
    launches: list[Launch] = []
    driver.set_active(_Driver(architecture, launches))
    try:
        yield launches
    finally:
        driver._active = None


class _Driver:
    """The interface that triton.runtime requires of a driver. Each architecture is a separate device for its caches."""

    def __init__(self, architecture: int, launches: list[Launch]) -> None:
        self.architecture, self.launches, self.utils = architecture, launches, _Utils()

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.architecture, 32)

    def get_current_device(self) -> int:
        return self.architecture

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def launcher_cls(self, source: Any, metadata: Any):
        names = source.fn.arg_names
        constants = {names[path[0]]: value for path, value in source.constants.items()}

        def record(x: int, y: int, z: int, stream: int, cubin: bytes, *_: Any) -> None:
            active: Any = driver.active
            active.launches.append(
                Launch(
                    kernel=source.fn.__name__,
                    architecture=self.architecture,
                    grid=(x, y, z),
                    warps=metadata.num_warps,
                    shared=metadata.shared,
                    cubin=cubin,
                    constants=constants,
                    variant=metadata.hash,
                )
            )

        return record


class _Utils:
    """Returns the machine code itself as the function handle that the launcher receives."""

    def load_binary(self, name: str, cubin: bytes, shared: int, device: int):
        registers, spills, max_threads = 0, 0, 1024  # read from the machine code later (kernels.bench.machine_code)
        return None, cubin, registers, spills, max_threads

    def unload_module(self, module: None) -> None:
        pass

    def get_device_properties(self, device: int) -> dict[str, int]:
        """Return no limit on shared memory, so that a kernel that needs too much is recorded rather than refused."""
        return {"max_shared_mem": 1 << 30, "multiprocessor_count": 1, "warpSize": 32}
