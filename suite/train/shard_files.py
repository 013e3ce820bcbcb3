"""Writes the shards of several processes. Imported where it is needed, since its import takes almost two seconds."""

from __future__ import annotations

import errno
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future


class _Writer(dcp.FileSystemWriter):
    """Raises an error of the file system itself, whose number is then sent to the other processes."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """See FileSystemWriter. Raises OSError where torch raises a RuntimeError from it."""
        try:
            return super().write_data(plan, planner)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


def write_shards(folder: Path, tensors: Mapping[str, Any]) -> None:
    """Write the tensors that the processes hold, each its own shards. All processes call it together.

    Args:
        folder: The folder of the checkpoint.
        tensors: Tensors, nested by name; DTensors where this process holds a shard.

    Raises:
        OSError: In every process, if one of them cannot write; its number is that of the first.
    """
    try:
        dcp.save(dict(tensors), storage_writer=_Writer(folder, sync_files=True))
    except CheckpointException as failed:  # a BaseException, which every process raises
        rank, (cause, _) = next(iter(failed.failures.items()))
        number = cause.errno if isinstance(cause, OSError) and cause.errno is not None else errno.EIO
        text = cause.strerror if isinstance(cause, OSError) and cause.strerror else f"{type(cause).__name__}: {cause}"
        raise OSError(number, f"process {rank}: {text}".splitlines()[0]) from None
