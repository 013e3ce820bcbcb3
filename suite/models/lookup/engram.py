"""`engram`: hashed n-grams that are read from a table, gated, and added to the residual stream.

Engram (arXiv 2601.07372; deepseek-ai/Engram, engram_demo_v1.py), and what DeepSeek-V4.1-Flash and Qwen3.8-Flash-Next
made of it, which their inference code shows (sglang, layers/engram.py). Where these are silent, the choice is ours, and
the text states it. Canonical ids are those of suite/data/canonical_ids.py.

Shapes: B rows, T tokens, D model width, N highest order, H rows read per token, E = H * row width, S taps.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from suite.models.attachments import Attachments, Skip
from suite.models.cache import Earlier
from suite.models.cost import Cost
from suite.models.distributions import Constant, Distribution, Normal
from suite.models.feedforward import SwiGLU
from suite.models.lookup.forms import NgramConfig
from suite.models.lookup.hashing import LAYER_SEED, NgramHash, primes_from
from suite.models.memory_table import MemoryLayer, MemoryTable
from suite.models.precision import at_least_fp32
from suite.models.registry import Family, Problem, placement_problems, register

NORM_EPS = 1e-5
MIN_SCORE = 1e-6
"""Smallest magnitude of a score under the signed square root (published code)."""

Gate = Literal["signed_root", "sigmoid", "none"]

FORMS: dict[str, dict[str, Any]] = {
    "engram": {"max_order": 3, "canonical_ids": True, "kernel": 4, "projection_bias": True, "depths": (1, 1 / 2)},
    "v4.1": {"max_order": 4, "canonical_ids": True, "kernel": 0, "projection_bias": False, "depths": (1, 14 / 40)},
    "qwen": {"max_order": 3, "canonical_ids": False, "kernel": 4, "projection_bias": False, "depths": (1,)},
}
"""Defaults of the options by form. `depths`: the layer of the first memory, and that of the second as a fraction of all
layers. The width of Qwen's kernel and the absence of biases in both deployed forms are our choice."""


class Engram(MemoryLayer):
    """g V e + silu(convolution(norm(g V e))), where e holds the rows of the n-grams that end at a token.

    The gate is g = sigmoid(sign(s) sqrt(|s|)) with s = norm(K e) . norm(x) / sqrt(D).

    Args:
        table: The rows of all orders and heads.
        hashes: The addresses.
        dim: Model width.
        gate: The function of s; "none": no gate and no K.
        kernel: Taps of the causal depthwise convolution, whose dilation is the highest order; 0: no convolution.
        bias: Whether K and V have biases.
        zero_kernel: Whether the taps start at zero.
    """

    matrices: ClassVar[tuple[str, ...]] = ("key.weight", "value.weight")

    def __init__(
        self,
        table: MemoryTable,
        hashes: NgramHash,
        dim: int,
        gate: Gate = "signed_root",
        kernel: int = 4,
        bias: bool = True,
        zero_kernel: bool = True,
    ) -> None:
        super().__init__([table])
        self.hashes, self.dim, self.gate, self.kernel, self.zero_kernel = hashes, dim, gate, kernel, zero_kernel
        self.window, self.reads_earlier = hashes.orders, kernel > 0
        width = len(hashes.moduli) * table.weight.shape[1]
        self.value = nn.Linear(width, dim, bias=bias)
        gated, convolved = gate != "none", kernel > 0
        self.key = nn.Linear(width, dim, bias=bias) if gated else None
        self.key_norm = nn.RMSNorm(dim, eps=NORM_EPS) if gated else None
        self.x_norm = nn.RMSNorm(dim, eps=NORM_EPS) if gated else None
        self.value_norm = nn.RMSNorm(dim, eps=NORM_EPS) if convolved else None
        self.taps = nn.Parameter(torch.empty(kernel, dim)) if convolved else None

    def forward(self, x_BTD: Tensor, ids_BTN: Tensor, earlier: Earlier | None = None) -> Tensor:
        e_BTE = self.tables[0].concatenated(self.hashes(ids_BTN)).to(x_BTD.dtype)
        v_BTD = self.value(e_BTE)
        if self.key is not None:
            v_BTD = self._gate(x_BTD, e_BTE).to(v_BTD.dtype) * v_BTD
        if self.taps is not None:
            assert earlier is not None
            v_BTD = v_BTD + F.silu(self._convolve(v_BTD, earlier))
        return v_BTD.to(x_BTD.dtype)

    def addresses(self, ids_BTW: Tensor) -> Tensor:
        """Return the rows of the n-grams, one per bag, as `concatenated` reads them."""
        return self.hashes(ids_BTW).reshape(-1, 1)

    def _gate(self, x_BTD: Tensor, e_BTE: Tensor) -> Tensor:
        """Return the gate [B, T, 1]."""
        assert self.key is not None
        assert self.key_norm is not None
        assert self.x_norm is not None
        wide = at_least_fp32(x_BTD.dtype)
        k_BTD, q_BTD = self.key_norm(self.key(e_BTE).to(wide)), self.x_norm(x_BTD.to(wide))
        score_BT1 = (k_BTD * q_BTD).sum(-1, keepdim=True) / math.sqrt(self.dim)
        if self.gate == "signed_root":
            # The gradient of the sign is zero, and that of a threshold takes fewer operations than that of clamp_min.
            magnitude_BT1 = F.threshold(score_BT1.abs(), MIN_SCORE, MIN_SCORE)
            score_BT1 = score_BT1.detach().sign() * magnitude_BT1.sqrt()
        return score_BT1.sigmoid()

    def _convolve(self, v_BTD: Tensor, earlier: Earlier) -> Tensor:
        """Return the causal depthwise convolution of the normed values; the first tap belongs to the current token."""
        assert self.taps is not None
        assert self.value_norm is not None
        normed_BTD = self.value_norm(v_BTD.to(at_least_fp32(v_BTD.dtype)))
        rows_SBTD = earlier(normed_BTD, [self.hashes.orders * tap for tap in range(self.kernel)])
        return (self.taps[:, None, None] * rows_SBTD).sum(0)

    def initial_values(self, name: str, shape: torch.Size) -> Distribution:
        """Return matrices normal with fan_in^-1/2, taps zero or normal with kernel^-1/2, biases zero, gains one.

        Arguments as for `initial_weights.initialise`. The paper states the zero taps only.
        """
        if name == "taps" and not self.zero_kernel:
            return Normal(self.kernel**-0.5)
        if name == "taps" or name.endswith("bias"):
            return Constant(0.0)
        return Normal(shape[1] ** -0.5) if len(shape) == 2 else Constant(1.0)

    def cost(self) -> Cost:
        """Count the projections; one row is read for each order and head, and the taps are no matrix product."""
        linears = [linear for linear in (self.key, self.value) if linear is not None]
        macs = sum(linear.weight.numel() for linear in linears)
        params = {
            "memory_projection": sum(parameter.numel() for linear in linears for parameter in linear.parameters())
        }
        norms = [norm for norm in (self.key_norm, self.x_norm, self.value_norm) if norm is not None]
        if norms:
            params["norm"] = len(norms) * self.dim
        if self.taps is not None:
            params["memory_convolution"] = self.taps.numel()
        return Cost(params, params | {"memory_values": self.value.in_features}, {"memory_projection": macs})


