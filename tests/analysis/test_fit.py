"""Fits: simulated truths come back, intervals cover, units and order behave, published fits are reproduced."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize
from simulated_tables import BOUNDS, TRUTH, bounded_truth, simulated

from analysis.cli.fit import run
from analysis.errors import InputError
from analysis.fits.fit import fit
from analysis.fits.intervals import (
    bootstrap,
    hold_out,
    leave_one_out,
    leverage,
    standard_errors,
)
from analysis.fits.problem import Problem
from analysis.fits.profile import identified, profile
from analysis.fits.solver import huber
from analysis.laws.builtin import LAWS
from analysis.studies.request import Request

SHARED = Path(os.environ.get("SHARED_DATA", Path(__file__).parents[2] / ".." / "shared" / "data"))


def shared(name: str) -> pd.DataFrame:
    path = SHARED / "scaling" / name
    if not path.exists():
        pytest.skip(f"{path} is not here (set SHARED_DATA)")
    return pd.read_csv(path)


@pytest.mark.parametrize("name", LAWS)
def test_noise_free_data_give_the_parameters_back(name: str) -> None:
    found = fit(simulated(name, 0.0, 0))
    assert found.parameters == pytest.approx(TRUTH[name], rel=1e-6)


@pytest.mark.parametrize("name", LAWS)
@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_noisy_data_give_them_back_within_their_errors(name: str, seed: int) -> None:
    found = fit(simulated(name, 0.002, seed))
    errors = standard_errors(found)
    assert found.agreeing > 0
    for key, value in found.parameters.items():
        assert abs(value - TRUTH[name][key]) < 6 * errors[key]


@pytest.mark.parametrize("name", ["power", "chinchilla", "joint1"])
def test_optimum_is_not_above_scipys(name: str) -> None:
    problem = simulated(name, 0.01, 5, delta=1e-3)
    found = fit(problem)

    def value(theta: np.ndarray) -> float:
        return float(huber(problem.residual(theta[None])[0][0], 1e-3).sum())

    rival = optimize.minimize(
        value, found.theta + 0.01, method="Nelder-Mead", options={"maxiter": 20_000, "maxfev": 20_000}
    )
    assert found.objective <= rival.fun * (1 + 1e-9)


@pytest.mark.parametrize("seed", range(4))
def test_optimum_is_global_where_the_robust_loss_has_many(seed: int) -> None:
    """Repeats and surplus parameters under noise far beyond delta: the reference scans both on a grid."""
    fixed = {name: TRUTH["data_constrained"][name] for name in ("A", "B", "E", "alpha", "beta")}
    clean = simulated("data_constrained", 0.0, 0)
    chosen = np.random.default_rng(seed).permutation(clean.n)[:60]
    y = clean.y * np.exp(0.1 * np.random.default_rng(seed).standard_t(2, clean.n))
    problem = replace(clean, y=y, delta=1e-3, fixed=fixed).restricted(chosen)

    def value(theta: np.ndarray) -> float:
        return float(huber(problem.residual(theta[None])[0], 1e-3).sum())

    scan = np.stack(np.meshgrid(np.linspace(-4, 10, 60), np.linspace(-4, 10, 60)), -1).reshape(-1, 2)
    best = scan[np.argsort(huber(problem.residual(scan)[0], 1e-3).sum(1))[:20]]
    rivals = [optimize.minimize(value, start, method="Nelder-Mead").fun for start in best]
    assert fit(problem).objective <= min(rivals) * (1 + 1e-6)


def test_parameters_at_infinity_are_a_limit_and_not_rounding() -> None:
    """Repeats worth as much as new tokens: Rd goes to infinity, where the law is smooth and does not depend on Rd."""
    clean = simulated("data_constrained", 0.0, 0)
    fixed = {name: TRUTH["data_constrained"][name] for name in ("A", "B", "E", "alpha", "beta", "Rn")}
    limit = np.asarray(clean.law.value(fixed | {"Rd": 1e9}, clean.x))
    noisy = limit * np.exp(np.random.default_rng(0).normal(0, 0.01, clean.n))
    found = fit(replace(clean, y=noisy, fixed=fixed))
    assert found.problem.predict(np.array([[40.0]]), clean.x)[0] == pytest.approx(limit, rel=1e-6)
    assert found.parameters["Rd"] > 1e3
    assert not identified(found.problem, profile(found))["Rd"]


def test_outliers_move_the_robust_fit_little() -> None:
    problem = simulated("chinchilla", 0.002, 0, delta=1e-3)
    y = problem.y.copy()
    y[::20] *= 1.5
    robust, squares = fit(replace(problem, y=y)), fit(replace(problem, y=y, delta=np.inf))
    assert robust.parameters["alpha"] == pytest.approx(TRUTH["chinchilla"]["alpha"], rel=0.05)
    assert abs(squares.parameters["alpha"] - 0.347) > 2 * abs(robust.parameters["alpha"] - 0.347)


def test_units_change_the_answer_as_they_must() -> None:
    problem = simulated("chinchilla", 0.01, 2, delta=1e-3)
    other = replace(problem, x={"N": problem.x["N"] / 1e6, "D": problem.x["D"] / 1e9}, y=problem.y * 3)
    a, b = fit(problem).parameters, fit(other).parameters
    assert b["alpha"] == pytest.approx(a["alpha"], rel=1e-5)
    assert b["beta"] == pytest.approx(a["beta"], rel=1e-5)
    assert b["E"] == pytest.approx(3 * a["E"], rel=1e-5)
    assert b["A"] == pytest.approx(3 * a["A"] * 1e6 ** -a["alpha"], rel=1e-4)
    assert b["B"] == pytest.approx(3 * a["B"] * 1e9 ** -a["beta"], rel=1e-4)


SHARED_UNITS = {"mixture": [("L",)], "data_constrained": [("D", "U")], "capacity": [("H", "B")]}


@pytest.mark.parametrize("unit", [pytest.param(1e-6, marks=pytest.mark.slow), 1e6])
@pytest.mark.parametrize("name", LAWS)
def test_every_law_fits_as_well_in_any_units(name: str, unit: float) -> None:
    problem, law = simulated(name, 0.005, 1), LAWS[name]
    best = fit(problem).objective
    shared = SHARED_UNITS.get(name, [])
    alone = [(key,) for key in [*law.inputs, law.output] if not any(key in group for group in shared)]
    if name == "mixture":  # shares have no unit
        alone = []
    for keys in [*shared, *alone]:
        x = {key: values * (unit if key in keys else 1.0) for key, values in problem.x.items()}
        scale = unit if law.output in keys else 1.0
        found = fit(replace(problem, x=x, y=problem.y * scale)).objective
        assert found == pytest.approx(best * (scale**2 if law.residuals == "linear" else 1.0), rel=1e-5)


def test_accuracy_may_be_linked_to_any_measure_that_falls() -> None:
    flops = np.geomspace(1e20, 1e25, 40)
    y = 0.25 + 0.6 / (1 + np.exp(-2.0 * (np.log10(flops) - 22.5)))
    found = run(pd.DataFrame({"C": flops, "y": y}), Request("sigmoid_link", "L=-log10(C),y=y"))
    assert found["parameters"] == pytest.approx({"low": 0.25, "span": 0.6, "k": 2.0, "L0": -22.5}, rel=1e-6)


def test_row_order_and_repeated_points_do_not_matter() -> None:
    problem = simulated("chinchilla", 0.01, 2, delta=1e-3)
    order = np.random.default_rng(0).permutation(problem.n)
    a, b = fit(problem), fit(problem.restricted(order))
    doubled = fit(problem.restricted(np.repeat(order, 2)))
    assert b.parameters == pytest.approx(a.parameters, rel=1e-6)
    assert doubled.parameters == pytest.approx(a.parameters, rel=1e-6)
    assert doubled.objective == pytest.approx(2 * a.objective, rel=1e-9)
    weighted = fit(replace(problem, weights=np.full(problem.n, 2.0)))
    assert weighted.objective == pytest.approx(2 * a.objective, rel=1e-9)


def test_seeds_do_not_matter_to_the_optimum() -> None:
    problem = simulated("joint2", 0.005, 1)
    values = [fit(problem, seed).objective for seed in range(4)]
    assert values == pytest.approx([values[0]] * 4, rel=1e-8)


def test_large_sample_errors_equal_scipys_curve_fit() -> None:
    problem = replace(simulated("power", 0.01, 0), law=replace(LAWS["power"], residuals="linear"))
    found = fit(problem)

    def model(x: np.ndarray, e: float, a: float, alpha: float) -> np.ndarray:
        return e + a * x**-alpha

    best, covariance = optimize.curve_fit(model, problem.x["x"], problem.y, p0=list(found.parameters.values()))
    assert list(found.parameters.values()) == pytest.approx(best, rel=1e-5)
    assert list(standard_errors(found).values()) == pytest.approx(np.sqrt(np.diag(covariance)), rel=1e-3)


def test_profile_of_a_linear_law_is_its_t_interval() -> None:
    problem = simulated("loglinear", 0.05, 1)
    found = fit(problem)
    x = np.stack([np.ones(problem.n), np.log(problem.x["R"])], 1)
    covariance = np.linalg.inv(x.T @ x) * (found.residuals**2).sum() / (problem.n - 2)
    reach = 2.048407 * np.sqrt(np.diag(covariance))  # t of 28 degrees of freedom
    for i, name in enumerate(("a", "b")):
        low, high = profile(found)[name]
        value = found.parameters[name]
        assert (low, high) == pytest.approx((value - reach[i], value + reach[i]), rel=2e-3)


def test_what_the_data_cannot_tell_is_not_identified() -> None:
    x = np.geomspace(1e3, 1e9, 12)
    y = 40 * x**-0.1 * np.exp(np.random.default_rng(0).normal(0, 0.02, 12))
    found = fit(Problem(LAWS["power"], {"x": x}, y))
    assert not identified(found.problem, profile(found))["E"]
    clear = fit(simulated("power", 0.002, 0))
    assert all(identified(clear.problem, profile(clear)).values())


def test_leverage_sums_to_parameters_and_leave_one_out_equals_refits() -> None:
    problem = simulated("power", 0.01, 4)
    found = fit(problem)
    assert leverage(found).sum() == pytest.approx(3)
    values, residuals = leave_one_out(found)
    without = fit(problem.restricted(np.arange(problem.n) != 7))
    assert values["alpha"][7] == pytest.approx(without.parameters["alpha"], rel=1e-6)
    predicted = without.predict({"x": problem.x["x"][7:8]})[0]
    assert residuals[7] == pytest.approx(np.log(predicted / problem.y[7]), rel=1e-5)


def test_held_out_cells_are_the_largest_and_never_fitted() -> None:
    problem = simulated("chinchilla", 0.0, 0)
    y = problem.y.copy()
    size = problem.x["N"] * problem.x["D"]
    largest = np.argsort(size)[-8:]
    y[largest] *= 2.0
    held = hold_out(replace(problem, y=y), size, 0.1, "largest")
    assert set(held.rows) == set(largest)
    np.testing.assert_allclose(held.predicted, problem.y[held.rows], rtol=1e-6)
    np.testing.assert_allclose(held.relative_errors, -0.5, rtol=1e-5)


def test_bootstrap_error_of_a_mean_like_law_is_known() -> None:
    problem = simulated("frontier", 0.05, 0)
    found = fit(problem)
    draws = bootstrap(found, 800, seed=1)
    assert draws.standard_error("a") == pytest.approx(standard_errors(found)["a"], rel=0.25)


def test_clustered_bootstrap_sees_that_copies_are_not_new_runs() -> None:
    problem = simulated("frontier", 0.05, 0)
    copies = problem.restricted(np.repeat(np.arange(problem.n), 4))
    runs = np.repeat(np.arange(problem.n), 4)
    single = bootstrap(fit(problem), 400, 0).standard_error("a")
    naive = bootstrap(fit(copies), 400, 0).standard_error("a")
    clustered = bootstrap(fit(copies), 400, 0, clusters=runs).standard_error("a")
    assert naive == pytest.approx(single / 2, rel=0.2)
    assert clustered == pytest.approx(single, rel=0.2)


def test_strata_keep_their_sizes() -> None:
    problem = simulated("frontier", 0.05, 0)
    strata = np.arange(problem.n) // 10
    draws = bootstrap(fit(problem), 50, 0, strata=strata)
    assert draws.completed == 50


def test_too_few_points_are_one_line() -> None:
    problem = simulated("chinchilla", 0.0, 0)
    with pytest.raises(InputError, match="5 points are too few for law chinchilla: it has 5 parameters, so at least 6"):
        fit(problem.restricted(np.arange(5)))


COLUMNS = "N=`Model Size`,D=`Training FLOP`/(6*`Model Size`),L=loss"


@pytest.mark.parametrize("draws", [300, pytest.param(2000, marks=pytest.mark.slow)])
def test_chinchilla_optimum_and_published_standard_errors(draws: int) -> None:
    table = shared("chinchilla_epoch/svg_extracted_data.csv")
    found = run(table, Request("chinchilla", COLUMNS, huber=1e-3, drop_highest=5, bootstrap=draws))
    assert found["n"] == 240
    assert found["objective"] <= 1.018275e-3
    best = {"A": 477.83, "B": 2143.4, "E": 1.81722, "alpha": 0.34731, "beta": 0.36717}
    assert found["parameters"] == pytest.approx(best, rel=5e-5)
    published = {
        "A": (124.5, 0.5),
        "B": (1293.3, 0.5),
        "E": (0.0257, 0.25),
        "alpha": (0.0154, 0.25),
        "beta": (0.0206, 0.25),
    }
    for name, (error, tolerance) in published.items():
        assert found["standard_errors"][name] == pytest.approx(error, rel=tolerance)
    assert all(found["identified"].values())
    mean = run(table, Request("chinchilla", COLUMNS, huber=1e-3, drop_highest=5, minimize="mean"))
    assert mean["objective"] == pytest.approx(found["objective"] / 240, rel=1e-9)


SMALL = "model in ['d=96_l=8_h=4', 'd=512_l=8_h=4', 'd=576_l=24_h=8', 'd=1024_l=24_h=8']"
LONG = "model == 'd=96_l=8_h=4' and chinchilla_mult == 16"
FITTED = f"train_dataset == 'rpj' and ((chinchilla_mult == 1 and {SMALL}) or ({LONG}))"
REQUESTED = "train_dataset == 'rpj' and ((model == 'open_lm_1b' and chinchilla_mult == 32) or model == 'open_lm_7b')"


def test_overtraining_and_error_fits_reproduce_the_published_numbers() -> None:
    table = shared("gadre_overtraining/models_losses_errors.csv")
    loss = run(table, Request("overtraining", "C=6*N*D,M=M_tok_mult,L=loss_c4_val", where=FITTED, predict=REQUESTED))
    printed = {"E": (1.837, 5e-4), "a": (212.2, 0.05), "b": (366.7, 0.05), "eta": (0.1364, 5e-5)}
    for name, (value, unit) in printed.items():
        assert loss["parameters"][name] == pytest.approx(value, abs=unit)
    errors = {round(item["observed"], 3): abs(item["relative_error"]) for item in loss["predictions"]}
    assert [f"{100 * value:.4f}" for value in errors.values()] == ["0.7320", "0.7103"]

    chosen = f"({FITTED}) or (train_dataset == 'rpj' and model == 'open_lm_1b' and chinchilla_mult == 1)"
    link = run(table, Request("exponential_link", "L=loss_c4_val,y=err_avg17", where=chosen, predict=REQUESTED))
    assert link["n"] == 6
    for name, value in {"eps": 0.857, "k": 2.206, "gamma": 0.715}.items():
        assert link["parameters"][name] == pytest.approx(value, abs=5e-4)
    p = link["parameters"]
    predicted = [p["eps"] - p["k"] * np.exp(-p["gamma"] * item["predicted"]) for item in loss["predictions"]]
    observed = [item["observed"] for item in link["predictions"]]
    relative = [f"{100 * abs(a / b - 1):.4f}" for a, b in zip(predicted, observed, strict=True)]
    assert relative == ["0.0464", "3.6365"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "delta"), [*((name, np.inf) for name in LAWS), ("chinchilla", 1e-3), ("joint1", 1e-3)]
)
def test_ninety_five_percent_intervals_of_a_fit_cover(name: str, delta: float) -> None:
    hits = dict.fromkeys(TRUTH[name], 0)
    for seed in range(200):
        for key, (low, high) in profile(fit(simulated(name, 0.005, seed, delta))).items():
            hits[key] += low <= TRUTH[name][key] <= high
    assert np.mean(list(hits.values())) / 200 == pytest.approx(0.95, abs=0.03)
    assert all(0.90 <= count / 200 <= 0.99 for count in hits.values())


def best_of_scipy(problem: Problem, starts: int, seed: int) -> float:
    """The least objective that scipy's bounded least squares reaches from random starts in the ranges of the law."""
    generator, box, best = np.random.default_rng(seed), problem.box, np.inf
    for _ in range(starts):
        start = []
        for p in problem.free:
            low, high = problem.ranges.get(
                p.name, (0.1 * TRUTH[problem.law.name][p.name], 10 * TRUTH[problem.law.name][p.name])
            )
            start.append(np.log(low * (high / low) ** generator.random()) if p.log else generator.uniform(low, high))
        found = optimize.least_squares(
            lambda theta: np.nan_to_num(problem.residual(theta[None])[0][0], nan=1e6),
            np.clip(start, box.low + 1e-9, box.high - 1e-9),
            lambda theta: np.nan_to_num(problem.residual(theta[None])[1][0], posinf=0, neginf=0),
            bounds=(box.low, box.high),
            x_scale="jac",
            xtol=1e-12,
            ftol=1e-12,
            gtol=1e-12,
        )
        best = min(best, float(found.cost))
    return best


