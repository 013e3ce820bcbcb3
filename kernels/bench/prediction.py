"""How fast a compiled kernel can be, predicted from its machine code alone.

Two things can keep a kernel that streams memory below the device's bandwidth:
- too few bytes in flight: a multiprocessor needs latency x its share of the bandwidth (Little's law); it has what the
  loads of one pass of the hot loop bring to every thread it can hold;
- too many instructions for the bytes they move: a multiprocessor issues INSTRUCTIONS_PER_CLOCK at best.
The share of the roof is the smaller of the two limits. Nothing here has been measured.
"""

from __future__ import annotations

from dataclasses import dataclass

from kernels.bench import machine_code
from kernels.bench.ahead_of_time import DEVICES, Launch

LATENCY_S = 700e-9
"""Of a global load that misses the caches: an assumption, about that of A100 to H200."""
INSTRUCTIONS_PER_CLOCK = 2.0
"""Of a multiprocessor, of its four schedulers: an assumption; mixed code rarely has more."""
REGISTERS, MAX_WARPS, MAX_BLOCKS = 65_536, 64, 32
"""Of a multiprocessor, on sm_80 to sm_100."""
RESERVED_SHARED = 1024
"""Bytes of shared memory that the system takes per block."""
CONVERSIONS = ("I2F", "F2I")
REGISTER_UNIT = 8
"""Registers of a thread are allocated in multiples of this."""


@dataclass(frozen=True)
class Compiled:
    """A compiled variant of a kernel; spills in bytes per thread, shared memory in bytes per block.

    load_bytes, widest_load: of one thread's widest load, in the innermost loop that loads and in the whole kernel.
    occupancy: warps that a multiprocessor holds, as a share of the most it can. in_flight, needed: bytes per
    multiprocessor. roof_share is the predicted share of the copy bandwidth; it means little for kernels that are
    bound by arithmetic (the selection of the search).
    """

    kernel: str
    shape: str
    architecture: str
    registers: int
    spill_stores: int
    spill_loads: int
    shared: int
    warps: int
    load_bytes: int
    widest_load: int
    occupancy: float
    in_flight: int
    needed: int
    conversions: list[str]
    roof_share: float
    basis: str = "predicted"


def predict(launch: Launch, shape: str) -> Compiled:
    """Return the registers, spills and predicted speed of a launch, from its machine code."""
    device, code = DEVICES[launch.architecture], machine_code.read(launch.cubin)
    hot = code.hot_loop()
    blocks = blocks_per_multiprocessor(code.registers, launch)
    in_flight = machine_code.loaded_bytes(hot) * 32 * launch.warps * blocks
    needed = LATENCY_S * device.bytes_per_s / device.multiprocessors
    moved = 32 * sum(i.bytes for i in hot if i.operation in ("LDG", "LDGSTS", "STG") and i.bytes == _widest(hot))
    seconds_moving = moved / (device.bytes_per_s / device.multiprocessors)
    seconds_issuing = len(hot) / (INSTRUCTIONS_PER_CLOCK * device.clock_hz)
    return Compiled(
        kernel=launch.kernel,
        shape=shape,
        architecture=f"sm_{launch.architecture}",
        registers=code.registers,
        spill_stores=code.spill_stores,
        spill_loads=code.spill_loads,
        shared=launch.shared,
        warps=launch.warps,
        load_bytes=_widest(hot),
        widest_load=_widest(code.instructions),
        occupancy=round(blocks * launch.warps / MAX_WARPS, 3),
        in_flight=in_flight,
        needed=round(needed),
        conversions=sorted({i.name for i in code.instructions if i.operation in CONVERSIONS}),
        roof_share=round(min(1.0, in_flight / needed, seconds_moving / seconds_issuing), 3),
    )


def blocks_per_multiprocessor(registers: int, launch: Launch) -> int:
    """Return the blocks that fit together; 0 where one alone needs more shared memory than a block may have."""
    device = DEVICES[launch.architecture]
    if launch.shared > device.shared_per_block:
        return 0
    allocated = -(-registers // REGISTER_UNIT) * REGISTER_UNIT
    by_registers = REGISTERS // (allocated * 32 * launch.warps)
    by_shared = device.shared_per_multiprocessor // (launch.shared + RESERVED_SHARED)
    return min(by_registers, by_shared, MAX_WARPS // launch.warps, MAX_BLOCKS)


def _widest(instructions: tuple[machine_code.Instruction, ...]) -> int:
    return max(machine_code.loads(instructions), default=0)
