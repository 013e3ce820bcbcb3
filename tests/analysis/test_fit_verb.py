"""The `fit` verb on files: the document, the columns as pandas.eval reads them, and one line for every fault."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from simulated_tables import TRUTH, table

from analysis.cli.fit import run
from analysis.cli.main import main
from analysis.errors import InputError
from analysis.fits.columns import expressions
from analysis.fits.intervals import HeldOut
from analysis.fits.problem import Problem
from analysis.laws.builtin import LAWS
from analysis.studies.request import Request
from analysis.studies.select import cell_errors, choose


def call(path: Path, capsys: pytest.CaptureFixture[str], *options: str) -> tuple[int, str, str]:
    code = main(["fit", "--data", str(path), *options])
    shown = capsys.readouterr()
    return code, shown.out, shown.err


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "runs.csv"
    frame = table("chinchilla", 0.005, 1)
    frame["Training FLOP"] = 6 * frame["N"] * frame["D"]
    frame["run name"] = [f"r{i}" for i in range(len(frame))]
    frame.rename(columns={"N": "Model Size"}).to_csv(path, index=False)
    return path


GOOD = "N=`Model Size`,D=`Training FLOP`/(6*`Model Size`),L=L"


def test_document_has_the_agreed_keys_and_is_all_of_stdout(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--law", "chinchilla", "--columns", GOOD, "--huber", "1e-3", "--drop-highest", "5", "--bootstrap", "50")
    code, out, err = call(data, capsys, *options, "--seed", "0", "--minimize", "mean", "--json")
    document = json.loads(out)
    assert (code, err) == (0, "")
    assert {"law", "n", "parameters", "objective", "intervals", "identified", "holdout", "minimize"} <= document.keys()
    assert list(document["parameters"]) == ["A", "B", "E", "alpha", "beta"]
    assert (document["law"], document["n"], document["minimize"]) == ("chinchilla", 75, "mean")
    assert all(low < document["parameters"][name] < high for name, (low, high) in document["intervals"].items())
    assert document["holdout"]["n"] >= 7
    again = call(data, capsys, *options, "--seed", "0", "--minimize", "mean", "--json")[1]
    assert again == out


def test_text_prints_the_held_out_score_next_to_the_law(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(data, capsys, "--law", "chinchilla", "--columns", GOOD, "--predict", "`run name` == 'r3'")
    assert code == 0
    assert "held out" in out
    assert "row 3: predicted" in out


def test_every_format_gives_the_same_fit(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    frame = pd.read_csv(data)
    lines = {"orient": "records", "lines": True, "double_precision": 15}
    frame.to_parquet(tmp_path / "plain.parquet")
    frame.set_index("Training FLOP").to_parquet(tmp_path / "indexed.parquet")
    frame.to_json(tmp_path / "runs.jsonl", **lines)
    frame.to_json(tmp_path / "lines.json", **lines)
    frame.to_json(tmp_path / "array.json", orient="records", double_precision=15)
    frame.rename(columns={"run name": "run; name"}).to_csv(tmp_path / "indexed.csv")
    frame.to_csv(tmp_path / "semicolons.csv", sep=";", encoding="utf-8-sig")
    frame.to_csv(tmp_path / "tabs.csv", sep="\t")
    for ending in (".gz", ".bz2", ".xz", ".zip"):
        frame.to_csv(tmp_path / f"runs.csv{ending}", index=False)
    files = sorted(tmp_path.iterdir())
    assert len(files) == 13
    found = [json.loads(call(path, capsys, "--law", "chinchilla", "--columns", GOOD, "--json")[1]) for path in files]
    for path, document in zip(files, found, strict=True):
        assert document["parameters"] == pytest.approx(found[0]["parameters"], rel=1e-6), path


def test_words_among_numbers_can_be_left_out(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    frame = pd.read_csv(data).astype(object)
    frame.loc[3, "L"] = "diverged"
    frame.to_csv(data, index=False)
    options = ("--law", "chinchilla", "--columns", GOOD, "--json")
    assert "'diverged' is not a number (row 3)" in call(data, capsys, *options)[2]
    assert json.loads(call(data, capsys, *options, "--where", "L != 'diverged'")[1])["n"] == 79


def test_infinite_outcomes_are_dropped_on_request_and_counted(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    frame = pd.read_csv(data)
    frame.loc[[3, 5], "L"] = [np.inf, np.nan]
    frame.to_csv(data, index=False)
    options = ("--law", "chinchilla", "--columns", GOOD, "--json", "--drop-missing")
    document = json.loads(call(data, capsys, *options)[1])
    assert document["n"] == len(frame) - 2
    assert any(line.startswith(f"2 of {len(frame)} rows have missing") for line in document["warnings"])


def test_rows_that_repeat_others_are_counted(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--law", "chinchilla", "--columns", GOOD, "--json")
    assert not any("repeat" in line for line in json.loads(call(data, capsys, *options)[1])["warnings"])
    frame = pd.read_csv(data)
    pd.concat([frame, frame]).to_csv(data, index=False)
    (line,) = (line for line in json.loads(call(data, capsys, *options)[1])["warnings"] if "repeat" in line)
    assert line.startswith(f"{len(frame)} of {2 * len(frame)} rows repeat another one (first: row {len(frame)})")


def test_one_laws_predictions_are_the_next_ones_input(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    frame = pd.read_csv(data)
    frame["error"] = 0.9 - 2.2 * np.exp(-0.7 * frame["L"])
    frame["seed"] = np.arange(len(frame))
    frame.to_csv(data, index=False)
    large = "`Model Size` >= 5e9"
    law = ("--law", "chinchilla", "--columns", GOOD, "--where", f"not ({large})")
    fitted = json.loads(call(data, capsys, *law, "--out", str(tmp_path / "next.csv"), "--predict", large, "--json")[1])
    written = pd.read_csv(tmp_path / "next.csv")
    pd.testing.assert_frame_equal(written[frame.columns], frame)
    assert (~written["fitted"]).equals(frame["Model Size"] >= 5e9)
    rows = [item["row"] for item in fitted["predictions"]]
    assert written["predicted"][rows].to_list() == pytest.approx([i["predicted"] for i in fitted["predictions"]])
    link = ("--law", "exponential_link", "--columns", "L=L.where(fitted, predicted),y=error", "--where", "fitted")
    document = json.loads(call(tmp_path / "next.csv", capsys, *link, "--predict", "not fitted", "--json")[1])
    assert document["parameters"] == pytest.approx({"eps": 0.9, "k": 2.2, "gamma": 0.7}, rel=1e-6)
    exact = [0.9 - 2.2 * np.exp(-0.7 * loss) for loss in written["predicted"][~written["fitted"]]]
    assert [item["predicted"] for item in document["predictions"]] == pytest.approx(exact)


def test_what_cannot_be_written_is_one_line_and_leaves_nothing(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(tmp_path.iterdir())
    for out, message in (("no/folder/x.csv", "cannot be written"), ("x.xlsx", "allowed: .csv, .jsonl, .parquet")):
        code, shown, error = call(data, capsys, "--law", "chinchilla", "--columns", GOOD, "--out", str(tmp_path / out))
        assert (code, shown, error.count("\n")) == (2, "", 1)
        assert message in error
    assert sorted(tmp_path.iterdir()) == before
    assert "a folder, allowed: a file" in call(tmp_path, capsys, "--law", "power", "--columns", "x=x,y=y")[2]


def test_where_a_table_cannot_be_written_is_found_before_the_fit(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    law = ("--law", "chinchilla", "--columns", GOOD, "--where", "no_such_column > 0")
    for out in ("no/folder/x.csv", "x.xlsx"):
        assert "--out" in call(data, capsys, *law, "--out", str(tmp_path / out))[2]


@pytest.mark.parametrize(
    ("several", "files", "line"),
    [
        (("--by", "kind"), ("--out", "x.csv"), "--out: not allowed together with --by"),
        (("--by", "kind"), ("--figure", "x"), "--figure: not allowed together with --by"),
        (("--group", "kind"), ("--out", "x.csv"), "--out: not allowed together with --group"),
    ],
)
def test_files_that_fits_of_groups_do_not_write_are_refused(
    data: Path, capsys: pytest.CaptureFixture[str], several: tuple[str, str], files: tuple[str, str], line: str
) -> None:
    code, shown, error = call(data, capsys, "--law", "chinchilla", "--columns", GOOD, *several, *files)
    assert (code, shown, error) == (2, "", f"analysis: {line}\n")


def test_index_of_the_table_does_not_matter() -> None:
    frame = table("chinchilla", 0.01, 0)
    doubled = frame.set_index(np.zeros(len(frame), int))
    assert run(doubled, Request("chinchilla", "N=N,D=D,L=L"))["parameters"] == pytest.approx(
        run(frame, Request("chinchilla", "N=N,D=D,L=L"))["parameters"], rel=1e-12
    )


def test_integers_do_not_overflow_in_expressions() -> None:
    frame = table("overtraining", 0.0, 0)
    n = np.sqrt(frame["C"] / 6 / frame["M"])
    frame["N"], frame["D"] = n.round().astype("int64"), (frame["M"] * n).round().astype("int64")
    found = run(frame, Request("overtraining", "C=6*N*D,M=D/N,L=L"))
    assert found["parameters"] == pytest.approx(TRUTH["overtraining"], rel=1e-3)


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("N=`a,b=c`,L=loss", {"N": "`a,b=c`", "L": "loss"}),
        ("N = f(x, y) , L=(a==b)*1.0", {"N": "f(x, y)", "L": "(a==b)*1.0"}),
    ],
)
def test_column_expressions_split_where_they_should(text: str, parsed: dict[str, str]) -> None:
    assert expressions(text) == parsed


def test_diagnostics_are_printed_as_text_too(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    frame = pd.read_csv(data)
    frame.loc[11, "L"] *= 1.3
    frame.to_csv(data, index=False)
    out = call(data, capsys, "--law", "chinchilla", "--columns", GOOD, "--diagnostics")[1]
    assert "largest residual when left out: -0.2" in out
    assert "(row 11)" in out
    assert "without any one point: A " in out
    assert "Hoffmann et al. 2022" in out
    assert "exponent of tokens" in out


def test_fixed_parameters_stay(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--law", "chinchilla", "--columns", GOOD, "--fix", "beta=0.4", "--json")
    document = json.loads(call(data, capsys, *options)[1])
    assert document["parameters"]["beta"] == 0.4
    assert "beta" not in document["intervals"]


def faults(frame: pd.DataFrame) -> dict[str, tuple[pd.DataFrame, list[str], str]]:
    """Name -> (data, options, what the line must say)."""
    law = ["--law", "chinchilla", "--columns", "N=N,D=D,L=L"]
    some = frame.copy()
    some.loc[3, "L"] = np.nan
    below = frame.copy()
    below.loc[5, "N"] = -1.0
    words = frame.assign(L="about 3")
    return {
        "one point": (frame.iloc[:1], law, "a single point"),
        "too few": (frame.iloc[[0, 9, 30, 50, 70]], law, "5 points are too few for law chinchilla"),
        "NaN": (some, law, "L is missing (NaN) in 1 of 80 rows"),
        "negative": (below, law, "N is -1 in row 5 (1 such rows); law chinchilla needs it above 0"),
        "constant output": (frame.assign(L=2.0), law, "L is constant (2)"),
        "constant input": (frame.assign(D=1e9), law, "D is constant (1e+09)"),
        "infinite": (
            frame.assign(L=np.where(frame.index == 0, np.inf, frame["L"])),
            law,
            "L is inf in row 0 (1 such rows)",
        ),
        "words": (words, law, "'about 3' is not a number"),
        "unknown column": (frame, ["--law", "chinchilla", "--columns", "N=nope,D=D,L=L"], "unknown column 'nope'"),
        "unknown quoted": (frame, ["--law", "chinchilla", "--columns", "N=`my N`,D=D,L=L"], "unknown column 'my N'"),
        "bad syntax": (frame, ["--law", "chinchilla", "--columns", "N=N+,D=D,L=L"], "cannot be evaluated"),
        "no equals": (frame, ["--law", "chinchilla", "--columns", "N"], "is not NAME=EXPRESSION"),
        "missing name": (frame, ["--law", "chinchilla", "--columns", "N=N,L=L"], "missing: D (D: training tokens)"),
        "unknown law": (frame, ["--law", "magic", "--columns", "N=N,L=L"], "--law: got 'magic', allowed: joint, power"),
        "no columns": (frame, ["--law", "chinchilla"], "--columns: missing"),
        "bad delta": (frame, [*law, "--huber", "0"], "--huber: got 0, allowed: above 0"),
        "bad where": (frame, [*law, "--where", "N > 1e99"], "no row satisfies"),
        "where not a condition": (frame, [*law, "--where", "N * 2"], "allowed: a condition"),
        "bad fix": (frame, [*law, "--fix", "zeta=1"], "--fix: got 'zeta'"),
        "fixed beyond its range": (frame, [*law, "--fix", "alpha=-1"], "--fix: got alpha=-1, allowed: at least 0"),
        "fixed twice": (frame, [*law, "--fix", "E=1", "--fix", "E=2"], "--fix: E is given twice"),
        "few places": (
            pd.concat([frame.iloc[[0, 9, 30, 50]]] * 20),
            law,
            "80 points at 4 different N, D are too few for law chinchilla: it has 5 parameters",
        ),
        "D of N": (frame.assign(D=20 * frame["N"]), law, "D is a power of N in all rows; law chinchilla"),
        "column of no law": (
            frame,
            ["--law", "chinchilla", "--columns", "N=N,D=D,L=L,M=N"],
            "--columns: got 'M', allowed for law chinchilla: N, D, L",
        ),
        "not of the table": (frame, ["--law", "chinchilla", "--columns", "N=@frame.N,D=D,L=L"], "unknown column"),
        "bad number": (frame, [*law, "--huber", "x"], "--huber"),
        "bad seed": (frame, [*law, "--seed", "-1"], "--seed: got -1, allowed: 0 or more"),
        "weights of words": (words, [*law, "--weights", "L"], "'about 3' is not a number"),
        "cluster without draws": (frame, [*law, "--cluster", "N"], "needs --bootstrap DRAWS"),
        "missing cluster": (
            frame.assign(c=np.where(frame.index < 4, np.nan, 1.0)),
            [*law, "--cluster", "c", "--bootstrap", "9"],
            "--cluster: c is missing in 4 of 80 rows",
        ),
        "few clusters": (
            frame.assign(c=frame.index % 5),
            [*law, "--cluster", "c", "--bootstrap", "9"],
            "--cluster: 5 groups are too few to resample for 5 parameters",
        ),
        "lonely strata": (
            frame.assign(s=frame.index),
            [*law, "--strata", "s", "--bootstrap", "9"],
            "every stratum holds a single run",
        ),
        "cluster across strata": (
            frame,
            [*law, "--cluster", "N", "--strata", "D", "--bootstrap", "9"],
            "lies in more than one stratum",
        ),
        "signed on logarithms": (
            table("loglinear").assign(y=-1.0 * np.arange(30)),
            ["--law", "loglinear", "--columns", "R=R,y=y", "--huber", "1"],
            "(others: --residuals linear)",
        ),
        "bad holdout": (frame, [*law, "--holdout", "1.5"], "--holdout: got 1.5"),
        "drop all": (frame, [*law, "--drop-highest", "100"], "no rows are left"),
        "single D in a joint law": (
            table("joint1").assign(D=1e10),
            ["--law", "joint1", "--columns", "N=N,M=M,D=D,L=L"],
            "D is constant (1e+10); law joint1 needs it to vary; leave D out",
        ),
        "joint4 without D": (table("joint1"), ["--law", "joint4", "--columns", "N=N,M=M,L=L"], "law joint4 needs D"),
        "rows of zero": (table("saturating"), ["--law", "loglinear", "--columns", "R=R,y=y"], "R is 0 in row 0"),
    }


@pytest.mark.parametrize("name", faults(table("chinchilla")))
def test_faults_of_fit_are_one_line_and_exit_2(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    frame, options, message = faults(table("chinchilla"))[name]
    path = tmp_path / "runs.csv"
    frame.to_csv(path, index=False)
    code, out, err = call(path, capsys, *options)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert message in err


def test_missing_rows_can_be_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    frame = table("chinchilla", 0.0)
    frame.loc[3, "L"] = np.nan
    frame.to_csv(tmp_path / "runs.csv", index=False)
    options = ("--law", "chinchilla", "--columns", "N=N,D=D,L=L", "--drop-missing", "--json")
    assert json.loads(call(tmp_path / "runs.csv", capsys, *options)[1])["n"] == 79


@pytest.mark.slow
@pytest.mark.parametrize("name", ["joint1", "joint3"])
def test_joint_selection_takes_a_law_that_predicts_as_well_as_the_true_one(name: str) -> None:
    found = run(table(name, 0.001, 3), Request("joint", "N=N,M=M,D=D,L=L"))
    scores = found["scores"]
    assert set(scores) == {"joint1", "joint2", "joint3", "joint4"}
    assert scores[found["selected"]] <= 2 * scores[name]
    assert found["law"] == found["selected"]


def test_joint_law_on_one_token_budget_has_no_token_term() -> None:
    frame = table("joint1", 0.001, 0)
    frame = frame[frame["D"] == frame["D"].max()].drop(columns="D")
    found = run(frame, Request("joint", "N=N,M=M,L=L"))
    assert set(found["refused"]) == {"joint4"}
    assert "B" not in found["parameters"]


def test_held_out_cells_can_be_declared_by_a_condition() -> None:
    frame = table("chinchilla", 0.002, 0)
    found = run(frame, Request("chinchilla", "N=N,D=D,L=L", holdout_by="N >= 5e9"))["holdout"]
    assert (found["n"], found["rule"]) == (int((frame["N"] >= 5e9).sum()), "where N >= 5e9")


def test_a_run_is_held_out_with_all_its_checkpoints() -> None:
    frame = table("chinchilla", 0.005, 1)
    frame["run"] = frame["N"].rank(method="dense")  # one run a size, its checkpoints at every D
    plain = Request("chinchilla", "N=N,D=D,L=L", bootstrap=20, holdout=0.15)
    rows = run(frame, plain)["holdout"]["n"]
    whole = run(frame, replace(plain, cluster="run"))["holdout"]
    largest = int((frame["N"] == frame["N"].max()).sum())
    assert rows % largest
    assert whole["n"] % largest == 0
    assert whole["rule"] == "largest by the size of law chinchilla, whole run"


def test_a_cell_counts_once_in_the_choice_however_many_runs_it_has() -> None:
    x = {"N": np.array([1.0, 2.0, 2.0, 2.0]), "M": np.array([0.0, 3.0, 3.0, 3.0]), "D": np.full(4, 5.0)}
    posed = Problem(LAWS["joint1"], x, np.ones(4))
    held = HeldOut("", np.arange(4), np.exp([0.1, 0.2, -0.4, 0.6]), np.ones(4))
    assert cell_errors(posed, held) == pytest.approx([0.1, 0.4])


@pytest.mark.parametrize("unit", [1e-100, 1e100])
def test_units_at_the_ends_of_the_floats_are_fitted(unit: float) -> None:
    frame = table("chinchilla", 0.005, 1)
    plain = run(frame, Request("chinchilla", "N=N,D=D,L=L"))
    other = run(frame * unit, Request("chinchilla", "N=N,D=D,L=L"))
    for name in ("alpha", "beta"):
        assert other["parameters"][name] == pytest.approx(plain["parameters"][name], rel=1e-5)
        assert other["intervals"][name] == pytest.approx(plain["intervals"][name], rel=1e-4)


def test_fewest_parameters_within_one_standard_error_win() -> None:
    scores = {
        "big": np.array([0.01, 0.03, 0.02]),
        "small": np.array([0.02, 0.03, 0.025]),
        "poor": np.array([0.5, 0.4, 0.6]),
    }
    assert choose(scores, {"big": 8, "small": 6, "poor": 2}) == "small"
    assert choose({"big": np.array([0.01]), "small": np.array([0.02])}, {"big": 8, "small": 6}) == "big"


@pytest.mark.parametrize("name", ["chinchilla", "isoflop", "saturating"])
def test_the_fit_can_be_drawn(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    frame = table(name, 0.01, 0)
    frame.to_csv(tmp_path / "runs.csv", index=False)
    columns = ",".join(f"{column}={column}" for column in frame.columns)
    options = ("--law", name, "--columns", columns, "--figure", str(tmp_path / "figures"), "--json")
    drawn = json.loads(call(tmp_path / "runs.csv", capsys, *options)[1])["figure"]
    assert [Path(path).name for path in drawn] == [
        f"{figure}-{name}.{kind}" for figure in ("fit", "curves") for kind in ("png", "pdf", "svg")
    ]
    assert all(Path(path).stat().st_size > 5000 for path in drawn)


def test_a_fit_without_held_out_points_can_be_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    x = np.geomspace(1e3, 1e9, 12)
    y = 40 * x**-0.1 * np.exp(np.random.default_rng(0).normal(0, 0.02, 12))
    pd.DataFrame({"x": x, "y": y}).to_csv(tmp_path / "runs.csv", index=False)
    options = ("--law", "power", "--columns", "x=x,y=y", "--holdout", "0", "--figure", str(tmp_path / "figures"))
    assert call(tmp_path / "runs.csv", capsys, *options)[0] == 0
    assert (tmp_path / "figures" / "curves-power.png").exists()


def test_what_json_cannot_hold_is_null(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    x = np.geomspace(1e3, 1e9, 12)
    y = 40 * x**-0.1 * np.exp(np.random.default_rng(0).normal(0, 0.02, 12))
    pd.DataFrame({"x": x, "y": y}).to_csv(tmp_path / "runs.csv", index=False)
    document = json.loads(call(tmp_path / "runs.csv", capsys, "--law", "power", "--columns", "x=x,y=y", "--json")[1])
    assert document["identified"]["E"] is False
    assert "E: not identified" in " ".join(document["warnings"])
    assert not any(isinstance(v, float) and math.isinf(v) for v in document["parameters"].values())


def isoflops() -> pd.DataFrame:
    """Nine sizes at each of six budgets under Chinchilla's law, and one budget with two sizes."""
    rows = []
    for budget in np.geomspace(1e18, 1e21, 6):
        best = 1.2 * (budget / 6) ** 0.5
        for n in best * np.geomspace(0.25, 4, 9):
            rows.append((budget, n, 1.8 + 400 * n**-0.34 + 400 * (budget / 6 / n) ** -0.34))
    rows += [(5e21, 1e9, 2.0), (5e21, 2e9, 2.1)]
    return pd.DataFrame(rows, columns=["C", "N", "L"])