FEW = ["power, no offset", "chinchilla, no offset", "overtraining, a = 0", "joint4, kappa infinite"]


@pytest.mark.parametrize(
    ("case", "starts"),
    [*((case, 20) for case in FEW), *(pytest.param(case, 200, marks=pytest.mark.slow) for case in BOUNDS)],
)
def test_no_optimum_at_a_bound_is_missed_and_seeds_agree(case: str, starts: int) -> None:
    problem = simulated(BOUNDS[case][0], 0.01, 0, values=bounded_truth(case))
    fits = [fit(problem, seed) for seed in range(3)]
    assert fits[0].objective <= best_of_scipy(problem, starts, 0) * (1 + 1e-6)
    for other in fits[1:]:
        assert other.objective == pytest.approx(fits[0].objective, rel=1e-9)
        assert other.at_bound == fits[0].at_bound


@pytest.mark.slow
@pytest.mark.parametrize("case", BOUNDS)
def test_intervals_cover_where_the_truth_is_at_a_bound(case: str) -> None:
    values, (name, _, meaningless) = bounded_truth(case), BOUNDS[case]
    hits = dict.fromkeys([key for key in values if key not in meaningless], 0)
    for seed in range(200):
        ends = profile(fit(simulated(name, 0.01, seed, values=values)))
        for key in hits:
            low, high = ends[key]
            hits[key] += low <= values[key] and (values[key] <= high or np.isinf(high))
    assert 0.92 <= np.mean(list(hits.values())) / 200 <= 0.985
    assert all(count / 200 >= 0.90 for count in hits.values())


