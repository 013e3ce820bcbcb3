"""The paper's grids: every field has a source, and the cells are those of the paper."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from suite.evaluate import task_list
from suite.grids import Grid, load_grid

GRIDS = Path(__file__).resolve().parents[2] / "grids"
NAMES = sorted(path.stem for path in GRIDS.glob("paper-*.yaml"))
ORIGIN = re.compile(r"#.*\b(paper|fits|code|ours)\b(?!['-])")


def grid(name: str) -> Grid:
    return load_grid(str(GRIDS / f"{name}.yaml"), need_data=False)


@pytest.mark.parametrize("name", NAMES)
def test_every_default_has_a_source(name: str) -> None:
    text = (GRIDS / f"{name}.yaml").read_text()
    defaults = text[text.index("\ndefaults:") : text.index("\nfamilies:")].splitlines()[2:]
    fields = [line for line in defaults if re.match(r"\s+(- )?\w+: \S", line) and "kind: hub" not in line]
    assert len(fields) > 15
    for line in fields:
        assert ORIGIN.search(line), line


@pytest.mark.parametrize("name", NAMES)
def test_every_family_and_block_has_a_source(name: str) -> None:
    """The source is on the line of the field or in the comment above it."""
    text = (GRIDS / f"{name}.yaml").read_text()
    comment, is_complete = "", False
    for line in text[text.index("\nfamilies:") :].splitlines():
        if line.lstrip().startswith("#"):
            comment, is_complete = ("" if is_complete else comment) + line, False
            continue
        is_complete = True
        if re.search(r"\w: [^#\s]", line):
            assert ORIGIN.search(line) or ORIGIN.search(comment), line


@pytest.mark.parametrize(
    ("name", "table"),
    [("fixed-memory", "table1"), ("memory-scaling", "figure1"), ("8b", "table2_8b"), ("ablations", "ablations")],
)
def test_the_evaluations_give_every_score_that_the_paper_prints(name: str, table: str) -> None:
    import pandas as pd

    from analysis.records.published import printed_as

    printed = pd.read_csv(GRIDS.parent / "results" / "published" / f"memory_layers_{table}.csv")
    wanted = {(task, metric) for task, metric in zip(printed["task"], printed["metric"], strict=True)}
    for cell in grid(f"paper-{name}").cells:
        given = {("train", "nll")}  # the loss of training
        for task in (task for config in cell.evaluate for task in config.tasks):
            metrics = (
                {"pass@1"}
                if task in ("humaneval", "mbpp")
                else {entry["metric"] for stated in task_list.entry(task).configs() for entry in stated["metric_list"]}
            )
            given |= {printed_as(task, metric) for metric in metrics}
        assert wanted <= given, cell.run_name


@pytest.mark.parametrize("name", NAMES)
def test_every_task_exists(name: str) -> None:
    tasks = {task for cell in grid(name).cells for config in cell.evaluate for task in config.tasks}
    assert tasks <= set(task_list.names())


def test_fixed_memory_has_every_base_and_family_at_the_papers_sizes() -> None:
    cells = grid("paper-fixed-memory").cells
    families = ("dense", "moe", "moe_topk", "peer", "pkm", "memory_plus")
    assert {(cell.model.base, cell.model.family) for cell in cells} == {
        (base, family) for base in ("134m", "373m", "720m", "1.3b") for family in families
    }
    for cell in cells:
        assert cell.train.tokens == 10**12
        if cell.model.family in ("pkm", "memory_plus"):
            assert cell.model.half_keys**2 == 2**20
        if cell.model.family == "moe_topk":
            assert (cell.model.experts, cell.model.top_k, cell.model.shared_experts) == (64, 8, 1)
            width = 9 * cell.model.expert_hidden / cell.model.size.ffn_hidden
            assert width == pytest.approx(1, abs=0.02)


def test_memory_scaling_and_8b_have_the_papers_tables_and_budgets() -> None:
    rows = [getattr(cell.model, "half_keys", 0) ** 2 for cell in grid("paper-memory-scaling").cells]
    assert sorted(rows) == [0, 2**20, 2**20, 2**22, 2**24, 2**26]
    large = {(cell.model.family, cell.train.tokens) for cell in grid("paper-8b").cells}
    assert large == {(family, tokens) for family in ("dense", "memory_plus") for tokens in (2 * 10**11, 10**12)}
    assert {getattr(cell.model, "half_keys", None) for cell in grid("paper-8b").cells} == {None, 4096}


def test_ablations_are_those_of_tables_3_and_4_under_the_papers_names() -> None:
    import pandas as pd

    from analysis.paper.figures import variants

    cells = grid("paper-ablations").cells
    names = {name for cell in cells for name in variants(cell.model.model_dump(mode="json"))}
    published = pd.read_csv(GRIDS.parent / "results" / "published" / "memory_layers_ablations.csv")
    assert names == set(published["model"])
    rows = {name: cell.model.half_keys**2 for cell in cells for name in variants(cell.model.model_dump(mode="json"))}
    for model, printed in published.groupby("model")["memory_rows"].first().items():
        assert rows[model] == pytest.approx(printed, rel=3e-4), model  # 512k is no square
    others = [cell.model for cell in cells if not variants(cell.model.model_dump(mode="json"))]
    assert {(m.qk_norm, m.share, m.keep_ffn) for m in others} == {
        (False, True, False),
        (True, True, False),
        (False, False, False),
        (False, True, True),
    }


def test_cells_shared_by_grids_are_the_same_run() -> None:
    fixed, partners, scaling = (
        {cell.run_name for cell in grid(f"paper-{name}").cells}
        for name in ("fixed-memory", "partners", "memory-scaling")
    )
    assert len(fixed & partners) >= 8
    assert len(fixed & scaling) >= 3
