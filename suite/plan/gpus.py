"""Assumptions about the GPUs that a grid is planned for: vendor peaks without sparsity, and placeholder prices."""

from __future__ import annotations

from dataclasses import dataclass


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
    """

    name: str
    memory: float
    flops: float
    bandwidth: float
    link: float
    price: float
    network: float = 50e9
    per_node: int = 8


GPUS = {
    "a100": Gpu("A100 SXM 80 GB", 80 * 2**30, 312e12, 2.04e12, 300e9, price=1.5),
    "h100": Gpu("H100 SXM 80 GB", 80 * 2**30, 989e12, 3.35e12, 450e9, price=2.5),
    "h200": Gpu("H200 SXM 141 GB", 140 * 2**30, 989e12, 4.8e12, 450e9, price=3.0),
}
USABLE = 0.92
"""Share of a GPU's memory that tensors may use; context, fragmentation and communication buffers take the rest."""
UTILISATION = 0.4
"""Share of the peak FLOPs that training is assumed to reach by default."""
