"""What is assumed of the GPUs a grid is planned for. Peaks are the vendor's, without sparsity; prices are ours."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """One GPU in a node of `per_node`, which reach each other by NVLink and other nodes by the network.

    Bytes, FLOPs of dense bf16 products a second, bytes a second (links: one direction), dollars an hour. The price
    is an assumption to be replaced by yours.
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
"""Share of a GPU's memory for tensors: the rest is the context, the allocator's gaps and communication buffers."""
UTILISATION = 0.4
"""Share of the peak FLOPs that training is taken to reach, where nothing else is said."""