def test_isoflop_parabolas_give_the_compute_optimal_exponent(tmp_path: Path) -> None:
    request = Request("isoflop", "N=N,L=L", group="C", figure=tmp_path)
    found = run(isoflops(), request)
    assert len(found["groups"]) == 6
    assert list(found["refused"]) == ["5e+21"]
    assert found["outside"] == []
    for group in found["groups"]:  # equal exponents and coefficients: the optimum is N = D = sqrt(C / 6)
        assert group["parameters"]["Nopt"] == pytest.approx((group["C"] / 6) ** 0.5, rel=0.05)
    assert found["frontier"]["parameters"]["a"] == pytest.approx(0.5, abs=0.01)
    assert (tmp_path / "isoflop.png").exists()


def test_budgets_read_off_a_plot_are_one_within_five_percent() -> None:
    frame = isoflops().iloc[:54]
    blurred = frame.assign(C=frame["C"] * np.exp(np.random.default_rng(0).uniform(-0.02, 0.02, 54)))
    found, exact = (run(table, Request("isoflop", "N=N,L=L", group="C")) for table in (blurred, frame))
    assert [group["C"] for group in exact["groups"]] == pytest.approx(sorted(set(frame["C"])), rel=1e-12)
    assert [group["n"] for group in found["groups"]] == [9] * 6
    assert found["frontier"]["parameters"]["a"] == pytest.approx(exact["frontier"]["parameters"]["a"], abs=0.01)


def test_isoflops_are_printed_a_line_per_budget(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    isoflops().to_csv(tmp_path / "runs.csv", index=False)
    code, out, _ = call(tmp_path / "runs.csv", capsys, "--law", "isoflop", "--columns", "N=N,L=L", "--group", "C")
    assert code == 0
    assert out.count("\n  C ") == 6
    assert "left out: budget 5e+21: 2 points are too few" in out
    assert "frontier: y = k C^a" in out


def test_an_isoflop_maximum_is_not_an_optimum() -> None:
    frame = isoflops().iloc[:54]
    found = run(frame.assign(L=10 - frame["L"]), Request("isoflop", "N=N,L=L", group="C"))
    assert len(found["outside"]) == 6
    assert "needs three budgets" in found["frontier"]["reason"]


def test_groups_are_for_isoflops_only() -> None:
    with pytest.raises(InputError, match="--group: got law 'power', allowed: isoflop"):
        run(isoflops(), Request("power", "x=N,y=L", group="C"))
