"""Whether the data of a cell can be used, tried without leaving anything on disk: for dry runs."""

from __future__ import annotations

import tempfile
from itertools import islice
from pathlib import Path

from suite.cells import Cell
from suite.data.corpus import prepare
from suite.errors import UserError
from suite.grids import Grid
from suite.launch.checks.settings import refuse_unfit_settings
from suite.train.loop import total_steps

FIRST_DOCUMENTS = 100
"""Documents that are read of a corpus that takes long to prepare."""


def refuse_unusable_data(grid: Grid) -> None:
    """Raise UserError if the data of a cell cannot be read, or does not fit its settings; every corpus is tried once.

    A sweep does not call this: it would prepare every corpus twice, which takes a minute for the larger grids.

    Data sets of the hub are not tried, since that downloads them.
    """
    groups: dict[str, list[Cell]] = {}
    for cell in grid.cells:
        groups.setdefault(cell.data.model_dump_json(), []).append(cell)
    for members in groups.values():
        try:
            _try(members)
        except UserError as error:
            name = "" if str(error).startswith("cell ") else f"cell {members[0].run_name}: "
            raise UserError(f"{grid.source}: {name}{error}") from None


def _try(cells: list[Cell]) -> None:
    config = cells[0].data
    if config.is_quick_to_prepare:
        with tempfile.TemporaryDirectory() as folder:
            corpus = prepare(config, Path(folder))
            for cell in cells:
                loader = corpus.loader(cell.seed, cell.train.batch_rows)
                refuse_unfit_settings(cell, total_steps(cell.train, loader, config.seq_len))
        return
    for part in config.corpora().values():
        for _ in islice(part.documents_on_disk(), FIRST_DOCUMENTS):
            pass
