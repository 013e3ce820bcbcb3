"""A cluster's profile: what its jobs request, from clusters/<name>.yaml or a path."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from suite.errors import UserError
from suite.shipped import shipped
from suite.yaml_input import did_you_mean, explain, read_mapping

CLUSTERS = "clusters"
DEFAULT = "default"
"""The profile that is used if none is named."""


def _minutes(value: Any) -> Any:
    """Return a time in one of Slurm's formats (minutes, MM:SS, HH:MM:SS, D-HH, D-HH:MM, D-HH:MM:SS) in minutes."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", value) if isinstance(value, str) else None
    if match is None:
        return value
    days, *parts = match.groups()
    first, second, third = (int(part or 0) for part in parts)
    if days is None and parts[1] is None:
        return first
    if days is None and parts[2] is None:  # MM:SS
        return first + (second > 0)
    return int(days or 0) * 24 * 60 + first * 60 + second + (third > 0)


class Profile(BaseModel):
    """What jobs request from a cluster. clusters/example.yaml explains every field."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    partition: str | None = Field(default=None, description="partition of the jobs; default: the cluster's")
    account: str | None = Field(default=None, description="account that is charged")
    qos: str | None = Field(default=None, description="quality of service")
    constraint: str | None = Field(default=None, description="features that nodes must have")
    time: Annotated[int, BeforeValidator(_minutes)] = Field(
        default=24 * 60, gt=0, description="time limit of a job, in minutes or in one of Slurm's formats (1-00:00:00)"
    )
    warning_s: int = Field(default=120, gt=0, description="seconds before the time limit at which a job starts to save")
    max_jobs: int = Field(default=32, gt=0, description="training jobs that run at once")
    max_eval_jobs: int = Field(default=8, gt=0, description="evaluation jobs that run at once")
    max_array: int = Field(
        default=1000, gt=1, description="largest number of jobs in an array: the cluster's MaxArraySize minus 1"
    )
    max_cuts: int = Field(default=1000, ge=0, description="how often a job that reaches its time limit is requeued")
    gpus_per_node: int = Field(default=0, ge=0, description="GPUs of a node; 0: cells train on CPUs")
    gpu: str = Field(default="h100", description="GPU type for the plan: a100, h100 or h200")
    gpus: int | None = Field(default=None, gt=0, description="GPUs of a cell; default: the smallest mesh of its plan")
    memory_parallel: int | None = Field(
        default=None, gt=0, description="processes that share a memory table; default: the plan"
    )
    checkpoint_activations: bool = Field(
        default=False, description="recompute blocks without a memory layer in the backward pass"
    )
    score_together: bool | None = Field(
        default=None,
        description="score with the resources of training; default: only models that do not fit on one GPU",
    )
    processes: int = Field(default=1, gt=0, description="processes of a cell on CPUs")
    cpus_per_task: int | None = Field(default=None, gt=0, description="cores of a process; default: the cell's threads")
    mem_gb: float | None = Field(
        default=None, gt=0, description="memory of a node; a job gets the share of its GPUs; default: the cluster's"
    )
    setup: tuple[str, ...] = Field(default=(), description="shell lines that run before a job, e.g. to load modules")
    sbatch: dict[str, str | int | bool] = Field(default={}, description="other options of sbatch, without dashes")
    refresh_s: float = Field(default=30.0, gt=0, description="seconds between two calls of squeue")

    @model_validator(mode="after")
    def _warned_in_time(self) -> Profile:
        if self.warning_s >= 60 * self.time:
            raise ValueError(f"warning_s: got {self.warning_s}, allowed: less than time, {60 * self.time} seconds")
        return self


def load_profile(name_or_path: str | None, over: Mapping[str, Any] | None = None) -> Profile:
    """Read a cluster profile.

    Args:
        name_or_path: A name in clusters/ or a path; None: `default`.
        over: Fields that override those of the profile: a grid's `launch`.

    Raises:
        UserError: There is no such profile, or one of its fields is invalid.
    """
    path = _find(name_or_path)
    fields = read_mapping(path) | dict(over or {})
    try:
        return Profile.model_validate(fields)
    except ValidationError as error:
        raise UserError(f"{path}: {explain(error, Profile, fields)}") from None


def refuse_unfit_launch(launch: Mapping[str, Any], source: Path) -> None:
    """Check the fields of a grid's `launch` section one by one, without a profile; `load_profile` checks them together.

    Raises:
        UserError: A field is unknown, or its value is invalid.
    """
    for field, value in launch.items():
        content = {field: value}
        try:
            Profile.model_validate(content)
        except ValidationError as error:
            if error.errors()[0]["loc"]:
                raise UserError(f"{source}: launch.{explain(error, Profile, content)}") from None


def _find(name_or_path: str | None) -> Path:
    path = Path(name_or_path or DEFAULT)
    if os.path.isfile(path):  # unlike Path.is_file, false for a text that is too long for a path
        return path
    folders = [Path(CLUSTERS), shipped(CLUSTERS)]
    for folder in folders:
        if os.path.isfile(named := folder / f"{path}.yaml"):
            return named
    names = sorted({path.stem for folder in folders for path in folder.glob("*.yaml")})
    allowed = f"a path to a .yaml file, or one of {', '.join(names)}" if names else "a path to a .yaml file"
    if name_or_path is None:
        raise UserError(f"--profile: missing, and there is no {CLUSTERS}/{DEFAULT}.yaml, allowed: {allowed}")
    raise UserError(f"--profile: got {name_or_path!r}{did_you_mean(name_or_path, names)}, allowed: {allowed}")
