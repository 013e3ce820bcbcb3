"""Smaller or larger copies of a grid that keep its ratios: `--scale tokens=0.01`."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import ValidationError

from suite.cells import Cell
from suite.errors import UserError
from suite.grids import Grid
from suite.yaml_input import explain

SCALES = ("tokens", "batch_rows", "half_keys")
MIN_FACTOR, MAX_FACTOR = 1e-9, 1e6


def parse_scales(texts: list[str]) -> dict[str, float]:
    """Parse `["tokens=0.01"]` into factors by name. Raises UserError."""
    factors = {}
    for text in texts:
        name, _, value = text.partition("=")
        try:
            factor = float(value)
        except ValueError:
            factor = 0.0
        if name not in SCALES or not MIN_FACTOR <= factor <= MAX_FACTOR:
            raise UserError(
                f"--scale: got {text!r}, allowed: {', '.join(SCALES)} = a factor "
                f"from {MIN_FACTOR:g} to {MAX_FACTOR:g}, e.g. tokens=0.01"
            )
        if name in factors:
            raise UserError(f"--scale: {name} is given twice")
        factors[name] = factor
    return factors


def rescale(grid: Grid, factors: Mapping[str, float]) -> Grid:
    """Return a grid in which the budget, batch or table side of every cell is multiplied, under another name.

    Args:
        grid: The grid to scale.
        factors: `tokens` multiplies the budget (tokens or epochs), the warm-up steps, so that every phase keeps its
            share, and the tokens taken from hub data sets. `batch_rows` multiplies the rows per step and divides the
            warm-up steps. `half_keys` multiplies the side of product-key tables.

    Raises:
        UserError: A scaled cell is invalid, or two cells become equal.
    """
    if not factors:
        return grid
    cells = _scaled_cells(grid, factors)
    names = [cell.run_name for cell in cells]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"{grid.source}: --scale: two cells become {name}; use a larger factor")
    suffix = "".join(f"-{name}-x{factor:g}" for name, factor in factors.items())
    renamed = dict(zip((cell.run_name for cell in grid.cells), names, strict=True))
    contrast = grid.contrast.renamed(renamed) if grid.contrast else None
    arguments = (*grid.arguments, *(f"--scale={name}={factor:g}" for name, factor in factors.items()))
    return Grid(grid.name + suffix, grid.source, cells, grid.launch, contrast, arguments)


def _scaled_cells(grid: Grid, factors: Mapping[str, float]) -> tuple[Cell, ...]:
    """Return the scaled cells; a cell whose parent is in the grid starts from the scaled parent."""
    hashes: dict[str | None, str] = {}
    cells = []
    for cell in grid.cells:  # parents come first
        scaled = _scaled(grid, cell, factors)
        if cell.train.parent in hashes:
            scaled = scaled.starting_from(hashes[cell.train.parent])
        hashes[cell.hash8] = scaled.hash8
        cells.append(scaled)
    return tuple(cells)


def _scaled(grid: Grid, cell: Cell, factors: Mapping[str, float]) -> Cell:
    """Return a cell with scaled fields. Raises UserError if it is invalid; `grid` is for the message."""
    budget, batch = factors.get("tokens", 1.0), factors.get("batch_rows", 1.0)
    train = cell.train.model_dump()
    train["batch_rows"] = _whole(train["batch_rows"] * batch / train["accumulate"]) * train["accumulate"]
    train["warmup"] = round(train["warmup"] * budget / batch)
    if train["tokens"] is not None:
        train["tokens"] = _whole(train["tokens"] * budget)
        train["branches"] = [_whole(tokens * budget) for tokens in train["branches"]]
    else:
        train["epochs"] *= budget
    model = cell.model.model_dump()
    if "half_keys" in model:
        model["half_keys"] = _whole(model["half_keys"] * factors.get("half_keys", 1.0))
    data = cell.data.model_dump()
    for source in (data, *data.get("parts", {}).values()):
        if source.get("tokens") is not None:
            source["tokens"] = _whole(source["tokens"] * budget)
    fields = cell.model_dump() | {"model": model, "data": data, "train": train}
    try:
        return Cell.model_validate(fields)
    except ValidationError as error:
        raise UserError(f"{grid.source}: --scale: {cell.run_name}: {explain(error, Cell, fields)}") from None


def _whole(value: float) -> int:
    """Round to a whole number of at least 1."""
    return max(1, round(value))
