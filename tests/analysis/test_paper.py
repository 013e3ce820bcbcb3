"""The paper's figures and tables: published numbers word for word, our runs only where they match."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from run_folders import write_json

from analysis.paper import equivalent_sizes, figures

PUBLISHED = Path(__file__).resolve().parents[2] / "results" / "published"


@pytest.fixture
def results(tmp_path: Path) -> Path:
    shutil.copytree(PUBLISHED, tmp_path / "published")
    return tmp_path


def scores(root: Path, *runs: tuple[dict[str, Any], dict[str, dict[str, float]], float]) -> pd.DataFrame:
    """Final scores of runs with these models, tasks and tokens, as the paper's tables take them."""
    for number, (model, tasks, tokens) in enumerate(runs):
        folder = root / "runs" / f"r{number}"
        scored = {name: {"metrics": {m: {"value": v} for m, v in metrics.items()}} for name, metrics in tasks.items()}
        write_json(folder / "cell.json", {"cell": {"model": model, "data": {}, "seed": 0}, "hash": f"h{number}"})
        write_json(folder / "state.json", {"state": "done"})
        write_json(folder / "eval" / "00000000.json", {"tasks": scored})
        (folder / "train.jsonl").write_text(json.dumps({"step": 1, "tokens": tokens, "loss": 2.5}) + "\n")
    return figures.ours(root)


def test_everything_is_drawn_without_any_run_of_ours(results: Path) -> None:
    files = figures.draw(results, results / "figures")
    tables = {"table1", "table2", "table3", "table4", "tables"}
    assert set(files) == {"figure1", "accuracy-base-size", "published-equivalent-size"} | tables
    for paths in files.values():
        assert all(path.stat().st_size > 0 for path in paths)
    page = files["tables"][0].read_text()
    assert "| 1.3b Memory+ | 67,108,864 | 138,748m | 1,000b | 20.78 A | 62.14 A | 77.31 B | 30.00 B | 20.47 A |" in page
    assert "| PK layers 4,12,20 | 1,048,576 | 2.06 A | 11.32 A | 7.20 A |" in page
    assert "| 8b Memory+ | 16,777,216 | 8b + 64b memory | 1,000b | 60.29 B |" in page
    assert "| 373m Memory+ | 1,048,576 | 1,441m* | 1,000b |" in page
    assert page.count("m* |") == 4
    assert "*: the total is our arithmetic, not printed." in page
    assert page.count("\n## ") == 6
    svg = next(path for path in files["figure1"] if path.suffix == ".svg").read_text()
    assert "vanilla" in svg
    assert "copied" in svg
    drawn = {
        name: next(path for path in files[name] if path.suffix == ".svg").read_text()
        for name in files
        if name.startswith("table") and name != "tables"
    }
    for name, cell in {"table1": "20.78 A", "table2": "60.29 B", "table3": "11.32 A", "table4": "12.86 A"}.items():
        assert f">{cell}<" in drawn[name]
        assert "arXiv:2412.09764" in drawn[name]
    assert "copied" in drawn["table1"]


