"""Loading a model whose tables stay where they are: in the checkpoint's file, or in host memory.

Shapes: R rows of a table, H rows in a cache.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

import torch
from torch import Tensor

from suite.errors import UserError
from suite.inference.tables.popularity import most_read
from suite.inference.tables.prefetch import add_prefetch
from suite.inference.tables.reading import expect_reduced, place_tables, stored_rows
from suite.inference.tables.stores import CachedRows, RowStore, rows_of_share
from suite.models.initial_weights import reset_statistics
from suite.models.memory_table import RowForm
from suite.models.registry import ModelConfig
from suite.models.transformer import Transformer

Policy = Literal["static", "lru"]
PLACES = ("host", "file")


@dataclass(frozen=True)
class Place:
    """Where tables are while a model is used, and the cache in front of them.

    Attributes:
        source: Host memory, or the file of the checkpoint.
        policy: The cache; None: no cache.
        share: Rows of each table in the cache, as a share of all.
        prefetch: Whether rows that follow from token ids are read before their layer runs.
    """

    source: Literal["host", "file"]
    policy: Policy | None = None
    share: float = 0.0
    prefetch: bool = False

    @property
    def label(self) -> str:
        """The place in a few characters: `file`, or `file lru:5% prefetch`."""
        cache = "" if self.policy is None else f" {self.policy}:{100 * self.share:g}%"
        return self.source + cache + (" prefetch" if self.prefetch else "")


def parse_place(table: str | None, cache: str | None, prefetch: bool = False) -> Place | None:
    """Read the options --table, --cache and --prefetch.

    Args:
        table: `host` or `file`; None: tables are loaded with the model.
        cache: `lru:5%` or `static:5%`; None: no cache.
        prefetch: Whether rows are read before their layer runs.

    Raises:
        UserError: An option has another value, or there is nothing to cache or to prefetch from.
    """
    if table is None:
        elsewhere = f"without --table, allowed: with --table {' or '.join(PLACES)}"
        if cache is not None:
            raise UserError(f"--cache: got {cache!r} {elsewhere}")
        if prefetch:
            raise UserError(f"--prefetch: {elsewhere}")
        return None
    if table not in PLACES:
        raise UserError(f"--table: got {table!r}, allowed: {', '.join(PLACES)}")
    source = cast(Literal["host", "file"], table)
    if cache is None:
        return Place(source, prefetch=prefetch)
    match = re.fullmatch(r"(lru|static):([0-9.]+)%", cache)
    share = float(match[2]) / 100 if match and match[2].count(".") < 2 and match[2] != "." else 0.0
    if match is None or not 0 < share <= 1:
        raise UserError(f"--cache: got {cache!r}, allowed: lru:N% or static:N%, with N above 0 and at most 100")
    return Place(source, cast(Policy, match[1]), share, prefetch)


def load_stored(
    config: ModelConfig,
    vocab_size: int,
    saved: Mapping[str, Tensor],
    path: Path,
    form: RowForm | None = None,
    place: Place | None = None,
    kept: float | None = None,
) -> Transformer:
    """Return a model with saved weights whose tables are reduced, elsewhere, or both; on the CPU.

    Args:
        config: The model's configuration.
        vocab_size: Entries of the vocabulary.
        saved: The saved tensors by name, mapped from `path`.
        path: The file.
        form: The form of the saved tables; None: rows as they are.
        place: Where the tables stay; None: in the memory of the model.
        kept: The share of the tables' rows that was saved; None: all.

    Raises:
        ValueError: Rows are to be prefetched, and those of no table follow from token ids.
    """
    with torch.device("meta"):
        model = Transformer(config, vocab_size)
    if form is not None or kept is not None:
        expect_reduced(model, form, kept)
    if place is not None:
        place_tables(model, saved, place.source, path, form)
    model.to_empty(device="cpu")
    with torch.no_grad():
        reset_statistics(model)
        for name, tensor in model.state_dict().items():
            tensor.copy_(saved[name])
    if place is not None and place.prefetch:
        add_prefetch(model)
    return model.eval()


def add_caches(model: Transformer, place: Place, counts: Iterable[Tensor] | None) -> None:
    """Put the cache of a place in front of every stored table.

    Args:
        model: A model from `load_stored`.
        place: Its place.
        counts: Counts of reads [R] of each table, which choose the rows of a static cache; None for LRU.
    """
    if place.policy is None:
        return
    tables = stored_rows(model)
    by_table: Iterable[Tensor | None] = [None] * len(tables) if counts is None else counts
    for rows, counts_R in zip(tables, by_table, strict=True):
        assert isinstance(rows.store, RowStore)
        size = rows_of_share(place.share, rows.store.rows)
        hot_H = None if counts_R is None else most_read(rows.counts_of_store(counts_R), size)
        rows.store = CachedRows(rows.store, size, hot_H)
