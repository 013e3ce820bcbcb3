"""The pages agree with the code: links, paths, fields, columns, families, tasks and laws."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from analysis.laws.builtin import LAWS
from analysis.records.frame import COLUMNS
from suite.cli.fields import list_fields
from suite.grids import GRID_FIELDS, load_grid
from suite.launch.slurm.profile import Profile
from suite.models import registry

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MADE = ("results/runs", "results/grids", "results/plans", "results/bench", "results/cache", "results/stale")
"""Folders that a sweep makes; pages name them although the repository does not hold them."""
PATH = re.compile(r"`((?:suite|kernels|analysis|grids|clusters|docs|tests|results)/[\w./*-]*)`")
LINK = re.compile(r"\]\(([^)\s]+)\)")


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    broken = []
    for link in LINK.findall(page.read_text()):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert broken == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_paths_in_code_exist(page: Path) -> None:
    paths = {path for path in PATH.findall(page.read_text()) if not path.startswith(MADE)}
    assert {path for path in paths if not list(ROOT.glob(path.rstrip("/")))} == set()


def test_every_page_is_in_the_index() -> None:
    index = (ROOT / "docs" / "index.md").read_text()
    assert [page.name for page in PAGES[1:] if page.name != "index.md" and f"({page.name})" not in index] == []


def table_rows(page: str, section: str) -> dict[str, list[str]]:
    """Return the rows of the tables between two markers of a page, by the field in the first column."""
    text = (ROOT / "docs" / page).read_text()
    block = text[text.index(f"<!-- {section} -->") : text.index(f"<!-- /{section} -->")]
    rows = [
        [part.strip() for part in line.strip("| ").split(" | ")] for line in block.splitlines() if line[:3] == "| `"
    ]
    return {row[0].strip("`"): row[1:] for row in rows}


def test_the_fields_of_a_cell_are_those_of_the_schema() -> None:
    documented = table_rows("grids.md", "fields")
    fields: dict[str, set[str]] = {}
    for field in list_fields():
        fields.setdefault(field.field, set()).add("required" if field.required else json.dumps(field.default))
    assert set(documented) == set(fields)
    for name, defaults in fields.items():
        assert set(re.findall(r"`([^`]+)`", documented[name][0])) == defaults, name
    outside = {field.field for field in list_fields() if not field.identity}
    assert {name for name, row in documented.items() if "No identity" in row[-1]} == outside


def test_the_fields_of_launch_are_those_of_the_profile() -> None:
    assert set(table_rows("grids.md", "profile")) == set(Profile.model_fields)


def test_the_sections_of_a_grid_are_documented() -> None:
    text = (ROOT / "docs" / "grids.md").read_text()
    assert {name for name in GRID_FIELDS if f"| `{name}` |" not in text} == set()


@pytest.mark.parametrize(("page", "cells"), [("grids.md", 5), ("first-experiment.md", 9)])
def test_the_grid_of_a_page_has_the_cells_that_the_page_states(page: str, cells: int, tmp_path: Path) -> None:
    text = (ROOT / "docs" / page).read_text()
    path = tmp_path / "example.yaml"
    path.write_text(text.split("```yaml\n")[1].split("```")[0])
    grid = load_grid(str(path))
    assert len(grid.cells) == cells
    assert grid.contrast is not None
    assert grid.contrast.metric == "e50"


def test_the_columns_of_the_frame_are_documented_and_no_others() -> None:
    text = (ROOT / "docs" / "records.md").read_text()
    table = text[text.index("| column | meaning |") : text.index("| split | task | metrics |")]
    names = [name for line in table.splitlines()[2:] for name in re.findall(r"`(\w+)`", line.split(" | ")[0])]
    assert sorted(names) == sorted(COLUMNS)


def test_the_readme_lists_every_family() -> None:
    text = (ROOT / "README.md").read_text()
    families = [name for name in registry.families() if registry.family(name).source is None]
    assert [name for name in families if f"| `{name}` |" not in text] == []


def test_every_law_is_documented() -> None:
    text = (ROOT / "docs" / "analysis.md").read_text()
    names = {name.rstrip("23") for name in LAWS}  # joint2 and joint3 are forms of joint
    assert [name for name in names if f"`{name}`" not in text] == []


def test_every_task_is_documented() -> None:
    from suite.evaluate.task_list import TASKS

    text = (ROOT / "docs" / "evaluation.md").read_text()
    assert [name for name in TASKS if f"`{name}`" not in text] == []
