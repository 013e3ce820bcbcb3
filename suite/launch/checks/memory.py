"""Whether a cell fits in the memory of this machine, predicted before it starts."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from suite.baselines.loading import reported
from suite.cells import Cell
from suite.errors import UserError
from suite.models.accounting import account_of, meta_model, needs_values
from suite.plan.activation_memory import PartCache
from suite.plan.gpus import Gpu
from suite.plan.mesh import DoesNotFit, Mesh, smallest_mesh
from suite.plan.one_process import PROCESS_BYTES, Where, training_bytes
from suite.train.parallel import Parallel

CGROUPS = Path("/sys/fs/cgroup")
MEMINFO = Path("/proc/meminfo")
OWN_CGROUPS = Path("/proc/self/cgroup")


@dataclass(frozen=True)
class Launch:
    """The processes that train a cell, each with a device of its own, and how they divide it."""

    processes: int = 1
    parallel: Parallel = field(default_factory=Parallel)


class MemoryCheck:
    """Compares what cells need with the memory that their processes may use.

    Args:
        limit: Bytes that a process may use; infinite if that is not known.
        device: Whose memory it is, for messages.
        gpus: GPUs with that memory which a cell may be divided over.
        shared_by: The processes of a cell that share the memory.
        host: Bytes of host memory where `limit` is the memory of a GPU; None: `limit` is host memory.
    """

    def __init__(
        self,
        limit: float,
        device: str,
        gpus: int = 1,
        shared_by: Launch | None = None,
        host: float | None = None,
    ) -> None:
        self.limit, self.device, self.gpus, self.host = limit, device, gpus, host
        self.shared_by = shared_by or Launch()
        self._parts: PartCache = {}
        self._needed: dict[tuple[str, ...], float | None] = {}
        self._meshes: dict[tuple[str, ...], Mesh | DoesNotFit] = {}

    @classmethod
    def of_this_machine(cls, gpus: int = 1) -> MemoryCheck:
        """Return the check for cells that are trained here: on up to `gpus` GPUs if there are any, else on the CPU."""
        import torch

        if torch.cuda.is_available():
            sizes = [torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count())]
            return cls(max(sizes), "a GPU of this machine", gpus, host=host_limit())
        return cls(host_limit(), "this machine")

    def needed(self, cell: Cell) -> float | None:
        """Return the predicted bytes of the processes that share the memory; None if they cannot be predicted."""
        key = _key(cell)
        if key not in self._needed:
            with reported(cell.model.family):
                self._needed[key] = self._predict(cell)
        return self._needed[key]

    def largest(self, cells: Iterable[Cell]) -> float:
        """Return the bytes of the largest cell that fits; 0 if none fits."""
        needs = (self.needed(cell) for cell in cells)
        return max((needed for needed in needs if needed is not None and needed <= self.limit), default=0.0)

    def _predict(self, cell: Cell) -> float | None:
        try:
            processes, members = self.shared_by.processes, self.shared_by.parallel.memory_parallel
            where: Where = "whole" if self.host is None else "peak"
            each = training_bytes(cell, cell.data.vocabulary(), self._parts, processes, members, where)
            return processes * (PROCESS_BYTES + each)
        except (UserError, ValueError):
            return None  # its data or its options are unusable, which is reported where they are read
        except (RuntimeError, TypeError) as error:
            if "overflow" in str(error).lower():  # a tensor of 2^63 bytes or more
                return float("inf")
            if not isinstance(error, RuntimeError) or not needs_values(error):
                raise
            return None  # a baseline whose forward pass reads values

    def _host_problem(self, cell: Cell) -> str | None:
        """Return why the tables of a cell that fits on its GPU do not fit in host memory; None if they do."""
        if self.host is None or cell.train.table_device != "host" or self.needed(cell) is None:
            return None
        needed = training_bytes(cell, cell.data.vocabulary(), self._parts, where="host")
        if needed <= self.host:
            return None
        return (
            f"train.table_device: got 'host', which needs about {needed / 1e9:,.1f} GB of host memory, and this machine"
            f" has {self.host / 1e9:,.1f} GB; use model, or a smaller table"
        )

    def _fits_one(self, cell: Cell) -> bool:
        needed = self.needed(cell)
        return needed is None or needed <= self.limit

    def _mesh(self, cell: Cell) -> Mesh | DoesNotFit:
        """Return the smallest mesh of the GPUs that a cell fits on, as planned for a node of them."""
        key = _key(cell)
        if key not in self._meshes:
            model = meta_model(cell.model, cell.data.vocabulary())
            counted = account_of(model, cell.data.seq_len)
            # The speeds and the price decide nothing about the mesh.
            gpu = Gpu(self.device, self.limit, 1.0, 1.0, 1.0, price=0.0, per_node=self.gpus)
            self._meshes[key] = smallest_mesh(cell, model, counted, gpu, 1, self._parts)
        return self._meshes[key]

    def launch(self, cell: Cell) -> Launch:
        """Return how to train a cell that has no `problem`: in one process if it fits, else on its smallest mesh."""
        alone = self.gpus == 1 or cell.source is not None or self._fits_one(cell)
        if alone or isinstance(mesh := self._mesh(cell), DoesNotFit):
            return Launch()
        return Launch(mesh.gpus, Parallel(memory_parallel=mesh.table_shards, accumulate=mesh.accumulate))

    def problem(self, cell: Cell) -> str | None:
        """Return why a cell does not fit in memory, and the fields to change; None if it fits."""
        if self._fits_one(cell):
            return self._host_problem(cell)
        needed = self.needed(cell)
        assert needed is not None
        if self.gpus > 1 and math.isfinite(needed):
            mesh = self._mesh(cell)
            if isinstance(mesh, DoesNotFit):
                return f"does not fit on {self.gpus} GPUs: {mesh.why}; would fit: {mesh.would_fit}"
            return None
        fields = [f"a smaller train.batch_rows ({cell.train.batch_rows})", "a larger train.accumulate"]
        if cell.model.table_side:
            fields.append(f"a smaller model.half_keys ({cell.model.table_side})")
        if self.host is not None and cell.model.has_tables and cell.train.table_device == "model":
            fields.append("train.table_device: host")
        size = f"about {needed / 1e9:,.1f} GB" if math.isfinite(needed) else "more than 9 billion GB"
        return (
            f"needs {size} of memory, and {self.device} has {self.limit / 1e9:,.1f} GB; use "
            f"{', '.join(fields)}, or a smaller model.base ({cell.model.base})"
        )


def _key(cell: Cell) -> tuple[str, ...]:
    """Return what decides the memory of a cell."""
    return cell.model.model_dump_json(), cell.data.model_dump_json(), cell.train.model_dump_json()


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
