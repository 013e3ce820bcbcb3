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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from suite.inference.tables.forms import Form, Parts, encode_table, form_of
from suite.inference.tables.stores import CachedRows, RowStore, Source, Traffic, advise, rows_of_share
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

    `ahead` holds the reads that were started and not used yet, in the order of the layers that will use them. If the
    store does not have all rows of the table, `place_R` holds the row of the store for each row of the table; rows that
    were dropped share one of zeros.
    """

    place_R: Tensor | None

    def __init__(
        self,
        store: RowStore | CachedRows,
        form: Form,
        dim: int,
        wide: torch.dtype,
        place_R: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.store, self.form, self.dim, self.wide = store, form, dim, wide
        self.register_buffer("place_R", place_R)
        self.ahead: deque[Ahead] = deque()

    @property
    def bytes(self) -> int:
        """Bytes of the rows, and of their places if some were dropped."""
        return self.store.rows * self.store.row_bytes + (0 if self.place_R is None else self.place_R.nbytes)

    def counts_of_store(self, counts_R: Tensor) -> Tensor:
        """Return counts of reads of the table as those of the store's rows."""
        if self.place_R is None:
            return counts_R
        return counts_R.new_zeros(self.store.rows).index_add(0, self.place_R.long(), counts_R)

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
        if self.place_R is not None:
            indices_CS = self.place_R[indices_CS]
        rows_U, numbers_CS = indices_CS.long().unique(return_inverse=True)
        return numbers_CS, self.store.gather(rows_U)


def store_rows(
    table: MemoryTable, store: RowStore | CachedRows, form: RowForm | None = None, place_R: Tensor | None = None
) -> None:
    """Let a table read its rows from a store, and release its weight.

    Its `weight` becomes a tensor on the meta device, from which other code reads shape and dtype; it is no parameter.

    Args:
        table: A table that is not being trained.
        store: The store of its rows.
        form: The form of the rows in the store; None: rows as they are.
        place_R: The row of the store for each row of the table; None: the same.
    """
    assert table.gradients is None, "the table is being trained"
    shape = table.weight.detach().to("meta")
    wide = table.wide
    if "weight" in table._parameters:
        del table.weight
    table.__dict__["weight"] = shape
    table.stored = StoredRows(store, form_of(form), shape.shape[1], wide, place_R)


def reduce_tables(model: Transformer, form: RowForm | None = None, kept: Sequence[Tensor] | None = None) -> None:
    """Replace the rows of every table of a model by codes on the same device, or drop some, or both.

    Args:
        model: The model.
        form: The form of the codes; None: rows as they are.
        kept: The numbers [K] of the rows of each table that are retained; the others read as zeros. None: all.
    """
    for number, table in enumerate(model.memory_tables()):
        rows_RD, place_R = table.weight.detach(), None
        if kept is not None:
            kept_K = kept[number].to(rows_RD.device)
            place_R = torch.full((len(rows_RD),), len(kept_K), dtype=torch.int32, device=rows_RD.device)
            place_R[kept_K] = torch.arange(len(kept_K), dtype=torch.int32, device=rows_RD.device)
            rows_RD = torch.cat((rows_RD[kept_K], rows_RD.new_zeros(1, rows_RD.shape[1])))
        store_rows(table, RowStore(encode_table(form_of(form), rows_RD)), form, place_R)


def expect_reduced(model: Transformer, form: RowForm | None = None, share: float | None = None) -> None:
    """Give every table of a model uninitialised rows on the same device, into which saved ones are loaded.

    Args:
        model: The model.
        form: The form of the saved rows; None: rows as they are.
        share: The share of rows that is retained; None: all.
    """
    for table in model.memory_tables():
        (rows, width), device, place_R = table.weight.shape, table.weight.device, None
        if share is not None:
            place_R = torch.empty(rows, dtype=torch.int32, device=device)
            rows = rows_of_share(share, rows) + 1
        parts = form_of(form).empty(rows, width, table.weight.dtype, device)
        store_rows(table, RowStore(parts), form, place_R)


def place_tables(
    model: Transformer, saved: Mapping[str, Tensor], source: Source, path: Path, form: RowForm | None = None
) -> None:
    """Let every table of a model read its rows from saved tensors, in host memory or in their file.

    Args:
        model: The model, whose tables expect what was saved; its own rows are released.
        saved: The saved tensors by their names in the model, mapped from `path`.
        source: The place.
        path: The file.
        form: The form of the saved tables; None: rows as they are.
    """
    for number, table in enumerate(model.memory_tables()):
        stored, weight = table.stored, f"tables.{number}.weight"
        prefix = weight if weight in saved else f"tables.{number}.stored.store."
        parts = {name.removeprefix(prefix) or "values": part for name, part in saved.items() if name.startswith(prefix)}
        for name, part in parts.items():
            if source == "file":
                advise(part, mmap.MADV_RANDOM)  # a read loads the pages of its rows, and none after them
            else:
                parts[name] = part.clone()
        place_R = stored.place_R if isinstance(stored, StoredRows) else None
        store_rows(table, RowStore(parts, source, path), form, place_R)


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
