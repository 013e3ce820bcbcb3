"""The report and the command line, end to end on a synthetic grid."""

from __future__ import annotations

import json
import math
import re
import shutil
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from run_folders import write_json, write_run

from analysis.cli.main import main
from analysis.comparisons.grid import Comparisons
from analysis.comparisons.multiplier_grid import multipliers_along_reference
from analysis.comparisons.paired import contrasts
from analysis.comparisons.trends import trends
from analysis.figures.context import Context, context
from analysis.figures.gallery import CAPTIONS, draw
from analysis.figures.variants import multiplier_figure
from analysis.records import frame
from analysis.records.frame import read_published
from analysis.records.grid_data import GridData, load
from analysis.records.grids import Contrast, read_source
from analysis.records.regime import regime
from analysis.report.blocks import Table, Text, to_markdown
from analysis.report.build import build
from analysis.report.fits import multiplier_blocks
from analysis.report.long_tables import shortened


def plots(root: Path, published: pd.DataFrame | None = None) -> Context:
    data = load(root, published=published, fallback="dense")
    return context(Comparisons(replace(data, grid="g")))


def declared(root: Path, treatment: str, reference: str) -> GridData:
    """The runs of a folder, with the contrast of those whose names start so."""
    data = load(root, reference="dense")
    names = [tuple(name for name in data.runs["run"] if name.startswith(start)) for start in (treatment, reference)]
    return replace(data, contrast=Contrast("e50", *names))


def text_of(data: GridData, folder: Path) -> str:
    return to_markdown(build(context(Comparisons(data)), [], []), folder)


def report_text(root: Path) -> str:
    return text_of(declared(root, "memory_plus", "dense"), root)


def multiplier_text(root: Path) -> str:
    data = load(root, fallback="dense")
    return to_markdown(multiplier_blocks(data, *multipliers_along_reference(data)), root)