@pytest.mark.slow
def test_data_without_a_floor_give_a_one_sided_interval_and_right_exponents() -> None:
    """Twenty sets of 48 runs: the exponents are held as often as with E fixed at 0."""
    n, d = (grid.ravel() for grid in np.meshgrid(np.geomspace(1e7, 3e9, 8), np.geomspace(1e9, 3e11, 6), indexing="ij"))
    held, at_zero = {"alpha": 0, "beta": 0}, 0
    for seed in range(20):
        y = (6 * n**-0.05 + 40 * d**-0.22) * np.exp(np.random.default_rng(seed).normal(0, 0.02, len(n)))
        found = fit(Problem(LAWS["chinchilla"], {"N": n, "D": d}, y))
        ends = profile(found)
        at_zero += found.at_bound == {"E": 0.0} and ends["E"][0] == 0.0
        for name, value in (("alpha", 0.05), ("beta", 0.22)):
            held[name] += ends[name][0] <= value <= ends[name][1]
    assert at_zero > 4
    assert min(held.values()) >= 17


def test_noise_leaves_exponents_open_and_the_optimum_is_scipys() -> None:
    """Offset and coefficient are nearly collinear: a step that takes both out of their range must not end a fit."""
    x = np.geomspace(1, 1e6, 20)
    for seed in range(4):
        y = np.exp(np.random.default_rng(seed).normal(1, 0.3, 20))
        problem = Problem(LAWS["power"], {"x": x}, y)
        found = fit(problem)
        assert found.objective <= best_of_scipy(problem, 20, 0) * (1 + 1e-6)
        constant = 0.5 * ((np.log(y) - np.log(y).mean()) ** 2).sum()
        if constant < found.objective * 1.15:  # then no exponent is worse than the limit 0
            assert profile(found)["alpha"] == (0.0, np.inf)


