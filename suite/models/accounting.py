"""Parameters, multiply-adds and bytes of a model, counted from its structure.

Every part of a model states its own cost (`cost() -> Cost`). The sum of the parameters is checked against the module
that is really built, on the meta device so that models of any size can be counted. Only matrix products count as
multiply-adds: reading rows of a value table, like reading an embedding, moves bytes and multiplies nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import nn

from suite.models.cost import Cost, add_counts, dense_cost
from suite.models.memory_table import MemoryLayer, MemoryTable
from suite.models.registry import ModelConfig
from suite.models.transformer import Transformer

__all__ = ["Account", "Cost", "account", "account_of", "cost_of", "dense_cost", "meta_model", "needs_values"]
# Cost and dense_cost are listed because baseline files import them from here, including the copies in old runs.

INFERENCE_BYTES = 2
"""Bytes per weight and per cached activation at inference (bf16)."""


@dataclass(frozen=True)
class Account:
    """The cost of a whole model.

    Attributes:
        params: Parameters by group.
        params_total: All parameters.
        params_active: Parameters that one token uses: all but unread value rows and unchosen experts. The input
            embedding is counted as a whole.
        params_memory: Elements of the value tables.
        memory_rows: Rows of the largest value table; 0 without one.
        params_embedding: Parameters of the embedding and of an untied output head.
        macs_per_token: Multiply-adds per token of the forward pass, by group; attention is counted at the mean
            causal length of a row.
        macs_total: The sum of `macs_per_token`.
        flops_per_token_forward: Twice `macs_total`.
        flops_per_token: FLOPs per token of a training step, three times the forward pass.
        bytes_per_token: Bytes that decoding one token of one sequence reads: active weights, one embedding row, and
            the key-value cache, in bf16; rows of quantised tables in their form.
    """

    params: dict[str, int]
    params_total: int
    params_active: int
    params_memory: int
    memory_rows: int
    params_embedding: int
    macs_per_token: dict[str, float]
    macs_total: float
    flops_per_token_forward: float
    flops_per_token: float
    bytes_per_token: float

    def to_json(self) -> dict:
        """Return the account as plain numbers and mappings, for records."""
        return asdict(self)


def account(config: ModelConfig, vocab_size: int, seq_len: int) -> Account:
    """Count the model of a configuration without allocating it.

    Args:
        config: The model's configuration.
        vocab_size: Entries of the vocabulary.
        seq_len: Tokens per row.

    Returns:
        The model's account.

    Raises:
        TypeError: A module has no `cost()`, or one that returns something other than a `Cost`.
        ValueError: A module's `cost()` leaves out parameters.
    """
    return account_of(meta_model(config, vocab_size), seq_len)


def meta_model(config: ModelConfig, vocab_size: int) -> Transformer:
    """Build the model of a configuration on the meta device, where tensors have shapes but no storage."""
    with torch.device("meta"):
        return Transformer(config, vocab_size)


def needs_values(error: RuntimeError) -> bool:
    """Return whether an operation failed because tensors on the meta device have no values."""
    return isinstance(error, NotImplementedError) or "meta tensor" in str(error).lower()


def account_of(model: Transformer, seq_len: int, row_bytes: Callable[[int], int] | None = None) -> Account:
    """Count a model that has been built, on any device. Raises as `account` does.

    Args:
        model: The model.
        seq_len: Tokens per row.
        row_bytes: The bytes of a table's row of a width; None: those of bf16.
    """
    costs = {name: cost_of(name, part) for name, part in model.parts()}
    for name, module in model.attached().items():
        _require_all_parameters(name, module, costs[name])
    total = sum(costs.values(), Cost())
    real = sum(parameter.numel() for parameter in model.parameters())
    counted = sum(total.params.values())
    assert counted == real, f"parameters counted {counted}, real {real}: {total.params}"

    size = model.size
    if "memory_values" in total.read:  # a table may have fewer rows than a token reads
        total.read["memory_values"] = min(total.read["memory_values"], total.params["memory_values"])
    mean_len = (seq_len + 1) / 2
    attend = size.layers * 2 * size.dim * mean_len
    macs = add_counts(total.macs, {"attention": attend})
    macs_total = sum(macs.values())
    cache = size.layers * 2 * size.kv_heads * size.head_dim * mean_len
    read = sum(total.read.values())
    rows_in_bf16, rows_in_form = (table_bytes(model, of_row) for of_row in (_bf16_bytes, row_bytes or _bf16_bytes))
    unread_embedding = total.params["embedding"] - total.read["embedding"]
    return Account(
        params=total.params,
        params_total=real,
        params_active=read + unread_embedding,
        params_memory=total.params.get("memory_values", 0),
        memory_rows=max((len(table.weight) for table in model.memory_tables()), default=0),
        params_embedding=total.params["embedding"] + total.params.get("head", 0),
        macs_per_token=macs,
        macs_total=macs_total,
        flops_per_token_forward=2 * macs_total,
        flops_per_token=6 * macs_total,
        bytes_per_token=INFERENCE_BYTES * (read + cache) + rows_in_form - rows_in_bf16,
    )


def table_bytes(model: Transformer, row_bytes: Callable[[int], int]) -> float:
    """Return the bytes of table rows that one token reads; `row_bytes` are the bytes of a row of a width."""
    return sum(
        min(reads, len(table.weight)) * row_bytes(table.weight.shape[1]) for table, reads in reads_per_token(model)
    )


def reads_per_token(model: Transformer) -> list[tuple[MemoryTable, float]]:
    """Return each table and the rows that one token reads from it, over all layers."""
    layers = model.memory_layers().values()
    return [
        (table, sum(rows_read(layer) for layer in layers for read in layer.tables if read is table))
        for table in model.memory_tables()
    ]


def rows_read(layer: MemoryLayer) -> float:
    """Return the rows that one token reads from each of the layer's tables."""
    widths = sum(table.weight.shape[1] for table in layer.tables)
    return cost_of("memory", layer).read.get("memory_values", 0) / widths


