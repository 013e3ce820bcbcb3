"""Whether the data of a cell can be used, tried without leaving anything on disk: for dry runs."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

from suite.cells import Cell
from suite.data.corpus import prepare
from suite.data.sources.bios import BiosData
from suite.data.sources.registry import DataConfig
from suite.data.sources.streams import StreamData
from suite.data.sources.text_files import TextData
from suite.errors import UserError
from suite.launch.checks.settings import refuse_unfit_settings
from suite.train.loop import total_steps

SMALL_BYTES, SMALL_PEOPLE = 4_000_000, 5_000
"""Corpora up to this size are prepared as a sweep does; of larger ones the first documents are read."""
FIRST_DOCUMENTS = 100


def refuse_unusable_data(cells: Iterable[Cell]) -> None:
    """Raise UserError if the data of a cell cannot be read, or does not fit its settings; every corpus is tried once.

    Data sets of the hub are not tried, since that downloads them.
    """
    groups: dict[str, list[Cell]] = {}
    for cell in cells:
        groups.setdefault(cell.data.model_dump_json(), []).append(cell)
    for members in groups.values():
        try:
            _try(members)
        except UserError as error:
            name = f"cell {members[0].run_name}"
            raise UserError(str(error) if str(error).startswith("cell ") else f"{name}: {error}") from None


def _try(cells: list[Cell]) -> None:
    config = cells[0].data
    if _is_small(config):
        with tempfile.TemporaryDirectory() as folder:
            corpus = prepare(config, Path(folder))
            for cell in cells:
                loader = corpus.loader(cell.seed, cell.train.batch_rows)
                refuse_unfit_settings(cell, total_steps(cell.train, loader, config.seq_len))
        return
    for part in config.corpora().values():
        if isinstance(part, TextData):
            for _ in islice(iter(part.reader()), FIRST_DOCUMENTS):
                pass


def _is_small(config: DataConfig) -> bool:
    if isinstance(config, BiosData):
        return config.people <= SMALL_PEOPLE
    parts = config.corpora().values()
    return all(isinstance(part, StreamData) and isinstance(part, TextData) for part in parts) and (
        sum(part.size_bytes() for part in parts if isinstance(part, TextData)) <= SMALL_BYTES
    )