def test_an_end_next_to_zero_of_an_optimum_far_away_is_found() -> None:
    """Scores near chance: the span tends to infinity, and the true one is as plausible."""
    loss = np.linspace(3.5, 2.9, 10)
    score = 0.25 + 0.65 / (1 + np.exp(5 * (loss - 2.6))) + np.random.default_rng(3).normal(0, 0.01, 10)
    low, high = profile(fit(Problem(LAWS["sigmoid_link"], {"L": loss}, score)))["span"]
    assert low < 0.65
    assert high == np.inf


def test_softplus_and_the_sharp_limits_of_laws_are_finite() -> None:
    bits = LAWS["capacity"].value({"c": 2.0, "k": 1e6}, {"P": np.array([10.0, 1e9]), "H": np.array([1e6, 1e6])})
    np.testing.assert_allclose(bits, [20.0, 1e6], rtol=1e-5)


def test_decoder_only_translation_gives_the_digits_of_both_forms() -> None:
    """Two forms fitted by least squares on log losses to the ten published points, and the point left out."""
    table = shared("nmt_google/nmt.csv")
    rows = {"where": "model == 'Dec-only' and training == 1", "predict": "model == 'Dec-only' and training == 0"}
    plain = run(table, Request("power", "x=examples,y=loss", **rows))
    assert plain["parameters"]["E"] == pytest.approx(0.360325, abs=5e-7)
    assert plain["parameters"]["alpha"] == pytest.approx(0.610301, abs=5e-7)
    shifted = run(table, Request("shifted", "x=examples,y=loss", **rows))
    assert shifted["parameters"]["E"] == pytest.approx(0.379991, abs=5e-7)
    assert shifted["parameters"]["x0"] == pytest.approx(1.08e6, rel=5e-3)
    errors = [document["predictions"][0]["relative_error"] for document in (plain, shifted)]
    assert errors == pytest.approx([-0.0369, -0.0042], abs=5e-5)


def test_an_outer_exponent_fits_the_chinchilla_points_better_for_every_seed() -> None:
    table = shared("chinchilla_epoch/svg_extracted_data.csv")
    requests = [Request("outer", COLUMNS, huber=1e-3, drop_highest=5, seed=seed, holdout=0.0) for seed in range(2)]
    values = [run(table, request)["objective"] for request in requests]
    assert values == pytest.approx([9.541845e-4] * 2, rel=1e-6)
