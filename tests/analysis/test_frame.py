"""The frame holds the contents of the run directories, and E50 is where the curve crosses half of the bits."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from run_folders import BITS_MAX, EXPOSURES, curve, write_run

from analysis.cli.main import main
from analysis.comparisons.grid import Comparisons
from analysis.errors import InputError
from analysis.figures.context import context
from analysis.records import frame
from analysis.records.grid_data import load
from analysis.records.run_files import read_run
from analysis.records.runs import rows
from analysis.records.runs.curves import Curves
from analysis.records.runs.labels import labels, pairing
from analysis.records.tables import read_lines, read_table, write, write_table
from analysis.report.blocks import to_markdown
from analysis.report.build import build


def test_columns_are_the_designs(results: Path) -> None:
    table = frame.load(results, "demo", "dense").table
    assert list(table.columns) == frame.COLUMNS
    assert len(frame.COLUMNS) == 33
    assert table.loc[table["source"] == "run", "params_embedding"].notna().all()
    assert (table["source"] == "run").all()


def test_scores_of_averaged_weights_have_a_split_of_their_own(tmp_path: Path) -> None:
    name = write_run(tmp_path, "dense", "w32", 0, 8.0)
    path = tmp_path / "runs" / name / "train.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    storage = {"bits": 700.0, "bits_max": 900.0, "nll": 0.5, "recall": 0.7, "n": 42}
    lines[-1]["averaged"] = {"eval_loss": 1.5, "probe": {"storage": storage}}
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    table = frame.load(tmp_path, None, "dense", published=False).table
    rows = table[table["split"] == "averaged"]
    assert [*zip(rows["task"], rows["metric"], rows["value"], strict=True)] == [
        ("eval", "nll", 1.5),
        *(("bios_storage", metric, storage[metric]) for metric in ("bits", "bits_max", "nll", "recall")),
    ]
    assert set(rows["step"]) == {lines[-1]["step"]}
    assert set(rows["n"].dropna()) == {42}
    raw = table[(table["split"] == "probe") & (table["task"] == "bios_storage") & (table["metric"] == "bits")]
    assert raw["value"].tolist() == [line["probe"]["storage"]["bits"] for line in lines if "probe" in line]


def test_a_frame_in_many_parts_has_the_rows_and_types_of_one_part(
    results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    published = results / "published" / "paper.csv"
    published.parent.mkdir()
    published.write_text("source,task,metric,value\narXiv:2412.09764,NQ,exact_match,13.68\n")
    whole = frame.load(results, None, "dense").table
    monkeypatch.setattr(rows, "RUNS", 3)
    loaded = frame.load(results, None, "dense")
    parts = list(loaded.tables())
    assert len(parts) > 10
    assert all(part.schema == parts[0].schema for part in parts)
    pd.testing.assert_frame_equal(loaded.table, whole)
    assert whole["seed"].dtype == whole["step"].dtype == float, "the published row has none"
    assert write(tmp_path / "frame.csv", lambda: loaded.table, loaded.tables) == len(whole)
    write_table(whole, tmp_path / "whole.csv")
    assert (tmp_path / "frame.csv").read_bytes() == (tmp_path / "whole.csv").read_bytes()


def test_values_are_those_of_the_files(results: Path) -> None:
    table = frame.load(results, "demo", "dense").table
    name = table["run"].iloc[0]
    lines = [json.loads(line) for line in (results / "runs" / name / "train.jsonl").read_text().splitlines()]
    probe = next(line for line in lines if "probe" in line)
    row = table[
        (table["run"] == name)
        & (table["step"] == probe["step"])
        & (table["task"] == "bios_storage")
        & (table["metric"] == "bits")
    ]
    assert row["value"].tolist() == [probe["probe"]["storage"]["bits"]]
    assert row["n"].tolist() == [1800]
    final = table[(table["run"] == name) & (table["split"] == "final")]
    assert final["stderr"].tolist() == [3.0]
    assert final["grids"].tolist() == ["demo"]


def test_scores_of_intermediate_checkpoints_are_not_final_scores(results: Path) -> None:
    name = frame.load(results, "demo", "dense").table["run"].iloc[0]
    (path,) = (results / "runs" / name / "eval").glob("*.json")
    scores = json.loads(path.read_text()) | {"step": 7, "tokens": 700}
    (path.parent / "steps").mkdir()
    (path.parent / "steps" / f"{path.stem}-7.json").write_text(json.dumps(scores))
    table = frame.load(results, "demo", "dense").table
    of_run = table[table["run"] == name]
    assert len(of_run[of_run["split"] == "final"]) == 1
    row = of_run[of_run["split"] == "steps"].iloc[0]
    assert (row["step"], row["tokens"], row["train_flops"]) == (7, 700, 700 * row["flops_per_token"])


def test_scores_with_tables_off_are_separate_rows_and_not_final_scores(results: Path) -> None:
    before = load(results, "demo", "dense")
    names = [run for run in before.runs["run"] if run.startswith("memory_plus")]
    for name in names:
        (path,) = (results / "runs" / name / "eval").glob("*.json")
        scores = json.loads(path.read_text())
        scores["eval"]["table_off"] = True
        scores["tasks"]["bios_storage"]["metrics"]["bits"]["value"] -= 100.0
        path.with_name("1badcafe.json").write_text(json.dumps(scores))
    data = load(results, "demo", "dense")
    pd.testing.assert_frame_equal(data.scores, before.scores)
    off = data.tables_off
    assert sorted(data.runs["run"].iloc[off["run"]]) == sorted(names)
    assert (off["value"] - off["off"]).tolist() == pytest.approx([100.0] * len(names))
    of_run = frame.load(results, "demo", "dense").table.query("run == @names[0] and task == 'bios_storage'")
    bits = of_run[of_run["metric"] == "bits"].set_index("split")["value"]
    page = to_markdown(build(context(Comparisons(data)), [], []), results)
    assert "Value tables switched off" in page
    assert "off - on" in page
    assert bits["final"] - bits["table_off"] == pytest.approx(100.0)


def test_ratios_are_to_the_dense_model_of_the_same_base(results: Path) -> None:
    table = frame.load(results, "demo", "dense").table.drop_duplicates("run").set_index("run")
    memory = table[(table["family"] == "memory_plus") & (table["half_keys"] == 64) & (table["base"] == "w32")].iloc[0]
    assert memory["macs_ratio"] == pytest.approx(1.2)
    assert memory["params_ratio"] == pytest.approx((50_000 + 64 * 64 * 32) / 50_000)
    assert memory["memory_rows"] == 4096


def crossing(x: np.ndarray, y: np.ndarray, level: float) -> tuple[float, str]:
    one = Curves(np.zeros(len(x), int), x, y, 1)
    value, state = one.crossing(np.array([level]))
    return float(value[0]), str(state[0])


def test_e50_of_a_curve_linear_in_log_exposure_is_exact() -> None:
    for e50 in (1.7, 13.0, 50.0):
        value, state = crossing(EXPOSURES, curve(EXPOSURES, e50), BITS_MAX / 2)
        assert state == "reached"
        assert value == pytest.approx(e50, rel=1e-9)


def test_runs_that_never_cross_are_censored_and_early_ones_marked() -> None:
    assert crossing(EXPOSURES, curve(EXPOSURES, 300.0), BITS_MAX / 2) == (EXPOSURES[-1], "censored")
    assert crossing(EXPOSURES, curve(EXPOSURES, 0.5), BITS_MAX / 2) == (EXPOSURES[0], "early")
    assert crossing(np.array([0.0, 2.0]), np.array([0.0, 4.0]), 1.0)[0] == pytest.approx(0.5)


def test_values_of_many_curves_are_those_of_numpy_one_by_one() -> None:
    generator = np.random.default_rng(0)
    lengths = [3, 0, 7, 1, 5]
    x = np.concatenate([np.sort(generator.uniform(0.5, 50, length)) for length in lengths])
    y = generator.normal(size=len(x))
    run = np.repeat(np.arange(len(lengths)), lengths)
    curves = Curves(run, x, y, len(lengths))
    queries, targets = generator.integers(0, len(lengths), 200), generator.uniform(0.1, 80, 200)
    for log in (True, False):
        scale = np.log if log else np.asarray
        values = curves.at(targets, queries, log=log)
        clamped = curves.at(targets, queries, log=log, clamp=True)
        for at, target, value, inside in zip(queries, targets, clamped, values, strict=True):
            xs, ys = x[run == at], y[run == at]
            if not len(xs):
                assert np.isnan(value)
                continue
            assert value == pytest.approx(np.interp(scale(target), scale(xs), ys))
            assert np.isnan(inside) == (not xs[0] <= target <= xs[-1])


def test_wall_clock_to_e50_follows_the_exposures(results: Path) -> None:
    row = load(results, "demo").runs.iloc[0]
    assert row["wall_to_e50"] == pytest.approx(row["e50"] * 20_000 / 30_000, rel=1e-3)


def test_a_line_cut_by_a_kill_is_dropped_and_a_broken_one_named(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text('{"step": 1}\n{"step": 2')
    assert read_lines(path) == [{"step": 1}]
    for broken in ("nonsense", '{"step": 2, "loss": NaN}', 100_000 * "["):
        path.write_text(f'{{"step": 1}}\n{broken}\n')
        with pytest.raises(InputError, match="line 2"):
            read_lines(path)


def test_a_line_without_a_step_makes_its_run_a_damaged_one(tmp_path: Path) -> None:
    name = write_run(tmp_path, "dense", "w32", 0, 5.0)
    path = tmp_path / "runs" / name / "train.jsonl"
    path.write_text('{"loss": 1.0}\n' + path.read_text())
    scalars = read_run(path.parent).scalars
    assert (scalars["state"], scalars["cause"]) == ("damaged", "train.jsonl: line 1: has no step")


def test_published_tables_load_into_the_same_columns(tmp_path: Path, results: Path) -> None:
    published = results / "published" / "paper.csv"
    published.parent.mkdir()
    published.write_text(
        "source,table,base_size,model_family,memory_keys,total_params,tokens,task,metric,value,confidence\n"
        "arXiv:2412.09764,Table 1,1.3b,memory_plus,1048576,3.377b,1T,NQ,exact_match,13.68,A\n"
    )
    row = frame.load(results, None, "dense").table.iloc[-1]
    assert (row["base"], row["family"], row["memory_rows"]) == ("1.3b", "memory_plus", 2**20)
    assert (row["params_total"], row["tokens"], row["value"]) == (3.377e9, 1e12, 13.68)
    published.write_text("a,b\n1,2\n")
    with pytest.raises(InputError, match="columns metric, source, task, value are missing"):
        frame.load(results, None, "dense")


@pytest.mark.parametrize(
    ("text", "value"), [("984m", 984e6), ("1.3b", 1.3e9), ("15,000", 15000), ("1T", 1e12), ("512k", 512e3)]
)
def test_amounts_as_papers_write_them(text: str, value: float) -> None:
    assert frame.amount(text) == pytest.approx(value)
    assert np.isnan(frame.amount("not stated"))


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".json", ".parquet", ".csv.gz", ".jsonl.gz"])
def test_every_format_gives_the_same_table(tmp_path: Path, suffix: str) -> None:
    table = pd.DataFrame({"N": [1.0, 2.0], "name": ["a", "b"]})
    path = tmp_path / f"t{suffix}"
    if ".csv" in suffix:
        table.to_csv(path, index=False)
    elif ".parquet" in suffix:
        table.to_parquet(path)
    else:
        table.to_json(path, orient="records", lines=".jsonl" in suffix)
    pd.testing.assert_frame_equal(read_table(path), table, check_dtype=False)


CLEAN = pd.DataFrame({"N": [1, 2], "loss": [3.5, 3.25], "family": ["None", "NA"]})


@pytest.mark.parametrize(
    "text",
    [
        "N, loss, family\n1, 3.5, None\n2, 3.25, NA\n",
        "N,loss,family\n1,3.5,None,\n2,3.25,NA,\n",
        "N,loss,family,\n1,3.5,None,\n2,3.25,NA,\n",
        "# runs of May\n#\nN,loss,family\n1,3.5,None\n\n2,3.25,NA\n",
        'sep=;\nN;loss;family\n1;3.5;"None"\n2;3.25;NA\n',
        "\ufeffN\tloss\tfamily\r\n1\t3.5\tNone\r\n2\t3.25\tNA\r\n",
    ],
)
def test_the_usual_forms_of_csv_give_the_same_table(tmp_path: Path, text: str) -> None:
    (tmp_path / "t.csv").write_text(text, encoding="utf-8", newline="")
    pd.testing.assert_frame_equal(read_table(tmp_path / "t.csv"), CLEAN)


@pytest.mark.parametrize("mark", ["\u2028", "\x85", "\x0c"])
def test_only_newlines_separate_rows(tmp_path: Path, mark: str) -> None:
    (tmp_path / "t.csv").write_text(f"N,family\n1,a{mark}b\n2,c\n", encoding="utf-8")
    objects = [{"N": 1, "family": f"a{mark}b"}, {"N": 2, "family": "c"}]
    lines = "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in objects)
    (tmp_path / "t.jsonl").write_text(lines, encoding="utf-8")
    for name in ("t.csv", "t.jsonl"):
        assert read_table(tmp_path / name)["family"].tolist() == [f"a{mark}b", "c"]


def test_missing_numbers_are_missing_and_labels_stay_labels(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("loss,family,flag,note\nNA,null,true,\n1e3,7b,False,x\nnan,,TRUE,y\n")
    table = read_table(tmp_path / "t.csv")
    np.testing.assert_array_equal(table["loss"], [np.nan, 1000.0, np.nan])
    assert table["family"].tolist()[:2] == ["null", "7b"]
    assert table["family"].isna().tolist() == [False, False, True]
    assert table["flag"].tolist() == [True, False, True]
    assert table["note"].isna().tolist() == [True, False, False]


def test_numbers_in_json_are_never_dates_and_may_be_of_any_size(tmp_path: Path) -> None:
    flops = [10**18, 3 * 10**23]
    (tmp_path / "t.jsonl").write_text("".join(f'{{"train_time": 1600000000, "flops": {value}}}\n' for value in flops))
    (tmp_path / "t.json").write_text(json.dumps([{"train_time": 1600000000, "flops": value} for value in flops]))
    for name in ("t.jsonl", "t.json"):
        table = read_table(tmp_path / name)
        assert table["train_time"].tolist() == [1600000000] * 2
        assert table["flops"].tolist() == [1e18, 3e23]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.csv", "a,b\n1,2\n3,4,5\n", "line 3: 3 values, but the header has 2 columns"),
        ("x.csv", "a,a\n1,2\n", "'a' is in the header twice"),
        ("x.xlsx", "", "suffix is '.xlsx'"),
        ("x.csv", "a,b\n", "no rows"),
        ("x.csv", "", "not readable"),
        ("x.parquet", "nonsense", "not readable"),
        ("x.jsonl", "{", "not readable"),
        ("x.jsonl", '{"a": 1}\n\n{"a": 2\n', "line 3: "),
        ("x.jsonl", '{"a": 1}\nnull\n', "line 2: got null, allowed: an object"),
        ("x.jsonl", '{"a": 1}\n[1, 2]\n', "line 2: got [1, 2], allowed: an object"),
        ("x.json", '[{"a": 1}, 5]', "element 2: got 5, allowed: an object"),
        ("x.json", "5", "got 5, allowed: an array of objects"),
        pytest.param("x.json", "[" * 100_000, "not readable", id="deep"),
        pytest.param("x.jsonl", '{"a": 1}\n{"a": ' + "7" * 5000 + "}\n", "line 2: Exceeds the limit", id="digits"),
    ],
)
def test_unreadable_tables_are_one_line(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        read_table(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_labels_name_what_varies(tmp_path: Path) -> None:
    write_run(tmp_path, "memory_plus", "w32", 0, 5.0, half_keys=16)
    name = write_run(tmp_path, "memory_plus", "w32", 1, 5.0, half_keys=16)
    content = json.loads((tmp_path / "runs" / name / "cell.json").read_text())
    content["cell"]["train"]["lr"] = 0.5
    (tmp_path / "runs" / name / "cell.json").write_text(json.dumps(content))
    found = load(tmp_path, fallback="dense").runs["label"]
    assert sorted(found) == ["memory_plus k16 lr=0.008", "memory_plus k16 lr=0.5"]


def test_labels_omit_a_setting_without_a_value() -> None:
    cells = [{"model": {"family": "pkm", "base": "w32", "control": control}} for control in (None, "frozen")]
    assert labels(cells) == ["pkm", "pkm control=frozen"]


def test_labels_name_files_by_eight_digits_of_their_hash() -> None:
    model = {"family": "dense", "base": "w32"}
    cells: list[dict[str, Any]] = [
        {
            "model": model,
            "data": {
                "path": content,
                "fingerprint": content * 64,
                "validation": f"{content}.txt",
                "validation_fingerprint": content * 64,
                "tokenizer": {"kind": "file", "path": "t", "fingerprint": "c" * 64},
            },
        }
        for content in "ab"
    ]
    assert labels(cells) == ["dense data=aaaaaaaa validation=aaaaaaaa", "dense data=bbbbbbbb validation=bbbbbbbb"]
    tokenizer = cells[0]["data"]["tokenizer"] | {"path": "z"}
    moved = {"model": model, "data": cells[0]["data"] | {"path": "x", "validation": "y", "tokenizer": tokenizer}}
    assert pairing(moved) == pairing(cells[0]) != pairing(cells[1])


@pytest.mark.parametrize(
    ("grid", "remedy"),
    [
        ("nope", ""),
        ("dmo", "did you mean demo? "),
        ("laptop", "suite sweep laptop makes them; "),
        ("laptp", "did you mean laptop? suite sweep laptop makes its records; "),
    ],
)
def test_unknown_grid_is_named_with_the_known_ones(results: Path, grid: str, remedy: str) -> None:
    with pytest.raises(InputError) as error:
        frame.load(results, grid, "dense")
    assert str(error.value) == (f"{results / 'grids'}: grid {grid!r} has no records; {remedy}grids with records: demo")


def test_a_grid_without_runs_is_made_by_the_sweep_of_its_file(results: Path) -> None:
    record = results / "grids" / "demo" / "grid.json"
    source = {"source": "elsewhere/demo.yaml", "arguments": ["--set=train.lr=1e-3"], "runs": ["absent"]}
    record.write_text(json.dumps(source))
    with pytest.raises(InputError, match=r"suite sweep elsewhere/demo\.yaml --set=train\.lr=1e-3$"):
        load(results, "demo")


def test_a_path_that_is_too_long_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    long = 300 * "x"
    assert main(["frame", "--results", long]) == 2
    assert re.fullmatch(r"analysis: x{300}\S*: File name too long; use a shorter path\n", capsys.readouterr().err)
    assert main(["report", "--grid", long]) == 2
    assert capsys.readouterr().err.startswith("analysis: results/grids: grid 'xxx")


def test_analysis_imports_neither_torch_nor_suite() -> None:
    code = (
        "import sys, analysis.records.frame, analysis.comparisons.paired, analysis.cli.main; "
        "bad = {'torch', 'suite', 'scipy', 'matplotlib'} & set(sys.modules); assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_plans_give_predicted_wall_clock(results: Path) -> None:
    name = load(results, "demo").runs["run"].iloc[0]
    cells = [{"run": name, "gpus": 4, "gpu_hours": 2.0}, {"run": "other", "gpus": None, "gpu_hours": 0}]
    (results / "plans").mkdir()
    record = results / "runs" / name / "cell.json"

    def write_plan(file: str, gpu: str) -> None:
        plan = {"grid": "demo", "assumed": {"gpu": {"name": gpu}}, "cells": cells}
        (results / "plans" / file).write_text(json.dumps(plan))

    write_plan("demo-h100.json", "H100 SXM 80 GB")
    for device in (None, "cpu", "NVIDIA A100-SXM4-80GB"):
        record.write_text(json.dumps(json.loads(record.read_text()) | ({"device": device} if device else {})))
        assert frame.load(results, "demo", "dense").table["predicted_wall_s"].isna().all()
    record.write_text(json.dumps(json.loads(record.read_text()) | {"device": "NVIDIA H100 80GB HBM3"}))
    table = frame.load(results, "demo", "dense").table
    assert table.loc[table["run"] == name, "predicted_wall_s"].unique().tolist() == [1800.0]
    write_plan("demo-h100-again.json", "H100 SXM 80 GB")
    assert frame.load(results, "demo", "dense").table["predicted_wall_s"].isna().all()
