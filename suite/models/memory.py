"""How much memory a training step needs: weights, gradients, moments and what lives in between, predicted.

Every part of the model (embedding, blocks, head with its loss) is run forward and backward once on the meta device,
where tensors have shapes and no content, and the bytes alive are counted as they come and go; equal parts are run
once. The step is then put together from its parts: forward in order, backward in reverse, gradients staying. No size
of table or model costs memory here.

Attention is taken as fused: it keeps queries, keys, values, output and one number per query.
Shapes: B rows, T tokens a row, D model width, H heads, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from suite.models.live_bytes import Layouts, MetaLiveBytes
from suite.models.memory_table import MemoryLayer, MemoryTable
from suite.models.moe import Experts
from suite.models.product_key import Addressing
from suite.models.transformer import Block, Transformer, as_bias, attention_mask

STATE_BYTES = 4
"""Of a weight, a gradient or a moment: fp32, also where products are computed in bf16."""
Precision = Literal["fp32", "bf16"]


@dataclass(frozen=True)
class Part:
    """Bytes of one part of the model beyond its weights: most in its forward, kept for its backward, most in that.

    `weights`: elements of its parameters, tables apart. `copies`: bytes of their copies in bf16, which autocast keeps
    until the backward. `tables`: which tables it reads, by number, and `lookups`: how often each.
    """

    forward: int
    saved: int
    backward: int
    weights: int
    copies: int = 0
    tables: tuple[int, ...] = ()
    lookups: tuple[int, ...] = ()


@dataclass
class Seen:
    """What has been run before, of one model or of several: equal parts, and the layouts of operations' results."""

    parts: dict[object, Part] = field(default_factory=dict)
    layouts: Layouts = field(default_factory=dict)
    blocks: WeakKeyDictionary[Transformer, list[tuple[object, tuple[int, ...]]]] = field(
        default_factory=WeakKeyDictionary
    )
    """Of each model's blocks: what makes two need the same memory, and which tables are read, by number."""


@dataclass(frozen=True)
class StepMemory:
    """Bytes of a training step on one device. `saved`: kept from forward to backward; `peak`: most alive at once."""

    weights: float
    moments: float
    gradients: float
    saved: float
    peak: float

    @property
    def activations(self) -> float:
        """What the peak holds beyond weights, moments and all gradients."""
        return max(0.0, self.peak - self.weights - self.moments - self.gradients)


@dataclass(frozen=True)
class Parts:
    """A model's parts in forward order (embedding, blocks, head), its tables as (rows, width), what all parts share."""

    parts: tuple[Part, ...]
    tables: tuple[tuple[int, int], ...]
    shared: int

    def step(
        self,
        rest_shards: int = 1,
        value_shards: int = 1,
        micro_batches: int = 1,
        row_wise: bool = True,
        use: float = 1.0,
    ) -> StepMemory:
        """The step on one of `rest_shards` devices that divide weights, moments and gradients among them.

        Columns of tables are divided among `value_shards`. A part's weights and gradients are whole while it runs,
        where they are divided at all. `micro_batches`: how many make a step; the gradients of earlier ones are there
        from the start. `row_wise`: tables have gradients for the rows that were read, else dense ones; `use`: how
        many rows are read at least once, over what even reading would give.
        """
        tables = _Tables(self.tables, value_shards, row_wise, use)
        rest, values = sum(part.weights for part in self.parts) / rest_shards, tables.elements
        weights, moments = STATE_BYTES * (rest + values), 2 * STATE_BYTES * (rest + values) + tables.marks
        pieces = [tables.gradient(part) for part in self.parts]
        buffer = tables.buffer(pieces, micro_batches)
        gradients = STATE_BYTES * rest + buffer
        state, whole = weights + moments + self.shared, rest_shards == 1
        early = 0.0 if micro_batches == 1 else STATE_BYTES * rest + tables.buffer(pieces, micro_batches - 1)
        saved, peak = 0.0, state + gradients + tables.merging(buffer)
        for part in self.parts:
            peak = max(peak, state + early + saved + part.forward + tables.grouping(part) + self._gathered(part, whole))
            saved += part.saved + (part.copies if whole else 0) + tables.groups(part)
        kept, arrived = saved, 0.0
        for part, piece in zip(reversed(self.parts), reversed(pieces), strict=True):
            kept -= part.saved + (part.copies if whole else 0)
            running = part.backward + piece + self._gathered(part, whole)
            peak = max(peak, state + early + kept + arrived + running)
            kept -= tables.groups(part)
            arrived += tables.arriving(part, piece)
            arrived += 0.0 if micro_batches > 1 else STATE_BYTES * part.weights / rest_shards
        return StepMemory(weights, moments, gradients, saved, peak)

    def _gathered(self, part: Part, whole: bool) -> int:
        """A part's weights as it computes with them, where they are not there as they are."""
        return part.copies or (0 if whole else STATE_BYTES * part.weights)


