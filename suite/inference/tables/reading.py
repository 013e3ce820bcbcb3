"""Reading a table whose rows are in a store: sums as those of an ordinary table, and the table is never unpacked.

Each read gathers its distinct rows from the store into a small matrix in fp32, and renumbers the indices. On a CPU the
sums therefore equal those of the ordinary table bit for bit. Rows have no gradients. A read may start before its layer
runs (prefetch.py).

Shapes: N tokens, C tokens of a chunk, S rows read per token, U distinct rows of a chunk, R rows, D row width.
"""

from __future__ import annotations

import functools
import mmap
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from suite.inference.tables.forms import Form, Parts, encode_table, form_of
from suite.inference.tables.stores import CachedRows, RowStore, Source, Traffic, advise
from suite.models.memory_table import MemoryTable, RowForm, row_products
from suite.models.transformer import Transformer

ELEMENTS_AT_ONCE = 1 << 26
"""Largest number of row elements that a read gathers at a time."""


Gathered = tuple[Tensor, Parts]
"""What a read of a chunk gathers: the numbers of its rows in a small matrix, [C, S], and the parts of these rows."""
Start = Callable[[Callable[[], Gathered], torch.device], Callable[[], Gathered]]
"""`start(gather, device)` starts a gather and returns a function that waits for it."""


@dataclass(frozen=True)
class Ahead:
    """A read that was started before its layer runs: its indices, and for each chunk a function that waits for it."""

    indices_NS: Tensor
    chunks: list[Callable[[], Gathered]]


class StoredRows(nn.Module):
    """The rows of a table of width `dim`, in a store and in a form; sums have the dtype `wide`.

    `ahead` holds the reads that were started and not used yet, in the order of the layers that will use them.
    """

    def __init__(self, store: RowStore | CachedRows, form: Form, dim: int, wide: torch.dtype) -> None:
        super().__init__()
        self.store, self.form, self.dim, self.wide = store, form, dim, wide
        self.ahead: deque[Ahead] = deque()

    def prefetch(self, indices_NS: Tensor, start: Start) -> None:
        """Start the read of the next layer; `start` decides where."""
        chunks = [
            start(functools.partial(self._gather, indices_NS[chunk]), indices_NS.device)
            for chunk in self._slices(indices_NS)
        ]
        self.ahead.append(Ahead(indices_NS, chunks))

    def sums(self, indices_NS: Tensor, weights_NS: Tensor) -> Tensor:
        """Return the weighted sums of rows, [N, D]; weights have the dtype `wide`."""
        return torch.cat(
            [
                F.embedding_bag(numbers_CS, rows_UD, per_sample_weights=weights_NS[chunk], mode="sum")
                for chunk, numbers_CS, rows_UD in self._chunks(indices_NS)
            ]
        )

    def products(self, indices_NS: Tensor, x_ND: Tensor) -> Tensor:
        """Return the inner products of each token with its rows, [N, S]; x has the dtype `wide`."""
        return torch.cat(
            [row_products(numbers_CS, rows_UD, x_ND[chunk]) for chunk, numbers_CS, rows_UD in self._chunks(indices_NS)]
        )

    def _chunks(self, indices_NS: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Yield tokens of a read, the numbers of their rows in a small matrix, and the matrix.

        Raises:
            RuntimeError: A read that was started has other indices.
        """
        ahead, traffic = self.ahead.popleft() if self.ahead else None, self.store.traffic
        if ahead is not None and not torch.equal(ahead.indices_NS, indices_NS):
            raise RuntimeError("a layer reads other rows than those that were prefetched for its token ids")
        for number, chunk in enumerate(self._slices(indices_NS)):
            started = time.perf_counter()
            numbers_CS, parts = self._gather(indices_NS[chunk]) if ahead is None else ahead.chunks[number]()
            traffic.wait_s += time.perf_counter() - started
            if ahead is not None:
                traffic.prefetched += len(next(iter(parts.values())))
            yield chunk, numbers_CS, self.form.decode(parts, self.dim).to(self.wide)

    def _slices(self, indices_NS: Tensor) -> Iterator[slice]:
        tokens, reads = indices_NS.shape
        step = max(1, ELEMENTS_AT_ONCE // max(1, reads * self.dim))
        return (slice(start, start + step) for start in range(0, max(1, tokens), step))

    def _gather(self, indices_CS: Tensor) -> Gathered:
        rows_U, numbers_CS = indices_CS.unique(return_inverse=True)
        return numbers_CS, self.store.gather(rows_U)


def store_rows(table: MemoryTable, store: RowStore | CachedRows, form: RowForm | None = None) -> None:
    """Let a table read its rows from a store, and release its weight.

    Its `weight` becomes a tensor on the meta device, from which other code reads shape and dtype; it is no parameter.

    Args:
        table: A table that is not being trained.
        store: The store of its rows.
        form: The form of the rows in the store; None: rows as they are.
    """
    assert table.gradients is None, "the table is being trained"
    shape = table.weight.detach().to("meta")
    wide = table.wide
    if "weight" in table._parameters:
        del table.weight
    table.__dict__["weight"] = shape
    table.stored = StoredRows(store, form_of(form), shape.shape[1], wide)


def quantise_tables(model: Transformer, form: RowForm) -> None:
    """Replace the rows of every table of a model by codes on the same device."""
    for table in model.memory_tables():
        store_rows(table, RowStore(encode_table(form_of(form), table.weight.detach())), form)


def expect_quantised(model: Transformer, form: RowForm) -> None:
    """Give every table of a model uninitialised codes on the same device, into which saved ones are loaded."""
    for table in model.memory_tables():
        rows, width = table.weight.shape
        parts = form_of(form).empty(rows, width, table.weight.dtype, table.weight.device)
        store_rows(table, RowStore(parts), form)


def place_tables(
    model: Transformer, saved: Mapping[str, Tensor], source: Source, path: Path, form: RowForm | None = None
) -> None:
    """Let every table of a model read its rows from saved tensors, in host memory or in their file.

    Args:
        model: The model; its own rows are released.
        saved: The saved tensors by their names in the model, mapped from `path`.
        source: The place.
        path: The file.
        form: The form of the saved tables; None: rows as they are.
    """
    for number, table in enumerate(model.memory_tables()):
        prefix = f"tables.{number}." + ("weight" if form is None else "stored.store.")
        parts = {name.removeprefix(prefix) or "values": part for name, part in saved.items() if name.startswith(prefix)}
        for name, part in parts.items():
            if source == "file":
                advise(part, mmap.MADV_RANDOM)  # a read loads the pages of its rows, and none after them
            else:
                parts[name] = part.clone()
        store_rows(table, RowStore(parts, source, path), form)


def stored_rows(model: Transformer) -> list[StoredRows]:
    """Return the stored rows of the tables of a model that have them."""
    stored = [table.stored for table in model.memory_tables()]
    return [rows for rows in stored if isinstance(rows, StoredRows)]


def traffic(model: Transformer) -> Traffic:
    """Return what was read of all stored tables of a model since it was loaded."""
    total = Traffic()
    for rows in stored_rows(model):
        for name, count in vars(rows.store.traffic).items():
            setattr(total, name, getattr(total, name) + count)
    return total
