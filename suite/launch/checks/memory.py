"""Whether a cell fits in the memory of this machine, predicted before it starts."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

from suite.cells import Cell
from suite.errors import UserError
from suite.models.accounting import needs_values
from suite.plan.activation_memory import PartCache
from suite.plan.one_process import PROCESS_BYTES, training_bytes

CGROUPS = Path("/sys/fs/cgroup")
MEMINFO = Path("/proc/meminfo")
OWN_CGROUPS = Path("/proc/self/cgroup")


class MemoryCheck:
    """Compares what cells need with the memory that their process may use.

    Args:
        limit: Bytes that a process may use; infinite if that is not known.
        device: Whose memory it is, for messages.
    """

    def __init__(self, limit: float, device: str) -> None:
        self.limit, self.device = limit, device
        self._parts: PartCache = {}
        self._needed: dict[tuple[object, ...], float | None] = {}

    @classmethod
    def of_this_machine(cls) -> MemoryCheck:
        """Return the check for cells that are trained here: on a GPU if there is one, else on the CPU."""
        import torch

        if torch.cuda.is_available():
            sizes = [torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count())]
            return cls(max(sizes), "a GPU of this machine")
        return cls(host_limit(), "this machine")

    def needed(self, cell: Cell) -> float | None:
        """Return the predicted bytes of a cell; None if they cannot be predicted."""
        key = (cell.model.model_dump_json(), cell.data.model_dump_json(), cell.train.model_dump_json())
        if key not in self._needed:
            self._needed[key] = self._predict(cell)
        return self._needed[key]

    def largest(self, cells: Iterable[Cell]) -> float:
        """Return the bytes of the largest cell that fits; 0 if none fits."""
        needs = (self.needed(cell) for cell in cells)
        return max((needed for needed in needs if needed is not None and needed <= self.limit), default=0.0)

    def _predict(self, cell: Cell) -> float | None:
        try:
            return PROCESS_BYTES + training_bytes(cell, cell.data.vocabulary(), self._parts)
        except (UserError, ValueError):
            return None  # its data or its options are unusable, which is reported where they are read
        except (RuntimeError, TypeError) as error:
            if "overflow" in str(error).lower():  # a tensor of 2^63 bytes or more
                return float("inf")
            if not isinstance(error, RuntimeError) or not needs_values(error):
                raise
            return None  # a baseline whose forward pass reads values

    def problem(self, cell: Cell) -> str | None:
        """Return why a cell does not fit in memory, and the fields to change; None if it fits."""
        needed = self.needed(cell)
        if needed is None or needed <= self.limit:
            return None
        fields = [f"a smaller train.batch_rows ({cell.train.batch_rows})", "a larger train.accumulate"]
        if cell.model.table_side:
            fields.append(f"a smaller model.half_keys ({cell.model.table_side})")
        return (
            f"needs about {needed / 1e9:,.1f} GB of memory, and {self.device} has {self.limit / 1e9:,.1f} GB; use "
            f"{', '.join(fields)}, or a smaller model.base ({cell.model.base})"
        )


def host_limit() -> float:
    """Return the bytes of memory that this process may use: the machine's, or less in a container or a job.

    Infinite where the system does not state them.
    """
    limits: list[float] = [*_cgroup_limits()]
    try:
        lines = MEMINFO.read_text(encoding="utf-8").splitlines()
        limits += [1024 * int(line.split()[1]) for line in lines if line.startswith("MemTotal:")]
    except OSError:
        pass
    return min(limits, default=math.inf)


def _cgroup_limits() -> list[int]:
    """Return the memory limits of this process's control groups and their parents, of both versions."""
    try:
        lines = OWN_CGROUPS.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    limits = []
    for _, controllers, path in (line.split(":", 2) for line in lines):
        if controllers and "memory" not in controllers.split(","):
            continue
        root, name = (CGROUPS / "memory", "memory.limit_in_bytes") if controllers else (CGROUPS, "memory.max")
        group = root / path.strip("/")
        for folder in (group, *group.parents):
            if folder == root.parent:
                break
            try:
                text = (folder / name).read_text(encoding="utf-8").strip()
            except OSError:
                continue  # within a container the path may be that of the host
            limits += [] if text == "max" else [int(text)]
    return limits
