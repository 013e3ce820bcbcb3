"""Learning against forgetting: what is read from runs, hulls, methods at equal learning, and the report."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from run_folders import write_json, write_run
from scipy.spatial import ConvexHull

from analysis.comparisons.grid import Comparisons
from analysis.comparisons.knowledge import forgetting_at, hull, learning_of
from analysis.figures.context import context
from analysis.figures.knowledge import drawing
from analysis.records.grid_data import load
from analysis.records.knowledge import KNOWLEDGE, read_knowledge
from analysis.report.build import write

FACTS = 4


def line(taught: int, gain: float, known: float, touched: int = 0) -> dict[str, Any]:
    """A measurement at which the facts taught have gained `gain` bits, and `known` of 100 bits are left."""
    bits = [gain if number < taught else 0.0 for number in range(FACTS)]
    kinds = {kind: {"bits": bits, "recall": [float(taught > 0)] * FACTS} for kind in ("storage", "paraphrase")}
    probe = {"storage": {"bits": known, "bits_max": 120.0, "nll": 1.0, "recall": known / 100, "n": 10}}
    return {
        "step": taught,
        "tokens": 64 * taught,
        "epoch": taught / FACTS,
        "train_flops": 1.0 * taught,
        "wall_s": 1.0 * taught,
        "new": {"taught": taught, "bits_max": [6.0] * FACTS, **kinds},
        "known": {"loss": 1.0, "probe": probe},
        "rows_touched": {"tables.0.weight": {"rows": 10, "touched": touched}},
    }


def write_taught(results: Path, kind: str, rate: float, seed: int, gain: float, lost: float) -> str:
    name = write_run(results, "memory_plus", "w32", seed, 30.0, half_keys=16 + int(1000 * rate))
    folder = results / "runs" / name
    record = json.loads((folder / "cell.json").read_text())
    record["cell"]["data"] |= {"kind": "new_people", "facts": FACTS}
    record["cell"]["model"]["half_keys"] = 16
    record["cell"]["train"] |= {"lr": rate, "trainable": {"kind": kind}, "init_from": "p", "parent": f"{seed:08x}"}
    new = folder.with_name(f"{name}-{kind}")
    write_json(new / "cell.json", record)
    lines = [line(0, 0.0, 100.0), line(2, gain, 100.0 - 50 * lost, 3), line(4, gain, 100.0 - 100 * lost, 5)]
    (new / "train.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in lines))
    write_json(new / "state.json", {"state": "done", "progress": 1.0})
    for path in sorted(folder.rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    folder.rmdir()
    return new.name


@pytest.fixture
def taught(tmp_path: Path) -> Path:
    """Rows and LoRA at two rates and five seeds: LoRA forgets twice as much."""
    names: dict[str, list[str]] = {"rows": [], "lora": []}
    for seed in range(5):
        for rate, gain in ((0.001, 2.0), (0.002, 4.0)):
            names["rows"].append(write_taught(tmp_path, "rows", rate, seed, gain, 0.02 * gain + 0.001 * seed))
            names["lora"].append(write_taught(tmp_path, "lora", rate, seed, gain, 0.04 * gain + 0.001 * seed))
    contrast = {"metric": "forgetting", "treatment": names["rows"], "reference": names["lora"]}
    grid = {"grid": "facts", "source": "facts.yaml", "runs": [*names["rows"], *names["lora"]], "contrast": contrast}
    write_json(tmp_path / "grids" / "facts" / "grid.json", grid)
    return tmp_path


def test_a_line_becomes_gains_losses_and_rows() -> None:
    lines = [line(0, 0.0, 80.0), {"loss": 3.0}, line(2, 3.0, 60.0, 4)]
    entries, retention = read_knowledge(lines)
    last = dict(zip(KNOWLEDGE, entries[-1], strict=True))
    assert last["taught"] == 2
    assert last["bits_max"] == 6.0
    assert last["bits_storage"] == last["bits_paraphrase"] == 3.0
    assert last["bits_extraction"] is None
    assert last["bits_before"] == 0.0
    assert last["known_lost"] == pytest.approx(0.25)
    assert last["touched"] == 0.4
    assert retention == [(0.0, 3.0, 3.0)]
    assert read_knowledge([{"loss": 1.0}]) == ([], [])


def test_retention_follows_each_block_of_facts() -> None:
    lines = [line(0, 0.0, 1.0), line(2, 3.0, 1.0), line(4, 1.0, 1.0)]
    assert read_knowledge(lines)[1] == [(0.0, 3.0, 3.0), (2.0, 1.0, 3.0), (0.0, 1.0, 1.0)]


def test_the_hull_equals_that_of_qhull() -> None:
    draw = np.random.default_rng(0)
    x, y = draw.uniform(0.1, 5, 30), draw.uniform(0.1, 1, 30)
    points = np.column_stack([np.append(x, 0.0), np.append(y, 0.0)])
    vertices = points[ConvexHull(points).vertices]
    most = vertices[vertices[:, 0].argmax()]
    below = [p for p in vertices if p[1] <= p[0] * most[1] / most[0] + 1e-12]
    assert np.allclose(hull(np.column_stack([x, y])), np.array(sorted(map(tuple, below))))


def test_forgetting_at_a_level_is_on_the_hull_and_nan_beyond_it() -> None:
    vertices = hull(np.array([[2.0, 0.1], [4.0, 0.4], [3.0, 0.9]]))
    assert forgetting_at(vertices, 1.0) == pytest.approx(0.05)
    assert forgetting_at(vertices, 3.0) == pytest.approx(0.25)
    assert np.isnan(forgetting_at(vertices, 4.1))
    assert np.isnan(forgetting_at(hull(np.array([[-3.0, 0.1]])), 1.0))


def test_methods_are_compared_at_equal_learning_by_seed(taught: Path) -> None:
    learning = learning_of(load(taught, "facts"))
    assert learning is not None
    assert sorted(set(learning.final["learned"].round(9))) == pytest.approx([2 / 6, 4 / 6])  # of 6 bits
    rows, lora = (learning.final[learning.final["method"].str.endswith(end)] for end in ("rows", "LoRA"))
    compared = learning.compare(rows, lora)
    assert compared.difference.n == compared.pairs == 5
    assert compared.difference.mean == pytest.approx(-0.02 * 0.4 * 6)
    assert (
        learning.final.groupby(["method", "label"]).ngroups == 4
    )  # the parent's hash, which differs by seed, makes no variant


def test_the_report_leads_with_the_declared_contrast_and_draws_the_figures(taught: Path, tmp_path: Path) -> None:
    data = load(taught, "facts")
    written = write(data, tmp_path / "report", tmp_path / "figures")
    text = (tmp_path / "report" / "report.md").read_text()
    assert re.search(r"memory_plus rows against memory_plus LoRA: .0\.048", text)
    assert "forgets less" in text
    assert {"learning-forgetting", "retention", "rows-touched"} <= written["figures"].keys()
    plots = context(Comparisons(data))
    assert drawing.rows_touched(plots, tmp_path / "again")