def test_the_published_equivalent_sizes_follow_from_the_dense_models_of_their_source() -> None:
    """Values by hand from the printed numbers, logarithms of parameters between the two dense models around them."""
    sizes = equivalent_sizes.equivalent_sizes(PUBLISHED.parent)

    def only(outcome: int, model: str, base: str, total: float) -> dict[str, Any]:
        chosen = sizes[(sizes["outcome"] == outcome) & (sizes["model"] == model) & (sizes["base"] == base)]
        (row,) = chosen[chosen["params_total"] == total].to_dict("records")
        return row

    exact_match = only(0, "Memory+", "134m", 937e6)  # .0316, between 373m (.0258) and 1.3b (.0776)
    assert exact_match["n_eq"] == pytest.approx(373e6 * (1300 / 373) ** ((0.0316 - 0.0258) / (0.0776 - 0.0258)))
    assert (exact_match["family"], exact_match["letter"], exact_match["side"]) == ("memory_plus", "A", "")
    loss = only(3, "UltraMem-151M-x12", "151M", 2.03e9)  # 2.67, between 150M (2.96) and 680M (2.64)
    assert loss["n_eq"] == pytest.approx(150e6 * (680 / 150) ** ((2.96 - 2.67) / (2.96 - 2.64)))
    best = only(3, "UltraMem-1.6B-x12", "1.6B", 21.41e9)  # 2.24: better than the largest dense model
    assert (best["n_eq"], best["side"]) == (pytest.approx(6.44e9), "above")
    perplexity = only(4, "B-16M Memory+", "33m act (no embeddings)", 6.5e9)  # 19.96, between 99M and 202M
    share = math.log(20.27 / 19.96) / math.log(20.27 / 18.758)
    assert perplexity["n_eq"] == pytest.approx(99e6 * (202 / 99) ** share)
    assert set(sizes["family"]) == {"moe", "peer", "pkm", "memory_plus", "ultramem"}


def test_a_matching_run_stands_next_to_the_published_number_with_its_tokens(results: Path) -> None:
    model = {"family": "memory_plus", "base": "1.3b", "half_keys": 1024}
    mine = scores(results, (model, {"nq_open": {"exact_match": 0.05}, "triviaqa_nll": {"nll": 6.5}}, 1e10))
    page = figures.tables(figures.published(results), mine)
    assert "13.68 A; ours 5.00 (1, 10.0b)" in page
    assert "14.43 A; ours" not in page  # another table size
    assert page.count("ours 5.00") == 1


def test_a_run_of_another_model_than_the_papers_matches_nothing(results: Path) -> None:
    """The partners of the paper's grids have its families, bases and rows, but are not its models."""
    plus = {"family": "memory_plus", "base": "1.3b", "half_keys": 1024, "top_k": 32, "memory_heads": 4, "share": True}
    others = [
        {"family": "dense", "base": "1.3b", "ffn_hidden": 15872},
        {"family": "dense", "base": "1.3b", "layers": 24},
        plus | {"keep_ffn": True},
        plus | {"qk_norm": True},
        plus | {"share": False},
        plus | {"placement": [11]},
        plus | {"family": "pkm", "query_batchnorm": True},
        {"family": "moe", "base": "1.3b", "experts": 8},
        {"family": "moe_topk", "base": "1.3b", "experts": 64},
        {"family": "dense", "base": "w32"},
    ]
    same = plus | {"k_dim": 1024, "placement": [3, 11, 19]}
    values = [*((model, 0.01) for model in others), (same, 0.05)]
    mine = scores(results, *((model, {"nq_open": {"exact_match": value}}, 1e10) for model, value in values))
    page = figures.tables(figures.published(results), mine)
    assert page.count("; ours") == 1
    assert "13.68 A; ours 5.00 (1, 10.0b)" in page
    assert figures._shown(mine, figures.PANELS)["value"].tolist() == [0.05]


def test_a_run_stands_next_to_the_nearest_budget_and_budgets_are_not_averaged(results: Path) -> None:
    model = {"family": "dense", "base": "8b"}
    budgets = {2e11: 0.1, 1e12: 0.2, 9e11: 0.3}
    runs = [(model, {"nq_open": {"exact_match": value}}, tokens) for tokens, value in budgets.items()]
    page = figures.tables(figures.published(results), scores(results, *runs))
    assert "18.61 A; ours 10.00 (1, 200b) |" in page
    assert "25.24 B; ours 30.00 (1, 900b); ours 20.00 (1, 1,000b) |" in page
    assert page.count("; ours") == 3