@dataclass
class _Tables:
    """What a step holds of tables beyond their rows: gradients, the grouping of lookups by row, marks of rows.

    A row-wise buffer keeps one compact piece for each read, until they hold more than twice the table's rows.
    """

    sizes: tuple[tuple[int, int], ...]
    shards: int
    row_wise: bool
    use: float

    def __post_init__(self) -> None:
        self._met: set[int] = set()

    @property
    def elements(self) -> float:
        """Of all tables, on this device."""
        return sum(rows * width for rows, width in self.sizes) / self.shards

    @property
    def marks(self) -> int:
        """When each row was last brought up to date, its moments too, and whether it was ever read."""
        return sum(9 * rows for rows, _ in self.sizes) if self.row_wise else 0

    def gradient(self, part: Part) -> float:
        """Bytes of what the part's backward pass makes."""
        return sum(
            self._rows(table, lookups) * self._row_bytes(table)
            for table, lookups in zip(part.tables, part.lookups, strict=True)
        )

    def arriving(self, part: Part, piece: float) -> float:
        """Bytes that stay of what the part made: all, but for a dense gradient that is summed into an earlier one."""
        first = self.row_wise or not self._met.issuperset(part.tables)
        self._met.update(part.tables)
        return piece if first else 0.0

    def buffer(self, pieces: list[float], micro_batches: int) -> float:
        """Bytes of all gradients at the end of that many micro-batches."""
        if not self.row_wise:
            return STATE_BYTES * self.elements
        most = sum(2 * rows * self._row_bytes(table) for table, (rows, _) in enumerate(self.sizes))
        return min(sum(pieces) * micro_batches, most)

    def merging(self, buffer: float) -> float:
        """Beside the pieces, all of them side by side and their sums by row, while they become one."""
        once = sum(rows * self._row_bytes(table) for table, (rows, _) in enumerate(self.sizes))
        return buffer + min(buffer, once) if self.row_wise else 0.0

    def groups(self, part: Part) -> float:
        """Lookups in the order of their rows, kept from forward to backward."""
        return sum(8 * lookups for lookups in part.lookups) if self.row_wise else 0.0

    def grouping(self, part: Part) -> float:
        """The same while it is made: rows in narrow integers, as they come and sorted."""
        return sum((8 + 4 + 4) * lookups for lookups in part.lookups) if self.row_wise else 0.0

    def _rows(self, table: int, lookups: int) -> float:
        rows = self.sizes[table][0]
        return self.use * rows * -math.expm1(-lookups / rows) if self.row_wise else rows

    def _row_bytes(self, table: int) -> float:
        return STATE_BYTES * self.sizes[table][1] / self.shards + (8 if self.row_wise else 0)


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
    for module in model.modules():
        if isinstance(module, Experts):
            module.busiest = busiest
    with torch.device("meta"), MetaLiveBytes(seen.layouts):
        tokens_BT = torch.zeros(rows, seq_len, dtype=torch.int64)
        rotation = model._rotation(0, seq_len, tokens_BT.device)
        mask = attention_mask(tokens_BT, 0, tokens_BT, None)
        assert mask is not None
        bias = as_bias(mask, torch.bfloat16 if precision == "bf16" else torch.float32)
    layers = cast(list[Block], list(model.layers))
    if model not in seen.blocks:
        seen.blocks[model] = [(_signature(layer), _tables_read(layer, number)) for layer in layers]
    window = max(layer.window for layer in layers)
    ids_BTW = tokens_BT.unsqueeze(-1).expand(-1, -1, window) if window else None

    def trace(run: Callable[[Tensor], Tensor], given: Iterable[Tensor], shape: object) -> Part:
        key = shape, rows, seq_len, precision, busiest
        if key not in seen.parts:
            weights = list(given)
            x_BTD = torch.empty(rows, seq_len, model.size.dim, device="meta", requires_grad=True)
            copies = {id(weight): weight.bfloat16() for weight in weights} if precision == "bf16" else {}
            known = (x_BTD, tokens_BT, *rotation, bias, *weights, *model.tables.parameters(), *copies.values())
            with MetaLiveBytes(seen.layouts, *known) as live, _Kernels(precision, copies):
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

    def of_block(layer: Block, signature: object, read: tuple[int, ...]) -> Part:
        part = trace(lambda x_BTD: layer(x_BTD, rotation, bias, None, 0, ids_BTW), layer.parameters(), signature)
        return replace(part, tables=read)

    embedded = rows * seq_len * model.size.dim * STATE_BYTES
    matrix = model.embedding.weight.numel()
    embedding = Part(embedded, embedded, embedded + STATE_BYTES * matrix, matrix)
    with _one_row(tables):
        blocks = [of_block(layer, *known) for layer, known in zip(layers, seen.blocks[model], strict=True)]
    tied = model.output is None
    output: list[Tensor] = [model.norm.weight, model.embedding.weight if model.output is None else model.output.weight]
    head = trace(lambda x_BTD: _loss(model, x_BTD, tokens_BT), output, (model.vocab_size, model.size.dim, tied))
    head = replace(head, weights=head.weights - (matrix if tied else 0))
    shared = sum(t.untyped_storage().nbytes() for t in (*rotation, bias)) + 3 * tokens_BT.numel() * 8
    sizes = tuple((table.weight.shape[0], table.weight.shape[1]) for table in tables)
    return Parts((embedding, *blocks, head), sizes, shared)


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
def _one_row(tables: list[MemoryTable]) -> Iterator[None]:
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


