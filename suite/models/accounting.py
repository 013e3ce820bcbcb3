"""Parameters, multiply-adds and bytes of a model, counted from its structure.

Every part of a model says what it costs (`cost() -> Cost`); the sum of the parameters is asserted against the
module that is really built (on the meta device, so that any size can be counted). Only matrix products count
as multiply-adds: reading rows of a value table, like reading an embedding, is bytes and no product.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from torch import nn
from torch.utils._device import DeviceContext

from suite.models.registry import ModelConfig

if TYPE_CHECKING:
    from suite.models.transformer import Transformer

N = TypeVar("N", int, float)

INFERENCE_BYTES = 2
"""Bytes of a weight or cached activation at inference (bf16)."""


@dataclass(frozen=True)
class Cost:
    """What one part of a model costs, by named group.

    `params`: parameters it owns. `read`: parameters the forward pass of one token reads (those left out of a
    table or of experts not chosen are not read). `macs`: multiply-adds of matrix products per token, forward.
    """

    params: dict[str, int] = field(default_factory=dict)
    read: dict[str, int] = field(default_factory=dict)
    macs: dict[str, float] = field(default_factory=dict)

    def __add__(self, other: Cost) -> Cost:
        return Cost(_merge(self.params, other.params), _merge(self.read, other.read), _merge(self.macs, other.macs))


def _merge(first: dict[str, N], second: dict[str, N]) -> dict[str, N]:
    return first | {name: first.get(name, 0) + count for name, count in second.items()}


def dense_cost(group: str, params: int, macs: float) -> Cost:
    """The cost of a part all of whose parameters are read for every token."""
    return Cost({group: params}, {group: params}, {group: macs} if macs else {})


@dataclass(frozen=True)
class Account:
    """What a model costs.

    macs are per token of the forward pass, attention at the mean causal length of a row;
    `flops_per_token_forward` is twice their sum and `flops_per_token` (training) three times that.
    `params_active` leaves out value rows and experts a token does not use; `params_memory` counts value rows
    alone. `bytes_per_token` is what decoding one token of one sequence reads: active weights (one embedding
    row) and the key-value cache, in bf16.
    """

    params: dict[str, int]
    params_total: int
    params_active: int
    params_memory: int
    params_embedding: int
    macs_per_token: dict[str, float]
    macs_total: float
    flops_per_token_forward: float
    flops_per_token: float
    bytes_per_token: float

    def to_json(self) -> dict:
        """As plain numbers and mappings, for records."""
        return asdict(self)


def account(config: ModelConfig, vocab_size: int, seq_len: int) -> Account:
    """What the model of this configuration costs with rows of `seq_len` tokens.

    TypeError names a module that does not say what it costs, ValueError one that leaves parameters out.
    """
    return account_of(meta_model(config, vocab_size), seq_len)


def meta_model(config: ModelConfig, vocab_size: int) -> Transformer:
    """The model of this configuration on the meta device, where any size fits."""
    from suite.models.transformer import Transformer

    with _MetaDevice("meta"):
        return Transformer(config, vocab_size)


class _MetaDevice(DeviceContext):
    """`torch.device("meta")` without the values that torch's modules draw when made: half of the time they take."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"]
        return super().__torch_function__(func, types, args, kwargs)


def account_of(model: Transformer, seq_len: int) -> Account:
    """What a model that is built, on whatever device, costs with rows of `seq_len` tokens; as `account`."""
    costs = {name: cost_of(name, part) for name, part in model.parts()}
    for name, part in model.parts():
        if name.endswith("feed_forward"):
            _refuse_uncounted(name, part, costs[name])
    total = sum(costs.values(), Cost())
    real = sum(parameter.numel() for parameter in model.parameters())
    counted = sum(total.params.values())
    assert counted == real, f"parameters counted {counted}, real {real}: {total.params}"

    size = model.size
    mean_len = (seq_len + 1) / 2
    attend = size.layers * 2 * size.dim * mean_len
    macs = _merge(total.macs, {"attention": attend})
    macs_total = sum(macs.values())
    cache = size.layers * 2 * size.kv_heads * size.head_dim * mean_len
    read = sum(total.read.values())
    unread_embedding = total.params["embedding"] - total.read["embedding"]
    return Account(
        params=total.params,
        params_total=real,
        params_active=read + unread_embedding,
        params_memory=total.params.get("memory_values", 0),
        params_embedding=total.params["embedding"] + total.params.get("head", 0),
        macs_per_token=macs,
        macs_total=macs_total,
        flops_per_token_forward=2 * macs_total,
        flops_per_token=6 * macs_total,
        bytes_per_token=INFERENCE_BYTES * (read + cache),
    )


def _refuse_uncounted(name: str, part: nn.Module, cost: Cost) -> None:
    """ValueError where a feed-forward's cost() does not count its parameters, naming them."""
    held = {each: parameter.numel() for each, parameter in part.named_parameters()}
    if sum(held.values()) != sum(cost.params.values()):
        listed = ", ".join(f"{each} {count}" for each, count in held.items())
        raise ValueError(
            f"{name} ({type(part).__name__}): cost() counts {sum(cost.params.values())} parameters, allowed: the "
            f"{sum(held.values())} it holds ({listed or 'none'})"
        )


def cost_of(name: str, part: nn.Module) -> Cost:
    """The part's own account; TypeError naming it if it has none, or something else."""
    cost = getattr(part, "cost", None)
    if cost is None:
        raise TypeError(f"{name} ({type(part).__name__}) has no cost(): what it costs cannot be counted")
    counted = cost()
    if not isinstance(counted, Cost):
        raise TypeError(f"{name} ({type(part).__name__}): cost() gives {type(counted).__name__}, allowed: a Cost")
    for kind in ("params", "read", "macs"):
        for group, count in getattr(counted, kind).items():
            if not (isinstance(count, int | float) and math.isfinite(count) and count >= 0):
                said = f"{name} ({type(part).__name__}): cost() gives {kind} {group} {count!r}"
                raise ValueError(f"{said}, allowed: a number of 0 or more")
    return counted