@pytest.mark.filterwarnings("error")
def test_report_states_the_primary_contrast_failures_and_ratios(
    results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "figures"
    assert main(["report", "--grid", "demo", "--results", str(results), "--out", str(out)]) == 1
    (not_drawn,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("figures not drawn: ")]
    assert "isoflop" in not_drawn
    assert not (out / "isoflop.png").exists()
    text = (results / "grids" / "demo" / "report.md").read_text()
    assert "at w32, memory_plus k64 needs 0.510 [0.500, 0.520] times the exposures of dense" in text
    assert "1.20x MACs per token (not equal-FLOP)" in text
    assert "this measures learning speed, not capacity" in text
    assert "loss is nan at step 12" in text
    assert "pkm-w32-k64-s9-00000000: not started" in text
    drawn = {path.name for path in out.iterdir()}
    names = (
        "bits-exposures",
        "memory-rows",
        "bits-compute",
        "loss-curves",
        "base-size",
        "cost",
        "compute-multiplier",
        "next-parameter",
        "equal-time",
        "trend-fit",
        "key-usage",
        "key-usage-training",
        "hit-rates",
    )
    assert {f"{name}.{kind}" for name in names for kind in ("png", "pdf", "svg")} == drawn
    page = (results / "grids" / "demo" / "report.html").read_text()
    assert "memory_plus k64 needs 0.510 [0.500, 0.520]" in page
    assert page.count("data:image/png;base64,") == len(names)
    assert not re.search(r"(src|href)=\"(?!data:|#)", page)


def test_figures_say_what_is_missing_and_what_makes_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "results"
    name = write_run(root, "dense", "w32", 0, 9.0)
    write_json(root / "grids" / "one" / "grid.json", {"grid": "one", "source": "one.yaml", "runs": [name]})
    assert main(["figures", "--grid", "one", "--results", str(root), "--out", str(tmp_path / "f"), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)[0]
    missing = dict(line.split(": ", 1) for line in document["missing"])
    assert missing["base-size"].startswith("grid one has one base size; a figure against base size needs two")
    assert all(re.search(r"suite (sweep|plan) one|python -m analysis", line) for line in document["missing"])
    assert missing["plan"].endswith("suite plan one.yaml --gpu GPU or cpu")
    assert not set(missing) & set(document["figures"])
    assert {*missing, *document["figures"]} == set(CAPTIONS)


def test_frame_writes_every_format(results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for suffix in ("csv", "jsonl", "parquet"):
        assert main(["frame", "--results", str(results), "--out", str(tmp_path / f"frame.{suffix}")]) == 0
        assert (tmp_path / f"frame.{suffix}").stat().st_size > 1000
    assert main(["frame", "--results", str(results), "--out", str(tmp_path / "frame.xls")]) == 2
    assert "suffix is '.xls'" in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["frame", "fit", "figures", "report"])
def test_no_results_is_one_line_and_exit_2(verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([verb, "--results", str(tmp_path)]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.count("\n") == 1
    assert "suite sweep" in shown.err


def test_trend_recovers_a_known_power_law(tmp_path: Path) -> None:
    for base, size in (("w32", 42_000), ("w64", 182_000)):
        for keys in (None, 16, 32, 64):
            memory = (keys or 0) ** 2 * int(base[1:])
            for seed in range(2):
                e50 = 3000 * (1 + memory / size) ** -0.4 * size**-0.45
                write_run(tmp_path, "memory_plus" if keys else "dense", base, seed, e50, half_keys=keys)
    found = trends(load(tmp_path, fallback="dense"))[0]
    assert found.estimates["ln(1 + M/N)"][0] == pytest.approx(-0.4, abs=1e-6)
    assert found.estimates["ln N"][0] == pytest.approx(-0.45, abs=1e-6)
    assert float(found.held_out["relative_error"]) == pytest.approx(0, abs=1e-6)


def test_a_trend_omits_the_term_that_one_base_cannot_identify(tmp_path: Path) -> None:
    for keys in (None, 16, 32, 64):
        write_run(tmp_path, "memory_plus" if keys else "dense", "w32", 0, 20.0 / (1 + (keys or 0) / 64), half_keys=keys)
    found = trends(load(tmp_path, fallback="dense"))[0]
    assert found.not_identified == ("ln N",)
    assert math.isnan(found.estimates["constant"][1])


def test_text_runs_are_compared_at_equal_tokens(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "results"
    names = []
    for seed in range(5):
        for family, keys, gain in (("dense", None, 0.0), ("memory_plus", 16, 0.1)):
            name = write_run(root, family, "w32", seed, 20.0, half_keys=keys, stop_past=False)
            folder = root / "runs" / name
            lines = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
            for line in lines:
                line.pop("probe", None)
            (folder / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
            scores = {
                "held_out": {
                    "version": 1,
                    "few_shot": 0,
                    "n": 9,
                    "metrics": {"bits_per_byte": {"value": 2.0 - gain + 0.01 * np.sin(seed), "stderr": 0.01}},
                }
            }
            right = np.random.default_rng(seed).random(400) < 0.4 + gain
            scores["nq"] = {
                "n": 400,
                "prompt_hash": "p",
                "metrics": {"em": {"value": right.mean(), "stderr": 0.02}},
                "answers": {"em": "".join(str(int(one)) for one in right)},
            }
            write_json(folder / "eval" / "0badcafe.json", {"step": 1, "tasks": scores})
            names.append(name)
    write_json(root / "grids" / "text" / "grid.json", {"grid": "text", "source": "grids/text.yaml", "runs": names})
    assert main(["report", "--results", str(root), "--out", str(tmp_path / "f"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["failed"] == []
    text = (root / "grids" / "text" / "report.md").read_text()
    assert (
        "| w32 | memory_plus k16 | dense | held_out/bits_per_byte ↓ | 0 | 9 | 5 | −0.100 [−0.100, −0.100] | – |" in text
    )
    assert "held_out/bits_per_byte ↓, 0-shot, 9 documents" in text
    assert "nq/em ↑, 400 questions" in text
    crossed = re.search(r"nq/em ↑ \| – \| 400 \| 5 \| \S+ \[\S+, \S+\] \| \[(\S+), (\S+)\]", text)
    assert crossed is not None
    low, high = (float(end) for end in crossed.groups())
    # the same 400 random numbers a seed: a question changes from wrong to right with chance 0.1, in 2,000 pairs
    assert low < 0.1 < high
    assert 0.5 < (high - low) / (4 * np.sqrt(0.1 * 0.9 / 2000)) < 3
    assert (tmp_path / "f" / "final-scores.png").exists()
    assert (tmp_path / "f" / "scores-rows.png").exists()


def test_a_headline_of_few_pairs_has_no_verdict(tmp_path: Path) -> None:
    for seed in range(2):
        write_run(tmp_path, "dense", "w32", seed, 30.0 + seed)
        write_run(tmp_path, "memory_plus", "w32", seed, 20.0 + seed, half_keys=32)
    text = report_text(tmp_path)
    assert "times the exposures of dense to learn half of N H (no verdict below 5 pairs), 2 pairs, at" in text


def test_an_undecided_headline_states_that(tmp_path: Path) -> None:
    for family, keys in (("dense", None), ("memory_plus", 16)):
        write_run(tmp_path, family, "w32", 0, 900.0, half_keys=keys)
    text = report_text(tmp_path)
    assert "is undecided, because 1 and 1 of the runs never reached half of N H" in text
    assert "≥ 64.0 (1 of 1 censored)" in text


def test_speeds_are_compared_only_if_the_machine_was_steady(tmp_path: Path) -> None:
    claims = ("x tokens/s", "wall-clock to E50, ratio")
    for seed in range(2):
        write_run(tmp_path, "memory_plus", "w32", seed, 9.0, half_keys=16)
        name = write_run(tmp_path, "dense", "w32", seed, 9.0)
        text = report_text(tmp_path)
        assert all((claim in text) is (seed == 1) for claim in claims)
        assert ("No variant has two runs that show how steady the machine was" in text) is (seed == 0)
    assert "machine was unsteady" not in text
    path = tmp_path / "runs" / name / "train.jsonl"
    path.write_text(path.read_text().replace('"tokens_per_s": 30000.0', '"tokens_per_s": 10000.0'))
    text = report_text(tmp_path)
    assert "runs of one variant differ in speed by up to 3.0 times" in text
    assert not any(claim in text for claim in claims)
    assert "20,000 (10,000 to 30,000)" in text, "the spread is stated"


@pytest.mark.parametrize("share", [0.95, 0.5])
def test_speeds_are_not_compared_if_other_programs_slowed_one_variant(share: float, tmp_path: Path) -> None:
    for seed in range(2):
        dense = write_run(tmp_path, "dense", "w32", seed, 9.0)
        memory = write_run(tmp_path, "memory_plus", "w32", seed, 9.0, half_keys=16)
        for name, had in ((dense, share), (memory, 1.0)):
            path = tmp_path / "runs" / name / "train.jsonl"
            path.write_text(path.read_text().replace('"memory_bytes"', f'"cpu_share": {had}, "memory_bytes"'))
    text = report_text(tmp_path)
    assert ("The machine was unsteady: runs had between 50% and 100% of a core" in text) is (share == 0.5)
    assert ("x tokens/s" in text) is (share == 0.95)


def test_worlds_beyond_capacity_are_not_called_learning_speed(tmp_path: Path) -> None:
    write_run(tmp_path, "dense", "w32", 0, 20.0)
    table = load(tmp_path, fallback="dense").runs
    assert "learning speed" in regime(table)
    assert "4 bits per parameter" in regime(table.assign(people=5000))


def _budget_run(root: Path, family: str, seed: int, epochs: float, gain: float, keys: int | None = None) -> str:
    """A run to the end of its budget, whose final loss is that of dense with `gain` times its compute."""
    name = write_run(root, family, "w32", seed, 900.0, half_keys=keys, stop_past=False, last=epochs)
    folder = root / "runs" / name
    content = json.loads((folder / "cell.json").read_text())
    content["cell"]["train"] = {"epochs": epochs}
    write_json(folder / "cell.json", content)
    lines = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    lines[-1]["eval_loss"] = 1.7 + 2e3 * (gain * lines[-1]["train_flops"]) ** -0.3
    (folder / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return name


def test_compute_multiplier_along_dense_budgets(tmp_path: Path) -> None:
    for seed, epochs in enumerate((2.0, 8.0, 32.0, 64.0)):
        _budget_run(tmp_path, "dense", seed, epochs, 1.0)
    _budget_run(tmp_path, "memory_plus", 1, 8.0, 3.0, keys=16)
    found = multiplier_text(tmp_path)
    assert re.search(r"\| w32 \| memory_plus k16 \| 1 \| [\d,]+ \| [\d.]+ \| 3\.00 \| no \|", found)


def test_a_missing_compute_multiplier_states_its_reason(tmp_path: Path) -> None:
    for seed, epochs in enumerate((2.0, 8.0, 32.0)):
        name = _budget_run(tmp_path, "dense", seed, epochs, 1.0)
    found = multiplier_text(tmp_path)
    assert "has 3 of the 4 compute budgets" in found
    path = tmp_path / "runs" / name / "cell.json"
    content = json.loads(path.read_text())
    content["cell"]["train"]["stop_past"] = 0.5
    write_json(path, content)
    assert "runs stop at a share of what there is to learn" in multiplier_text(tmp_path)


def _without_probes(root: Path, name: str) -> None:
    path = root / "runs" / name / "train.jsonl"
    lines = [{key: value for key, value in json.loads(line).items() if key != "probe"} for line in path.open()]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_text_grids_draw_scores_against_base_and_cost(tmp_path: Path) -> None:
    for base in ("w32", "w64"):
        for family, keys in (("dense", None), ("memory_plus", 16)):
            name = write_run(tmp_path, family, base, 0, 20.0, half_keys=keys, stop_past=False)
            _without_probes(tmp_path, name)
            scores = {"triviaqa_qa": {"n": 9, "metrics": {"f1": {"value": 0.3}}}}
            write_json(tmp_path / "runs" / name / "eval" / "0badcafe.json", {"step": 1, "tasks": scores})
    table = tmp_path / "published.csv"
    table.write_text(
        "source,base,family,memory_rows,task,metric,value,confidence\n"
        "a paper,w32,memory_plus,256,triviaqa,f1,0.4,B: one\na paper,w32,pkm,256,triviaqa,exact_match,0.4,C: read off\n"
    )
    drawn, missing = draw(plots(tmp_path, read_published(table)), tmp_path / "figures")
    points = next(path for path in drawn["scores-rows"] if path.suffix == ".svg").read_text()
    assert ">memory_plus B<" in points
    assert ">published: a paper<" in points
    assert ">pkm C<" not in points
    assert {"scores-rows", "scores-base", "scores-cost", "final-scores", "cost"} <= set(drawn)
    reason = "memory-rows: no storage probes at a constant learning rate in grid g"
    assert any(line.startswith(reason) for line in missing)


def test_text_grids_draw_the_compute_multiplier_along_dense_budgets(tmp_path: Path) -> None:
    for seed, epochs in enumerate((2.0, 8.0, 32.0, 64.0)):
        _without_probes(tmp_path, _budget_run(tmp_path, "dense", seed, epochs, 1.0))
    _without_probes(tmp_path, _budget_run(tmp_path, "memory_plus", 1, 8.0, 3.0, keys=16))
    paths = multiplier_figure(plots(tmp_path), tmp_path)
    assert "compute multiplier at the final loss" in paths[2].read_text()
    assert "w32 memory_plus k16 (n=1)" in paths[2].read_text()


def test_without_a_memory_nothing_is_drawn_against_rows(tmp_path: Path) -> None:
    for seed in range(2):
        write_run(tmp_path, "dense", "w32", seed, 20.0)
    drawn, missing = draw(plots(tmp_path), tmp_path / "figures")
    assert "memory-rows" not in drawn
    assert any(line.startswith("memory-rows: grid g has no model with a memory") for line in missing)


def test_the_command_for_a_missing_figure_names_the_grid_as_it_was_passed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = write_run(tmp_path, "dense", "w32", 0, 20.0)
    grid = {"grid": "g", "source": "/else/g.yaml", "runs": [name]}
    write_json(tmp_path / "grids" / "g" / "grid.json", grid)
    assert read_source(tmp_path, "g") == "/else/g.yaml"
    kept = tmp_path / "runs" / name / "baseline.py"
    kept.write_text("pass\n")
    of_grid = context(Comparisons(load(tmp_path, "g", fallback="dense")))
    _, missing = draw(of_grid, tmp_path)
    assert any(line.endswith("suite sweep /else/g.yaml") for line in missing)
    report = to_markdown(build(of_grid, [], missing), tmp_path)
    assert report.count(f"--baseline={kept}") == 1
    assert f"The commands below also need --baseline={kept}" in report
    assert "not finished" not in report
    kept.unlink()
    write_json(tmp_path / "grids" / "g" / "grid.json", {**grid, "source": "/else/grids/g.yaml"})
    assert read_source(tmp_path, "g") == "/else/grids/g.yaml"  # no grid of that name is found from here
    write_json(tmp_path / "grids" / "g" / "grid.json", {**grid, "source": "with space/g.yaml"})
    assert read_source(tmp_path, "g") == "'with space/g.yaml'"
    monkeypatch.chdir(tmp_path)
    scaled = "g-tokens-x0.01-batch_rows-x1e-05"
    options = ["--scale=tokens=0.01", "--scale=batch_rows=1e-05"]
    for name, arguments in (("g", []), (scaled, options)):
        record = {"grid": name, "source": "grids/g.yaml", "arguments": arguments, "runs": []}
        write_json(tmp_path / "grids" / name / "grid.json", record)
        assert read_source(tmp_path, name) == " ".join(["g", *arguments])


def _scored(root: Path, name: str, few_shot: int, right: str, **settings: Any) -> None:
    """A run's score on `right`, one question per character."""
    limit, prompts = settings.get("limit"), settings.get("prompts", "p")
    value = sum(map(int, right)) / len(right)
    task = {
        "version": 1,
        "few_shot": few_shot,
        "n": len(right),
        "prompt_hash": f"{prompts}-{few_shot}-{len(right)}",
        "data_fingerprint": "d",
        "metrics": {"acc": {"value": value, "stderr": 0.1}},
        "answers": {"acc": right},
    }
    evaluation = {"limit": limit} | ({"precision": settings["precision"]} if "precision" in settings else {})
    digest = zlib.crc32(f"{few_shot}{len(right)}{prompts}{settings.get('precision', '')}".encode())
    content = {"eval": evaluation, "step": 1, "tasks": {"piqa": task}}
    write_json(root / "runs" / name / "eval" / f"{digest:08x}.json", content)


def test_missing_figures_of_a_grid_with_unfinished_runs_are_about_the_others(tmp_path: Path) -> None:
    states = {"dense": "done", "moe": "running", "pkm": "pending"}
    runs = [write_run(tmp_path, family, "w32", 0, 20.0, state=state) for family, state in states.items()]
    record = {"grid": "g", "source": "/else/g.yaml", "runs": [*runs, "memory_plus-w32-k16-s0-0badcafe"]}
    write_json(tmp_path / "grids" / "g" / "grid.json", record)
    of_grid = context(Comparisons(load(tmp_path, "g", fallback="dense")))
    text = to_markdown(build(of_grid, [], ["memory-rows: grid g has no model with a memory"]), tmp_path)
    assert "3 runs of the grid are not finished, and the lines below are about the others" in text
    assert text.index("3 runs of the grid") < text.index("memory-rows: ")


def test_scores_of_different_questions_or_few_shot_settings_are_not_paired(tmp_path: Path) -> None:
    """On the ten questions that both answered, memory is worse; on thirty questions it looks better."""
    for seed in range(2):
        dense = write_run(tmp_path, "dense", "w32", seed, 20.0, stop_past=False)
        memory = write_run(tmp_path, "memory_plus", "w32", seed, 20.0, half_keys=16, stop_past=False)
        for name in (dense, memory):
            _without_probes(tmp_path, name)
        _scored(tmp_path, dense, 0, "1111100000", limit=10)
        _scored(tmp_path, memory, 0, "1111000000" + "1" * 20, limit=30)
        if seed == 0:
            _scored(tmp_path, dense, 2, "1111111110", limit=10)
    data = load(tmp_path, fallback="dense")
    (contrast,) = contrasts(data)
    assert not [score for score in contrast.finals if score.key == "piqa/acc"]
    (unpaired,) = [score for score in contrast.unpaired if score.key == "piqa/acc"]
    assert unpaired.seeds == (0, 1)
    assert "n=30" in unpaired.ours
    assert "n=10" in unpaired.theirs
    text = report_text(tmp_path)
    assert "piqa/acc, seeds 0, 1: 0-shot, n=30 against 0-shot, n=10" in text
    assert "piqa/acc ↑, 2-shot, 10 questions" in text
    # the same ten questions, scored later, are paired even though their file's hash does not sort last
    for name in (name for name in data.runs["run"] if name.startswith("memory_plus")):
        _scored(tmp_path, name, 0, "1111000000", limit=10)
    (contrast,) = contrasts(load(tmp_path, fallback="dense"))
    (score,) = [score for score in contrast.finals if score.key == "piqa/acc"]
    assert (score.few_shot, score.n, score.difference.n) == (0, 10, 2)
    assert score.difference.mean == pytest.approx(-0.1)


def test_scores_on_other_data_or_prompts_are_not_paired(tmp_path: Path) -> None:
    for family, keys, prompts in (("dense", None, "p"), ("memory_plus", 16, "q")):
        name = write_run(tmp_path, family, "w32", 0, 20.0, half_keys=keys, stop_past=False)
        _without_probes(tmp_path, name)
        _scored(tmp_path, name, 0, "1100", prompts=prompts)
    (contrast,) = contrasts(load(tmp_path, fallback="dense"))
    assert [score.key for score in contrast.unpaired] == ["piqa/acc"]
    assert "other prompts, version or data" in report_text(tmp_path)


def test_scores_of_different_precision_are_not_paired(tmp_path: Path) -> None:
    """Records of before the option have none: they were made in fp32."""
    dense = write_run(tmp_path, "dense", "w32", 0, 20.0, stop_past=False)
    memory = write_run(tmp_path, "memory_plus", "w32", 0, 20.0, half_keys=16, stop_past=False)
    for name in (dense, memory):
        _without_probes(tmp_path, name)
    _scored(tmp_path, dense, 0, "1100")
    _scored(tmp_path, memory, 0, "1110", precision="bf16")
    (contrast,) = contrasts(load(tmp_path, fallback="dense"))
    (unpaired,) = [score for score in contrast.unpaired if score.key == "piqa/acc"]
    assert (unpaired.ours, unpaired.theirs) == ("0-shot, n=4, bf16", "0-shot, n=4")
    assert "0-shot, 4 questions, bf16" in report_text(tmp_path)
    _scored(tmp_path, dense, 0, "1000", precision="bf16")
    _scored(tmp_path, memory, 0, "1111", precision="fp32")
    (contrast,) = contrasts(load(tmp_path, fallback="dense"))
    paired = {score.precision: score.difference.mean for score in contrast.finals if score.key == "piqa/acc"}
    assert paired == pytest.approx({"fp32": 0.5, "bf16": 0.5})
    table = frame.load(tmp_path, None, "dense").table
    assert set(table.loc[table["task"] == "piqa", "precision"]) == {"fp32", "bf16"}


@pytest.mark.parametrize("file", ["cell.json", "state.json", "train.jsonl", "eval/0badcafe.json", "usage.json"])
@pytest.mark.parametrize("content", [b"", b'{"cell": {"mod', b"\xff\xfe\x00\n"])
def test_a_damaged_run_is_named_and_the_rest_is_reported(tmp_path: Path, file: str, content: bytes) -> None:
    for seed in range(2):
        write_run(tmp_path, "dense", "w32", seed, 20.0)
        name = write_run(tmp_path, "memory_plus", "w32", seed, 10.0, half_keys=16)
    path = tmp_path / "runs" / name / file
    path.write_bytes(content)
    data = load(tmp_path, fallback="dense")
    if file == "train.jsonl" and content != b"\xff\xfe\x00\n":  # a last line without its newline was interrupted
        assert not len(data.left_out)
        return
    assert data.left_out["run"].tolist() == [name]
    assert str(path) in data.left_out["cause"].item()
    assert len(data.runs) == 3
    text = report_text(tmp_path)
    assert f"{name}: damaged: {path}" in text
    assert "1 runs are damaged or copies" in text
    assert "0.500 times the exposures of dense" in text


def test_the_report_of_damaged_runs_alone_names_them(tmp_path: Path) -> None:
    names = [write_run(tmp_path, family, "w32", 0, 20.0, half_keys=16) for family in ("dense", "memory_plus")]
    for name in names:
        (tmp_path / "runs" / name / "state.json").write_bytes(b"")
    text = report_text(tmp_path)
    assert "2 runs are damaged or copies" in text
    assert all(f"{name}: damaged: " in text for name in names)


@pytest.mark.parametrize(
    "stray", ["eval/._0badcafe.json", "eval/0badcafe copy.json", "eval/steps/0badcafe-20 (1).json"]
)
def test_files_beside_the_scores_that_are_no_scores_are_left_alone(tmp_path: Path, stray: str) -> None:
    name = write_run(tmp_path, "dense", "w32", 0, 20.0)
    before = frame.load(tmp_path, None, "dense").table
    path = tmp_path / "runs" / name / stray
    path.parent.mkdir(exist_ok=True)
    for content in (b"\x00\x05\x16\x07", (tmp_path / "runs" / name / "eval/0badcafe.json").read_bytes()):
        path.write_bytes(content)
        data = load(tmp_path, fallback="dense")
        assert not len(data.left_out)
        pd.testing.assert_frame_equal(frame.load(tmp_path, None, "dense").table, before)


def test_a_copied_run_folder_is_named_and_counts_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = write_run(tmp_path, "dense", "w32", 0, 20.0)
    copies = [f"{name[:-1]} (copy)", f"a copy of {name}", "backup"]
    for copy in copies:
        shutil.copytree(tmp_path / "runs" / name, tmp_path / "runs" / copy)
    assert main(["frame", "--results", str(tmp_path), "--out", str(tmp_path / "frame.csv")]) == 1
    assert set(pd.read_csv(tmp_path / "frame.csv")["run"]) == {name}
    assert sorted(capsys.readouterr().err.splitlines()[-3:]) == sorted(
        f"left out: {copy}: a copy of {name}" for copy in copies
    )
    data = load(tmp_path, fallback="dense")
    assert data.runs["run"].tolist() == [name]


def test_a_damaged_run_gives_exit_code_1(results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = next(path.name for path in sorted((results / "runs").iterdir()) if path.name.startswith("pkm"))
    (results / "runs" / name / "cell.json").write_text("{")
    assert main(["frame", "--results", str(results), "--out", str(tmp_path / "f.csv")]) == 1
    assert f"left out: {name}: damaged:" in capsys.readouterr().err
    assert name not in set(pd.read_csv(tmp_path / "f.csv")["run"])


def test_figures_that_no_longer_belong_are_removed(results: Path, tmp_path: Path) -> None:
    folder = tmp_path / "figures"
    draw(context(Comparisons(load(results, "demo"))), folder)
    assert (folder / "memory-rows.png").exists()
    own = folder / "mine.png"
    own.write_bytes(b"")
    runs = load(results, "demo").runs
    for name in runs.loc[runs["memory_rows"] > 0, "run"]:
        (results / "runs" / name / "state.json").write_text('{"state": "failed", "cause": "gone"}')
    drawn, _ = draw(context(Comparisons(load(results, "demo"))), folder)
    assert "memory-rows" not in drawn
    assert {path.stem for path in folder.iterdir()} == {*drawn, "mine"}
    assert own.exists()


def test_a_grid_without_a_contrast_states_that_and_adjusts_every_comparison(tmp_path: Path) -> None:
    for seed in range(5):
        write_run(tmp_path, "dense", "w32", seed, 20.0 + seed)
        write_run(tmp_path, "memory_plus", "w32", seed, 12.0 + seed / 2, half_keys=16)
        write_run(tmp_path, "moe", "w32", seed, 19.0 + 2 * seed)
    data = load(tmp_path, fallback="dense")
    found = contrasts(data)
    assert not any(contrast.primary for contrast in found)
    assert all(contrast.p_holm >= contrast.p for contrast in found)
    assert "declares no primary contrast" in text_of(data, tmp_path)


def test_any_family_may_be_the_reference_and_any_score_the_metric(tmp_path: Path) -> None:
    """The author of a new family declares its contrast against any other."""
    for seed in range(5):
        for family, gain in (("token_memory", 0.1), ("moe", 0.0)):
            name = write_run(tmp_path, family, "w32", seed, 20.0, stop_past=False)
            _without_probes(tmp_path, name)
            right = "1" * (50 + int(100 * gain) + seed) + "0" * (50 - int(100 * gain) - seed)
            _scored(tmp_path, name, 0, right)
    data = load(tmp_path, fallback="moe")
    sides = [tuple(name for name in data.runs["run"] if name.startswith(start)) for start in ("token", "moe")]
    data = replace(data, contrast=Contrast("piqa/acc", *sides))
    text = text_of(data, tmp_path)
    assert (
        "token_memory against moe at w32: +0.100 [+0.100, +0.100] in piqa/acc (0-shot, 100 questions), 5 pairs" in text
    )
    assert "Paired differences with moe" in text


def test_long_tables_are_cut_and_all_rows_are_in_a_file(tmp_path: Path) -> None:
    rows = [[f"v{number}", number] for number in range(200)]
    blocks = shortened([Table(["variant", "n"], rows, name="all")], tmp_path / "tables")
    table, text = blocks
    assert isinstance(table, Table)
    assert isinstance(text, Text)
    assert len(table.rows) == 60
    assert "200 rows" in text.text
    assert len(pd.read_csv(tmp_path / "tables" / "all.csv")) == 200
    assert shortened([Table(["a"], [[1]], name="all")], tmp_path / "tables") == [Table(["a"], [[1]], name="all")]
    assert not list((tmp_path / "tables").glob("*.csv"))


def test_a_grid_without_evaluations_and_probes_has_a_report(tmp_path: Path) -> None:
    name = write_run(tmp_path, "dense", "w32", 0, 20.0)
    _without_probes(tmp_path, name)
    path = tmp_path / "runs" / name / "train.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines if "loss" in line))
    (tmp_path / "runs" / name / "eval" / "0badcafe.json").unlink()
    _, missing = draw(plots(tmp_path), tmp_path / "figures")
    assert any(line.startswith("final-scores: no final scores") for line in missing)
    assert any(line.startswith("loss-curves: no run of grid ") and "measured its loss" in line for line in missing)
    assert "## Final evaluations\n\nNone yet." in text_of(load(tmp_path, fallback="dense"), tmp_path)


def test_rows_that_are_no_square_are_written_as_a_number() -> None:
    from analysis.figures.learning import _rows_text

    assert [_rows_text(rows) for rows in (128**2, 2**14 + 1, 3)] == ["128²", "16,385", "3"]
