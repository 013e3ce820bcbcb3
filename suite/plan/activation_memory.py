"""How much memory a training step needs: weights, gradients, moments and what lives in between, predicted.

Every part of the model (embedding, blocks, head with its loss) is run forward and backward once on the meta device,
where tensors have shapes and no content, and the bytes alive are counted as they come and go; equal parts are run
once. The step is then put together from its parts (step_memory.py). No size of table or model costs memory here.

Attention is taken as fused: it keeps queries, keys, values, output and one number per query.
Shapes: B rows, T tokens a row, D model width, H heads, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from suite.models.memory_table import MemoryLayer, MemoryTable
from suite.models.moe import Experts
from suite.models.product_key import Addressing
from suite.models.transformer import Block, Transformer, as_bias, attention_mask
from suite.plan.fused_attention import Kernels, Precision
from suite.plan.live_bytes import Layouts, MetaLiveBytes
from suite.plan.step_memory import STATE_BYTES, Part, Parts

Halves = tuple[int, int, tuple[int, ...]]
"""A block as far as memory goes: the kinds of its halves, and the tables that are read, by number."""


Beside = tuple[Tensor, tuple[Tensor, Tensor], Tensor]
"""What a model's blocks are given beside the residual stream: tokens [B, T], rotation, bias of attention scores."""


@dataclass
class Seen:
    """What has been met before, of one model or of several: halves of blocks, and layouts of operations' results."""

    parts: dict[object, Part] = field(default_factory=dict)
    layouts: Layouts = field(default_factory=dict)
    kinds: dict[object, int] = field(default_factory=dict)
    """What makes two halves need the same memory -> their kind."""
    blocks: WeakKeyDictionary[Transformer, list[Halves]] = field(default_factory=WeakKeyDictionary)
    beside: dict[object, Beside] = field(default_factory=dict)

    def kind(self, *modules: nn.Module) -> int:
        """The kind of the half that is made of these modules."""
        return self.kinds.setdefault(tuple(map(_signature, modules)), len(self.kinds))


def parts(
    model: Transformer,
    seq_len: int,
    rows: int,
    precision: Precision = "fp32",
    busiest: float = 1.0,
    seen: Seen | None = None,
) -> Parts:
    """The parts of a model that lies on the meta device, on `rows` packed rows of `seq_len` tokens (B x T).

    `busiest`: tokens of the busiest expert over the mean, for families that route tokens to experts. `seen`: parts
    run before, of this model or others; those that are equal are not run again.
    """
    seen = seen or Seen()
    tables = model.memory_tables()
    number = {id(table): index for index, table in enumerate(tables)}
    beside = model.size.heads, model.size.head_dim, rows, seq_len, precision
    if beside not in seen.beside:
        seen.beside[beside] = _beside(model, rows, seq_len, precision, seen.layouts)
    tokens_BT, rotation, bias = seen.beside[beside]
    layers = cast(list[Block], list(model.layers))
    for module in (module for layer in layers for module in layer.feed_forward.modules()):
        if isinstance(module, Experts):
            module.busiest = busiest
    if model not in seen.blocks:
        seen.blocks[model] = [_block(layer, number, seen) for layer in layers]
    window = max(layer.window for layer in layers)
    ids_BTW = tokens_BT.unsqueeze(-1).expand(-1, -1, window) if window else None

    def trace(run: Callable[[Tensor], Tensor], given: Iterable[Tensor], shape: object) -> Part:
        key = shape, rows, seq_len, precision, busiest
        if key not in seen.parts:
            weights = list(given)
            x_BTD = torch.empty(rows, seq_len, model.size.dim, device="meta", requires_grad=True)
            with MetaLiveBytes(seen.layouts):
                copies = {id(weight): weight.bfloat16() for weight in weights} if precision == "bf16" else {}
            known = (x_BTD, tokens_BT, *rotation, bias, *weights, *model.tables.parameters(), *copies.values())
            with MetaLiveBytes(seen.layouts, *known) as live, Kernels(precision, copies):
                with _count_lookups(tables) as lookups:
                    y = run(x_BTD)
                forward, saved = live.peak, live.bytes
                live.peak = live.bytes
                y.backward(None if y.dim() == 0 else torch.empty_like(y))
            matrices = [weight for weight in weights if weight.dim() > 1] if precision == "bf16" else []
            seen.parts[key] = Part(
                forward, saved, live.peak, _elements(weights), 2 * _elements(matrices), lookups=tuple(lookups)
            )
            for parameter in (*weights, *model.tables.parameters()):
                parameter.grad = None
        return seen.parts[key]

    def of_block(layer: Block, attention: int, feed_forward: int, read: tuple[int, ...]) -> Part:
        first = trace(
            lambda x_BTD: layer.attend(x_BTD, rotation, bias, None, 0),
            [*layer.attention_norm.parameters(), *layer.attention.parameters()],
            attention,
        )
        second = trace(
            lambda x_BTD: layer.feed(x_BTD, ids_BTW),
            [*layer.feed_forward_norm.parameters(), *layer.feed_forward.parameters()],
            feed_forward,
        )
        return first.then(replace(second, tables=read))

    embedded = rows * seq_len * model.size.dim * STATE_BYTES
    matrix = model.embedding.weight.numel()
    embedding = Part(embedded, embedded, embedded + STATE_BYTES * matrix, matrix)
    distinct = dict(zip(seen.blocks[model], layers, strict=True))
    with one_row(tables):
        blocks = {known: of_block(layer, *known) for known, layer in distinct.items()}
    tied = model.output is None
    output: list[Tensor] = [model.norm.weight, model.embedding.weight if model.output is None else model.output.weight]
    head = trace(lambda x_BTD: _loss(model, x_BTD, tokens_BT), output, (model.vocab_size, model.size.dim, tied))
    head = replace(head, weights=head.weights - (matrix if tied else 0))
    shared = sum(t.untyped_storage().nbytes() for t in (*rotation, bias)) + 3 * tokens_BT.numel() * 8
    sizes = tuple((table.weight.shape[0], table.weight.shape[1]) for table in tables)
    return Parts((embedding, *(blocks[known] for known in seen.blocks[model]), head), sizes, shared)


