"""Calls of the operators at the shapes of the models from 134m to 8b, for compiling what they launch.

Only what a kernel is compiled for is at full size (row width, width of a half key, half keys, rows read per head);
tables have a few rows and batches a few tokens, since these are ordinary arguments of the same compiled code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import combinations, product
from typing import Any

import torch

from kernels.bench.ahead_of_time import DEVICES
from kernels.bench.cases import dtype_name
from kernels.embedding_bag import RowGradients
from kernels.embedding_bag import triton as bags
from kernels.product_key import triton as search
from kernels.rotary import triton as rotary
from kernels.row_adamw import RowAdamW

ROWS, TOKENS, READ = 64, 16, 128
"""Rows of the tables, tokens of the batches, and rows read per token (4 heads of 32)."""
WIDTHS = {"134m": 768, "373m": 1024, "720m": 1536, "1.3b": 2048, "8b": 4096}
SHARDS = {"134m / 8": 96, "720m / 8": 192, "1.3b / 8": 256, "8b / 8": 512, "8b / 64": 64}
"""Row widths where a table's columns are divided over processes."""
NGRAM_WIDTHS = {"Engram-27B": 80, "Qwen3.8": 160, "DeepSeek-V4.1": 256}
"""Row widths of n-gram tables, whose bags hold one row."""
HALF_KEYS = (1024, 2048, 4096, 8192)
"""Tables of 2^20 to 2^26 rows."""
HALF_WIDTHS = {"pkm": 128, "134m": 192, "373m": 256, "720m": 384, "1.3b": 512, "8b": 1024}
"""Widths of a half key: 128 for `pkm` and `peer`, a quarter of the model's width for `memory_plus`."""
ROUNDINGS = (
    (torch.float32, "nearest"),
    (torch.bfloat16, "nearest"),
    (torch.bfloat16, "master"),
    (torch.bfloat16, "stochastic"),
)


DTYPES = (torch.float32, torch.bfloat16)
PATHS = ("replay", "sweep")


@dataclass(frozen=True)
class Call:
    """A call of an operator: its shape in words, and the architecture to compile it for (90: sm_90)."""

    shape: str
    architecture: int
    run: Callable[[], object]


Choose = Callable[..., Iterable[tuple[Any, ...]]]
"""Returns combinations of the values of several factors: all of them (`product`), or a selection (`pairwise`)."""


def calls(every: bool) -> list[Call]:
    """Return calls of all shapes and options on all architectures.

    Args:
        every: All combinations instead of a selection in which each two settings of an operator meet.
    """
    choose: Choose = product if every else pairwise
    return [*_searches(choose), *_bags(choose), *_updates(choose), *_rotations(choose)]


def pairwise(*factors: Iterable[Any]) -> list[tuple[Any, ...]]:
    """Return few combinations such that any two values of different factors meet in one of them.

    Args:
        factors: The values of each factor, hashable.
    """
    candidates = {combination: set(combinations(enumerate(combination), 2)) for combination in product(*factors)}
    unmet = set().union(*candidates.values())
    chosen = []
    while unmet:
        chosen.append(max(candidates, key=lambda combination: len(candidates[combination] & unmet)))
        unmet -= candidates[chosen[-1]]
    return chosen


def _searches(choose: Choose) -> Iterator[Call]:
    for (size, width), half_keys, dtype, architecture in choose(HALF_WIDTHS.items(), HALF_KEYS, DTYPES, DEVICES):
        shape = f"{size}: half keys {half_keys} x {width}, {dtype_name(dtype)} queries"
        yield Call(shape, architecture, partial(_search, width, half_keys, 32, dtype))
    for (top_k, half_keys), architecture in choose(((1, 8), (3, 33), (20, 768), (64, 1000)), DEVICES):
        shape = f"top {top_k} of {half_keys}^2"
        yield Call(shape, architecture, partial(_search, 40, half_keys, top_k, torch.float32))
        best = partial(search.best, torch.zeros(TOKENS, half_keys), top_k)
        yield Call(f"best {top_k} of {half_keys}", architecture, best)


def _search(width: int, half_keys: int, top_k: int, dtype: torch.dtype) -> None:
    q_NM2W, keys_M2nW = torch.zeros(TOKENS, 4, 2, width, dtype=dtype), torch.zeros(4, 2, half_keys, width)
    search.search(q_NM2W, keys_M2nW, top_k)
    rows_MNK = torch.zeros(4, TOKENS, top_k, dtype=torch.int64)
    search.search_backward(torch.zeros(rows_MNK.shape), rows_MNK, q_NM2W, keys_M2nW)


