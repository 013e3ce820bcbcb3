"""Registers, spills and memory instructions of compiled CUDA kernels, read with the tools in Triton's wheel."""

from __future__ import annotations

import functools
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import triton

_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_.]+)\s*([^;]*);")
_RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+)")
_WIDTHS = {"256": 32, "128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}


@dataclass(frozen=True)
class Code:
    """A kernel's instructions and the registers of a thread.

    spill_stores, spill_loads: bytes a thread writes to and reads from local memory because registers ran out.
    """

    registers: int
    spill_stores: int
    spill_loads: int
    instructions: tuple[Instruction, ...]

    def hot_loop(self) -> tuple[Instruction, ...]:
        """Return the innermost loop that loads the most global memory; the whole kernel where no loop loads any."""
        bodies = []
        for instruction in self.instructions:
            target = instruction.jump_target()
            if target is not None and target < instruction.address:
                bodies.append(tuple(i for i in self.instructions if target <= i.address <= instruction.address))
        loading = [body for body in bodies if loaded_bytes(body)]
        return max(loading, key=lambda body: (loaded_bytes(body), -len(body)), default=self.instructions)


@dataclass(frozen=True)
class Instruction:
    """One instruction: its address, its name with modifiers ("LDG.E.128"), and its operands as text."""

    address: int
    name: str
    operands: str

    @property
    def operation(self) -> str:
        """The name without modifiers."""
        return self.name.partition(".")[0]

    @property
    def bytes(self) -> int:
        """Bytes that one thread loads or stores."""
        return next((_WIDTHS[part] for part in self.name.split(".") if part in _WIDTHS), 4)

    def jump_target(self) -> int | None:
        """Return the address that a branch goes to."""
        match = re.search(r"0x([0-9a-f]+)", self.operands) if self.operation == "BRA" else None
        return int(match[1], 16) if match else None


def loads(instructions: tuple[Instruction, ...]) -> Counter[int]:
    """Return numbers of global loads by bytes per thread; asynchronous copies to shared memory included."""
    return Counter(i.bytes for i in instructions if i.operation in ("LDG", "LDGSTS"))


def loaded_bytes(instructions: tuple[Instruction, ...]) -> int:
    """Return the bytes per thread of the widest global loads: narrower ones are indices and scalars, the same for many
    threads."""
    counts = loads(instructions)
    return max(counts) * counts[max(counts)] if counts else 0


@functools.lru_cache(maxsize=4096)
def read(cubin: bytes) -> Code:
    """Disassemble a kernel."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        text = _cuobjdump(path)
    resources = _RESOURCES.search(text)
    instructions = tuple(Instruction(int(match[1], 16), match[2], match[3]) for match in _INSTRUCTION.finditer(text))
    if resources is None or not instructions:
        raise RuntimeError("cuobjdump: its output names neither registers nor instructions")
    spills = {name: sum(i.bytes for i in instructions if i.operation == name) for name in ("STL", "LDL")}
    return Code(int(resources[1]), spills["STL"], spills["LDL"], instructions)


def _cuobjdump(path: Path) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    command = [str(tool), "-res-usage", "-sass", str(path)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
