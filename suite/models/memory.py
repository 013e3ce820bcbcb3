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
from typing import cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from suite.models.fused import Kernels, Precision
from suite.models.live_bytes import Layouts, MetaLiveBytes
from suite.models.memory_table import MemoryLayer, MemoryTable
from suite.models.moe import Experts
from suite.models.product_key import Addressing
from suite.models.transformer import Block, Transformer, as_bias, attention_mask

STATE_BYTES = 4
"""Of a weight, a gradient or a moment: fp32, also where products are computed in bf16."""


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

    def then(self, after: Part) -> Part:
        """Both as one part: what the first saved, and the gradients of the second's weights, stay to the end of it."""
        return Part(
            max(self.forward, self.saved + after.forward),
            self.saved + after.saved,
            max(self.saved + after.backward, self.backward + STATE_BYTES * after.weights),
            self.weights + after.weights,
            self.copies + after.copies,
            self.tables + after.tables,
            self.lookups + after.lookups,
        )


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


@dataclass(frozen=True)
class TableState:
    """Bytes of tables while they train: of a value, of its moments (and its fp32 copy, if any), of a row's marks.

    `row_wise`: only rows that were read have gradients, else all. Gradients are fp32.
    """

    row_wise: bool = True
    value: int = STATE_BYTES
    moments: int = 2 * STATE_BYTES
    row: int = 9

    @property
    def kept(self) -> int:
        """Of a value from step to step; dense gradients stay, too."""
        return self.value + self.moments + (0 if self.row_wise else STATE_BYTES)


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
        state: TableState = TableState(),
        use: float = 1.0,
    ) -> StepMemory:
        """The step on one of `rest_shards` devices that divide weights, moments and gradients among them.

        Columns of tables are divided among `value_shards`. A part's weights and gradients are whole while it runs,
        where they are divided at all. `micro_batches`: how many make a step; the gradients of earlier ones are there
        from the start. `state`: how tables are kept; `use`: how many rows are read at least once, over what even
        reading would give.
        """
        tables = _Tables(self.tables, value_shards, state, use)
        rest, values = sum(part.weights for part in self.parts) / rest_shards, tables.elements
        weights = STATE_BYTES * rest + state.value * values
        moments = 2 * STATE_BYTES * rest + state.moments * values + tables.marks
        pieces = [tables.gradient(part) for part in self.parts]
        buffer = tables.buffer(pieces, micro_batches)
        gradients = STATE_BYTES * rest + buffer
        always, whole = weights + moments + self.shared, rest_shards == 1
        early = 0.0 if micro_batches == 1 else STATE_BYTES * rest + tables.buffer(pieces, micro_batches - 1)
        saved, peak = 0.0, always + gradients + tables.merging(buffer)
        for part in self.parts:
            running = part.forward + tables.grouping(part) + self._gathered(part, whole)
            peak = max(peak, always + early + saved + running)
            saved += part.saved + (part.copies if whole else 0) + tables.groups(part)
        kept, arrived = saved, 0.0
        for part, piece in zip(reversed(self.parts), reversed(pieces), strict=True):
            kept -= part.saved + (part.copies if whole else 0)
            running = part.backward + piece + self._gathered(part, whole)
            peak = max(peak, always + early + kept + arrived + running)
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
    state: TableState
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
        return sum(self.state.row * rows for rows, _ in self.sizes)

    def gradient(self, part: Part) -> float:
        """Bytes of what the part's backward pass makes."""
        return sum(
            self._rows(table, lookups) * self._row_bytes(table)
            for table, lookups in zip(part.tables, part.lookups, strict=True)
        )

    def arriving(self, part: Part, piece: float) -> float:
        """Bytes that stay of what the part made: all, but for a dense gradient that is summed into an earlier one."""
        first = self.state.row_wise or not self._met.issuperset(part.tables)
        self._met.update(part.tables)
        return piece if first else 0.0

    def buffer(self, pieces: list[float], micro_batches: int) -> float:
        """Bytes of all gradients at the end of that many micro-batches."""
        if not self.state.row_wise:
            return STATE_BYTES * self.elements
        most = sum(2 * rows * self._row_bytes(table) for table, (rows, _) in enumerate(self.sizes))
        return min(sum(pieces) * micro_batches, most)

    def merging(self, buffer: float) -> float:
        """Beside the pieces, all of them side by side and their sums by row, while they become one."""
        once = sum(rows * self._row_bytes(table) for table, (rows, _) in enumerate(self.sizes))
        return buffer + min(buffer, once) if self.state.row_wise else 0.0

    def groups(self, part: Part) -> float:
        """Lookups in the order of their rows, kept from forward to backward."""
        return sum(8 * lookups for lookups in part.lookups) if self.state.row_wise else 0.0

    def grouping(self, part: Part) -> float:
        """The same while it is made: rows in narrow integers, as they come and sorted."""
        return sum((8 + 4 + 4) * lookups for lookups in part.lookups) if self.state.row_wise else 0.0

    def _rows(self, table: int, lookups: int) -> float:
        rows = self.sizes[table][0]
        return self.use * rows * -math.expm1(-lookups / rows) if self.state.row_wise else rows

    def _row_bytes(self, table: int) -> float:
        return STATE_BYTES * self.sizes[table][1] / self.shards + (8 if self.state.row_wise else 0)


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
