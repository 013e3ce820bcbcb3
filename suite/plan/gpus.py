"""Assumptions about the GPUs that a grid is planned for: vendor peaks without sparsity, and placeholder prices."""

from __future__ import annotations

from dataclasses import MISSING, dataclass, fields
from pathlib import Path

from suite.errors import UserError
from suite.yaml_input import did_you_mean, read_mapping


@dataclass(frozen=True)
class Gpu:
    """One GPU in a node of `per_node` GPUs, which are linked by NVLink; nodes are linked by the network.

    Attributes:
        name: The product name.
        memory: Bytes.
        flops: Dense bf16 FLOPs per second.
        bandwidth: Bytes per second of its memory.
        link: Bytes per second to another GPU of the node, in one direction.
        price: Dollars per hour, an assumption to be replaced (`--price`).
        network: Bytes per second to another node, in one direction.
        per_node: GPUs of a node.
        capability: Major compute capability: 8 is sm_80, 9 is sm_90.
    """

    name: str
    memory: float
    flops: float
    bandwidth: float
    link: float
    price: float
    network: float = 50e9
    per_node: int = 8
    capability: int = 9


GPUS = {
    "a100": Gpu("A100 SXM 80 GB", 80 * 2**30, 312e12, 2.04e12, 300e9, price=1.5, capability=8),
    "h100": Gpu("H100 SXM 80 GB", 80 * 2**30, 989e12, 3.35e12, 450e9, price=2.5),
    "h200": Gpu("H200 SXM 141 GB", 140 * 2**30, 989e12, 4.8e12, 450e9, price=3.0),
}
USABLE = 0.92
"""Share of a GPU's memory that tensors may use; context, fragmentation and communication buffers take the rest."""
UTILISATION = 0.4
"""Share of the peak FLOPs that training is assumed to reach by default."""
CPU = "cpu"
"""The device that stands for this machine, planned from its own runs (`suite.plan.this_machine`)."""


def gpu_named(name: str, where: str = "--gpu") -> Gpu:
    """Return a GPU by its name in GPUS, in any case, or from a YAML file with the fields of `Gpu`.

    Args:
        name: A name or a path that ends in .yaml.
        where: The option or field, for errors.

    Raises:
        UserError: The name is unknown, or a field of the file is missing, unknown or not a number above 0.
    """
    if name.endswith((".yaml", ".yml")):
        return _read(Path(name))
    if name.lower() not in GPUS:
        allowed = f"{', '.join(GPUS)}, {CPU}, or a .yaml file (docs/planning.md)"
        raise UserError(f"{where}: got {name!r}{did_you_mean(name.lower(), GPUS)}, allowed: {allowed}")
    return GPUS[name.lower()]


def _read(path: Path) -> Gpu:
    content = read_mapping(path)
    names = [field.name for field in fields(Gpu)]
    for field, value in content.items():
        if field not in names:
            raise UserError(f"{path}: {field}: unknown field{did_you_mean(field, names)}, allowed: {', '.join(names)}")
        is_text, is_number = isinstance(value, str), isinstance(value, int | float) and not isinstance(value, bool)
        if not (is_text if field == "name" else is_number and value > 0 and value < float("inf")):
            raise UserError(f"{path}: {field}: got {value!r}, allowed: {'text' if field == 'name' else 'above 0'}")
    if missing := [field.name for field in fields(Gpu) if field.default is MISSING and field.name not in content]:
        raise UserError(f"{path}: {missing[0]}: missing, allowed: {', '.join(names)}")
    return Gpu(**content)


def is_device(gpu: str, device: str | None) -> bool:
    """Return whether a run's recorded device is a plan's GPU: `NVIDIA H100 80GB HBM3` is an `H100 SXM 80 GB`."""
    return device is not None and gpu.split()[0].lower() in device.lower()