def _signature(layer: Block) -> object:
    """What makes two blocks need the same memory: their modules, the settings of each and its parameters' shapes."""
    return tuple(
        (
            name,
            type(module),
            tuple((key, value) for key, value in vars(module).items() if _is_setting(value)),
            tuple((key, weight.shape) for key, weight in module._parameters.items() if weight is not None),
        )
        for name, module in layer.named_modules()
    )


def _tables_read(layer: Block, number: dict[int, int]) -> tuple[int, ...]:
    """The numbers of the tables that a block's memory reads."""
    memory = (module for module in layer.modules() if isinstance(module, MemoryLayer))
    return tuple(number[id(table)] for module in memory for table in module.tables)


def _is_setting(value: object) -> bool:
    """Whether a module's attribute is no tensor, no module and nothing of torch's."""
    if isinstance(value, tuple):
        return all(_is_setting(part) for part in value)
    return isinstance(value, bool | int | float | str | Addressing)


class _Kernels(TorchFunctionMode):
    """Attention as fused kernels keep it and, for bf16, products in bf16 as autocast makes them."""

    PRODUCTS = (F.linear, torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm)

    def __init__(self, precision: Precision, copies: dict[int, Tensor]) -> None:
        super().__init__()
        self.bf16, self.copies = precision == "bf16", copies

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return _FusedAttention.apply(*(self._low(x) for x in args), kwargs.get("attn_mask"))
        if self.bf16 and func in self.PRODUCTS:
            args, kwargs = tuple(self._low(x) for x in args), {key: self._low(x) for key, x in kwargs.items()}
        return func(*args, **kwargs)

    def _low(self, x: Any) -> Any:
        """The tensor in bf16; of a parameter the copy there is."""
        if not self.bf16 or not isinstance(x, Tensor) or not x.is_floating_point():
            return x
        return self.copies[id(x)] if id(x) in self.copies else x.bfloat16()


class _FusedAttention(torch.autograd.Function):
    """What fused attention allocates and keeps, without its arithmetic."""

    @staticmethod
    def forward(ctx: Any, q_BHTK: Tensor, k_BGTK: Tensor, v_BGTK: Tensor, bias: Tensor | None) -> Tensor:
        # Laid out as queries come, token by token, so that heads are joined without a copy.
        y_BHTK = torch.empty_like(q_BHTK.transpose(1, 2).contiguous()).transpose(1, 2)
        ctx.save_for_backward(q_BHTK, k_BGTK, v_BGTK, y_BHTK, q_BHTK.new_empty(q_BHTK.shape[:3], dtype=torch.float32))
        return y_BHTK

    @staticmethod
    def backward(ctx: Any, grad_BHTK: Tensor) -> tuple[Tensor | None, ...]:
        q_BHTK, k_BGTK, v_BGTK, *_ = ctx.saved_tensors
        return torch.empty_like(q_BHTK), torch.empty_like(k_BGTK), torch.empty_like(v_BGTK), None
