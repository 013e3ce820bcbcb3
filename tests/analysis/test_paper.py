"""The paper's figures and tables: published numbers word for word, our runs only where they match."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from analysis import paper
from analysis.runs import Run

PUBLISHED = Path(__file__).resolve().parents[2] / "results" / "published"


@pytest.fixture
def results(tmp_path: Path) -> Path:
    shutil.copytree(PUBLISHED, tmp_path / "published")
    return tmp_path


def run(model: dict[str, Any], tasks: dict[str, dict[str, float]]) -> Run:
    scored = {name: {"metrics": {m: {"value": v} for m, v in metrics.items()}} for name, metrics in tasks.items()}
    return Run(
        name="r", cell={"model": model, "data": {}, "seed": 0}, hash="h", account={}, versions={},
        lines=[{"step": 1, "tokens": 1e10}], evals=[{"tasks": scored}], state={"state": "done"}, usage={},
    )  # fmt: skip


def test_everything_is_drawn_without_any_run_of_ours(results: Path) -> None:
    files = paper.draw(results, results / "figures")
    assert set(files) == {"figure1", "accuracy-base-size", "table1", "table2", "table3", "table4", "tables"}
    for paths in files.values():
        assert all(path.stat().st_size > 0 for path in paths)
    page = files["tables"][0].read_text()
    assert "| 1.3b Memory+ | 67,108,864 | 138,748m | 1,000b | 20.78 A | 62.14 A | 77.31 B | 30.00 B | 20.47 A |" in page
    assert "| PK layers 4,12,20 | 1,048,576 | 2.06 A | 11.32 A | 7.20 A |" in page
    assert "| 8b Memory+ | 16,777,216 | – | 1,000b | 60.29 B |" in page
    assert "| 373m Memory+ | 1,048,576 | 1,441m* | 1,000b |" in page
    assert page.count("m* |") == 4
    assert "*: the total is our arithmetic, not printed." in page
    assert page.count("\n## ") == 6
    svg = next(path for path in files["figure1"] if path.suffix == ".svg").read_text()
    assert "vanilla" in svg
    assert "copied" in svg
    drawn = {name: next(path for path in files[name] if path.suffix == ".svg").read_text() for name in files
             if name.startswith("table") and name != "tables"}  # fmt: skip
    for name, cell in {"table1": "20.78 A", "table2": "60.29 B", "table3": "11.32 A", "table4": "12.86 A"}.items():
        assert f">{cell}<" in drawn[name]
        assert "arXiv:2412.09764" in drawn[name]
    assert "copied" in drawn["table1"]


def test_a_matching_run_stands_beside_the_published_number_with_its_tokens(results: Path) -> None:
    model = {"family": "memory_plus", "base": "1.3b", "half_keys": 1024}
    rows = paper._scores(run(model, {"nq_open": {"exact_match": 0.05}, "triviaqa_nll": {"nll": 6.5}}))
    mine = pd.DataFrame(rows)
    page = paper.tables(paper.published(results), mine)
    assert "13.68 A; ours 5.00 (1, 10.0b)" in page
    assert "14.43 A; ours" not in page  # another table size
    assert page.count("ours 5.00") == 1


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"family": "pkm"}, {"PK base", "PK layers 12", "v_dim=1024", "key_dim=256 (sum of both sub-keys)"}),
        ({"family": "pkm", "placement": [4, 12, 20]}, {"PK layers 4,12,20"}),
        ({"family": "pkm", "placement": [12], "scalar_gate": True}, {"+gated"}),
        ({"family": "pkm", "placement": [12], "sink": True}, {"+softmax sink"}),
        ({"family": "pkm", "random_rows": 8}, {"+random values"}),
        ({"family": "pkm", "value_dim": 64, "half_keys": 4096}, {"v_dim=64"}),
        ({"family": "pkm", "k_dim": 2048}, {"key_dim=2048 (sum of both sub-keys)"}),
        ({"family": "memory_plus", "placement": [12], "k_dim": 256}, {"+swilu"}),
        ({"family": "memory_plus"}, set()),
        ({"family": "pkm", "sink": True, "scalar_gate": True}, set()),
        ({"family": "pkm", "base": "134m"}, set()),
        ({"family": "dense"}, set()),
    ],
)
def test_variants_have_the_papers_names(options: dict[str, Any], names: set[str]) -> None:
    found = set(paper.variants({"base": "373m", **options}))
    assert found == names
    printed = set(pd.read_csv(PUBLISHED / "memory_layers_ablations.csv")["model"])
    assert found <= printed
