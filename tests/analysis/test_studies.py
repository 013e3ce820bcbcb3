"""What follows from a fit: predictions, optima, groups, the comparison of laws, and isoFLOP budgets."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from simulated_tables import BOUNDS, TRUTH, bounded_truth, simulated, table

from analysis.cli.fit import run
from analysis.cli.main import main
from analysis.errors import InputError
from analysis.fits.budgets import budgets
from analysis.fits.fit import fit
from analysis.fits.profile import profile
from analysis.fits.quantities import by_differences, interval, intervals, prediction, predictions
from analysis.laws.builtin import LAWS
from analysis.studies.groups import fit_groups
from analysis.studies.request import Request


def call(capsys: pytest.CaptureFixture[str], *options: str) -> dict:
    assert main([*options, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.fixture
def runs(tmp_path: Path) -> str:
    table("chinchilla", 0.01, 1).to_csv(tmp_path / "runs.csv", index=False)
    return str(tmp_path / "runs.csv")


LAW = ("--law", "chinchilla", "--columns", "N=N,D=D,L=L")


def test_interval_of_a_prediction_of_a_linear_law_is_its_t_interval() -> None:
    problem = simulated("loglinear", 0.05, 1)
    found = fit(problem)
    x = np.stack([np.ones(problem.n), np.log(problem.x["R"])], 1)
    point = np.array([1.0, np.log(1e12)])
    variance = point @ np.linalg.inv(x.T @ x) @ point * (found.residuals**2).sum() / (problem.n - 2)
    centre, reach = point @ list(found.parameters.values()), 2.048407 * np.sqrt(variance)
    ends = interval(found, prediction(found, {"R": 1e12}), profile(found))
    assert ends == pytest.approx((centre - reach, centre + reach), rel=1e-3)


def test_interval_of_a_parameter_as_a_quantity_is_its_profile() -> None:
    found = fit(simulated("chinchilla", 0.01, 0))
    ends = profile(found)
    low, high = interval(found, by_differences(lambda theta: theta[:, 3]), ends)
    assert np.exp([low, high]) == pytest.approx(ends["alpha"], rel=2e-3)


POINTS = {
    "power": {"x": np.array([1e4, 1e9, 1e13])},
    "chinchilla": {"N": np.array([1e9, 1e11, 1e8]), "D": np.array([3e10, 1e13, 1e14])},
}


@pytest.mark.parametrize(
    ("case", "draws"),
    [
        ("power, no offset", 20),
        pytest.param("power, no offset", 200, marks=pytest.mark.slow),
        pytest.param("chinchilla, no offset", 200, marks=pytest.mark.slow),
        pytest.param("power", 200, marks=pytest.mark.slow),
        pytest.param("chinchilla", 200, marks=pytest.mark.slow),
    ],
)
def test_intervals_of_predictions_cover_at_a_bound_and_inside(case: str, draws: int) -> None:
    """At points inside the data and far beyond: predictions, and the bands of curves, which are the same intervals."""
    name, values = (BOUNDS[case][0], bounded_truth(case)) if case in BOUNDS else (case, TRUTH[case])
    truth = np.log(LAWS[name].value(values, POINTS[name]))
    hits = np.zeros(3)
    for seed in range(1000, 1000 + draws):
        found = fit(simulated(name, 0.01, seed, values=values))
        ends = intervals(found, predictions(found, POINTS[name]), 3, profile(found))
        hits += (ends[:, 0] <= truth) & (truth <= ends[:, 1])
    least = 0.90 if draws == 200 else 0.75
    assert (hits / draws >= least).all()
    assert hits.mean() / draws <= 0.99 or draws < 200


def test_predict_prints_points_of_both_kinds(runs: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pd.DataFrame({"N": [1e9], "D": [2e10]}).to_csv(tmp_path / "points.csv", index=False)
    document = call(
        capsys, "predict", "--data", runs, *LAW, "--at", "N=7e10,D=1.4e12", "--points", str(tmp_path / "points.csv")
    )
    far, near = document["predictions"]
    assert (far["extrapolated"], near["extrapolated"]) == (["N", "D"], [])
    for item in (far, near):
        (low, high), (run_low, run_high) = item["interval"], item["run_interval"]
        assert run_low < low < item["predicted"] < high < run_high


def test_the_optimum_is_the_analytic_one(runs: str, capsys: pytest.CaptureFixture[str]) -> None:
    document = call(capsys, "optimum", "--data", runs, *LAW, "--budget", "1e21,1e23", "--ratio", "100")
    p = document["fit"]["parameters"]
    for item in document["optima"]:
        g = (p["alpha"] * p["A"] / (p["beta"] * p["B"])) ** (1 / (p["alpha"] + p["beta"]))
        best = g * (item["C"] / 6) ** (p["beta"] / (p["alpha"] + p["beta"]))
        assert item["N"] == pytest.approx(best, rel=1e-3)
        assert item["N"] * item["D"] * 6 == pytest.approx(item["C"], rel=1e-6)
        assert item["N_interval"][0] < item["N"] < item["N_interval"][1]
        assert item["D_interval"][0] < item["D"] < item["D_interval"][1]
        assert item["at_ratio"]["D"] == pytest.approx(100 * item["at_ratio"]["N"])
        assert item["at_ratio"]["loss"] > item["loss"]


def isoflops(scatter: float, seed: int = 0) -> pd.DataFrame:
    """Seven sizes at each of five budgets whose FLOPs scatter about the nominal one."""
    generator, rows = np.random.default_rng(seed), []
    for budget in 1e18 * 3.0 ** np.arange(5):
        for n in (budget / 6) ** 0.5 * np.geomspace(0.25, 4, 7):
            loss = 1.8 + 400 * n**-0.34 + 400 * (budget / 6 / n) ** -0.34
            rows.append((budget, budget * np.exp(generator.uniform(-scatter, scatter)), n, loss))
    return pd.DataFrame(rows, columns=["nominal", "C", "N", "L"])


@pytest.mark.parametrize("scatter", [0.0, 0.02, 0.05, 0.1])
def test_budgets_belong_together_by_gaps_or_by_a_column(scatter: float) -> None:
    data = isoflops(scatter)
    by_gaps, by_column = (run(data, Request("isoflop", "N=N,L=L", group=group)) for group in ("C", "nominal"))
    assert [group["n"] for group in by_gaps["groups"]] == [7] * 5
    assert [group["C"] for group in by_column["groups"]] == pytest.approx(1e18 * 3.0 ** np.arange(5))
    for kind in ("frontier", "frontier_unweighted"):
        assert by_gaps[kind]["parameters"]["a"] == pytest.approx(0.5, abs=0.02)


def test_close_budgets_of_exact_flops_stay_separate() -> None:
    assert len(set(budgets(np.repeat(1e18 * 1.1 ** np.arange(6), 5)))) == 6
    assert len(set(budgets(np.array([1e18, 1.03e18, 1.05e18])))) == 1


def test_an_unidentified_optimum_takes_no_part_in_the_frontier() -> None:
    data = isoflops(0.0)
    rows = data["nominal"] == data["nominal"].max()
    data.loc[rows, "L"] = 2.5 + np.random.default_rng(0).normal(0, 0.2, int(rows.sum()))
    found = run(data, Request("isoflop", "N=N,L=L", group="nominal"))
    assert found["unidentified"] == [data["nominal"].max()]
    assert found["frontier"]["n"] == 4


def test_the_optimum_from_isoflops_is_the_frontier(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    isoflops(0.0).to_csv(tmp_path / "runs.csv", index=False)
    options = ("--law", "isoflop", "--columns", "N=N,L=L", "--group", "C", "--budget", "1e19,1e22")
    inside, outside = call(capsys, "optimum", "--data", str(tmp_path / "runs.csv"), *options)["optima"]
    assert inside["N"] == pytest.approx((1e19 / 6) ** 0.5, rel=0.05)
    assert (inside["inside"], outside["inside"]) == (True, False)


def test_groups_share_what_is_stated_and_a_test_tells_whether_they_may() -> None:
    equal = pd.concat([table("power", 0.01, 0).assign(g="a"), table("power", 0.01, 1).assign(g="b")])
    equal.loc[equal["g"] == "b", "y"] *= 1.5
    found = fit_groups(equal, Request("power", "x=x,y=y"), "g", ["alpha"])
    assert {item["group"] for item in found["groups"]} == {"a", "b"}
    assert set(found["shared"]["parameters"]) == {"alpha", "E[a]", "A[a]", "E[b]", "A[b]"}
    low, high = found["shared"]["intervals"]["alpha"]
    assert low <= TRUTH["power"]["alpha"] <= high
    assert all(high - low < item["intervals"]["alpha"][1] - item["intervals"]["alpha"][0] for item in found["groups"])
    assert found["test"]["degrees"] == [1, 74]
    assert found["test"]["p"] > 0.01
    x = equal.loc[equal["g"] == "b", "x"]
    equal.loc[equal["g"] == "b", "y"] = 1.7 + 40 * x**-0.4
    assert fit_groups(equal, Request("power", "x=x,y=y"), "g", ["alpha"])["test"]["p"] < 1e-6


def test_rolling_holdout_selects_the_true_law(runs: str, capsys: pytest.CaptureFixture[str]) -> None:
    laws = ("--law", "chinchilla", "--law", "outer", "--formula", "L = E + A*N**-a", "--law", "capacity")
    columns = ("--columns", "N=N,D=D,L=L", "--size", "N")
    document = call(capsys, "select", "--data", runs, *laws, *columns)
    assert document["selected"] == "chinchilla"
    assert "capacity" in document["refused"]
    errors = {item["law"]: item["mean_error"] for item in document["laws"]}
    assert errors["chinchilla"] < errors["L = E + A*N**-a"]


def test_each_formula_of_a_selection_has_its_own_parameters(runs: str, capsys: pytest.CaptureFixture[str]) -> None:
    formulas = ("--formula", "L = E + A*N**-a", "--formula", "L = E + A*N**-a + B*D**-b")
    rest = ("--data", runs, "--columns", "N=N,D=D,L=L", "--size", "N", "--blocks", "1")
    rules = ("--parameters", "a = 0.5", "--parameters", "a = b")
    selected = {item["law"]: item for item in call(capsys, "select", *rest, *formulas, *rules)["laws"]}
    alone = call(capsys, "select", *rest, *formulas[2:], *rules[2:])["laws"][0]
    assert selected["L = E + A*N**-a + B*D**-b"]["mean_error"] == pytest.approx(alone["mean_error"], rel=1e-9)
    assert main(["select", *rest, *formulas, "--parameters", "a = 0.5"]) == 2
    assert "--parameters: got 1, allowed: one for each --formula" in capsys.readouterr().err


def test_rows_to_predict_need_no_outcome() -> None:
    data = table("chinchilla", 0.01, 0)
    data.loc[70:, "L"] = np.nan
    found = run(data, Request("chinchilla", "N=N,D=D,L=L", where="L == L", predict="L != L"))
    assert len(found["predictions"]) == 10
    assert all(np.isnan(item["observed"]) and item["predicted"] > 0 for item in found["predictions"])


def test_a_law_of_one_sign_refuses_an_outcome_of_the_other(runs: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--law", "chinchilla", "--columns", "N=N,D=D,L=-L", "--residuals", "linear")
    assert main(["fit", "--data", runs, *options]) == 2
    assert "L is negative in every row" in capsys.readouterr().err


def test_groups_print_one_sided_intervals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    x = np.geomspace(1e3, 1e9, 12)
    data = pd.DataFrame({"x": np.tile(x, 2), "g": np.repeat(["a", "b"], 12)})
    data["y"] = (40 * data["x"] ** -0.3 + 1.7 * (data["g"] == "a")) * np.exp(
        np.random.default_rng(0).normal(0, 0.02, 24)
    )
    data.to_csv(tmp_path / "runs.csv", index=False)
    options = ["--data", str(tmp_path / "runs.csv"), "--columns", "x=x,y=y", "--by", "g"]
    assert main(["fit", "--law", "power", *options]) == 0
    assert "(one-sided) not identified" in capsys.readouterr().out.partition("g = b")[2]


def test_a_law_that_explains_nothing_says_so() -> None:
    x = np.geomspace(1, 1e6, 20)
    noise = pd.DataFrame({"x": x, "y": np.exp(np.random.default_rng(2).normal(1, 0.3, 20))})
    line = "the law fits no better than a constant"
    assert any(text.startswith(line) for text in run(noise, Request("power", "x=x,y=y", holdout=0.0))["warnings"])
    clear = run(table("power", 0.01, 0), Request("power", "x=x,y=y", holdout=0.0))
    assert not any(text.startswith(line) for text in clear["warnings"])


def test_a_law_without_nonlinear_parameters_needs_one_start() -> None:
    data = table("loglinear", 0.01, 0)
    assert run(data, Request("loglinear", "R=R,y=y", holdout=0.0))["warnings"] == ["nothing held out: --holdout 0"]


@pytest.mark.parametrize("value", [0.0, np.inf, np.nan])
def test_a_weight_that_is_no_weight_is_named_with_its_row(value: float) -> None:
    data = table("power", 0.01, 0).assign(w=1.0)
    data.loc[3, "w"] = value
    with pytest.raises(InputError, match=f"--weights: got {value:g} in row 3"):
        run(data, Request("power", "x=x,y=y", weights="w"))


@pytest.mark.parametrize("name", ["Model Size", "a-b"])
def test_a_name_that_is_not_plain_stands_between_backticks(name: str) -> None:
    data = table("power", 0.01, 0).rename(columns={"x": name})
    with pytest.raises(InputError, match=f"a name such as {name} stands between backticks"):
        run(data, Request("power", f"x={name},y=y"))
    assert run(data, Request("power", f"x=`{name}`,y=y", holdout=0.0))["n"] == 40