def _bf16_bytes(width: int) -> int:
    return INFERENCE_BYTES * width


def cost_of(name: str, part: nn.Module) -> Cost:
    """Return a part's cost, checked.

    Args:
        name: The part's name in its model, for messages.
        part: A module with a method `cost()`.

    Returns:
        What the module's `cost()` returns.

    Raises:
        TypeError: The module has no `cost()`, or it returns something other than a `Cost`.
        ValueError: A count is negative or not a finite number.
    """
    cost = getattr(part, "cost", None)
    if cost is None:
        raise TypeError(f"{name} ({type(part).__name__}) has no cost() method, so its cost cannot be counted")
    counted = cost()
    if not isinstance(counted, Cost):
        raise TypeError(f"{name} ({type(part).__name__}): cost() returns {type(counted).__name__}, allowed: a Cost")
    for kind in ("params", "read", "macs"):
        for group, count in getattr(counted, kind).items():
            if not (isinstance(count, int | float) and math.isfinite(count) and count >= 0):
                raise ValueError(
                    f"{name} ({type(part).__name__}): cost() returns {kind} {group} {count!r}, "
                    "allowed: a number of 0 or more"
                )
    return counted


def _require_all_parameters(name: str, part: nn.Module, cost: Cost) -> None:
    """Raise ValueError if the `cost()` of a family's module does not count all of its parameters, and list them."""
    sizes = {path: parameter.numel() for path, parameter in part.named_parameters()}
    if sum(sizes.values()) != sum(cost.params.values()):
        listed = ", ".join(f"{path} {size}" for path, size in sizes.items())
        raise ValueError(
            f"{name} ({type(part).__name__}): cost() counts {sum(cost.params.values())} parameters, allowed: the "
            f"{sum(sizes.values())} that the module holds ({listed or 'none'})"
        )
