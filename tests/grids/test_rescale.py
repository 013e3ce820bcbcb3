"""--scale changes the size of a grid and keeps its ratios."""

from __future__ import annotations

from pathlib import Path

import pytest

from suite.errors import UserError
from suite.grids import load_grid
from suite.rescale import parse_scales, rescale

GRIDS = Path(__file__).resolve().parents[2] / "grids"


def test_budget_and_warmup_shrink_together_and_the_name_shows_it() -> None:
    grid = load_grid(str(GRIDS / "paper-8b.yaml"), need_data=False)
    small = rescale(grid, parse_scales(["tokens=0.01"]))
    assert small.name == "paper-8b-tokens-x0.01"
    for before, after in zip(grid.cells, small.cells, strict=True):
        assert after.train.tokens == before.train.tokens // 100
        assert after.train.warmup == 40
        assert after.data.tokens == before.data.tokens // 100
        assert after.model == before.model
        assert after.hash8 != before.hash8


def test_parts_of_a_mixture_and_budgets_of_branches_shrink_too(tmp_path: Path) -> None:
    path = tmp_path / "grid.yaml"
    path.write_text("""
defaults:
  model: {base: w32}
  data:
    kind: mixture
    tokenizer: {kind: bytes}
    parts:
      web: {kind: hub, name: a/b, tokens: 1000, weight: 0.8}
      books: {kind: text, path: books, weight: 0.2}
  train: {batch_rows: 8, lr: 1e-3, schedule: wsd, branches: [400, 800]}
blocks:
  - axes: {model.family: [dense], train.tokens: [400, 800]}
""")
    small = rescale(load_grid(str(path), need_data=False), {"tokens": 0.5})
    assert [cell.train.tokens for cell in small.cells] == [200, 400]
    assert {cell.train.branches for cell in small.cells} == {(200, 400)}
    assert {cell.data.parts["web"].tokens for cell in small.cells} == {500}


def test_tables_of_all_families_shrink_by_the_same_factor() -> None:
    grid = load_grid(str(GRIDS / "paper-fixed-memory.yaml"), need_data=False)
    small = rescale(grid, {"half_keys": 0.125, "batch_rows": 0.25})
    sides = {cell.model.family: cell.model.half_keys for cell in small.cells if hasattr(cell.model, "half_keys")}
    assert sides == {"peer": 96, "pkm": 128, "memory_plus": 128}
    assert {cell.train.batch_rows for cell in small.cells} == {512}
    assert {cell.train.warmup for cell in small.cells} == {16000}


def test_exposures_of_a_world_shrink() -> None:
    grid = load_grid(str(GRIDS / "smoke.yaml"))
    assert {cell.train.epochs for cell in rescale(grid, {"tokens": 0.5}).cells} == {6.0}


@pytest.mark.parametrize(
    "text", ["tokens", "tokens=0", "tokens=x", "layers=0.5", "tokens=-1", "tokens=inf", "tokens=1e300", "tokens=1e-300"]
)
def test_an_invalid_scale_is_refused(text: str) -> None:
    with pytest.raises(UserError, match=r"--scale: got .*allowed: tokens, batch_rows, half_keys"):
        parse_scales([text])


def test_a_scale_given_twice_is_refused() -> None:
    with pytest.raises(UserError, match="--scale: tokens"):
        parse_scales(["tokens=2", "tokens=3"])


def test_tables_with_fewer_rows_than_are_read_are_refused() -> None:
    grid = load_grid(str(GRIDS / "paper-fixed-memory.yaml"), need_data=False)
    with pytest.raises(UserError, match=r"half_keys: got 8, allowed: at least top_k"):
        rescale(grid, {"half_keys": 0.01})


def test_cells_that_become_equal_are_refused() -> None:
    grid = load_grid(str(GRIDS / "smoke.yaml"), {"model.top_k": "1"})
    with pytest.raises(UserError, match="two cells become"):
        rescale(grid, {"half_keys": 0.01})
