"""Checkpoints that were not trained here, as reference lines."""

import json
from pathlib import Path

from run_folders import write_json, write_run

from analysis.comparisons.grid import Comparisons
from analysis.figures.context import context
from analysis.figures.scores import scores_against_rows
from analysis.records.grid_data import load


def test_imported_checkpoints_are_reference_lines_of_the_scores_that_they_share(tmp_path: Path) -> None:
    """Only a score of the same task, prompts, documents and data counts."""
    results = tmp_path / "results"
    names = [write_run(results, "dense", "w32", 0, 30.0, stop_past=False)]
    names += [write_run(results, "memory_plus", "w32", 0, 20.0, half_keys=keys, stop_past=False) for keys in (16, 32)]
    write_json(results / "grids" / "demo" / "grid.json", {"grid": "demo", "source": "demo.yaml", "runs": names})
    run = results / "runs" / names[-1]
    imported = results / "runs" / "imported-2x48-0123abcd"
    cell = json.loads((run / "cell.json").read_text()) | {"run": imported.name}
    scores = json.loads((run / "eval" / "0badcafe.json").read_text())
    task = scores["tasks"]["bios_storage"]
    task["metrics"] = {"recall": {"value": 0.25, "stderr": 0.01}}
    own = json.loads(json.dumps(scores))
    for path in results.glob("runs/*/eval/0badcafe.json"):
        content = json.loads(path.read_text())
        content["tasks"]["bios_storage"]["metrics"]["recall"] = {"value": 0.5, "stderr": 0.01}
        path.write_text(json.dumps(content))
    own["tasks"]["bios_extraction"] = task | {"prompt_hash": "other"}
    for name, content in (("cell.json", cell), ("state.json", {"state": "done"}), ("eval/0badcafe.json", own)):
        (imported / name).parent.mkdir(parents=True, exist_ok=True)
        (imported / name).write_text(json.dumps(content))
    data = load(results, "demo", "dense")
    assert data.imported[["name", "value"]].to_numpy().tolist() == [["imported-2x48-0123abcd", 0.25]]
    drawn = scores_against_rows(context(Comparisons(data)), tmp_path / "figures")
    svg = next(path for path in drawn if path.suffix == ".svg").read_text()
    assert "not trained here: imported-2x48-0123abcd" in svg