def _bags(choose: Choose) -> Iterator[Call]:
    for (size, width), dtype, architecture in choose({**WIDTHS, **SHARDS}.items(), DTYPES, DEVICES):
        shape = f"{size}: width {width}, {dtype_name(dtype)} table"
        yield Call(shape, architecture, partial(_bag, width, READ, dtype))
    for (model, width), dtype, architecture in choose(NGRAM_WIDTHS.items(), DTYPES, DEVICES):
        shape = f"{model}: width {width}, {dtype_name(dtype)} table, bags of one row"
        yield Call(shape, architecture, partial(_bag, width, 1, dtype))
    for (width, read, dtype), architecture in choose(((48, 8, torch.float64), (33, 20, torch.float32)), DEVICES):
        shape = f"width {width}, {dtype_name(dtype)} table, {read} rows per token"
        yield Call(shape, architecture, partial(_bag, width, read, dtype))


def _bag(width: int, read: int, dtype: torch.dtype) -> None:
    """Run forward and both gradients; one row is read so often that its sum takes several levels."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    table_RD, x_ND = torch.zeros(ROWS, width, dtype=dtype), torch.zeros(TOKENS, width, dtype=dtype)
    indices_NS = (torch.arange(TOKENS * read) % ROWS).view(TOKENS, read)
    indices_NS[:, : read // 2] = 3
    weights_NS = torch.zeros(TOKENS, read, dtype=wide)
    bags.bag(table_RD, indices_NS, weights_NS, dtype)
    bags.dots(table_RD, indices_NS, x_ND)
    bags.row_sums(x_ND, weights_NS, bags.group_by_row(indices_NS, ROWS), wide)


def _updates(choose: Choose) -> Iterator[Call]:
    settings = ({**WIDTHS, **SHARDS}.items(), ROUNDINGS, PATHS, (False, True), (0.1, 0.0), DEVICES)
    for (size, width), (dtype, rounding), path, by_row, decay, architecture in choose(*settings):
        shape = f"{size}: width {width}, {dtype_name(dtype)} {rounding}, {path}"
        shape += (", one second moment per row" if by_row else "") + ("" if decay else ", no weight decay")
        update = {"low_precision": rounding, "path": path, "row_second_moment": by_row, "weight_decay": decay}
        yield Call(shape, architecture, partial(_update, width, dtype, update))
    for (model, width), path, architecture in choose(NGRAM_WIDTHS.items(), PATHS, DEVICES):
        shape = f"{model}: width {width}, {path}"
        yield Call(shape, architecture, partial(_update, width, torch.float32, {"path": path}))
    for path, architecture in choose(PATHS, DEVICES):
        shape = f"width 2048, float64, {path}"
        yield Call(shape, architecture, partial(_update, 2048, torch.float64, {"path": path}))


def _update(width: int, dtype: torch.dtype, options: dict[str, Any]) -> None:
    take_steps(2, torch.zeros(ROWS, width, dtype=dtype), options)


def _rotations(choose: Choose) -> Iterator[Call]:
    for (size, width), dtype, architecture in choose(WIDTHS.items(), DTYPES, DEVICES):
        shape = f"{size}: rotary positions of {width} columns, {dtype_name(dtype)}"
        yield Call(shape, architecture, partial(_rotation, width, dtype))


def _rotation(width: int, dtype: torch.dtype) -> None:
    """Rotate both ways; columns of the values lie between tokens."""
    x_BTC, angle_TI = torch.zeros(1, TOKENS, 2 * width, dtype=dtype), torch.zeros(TOKENS, 64)
    for direction in (1, -1):
        rotary.rotate(x_BTC[..., :width], angle_TI, angle_TI, direction)


def take_steps(steps: int, table_RD: torch.Tensor, options: dict[str, Any], flush_every: int = 0) -> None:
    """Take AdamW steps on changing rows of a table, and a flush at the end (and every `flush_every` steps)."""
    sink = RowGradients(table_RD)
    adamw = RowAdamW(table_RD, sink, replay_limit=256, backend="triton", **options)
    for step in range(steps):
        rows_U = torch.arange(step % 7, len(table_RD) - step % 5, 1 + step % 3)
        adamw.before_read(rows_U)
        sink.add(rows_U, torch.zeros(len(rows_U), table_RD.shape[1], dtype=sink.dtype))
        adamw.step(1e-3)
        if flush_every and step % flush_every == flush_every - 1:
            adamw.flush()
    adamw.flush()