def _beside(model: Transformer, rows: int, seq_len: int, precision: Precision, layouts: Layouts) -> Beside:
    with torch.device("meta"), MetaLiveBytes(layouts):
        tokens_BT = torch.zeros(rows, seq_len, dtype=torch.int64)
        mask = attention_mask(tokens_BT, 0, tokens_BT, None)
        assert mask is not None
        bias = as_bias(mask, torch.bfloat16 if precision == "bf16" else torch.float32)
        return tokens_BT, model._rotation(0, seq_len, tokens_BT.device), bias


def _elements(parameters: Iterable[Tensor]) -> int:
    return sum(parameter.numel() for parameter in parameters)


@contextmanager
def _count_lookups(tables: list[MemoryTable]) -> Iterator[list[int]]:
    """Gathers how many rows each read asks for, in order."""
    seen: list[int] = []

    def listen(indices: Tensor) -> None:
        seen.append(indices.numel())

    for table in tables:
        table.before_read.append(listen)
    try:
        yield seen
    finally:
        for table in tables:
            table.before_read.remove(listen)


@contextmanager
def one_row(tables: list[MemoryTable]) -> Iterator[None]:
    """Tables of one row for a while: their gradients are put in by `Parts.step`, which knows how they lie."""
    whole = [table.weight for table in tables]
    try:
        for table in tables:
            table.weight = nn.Parameter(table.weight[:1].detach())
        yield
    finally:
        for table, weight in zip(tables, whole, strict=True):
            table.weight = weight


def _loss(model: Transformer, x_BTD: Tensor, targets_BT: Tensor) -> Tensor:
    """As the trainer does: the logits stay alive until the loss has its gradient."""
    logits_BTV = model.head(model.norm(x_BTD))
    loss = F.cross_entropy(logits_BTV.flatten(0, 1).float(), targets_BT.flatten(), reduction="sum")
    loss.logits = logits_BTV  # type: ignore[attr-defined]
    return loss


def _block(layer: Block, number: dict[int, int], seen: Seen) -> Halves:
    memory = (module for module in layer.modules() if isinstance(module, MemoryLayer))
    return (
        seen.kind(layer.attention_norm, layer.attention),
        seen.kind(layer.feed_forward_norm, layer.feed_forward),
        tuple(number[id(table)] for module in memory for table in module.tables),
    )


def _signature(part: nn.Module) -> object:
    """What makes two parts need the same memory: their modules, the settings of each and its parameters' shapes."""
    return tuple(
        (
            name,
            type(module),
            tuple((key, value) for key, value in vars(module).items() if key not in _INTERNAL and _is_setting(value)),
            tuple((key, weight.shape) for key, weight in module._parameters.items() if weight is not None),
        )
        for name, module in part.named_modules()
    )


_INTERNAL = vars(nn.Module()).keys() - {"training"}
"""Attributes of any module that say nothing of what it computes."""


def _is_setting(value: object) -> bool:
    """Whether a module's attribute is no tensor, no module and nothing of torch's."""
    if isinstance(value, tuple):
        return all(_is_setting(part) for part in value)
    return isinstance(value, bool | int | float | str | Addressing)
