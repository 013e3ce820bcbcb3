"""Base shapes by name: the five of "Memory Layers at Scale" (arXiv 2412.09764) and the laptop's.

Sources of the paper's shapes. 134m and 1.3b: layers and feed-forward width follow uniquely from the published totals,
given width, full multi-head attention, untied embeddings and a vocabulary of 32,000. 373m: the released template. 720m:
one of several shapes that are consistent with the paper, which publishes no total for it. 8b: "the Llama3 8B
architecture" (section 5.3), as Meta released it. The head width of 134m, 720m and 1.3b (64 or 128) and their rope_theta
(that of Llama 2) are our choice, because totals do not depend on them. Strides: section 5.1. The w* shapes are ours.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Size:
    """A Llama-style shape; `memory_stride` is the distance between Memory+ layers.

    `vocab_size` is that of the paper's tokenizer for the shape (0: none). The caller of `build` sets the vocabulary of
    a model.
    """

    layers: int
    dim: int
    ffn_hidden: int
    heads: int
    kv_heads: int
    vocab_size: int
    rope_theta: float = 1e4
    memory_stride: int = 8

    @property
    def head_dim(self) -> int:
        """Width of an attention head."""
        return self.dim // self.heads


SIZES: dict[str, Size] = {
    "134m": Size(12, 768, 2048, 12, 12, 32000, memory_stride=4),
    "373m": Size(24, 1024, 2816, 16, 16, 32000, rope_theta=5e5),
    "720m": Size(22, 1536, 4096, 12, 12, 32000),
    "1.3b": Size(22, 2048, 5632, 16, 16, 32000),
    "8b": Size(32, 4096, 14336, 32, 8, 128256, rope_theta=5e5),
    "w16": Size(4, 16, 48, 1, 1, 0, memory_stride=1),
    "w32": Size(4, 32, 96, 2, 2, 0, memory_stride=1),
    "w48": Size(4, 48, 128, 3, 3, 0, memory_stride=1),
    "w64": Size(4, 64, 192, 4, 4, 0, memory_stride=1),
    "w128": Size(6, 128, 384, 4, 4, 0, memory_stride=2),
}