def test_a_score_of_ours_is_the_papers_once(tmp_path: Path) -> None:
    tasks = {
        "nq_open": {"exact_match": 0.1},
        "nq_open_qa": {"em": 0.2, "f1": 0.3},
        "nq_open_nll": {"nll": 6.0},
        "triviaqa_qa": {"em": 0.4, "f1": 0.5},
    }
    mine = scores(tmp_path, ({"family": "dense", "base": "1.3b"}, tasks, 1e10))
    values = {(row["task"], row["metric"]): row["value"] for row in mine.to_dict("records")}
    assert len(values) == len(mine)
    assert values == {
        ("nq_open", "exact_match"): 0.1,
        ("nq_open", "f1"): 0.3,
        ("triviaqa", "exact_match"): 0.4,
        ("triviaqa", "f1"): 0.5,
        ("nq_open", "nll"): 6.0,
        ("train", "nll"): 2.5,
    }


def test_training_loss_stands_next_to_the_papers_training_nll(results: Path) -> None:
    mine = scores(results, ({"family": "pkm", "base": "373m", "half_keys": 1024, "sink": True}, {}, 1e10))
    page = figures.tables(figures.published(results), mine)
    assert "| +softmax sink | 1,048,576 | 2.11 A; ours 2.50 (1, 10.0b) | 12.19 A | 8.04 A |" in page
    assert page.count("; ours") == 1


def test_the_papers_models_are_those_of_its_grids_and_of_the_suite() -> None:
    from suite.grids import load_grid
    from suite.models import moe, product_key, registry
    from suite.models.sizes import SIZES

    sizes = {base: size for base, size in SIZES.items() if size.vocab_size}
    assert {base: (size.layers, size.dim, size.memory_stride) for base, size in sizes.items()} == figures.SHAPES
    assert figures.EXPERTS == moe.PAPER_EXPERTS
    for base in figures.SHAPES:
        for family in ("pkm", "memory_plus"):
            model = {"family": family, "base": base, "half_keys": 1024}
            config = registry.family(family).config.model_validate(model)
            assert isinstance(config, product_key.MemoryConfig)
            stated = model | {"k_dim": config.key_dim, "placement": list(config.memory_placement)}
            assert not figures.own_options(stated)
    for name in ("fixed-memory", "memory-scaling", "8b"):
        for cell in load_grid(str(PUBLISHED.parents[1] / "grids" / f"paper-{name}.yaml"), need_data=False).cells:
            own = figures.own_options(cell.model.model_dump(mode="json"))
            assert bool(own) == (cell.model.family == "moe_topk"), own


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"family": "pkm"}, {"PK base", "PK layers 12", "v_dim=1024", "key_dim=256 (sum of both sub-keys)"}),
        ({"family": "pkm", "placement": [4, 12, 20]}, {"PK layers 4,12,20"}),
        ({"family": "pkm", "placement": [12], "scalar_gate": True}, {"+gated"}),
        ({"family": "pkm", "placement": [12], "sink": True}, {"+softmax sink"}),
        ({"family": "pkm", "random_rows": 8}, {"+random values"}),
        ({"family": "pkm", "value_dim": 64, "half_keys": 4096}, {"v_dim=64"}),
        ({"family": "pkm", "value_dim": 2048, "half_keys": 724}, {"v_dim=2048"}),
        ({"family": "pkm", "value_dim": 64}, set()),
        ({"family": "pkm", "half_keys": 4096}, set()),
        ({"family": "pkm", "top_k": 16}, set()),
        ({"family": "pkm", "placement": [12, 16, 20], "share": False}, set()),
        ({"family": "pkm", "k_dim": 2048}, {"key_dim=2048 (sum of both sub-keys)"}),
        ({"family": "memory_plus", "placement": [12], "k_dim": 256}, {"+swilu"}),
        ({"family": "memory_plus"}, set()),
        ({"family": "pkm", "sink": True, "scalar_gate": True}, set()),
        ({"family": "pkm", "base": "134m"}, set()),
        ({"family": "dense"}, set()),
    ],
)
def test_variants_have_the_papers_names(options: dict[str, Any], names: set[str]) -> None:
    found = set(figures.variants({"base": "373m", "half_keys": 1024, **options}))
    assert found == names
    printed = set(pd.read_csv(PUBLISHED / "memory_layers_ablations.csv")["model"])
    assert found <= printed
