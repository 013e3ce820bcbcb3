"""Predicts how much memory each part of a model needs in a training step.

Each part (embedding, a module at the input embedding, blocks, head with its loss) runs forward and backward once on the
meta device, where tensors have shapes but no storage, while the bytes alive are counted. Equal parts run once.
`step_memory` adds the parts up to a step. Tracing allocates no memory, whatever the size of the tables or the model.

Attention is assumed to be fused: it saves queries, keys, values, the output and one number per query. On GPUs without a
kernel for grouped products, experts that tokens choose work on blocks of tokens with copies of their weights.

Shapes: B rows, T tokens per row, D model width, C width of all heads, W tokens of a window.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from suite.models.attachments import call
from suite.models.cache import EarlierTokens
from suite.models.feedforward import SwiGLU
from suite.models.memory_table import MemoryLayer, MemoryTable
from suite.models.moe import Experts, RoutedExperts
from suite.models.transformer import Block, Transformer
from suite.models.usage import count_bytes
from suite.plan.fused_attention import Kernels, Precision
from suite.plan.live_bytes import LiveBytes
from suite.plan.step_memory import STATE_BYTES, Part, Parts

INT64_BYTES = 8

PartCache = dict[object, Part]
"""Traced parts, by the settings that determine their memory; shared by all models of a plan."""


class StepTracer:
    """Traces the parts of one model on the meta device, for micro-batches of any number of rows.

    Args:
        model: A model on the meta device.
        seq_len: Tokens per row (T).
        precision: The dtype of matrix products.
        busiest: Load of the busiest expert relative to the mean load, for families that route tokens to experts.
        cache: Parts traced earlier, of this or other models. New ones are added.
        capability: Major compute capability of the GPU; None: a CPU, on which the host knows the experts' loads.
    """

    def __init__(
        self,
        model: Transformer,
        seq_len: int,
        precision: Precision = "fp32",
        busiest: float = 1.0,
        cache: PartCache | None = None,
        capability: int | None = None,
    ) -> None:
        self.model, self.seq_len, self.precision, self.busiest = model, seq_len, precision, busiest
        self.in_blocks = [routed.experts for routed in experts_in_blocks(model, precision, capability)]
        self.cache: PartCache = {} if cache is None else cache
        self.tables = [table for table in model.memory_tables() if table.weight.requires_grad]
        self.frozen = [table for table in model.memory_tables() if not table.weight.requires_grad]
        self.blocks = cast(list[Block], list(model.layers))
        self._config = model.config.model_dump_json()
        self._block_keys = [_block_key(block, model, self._config) for block in self.blocks]

    def parts(self, rows: int) -> Parts:
        """Return the parts in forward order, on a micro-batch of `rows` packed rows (B)."""
        model, inputs = self.model, _inputs(self.model, self.seq_len, rows, self.precision)
        output = rows * self.seq_len * model.size.dim * STATE_BYTES
        matrix = model.embedding.weight.numel()
        embedding = Part(output, output, output + STATE_BYTES * matrix, matrix)
        blocks = [
            self._with_tables(self._block(block, key, inputs), block)
            for block, key in zip(self.blocks, self._block_keys, strict=True)
        ]
        parts = (embedding, *self._input(inputs), *blocks, self._head(inputs))
        return Parts(parts, _sizes(self.tables), inputs.bytes, count_bytes(model), _sizes(self.frozen))

    def _with_tables(self, part: Part, module: nn.Module) -> Part:
        """Return the part of a module with the tables that the module reads, which differ between equal modules."""
        return replace(part, tables=_tables_read(module, self.tables), frozen=_tables_read(module, self.frozen))

    def _input(self, inputs: _Inputs) -> list[Part]:
        """Return the part of the module at the input embedding, if there is one."""
        module = self.model.input_embedding
        if module is None:
            return []

        def run(x_BTD: Tensor) -> Tensor:
            return call(module, "input_embedding", x_BTD, inputs.ids_BTW, x_BTD, inputs.earlier)

        part = self._traced(("input_embedding", self._config), run, module.parameters(), inputs)
        return [self._with_tables(part, module)]

    def _block(self, block: Block, key: object, inputs: _Inputs) -> Part:
        def run(x_BTD: Tensor) -> Tensor:
            read_BTD = inputs.embedding_BTD if block.reads_embedding else None
            y = block(x_BTD, inputs.rotation, inputs.bias, None, 0, inputs.ids_BTW, read_BTD, inputs.earlier)
            return y if block.skip is None else y[0] + y[1]

        return self._traced(key, run, block.parameters(), inputs)

    def _head(self, inputs: _Inputs) -> Part:
        """Return the last norm, the output matrix and the loss; a tied matrix is counted with the embedding."""
        model = self.model
        tied = model.output is None
        matrix = model.output_matrix

        def run(x_BTD: Tensor) -> Tensor:
            return model.loss(model.norm(x_BTD), inputs.tokens_BT)

        key = "head", model.vocab_size, model.size.dim, tied
        part = self._traced(key, run, [model.norm.weight, matrix], inputs)
        return replace(part, weights=part.weights - (matrix.numel() if tied else 0))

    def _traced(self, key: object, run: Callable[[Tensor], Tensor], weights: Iterable[Tensor], inputs: _Inputs) -> Part:
        """Return the part of that key; on first use, run it forward and backward and count its bytes.

        Args:
            key: The settings that determine the part's memory, without micro-batch and precision.
            run: The part as a function of the residual stream [B, T, D]; returns its output or the loss.
            weights: Its parameters, without tables.
            inputs: The micro-batch.

        Returns:
            The part's bytes.
        """
        key = key, inputs.tokens_BT.shape, self.precision, self.busiest, bool(self.in_blocks)
        if key not in self.cache:
            for module in self.model.modules():
                if isinstance(module, Experts):
                    module.busiest = self.busiest
            with one_row(self.tables), _routed_in_blocks(self.in_blocks):
                self.cache[key] = self._trace(run, list(weights), inputs)
        return self.cache[key]

    def _trace(self, run: Callable[[Tensor], Tensor], weights: list[Tensor], inputs: _Inputs) -> Part:
        x_BTD = torch.empty(*inputs.tokens_BT.shape, self.model.size.dim, device="meta", requires_grad=True)
        is_bf16 = self.precision == "bf16"
        copies = {id(weight): weight.bfloat16() for weight in weights} if is_bf16 else {}
        table_weights = [table.weight for table in self.model.memory_tables()]
        with (
            LiveBytes(x_BTD, *inputs.tensors, *weights, *table_weights, *copies.values()) as live,
            Kernels(self.precision, copies),
        ):
            with _count_lookups(self.tables) as lookups, _count_lookups(self.frozen) as frozen:
                y = run(x_BTD)
            forward, saved = live.peak, live.bytes
            live.peak = live.bytes
            loss = y if y.dim() == 0 else _GradientSource.apply(y)
            loss.backward(None if y.dim() == 0 else torch.empty_like(loss))
        for weight in weights:
            weight.grad = None
        matrices = [weight for weight in weights if weight.dim() > 1] if is_bf16 else []
        memory = Part(forward, saved, live.peak, _elements(weights), 2 * _elements(matrices))
        return replace(memory, lookups=tuple(lookups), frozen_lookups=tuple(frozen))


@dataclass(frozen=True)
class _Inputs:
    """The inputs of every block other than the residual stream."""

    tokens_BT: Tensor
    rotation: tuple[Tensor, Tensor]
    bias: Tensor
    ids_BTW: Tensor | None
    embedding_BTD: Tensor
    earlier: EarlierTokens

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All tensors."""
        assert self.earlier.segments_BT is not None
        return self.tokens_BT, self.embedding_BTD, self.earlier.segments_BT, *self._computed

    @property
    def bytes(self) -> int:
        """Bytes of rotation, bias, windows, tokens, segments and targets; the embedding is a part's output."""
        computed = sum(tensor.untyped_storage().nbytes() for tensor in self._computed)
        return computed + 3 * self.tokens_BT.numel() * INT64_BYTES

    @property
    def _computed(self) -> tuple[Tensor, ...]:
        return *self.rotation, self.bias, *(() if self.ids_BTW is None else (self.ids_BTW,))


