"""Each law against its formula, its limits and its gradient."""

from __future__ import annotations

import numpy as np
import pytest
from simulated_tables import TRUTH, inputs, simulated, truth

from analysis.fits.problem import to_theta
from analysis.laws.builtin import LAWS, law
from analysis.laws.joint import JOINT


@pytest.mark.parametrize("name", LAWS)
def test_analytic_gradient_equals_central_differences(name: str) -> None:
    problem = simulated(name, 0.02, 3)
    theta = np.array([[float(to_theta(p, np.array(TRUTH[name][p.name] * 1.1))) for p in problem.free]])
    _, jacobian = problem.residual(theta)
    for i in range(theta.shape[1]):
        step = 1e-5 * max(1.0, abs(theta[0, i]))
        moved = np.repeat(theta, 2, 0)
        moved[0, i] += step
        moved[1, i] -= step
        high, low = problem.residual(moved)[0]
        np.testing.assert_allclose(
            jacobian[0, :, i], (high - low) / (2 * step), rtol=2e-5, atol=2e-6 * np.ptp(problem.y)
        )


@pytest.mark.parametrize("name", JOINT)
def test_joint_laws_are_the_dense_law_without_memory(name: str) -> None:
    x = inputs("chinchilla")
    values = {key: value for key, value in TRUTH[name].items() if key in TRUTH["chinchilla"]}
    dense = LAWS["chinchilla"].value(values, x)
    joint = LAWS[name].value(TRUTH[name], x | {"M": np.zeros_like(x["N"])})
    np.testing.assert_array_equal(joint, dense)


@pytest.mark.parametrize("name", JOINT)
def test_memory_only_ever_lowers_the_joint_laws_loss(name: str) -> None:
    n = np.full(20, 1e8)
    loss = LAWS[name].value(TRUTH[name], {"N": n, "D": n * 100, "M": np.geomspace(1e6, 1e11, 20)})
    assert (np.diff(loss) < 0).all()


def test_published_formulas_at_a_point() -> None:
    values = {"A": 482.01, "B": 2085.43, "E": 1.81686, "alpha": 0.34781, "beta": 0.36585}
    loss = LAWS["chinchilla"].value(values, {"N": np.array([70e9]), "D": np.array([1.4e12])})
    assert loss[0] == pytest.approx(1.81686 + 482.01 / 70e9**0.34781 + 2085.43 / 1.4e12**0.36585, rel=1e-12)


def test_overtraining_is_chinchilla_with_equal_exponents() -> None:
    n, d, p = np.array([1e8, 3e8]), np.array([2e9, 9e10]), TRUTH["overtraining"]
    ours = LAWS["overtraining"].value(p, {"C": 6 * n * d, "M": d / n})
    factor = 6 ** -p["eta"]
    equal = {"E": p["E"], "A": p["a"] * factor, "B": p["b"] * factor, "alpha": 2 * p["eta"], "beta": 2 * p["eta"]}
    np.testing.assert_allclose(ours, LAWS["chinchilla"].value(equal, {"N": n, "D": d}), rtol=1e-12)


def test_data_constrained_is_chinchilla_for_one_epoch_of_an_optimal_model() -> None:
    p = TRUTH["data_constrained"]
    d = np.array([1e10, 1e12])
    n = np.array([1e7, 1e8])
    ours = LAWS["data_constrained"].value(p, {"N": n, "D": d, "U": d})
    np.testing.assert_allclose(ours, LAWS["chinchilla"].value(p, {"N": n, "D": d}), rtol=1e-12)
    plenty = LAWS["data_constrained"].value(p, {"N": n, "D": d, "U": 7 * d})
    np.testing.assert_array_equal(plenty, ours)
    repeated = LAWS["data_constrained"].value(p, {"N": n, "D": 100 * d, "U": d})
    fresh = LAWS["chinchilla"].value(p, {"N": n, "D": d * (1 + p["Rd"])})
    assert (repeated > fresh).all()


def test_capacity_is_a_smooth_minimum() -> None:
    bits = LAWS["capacity"].value({"c": 2.0, "k": 50.0}, {"P": np.array([10.0, 1e9]), "H": np.array([1e6, 1e6])})
    np.testing.assert_allclose(bits, [20.0, 1e6], rtol=1e-6)


@pytest.mark.parametrize("name", ["joint1", "joint2", "joint3"])
def test_joint_laws_without_tokens_have_no_token_term(name: str) -> None:
    entry = law(name, {"N", "M", "L"})
    assert "B" not in entry.names
    assert "D" not in entry.inputs
    assert truth("chinchilla", inputs("chinchilla")).min() > 1.8


@pytest.mark.parametrize("name", LAWS)
def test_every_parameter_of_a_built_in_law_has_a_meaning(name: str) -> None:
    assert all(p.meaning for p in LAWS[name].parameters)
    assert all(text not in ("", "input") for text in LAWS[name].inputs.values())
