"""Calls of the operators at the shapes of the models from 134m to 8b, for compiling what they launch.

Only what a kernel is compiled for is at full size (row width, width of a half key, half keys, rows read per head);
tables have a few rows and batches a few tokens, since these are ordinary arguments of the same compiled code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import torch

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


@dataclass(frozen=True)
class Call:
    """A call of an operator, and its shape in words."""

    shape: str
    run: Callable[[], object]


def calls(every: bool) -> list[Call]:
    """Return the calls of all shapes and options, or of a few that represent them."""
    return [*_searches(every), *_bags(every), *_updates(every), *_rotations(every)]


def _searches(every: bool) -> Iterator[Call]:
    for size, width in HALF_WIDTHS.items():
        for half_keys, dtype in product(HALF_KEYS, (torch.bfloat16, torch.float32)):
            if every or (dtype == torch.bfloat16 and (size, half_keys) in (("pkm", 1024), ("1.3b", 8192))):
                label = f"{size}: half keys {half_keys} x {width}, {_name(dtype)} queries"
                yield Call(label, partial(_search, width, half_keys, 32, dtype))
    for top_k, half_keys in ((1, 8), (3, 33), (20, 768), (64, 1000)) if every else ((3, 33),):
        yield Call(f"top {top_k} of {half_keys}^2", partial(_search, 40, half_keys, top_k, torch.float32))


def _search(width: int, half_keys: int, top_k: int, dtype: torch.dtype) -> None:
    q_NM2W, keys_M2nW = torch.zeros(TOKENS, 4, 2, width, dtype=dtype), torch.zeros(4, 2, half_keys, width)
    search.search(q_NM2W, keys_M2nW, top_k)
    rows_MNK = torch.zeros(4, TOKENS, top_k, dtype=torch.int64)
    search.search_backward(torch.zeros(rows_MNK.shape), rows_MNK, q_NM2W, keys_M2nW)


def _bags(every: bool) -> Iterator[Call]:
    for (size, width), dtype in product({**WIDTHS, **SHARDS}.items(), (torch.float32, torch.bfloat16)):
        if every or size == "1.3b" or (dtype == torch.float32 and size in ("134m / 8", "8b / 64")):
            yield Call(f"{size}: width {width}, {_name(dtype)} table", partial(_bag, width, READ, dtype))
    if every:
        for (model, width), dtype in product(NGRAM_WIDTHS.items(), (torch.float32, torch.bfloat16)):
            yield Call(f"{model}: width {width}, {_name(dtype)} table, bags of one row", partial(_bag, width, 1, dtype))
        yield Call("width 48, float64 table", partial(_bag, 48, 8, torch.float64))
        yield Call("width 33, 20 rows per token", partial(_bag, 33, 20, torch.float32))


def _bag(width: int, read: int, dtype: torch.dtype) -> None:
    """Run forward and both gradients; one row is read so often that its sum takes several levels."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    table_RD, x_ND = torch.zeros(ROWS, width, dtype=dtype), torch.zeros(TOKENS, width, dtype=dtype)
    indices_NS = (torch.arange(TOKENS * read) % ROWS).view(TOKENS, read)
    indices_NS[:, : read // 2] = 3
    weights_NS = torch.zeros(TOKENS, read, dtype=wide)
    bags.bag(table_RD, indices_NS, weights_NS, dtype)
    bags.dots(table_RD, indices_NS, x_ND)
    bags.row_sums(x_ND, weights_NS, bags.group_by_row(indices_NS, ROWS), ROWS, wide)


def _updates(every: bool) -> Iterator[Call]:
    options = product({**WIDTHS, **SHARDS}.items(), ROUNDINGS, ("replay", "sweep"), (False, True), (0.1, 0.0))
    for (size, width), (dtype, rounding), path, by_row, decay in options:
        is_plain = not by_row and decay and (dtype, rounding) in (ROUNDINGS[0], ROUNDINGS[-1])
        if every or (is_plain and (size == "8b" or (size, path, rounding) == ("8b / 64", "replay", "nearest"))):
            shape = f"{size}: width {width}, {_name(dtype)} {rounding}, {path}"
            shape += (", one second moment per row" if by_row else "") + ("" if decay else ", no weight decay")
            update: dict[str, Any] = {
                "low_precision": rounding,
                "path": path,
                "row_second_moment": by_row,
                "weight_decay": decay,
            }
            yield Call(shape, partial(take_steps, 2, torch.zeros(ROWS, width, dtype=dtype), update))
    if every:
        for (model, width), path in product(NGRAM_WIDTHS.items(), ("replay", "sweep")):
            table_RD = torch.zeros(ROWS, width)
            yield Call(f"{model}: width {width}, {path}", partial(take_steps, 2, table_RD, {"path": path}))
        for path in ("replay", "sweep"):
            table_RD = torch.zeros(ROWS, 2048, dtype=torch.float64)
            yield Call(f"width 2048, float64, {path}", partial(take_steps, 2, table_RD, {"path": path}))


def _rotations(every: bool) -> Iterator[Call]:
    for size, width in WIDTHS.items():
        for dtype in (torch.bfloat16, torch.float32):
            if every or (size == "8b" and dtype == torch.bfloat16):
                label = f"{size}: rotary positions of {width} columns, {_name(dtype)}"
                yield Call(label, partial(_rotation, width, dtype))


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


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