class EngramConfig(NgramConfig):
    """`engram`: memories of n-grams at a few layers, each with its own table."""

    forms: ClassVar[Mapping[str, Mapping[str, Any]]] = FORMS

    form: Literal["engram", "v4.1", "qwen"] = Field(
        default="engram", description="published form that the options which are None take their values from"
    )
    head_rows: int = Field(
        default=4096, gt=1, description="approximate rows of each order, head and layer; the next primes are used"
    )
    hash_heads: int = Field(default=8, gt=0, description="hash heads per order")
    canonical_ids: bool | None = Field(
        default=None, description="hash canonical ids (normalised texts of tokens); None: the form's"
    )
    shared_mix: bool = Field(default=True, description="heads of an order differ in their modulus only")
    prime_rows: bool = Field(
        default=True, description="each head of the model has another prime number of rows; false: all have head_rows"
    )
    gate: Gate = Field(default="signed_root", description="gate of a value by the hidden state")
    kernel: int | None = Field(
        default=None, ge=0, description="taps of the causal convolution of values; 0: none; None: the form's"
    )
    zero_kernel: bool = Field(default=True, description="taps of the convolution start at zero")
    projection_bias: bool | None = Field(default=None, description="biases of keys and values; None: the form's")
    point: Literal["before_attention", "beside_ffn"] = Field(
        default="before_attention", description="where the memory enters"
    )
    placement: tuple[int, ...] | None = Field(
        default=None, strict=False, min_length=1, description="layers with a memory; None: the form's, by depth"
    )
    hash_seed: int = Field(default=0, ge=0, description="seed of the hash functions")

    @property
    def memory_placement(self) -> tuple[int, ...]:
        """Layers with a memory: `placement`, or 1 and the form's second depth, at least 2."""
        first, *rest = FORMS[self.form]["depths"]
        return self.placement or (first, *(max(2, round(depth * self.size.layers)) for depth in rest))

    @property
    def rows_read(self) -> int:
        return (int(self.option("max_order")) - 1) * self.hash_heads

    @property
    def value_lr_ratio(self) -> float:
        """Learning rate of the table over the base rate (paper: 5)."""
        return 5.0

    @property
    def default_value_weight_decay(self) -> float | None:
        """Weight decay of the table (paper: 0)."""
        return 0.0

    def moduli(self) -> list[list[int]]:
        """Return the rows of each order and head for each layer with a memory.

        Primes ascend over layers, orders and heads, so that all are distinct.
        """
        layers = len(self.memory_placement)
        if not self.prime_rows:
            return [[self.head_rows] * self.rows_read for _ in range(layers)]
        primes = primes_from(self.head_rows)
        return [list(itertools.islice(primes, self.rows_read)) for _ in range(layers)]

    def family_problems(self) -> list[Problem]:
        problems = placement_problems(self.placement, self.memory_placement, self.size.layers)
        if self.shared_mix and not self.prime_rows:
            problems.append(("prime_rows", False, "true with shared_mix, since equal heads would read equal rows"))
        return problems


def engram_modules(config: EngramConfig, vocab_size: int) -> Attachments:
    """Return a SwiGLU for every layer, and the memories of the placement."""
    size, orders = config.size, int(config.option("max_order"))
    memories: dict[int, nn.Module] = {}
    for layer, moduli in zip(config.memory_placement, config.moduli(), strict=True):
        seed, canonical = config.hash_seed + LAYER_SEED * layer, bool(config.option("canonical_ids"))
        memories[layer] = Engram(
            MemoryTable(sum(moduli), config.width),
            NgramHash(vocab_size, moduli, orders, seed, config.shared_mix, canonical),
            size.dim,
            config.gate,
            int(config.option("kernel")),
            bool(config.option("projection_bias")),
            config.zero_kernel,
        )
    feed_forwards = [SwiGLU(size.dim, size.ffn_hidden) for _ in range(size.layers)]
    if config.point == "before_attention":
        return Attachments(feed_forwards, before_attention=memories)
    return Attachments(feed_forwards, skips={layer: Skip(memory, layer) for layer, memory in memories.items()})


register(Family("engram", EngramConfig, engram_modules, has_memory=True))