def _inputs(model: Transformer, seq_len: int, rows: int, precision: Precision) -> _Inputs:
    """Return tensors of the shapes that the transformer gives its blocks for packed rows."""
    with torch.device("meta"):
        tokens_BT = torch.empty(rows, seq_len, dtype=torch.int64)
        angles_TC = (seq_len, model.size.heads * model.size.head_dim)
        rotation = torch.empty(angles_TC), torch.empty(angles_TC)
        bias = torch.empty(rows, 1, seq_len, seq_len, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
        ids_BTW = torch.empty(rows, seq_len, model.window, dtype=torch.int64) if model.window else None
        embedding_BTD = torch.empty(rows, seq_len, model.size.dim, requires_grad=True)
    earlier = EarlierTokens(segments_BT=torch.empty_like(tokens_BT))
    return _Inputs(tokens_BT, rotation, bias, ids_BTW, embedding_BTD, earlier)


class _GradientSource(torch.autograd.Function):
    """An empty tensor whose backward pass makes the gradient of `y`, as the next part does, and then releases it."""

    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        ctx.shape, ctx.dtype = y.shape, y.dtype
        return y.new_empty(0)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> Tensor:
        return torch.empty(ctx.shape, dtype=ctx.dtype, device="meta")


def _block_key(block: Block, model: Transformer, config: str) -> object:
    """Return a key; blocks with equal keys need equal memory.

    A block with the plain feed-forward is the same in every family. The key of others consists of the configuration,
    their modules (with the settings in `extra_repr`) and the shapes of their parameters.
    """
    shapes = tuple(parameter.shape for parameter in block.parameters())
    if [type(module) for module in block.attached().values()] == [SwiGLU]:
        return model.size.heads, model.size.kv_heads, shapes
    return config, repr(block), shapes


def _tables_read(part: nn.Module, tables: list[MemoryTable]) -> tuple[int, ...]:
    """Return the indices of the tables that a block or module reads, in order."""
    index_of = {id(table): index for index, table in enumerate(tables)}
    memories = (module for module in part.modules() if isinstance(module, MemoryLayer))
    return tuple(index_of[id(table)] for memory in memories for table in memory.tables if id(table) in index_of)


def _sizes(tables: list[MemoryTable]) -> tuple[tuple[int, int], ...]:
    """Return the rows and the width of each table."""
    return tuple((table.weight.shape[0], table.weight.shape[1]) for table in tables)


def _elements(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors)


@contextmanager
def _count_lookups(tables: list[MemoryTable]) -> Iterator[list[int]]:
    """Yield a list to which the number of rows of every read is appended, in order."""
    lookups: list[int] = []

    def listen(indices: Tensor) -> None:
        lookups.append(indices.numel())

    for table in tables:
        table.before_read.append(listen)
    try:
        yield lookups
    finally:
        for table in tables:
            table.before_read.remove(listen)


def experts_in_blocks(model: Transformer, precision: Precision, capability: int | None) -> list[RoutedExperts]:
    """Return the mixtures whose experts work on blocks of tokens, since a GPU has no kernel for grouped products.

    Args:
        model: The model.
        precision: The dtype of matrix products.
        capability: Major compute capability of the GPU; None: a CPU, where none do.
    """
    if capability is None:
        return []
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    mixtures = [module for module in model.modules() if isinstance(module, RoutedExperts)]
    return [mixture for mixture in mixtures if not mixture.experts.has_grouped_kernel(dtype, capability)]


@contextmanager
def _routed_in_blocks(every: list[Experts]) -> Iterator[None]:
    """Let experts work in blocks, as they do on a GPU; on the meta device they would pad to the busiest one."""
    try:
        for experts in every:
            experts.routed = experts.in_blocks  # type: ignore[method-assign]
        yield
    finally:
        for experts in every:
            del experts.routed


@contextmanager
def one_row(tables: list[MemoryTable]) -> Iterator[None]:
    """Shrink tables to one row: `Parts.step` adds their gradients, whose layout depends on the optimizer."""
    weights = [table.weight for table in tables]
    try:
        for table in tables:
            table.weight = nn.Parameter(table.weight[:1].detach())
        yield
    finally:
        for table, weight in zip(tables, weights, strict=True):
            table.weight = weight
