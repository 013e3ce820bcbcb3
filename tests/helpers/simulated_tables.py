"""Designs and true parameters from which each law's data are simulated."""

from __future__ import annotations

import numpy as np
import pandas as pd

from analysis.fits.problem import Problem
from analysis.laws.builtin import LAWS

TRUTH: dict[str, dict[str, float]] = {
    "power": {"E": 1.7, "A": 40.0, "alpha": 0.3},
    "frontier": {"k": 0.3, "a": 0.49},
    "chinchilla": {"A": 480.0, "B": 2100.0, "E": 1.82, "alpha": 0.347, "beta": 0.367},
    "overtraining": {"E": 1.84, "a": 212.0, "b": 367.0, "eta": 0.136},
    "isoflop": {"Lmin": 2.5, "k": 0.04, "Nopt": 3e8},
    "data_constrained": {"A": 520.0, "B": 1500.0, "E": 1.87, "alpha": 0.35, "beta": 0.35, "Rn": 5.0, "Rd": 15.0},
    "loglinear": {"a": -20.0, "b": 2.4},
    "saturating": {"base": 7.8, "gain": 20.0, "R0": 1e6, "gamma": 0.5},
    "sigmoid_link": {"low": 0.25, "span": 0.6, "k": 3.0, "L0": 2.6},
    "exponential_link": {"eps": 0.857, "k": 2.2, "gamma": 0.715},
    "capacity": {"c": 2.0, "k": 2.0},
    "outer": {"E": 1.7, "A": 3000.0, "alpha": 0.45, "B": 9000.0, "beta": 0.43, "k": 0.7},
    "power2": {"k": 1.8, "a": -0.7, "b": 0.3},
    "shifted": {"E": 0.4, "A": 1e3, "x0": 2e5, "alpha": 0.5},
    "broken": {"E": 0.2, "A": 40.0, "a": 0.1, "d": 1e6, "f": 0.4, "c": 0.3},
    "three_terms": {"E": -5.5, "A": 30.0, "alpha": 0.2, "B": 300.0, "beta": 0.3, "G": 4.0, "gamma": 0.25},
    "mixture": {"E": 1.5, "w1": -0.8, "w2": 0.4, "w3": 0.1},
    "joint1": {"A": 480.0, "B": 2100.0, "E": 1.82, "alpha": 0.347, "beta": 0.367, "rho": 2.0, "gamma": 0.15},
    "joint2": {
        "A": 480.0,
        "B": 2100.0,
        "E": 1.82,
        "alpha": 0.347,
        "beta": 0.367,
        "rho": 2.0,
        "gamma": 0.6,
        "s": 0.5,
    },
    "joint3": {"A": 480.0, "B": 2100.0, "E": 1.82, "alpha": 0.347, "beta": 0.367, "kappa": 0.5, "gamma": 0.6},
    "joint4": {
        "A": 480.0,
        "B": 2100.0,
        "E": 1.82,
        "alpha": 0.347,
        "beta": 0.367,
        "rho": 2.0,
        "gamma": 0.25,
        "kappa": 0.02,
        "phi": 1.5,
    },
}


def inputs(name: str) -> dict[str, np.ndarray]:
    """A crossed design of a realistic range for a law's inputs."""
    sizes, tokens = np.geomspace(3e7, 1e10, 10), np.geomspace(5e8, 1e12, 8)
    n, d = (grid.ravel() for grid in np.meshgrid(sizes, tokens, indexing="ij"))
    if name in ("outer", "power2"):
        return {"N": n, "D": d}
    if name == "three_terms":
        return {"N": n, "D": d, "V": np.tile(np.geomspace(1e6, 1e9, 4), len(n) // 4)}
    if name == "mixture":
        shares = np.random.default_rng(0).dirichlet([1.0, 1.0, 1.0], 60)
        return {f"s{i + 1}": shares[:, i] for i in range(3)}
    if name in ("shifted", "broken"):
        return {"x": np.geomspace(1e3, 1e10, 60)}
    if name == "power":
        return {"x": np.geomspace(1e3, 1e9, 40)}
    if name == "frontier":
        return {"C": np.geomspace(1e17, 1e23, 30)}
    if name == "chinchilla":
        return {"N": n, "D": d}
    if name == "overtraining":
        return {"C": 6 * n * d, "M": d / n}
    if name == "isoflop":
        return {"N": np.geomspace(3e7, 3e9, 30)}
    if name == "data_constrained":
        share = np.tile([1.0, 0.3, 0.1, 0.03], len(n) // 4)
        return {"N": np.concatenate([n, n]), "D": np.concatenate([d, d]), "U": np.concatenate([d, d * share])}
    if name in ("loglinear", "saturating"):
        rows = np.geomspace(1e4, 1e9, 30)
        return {"R": rows if name == "loglinear" else np.concatenate([[0.0, 0.0, 0.0], rows])}
    if name.endswith("link"):
        return {"L": np.linspace(1.6, 4.5, 60)}
    if name == "capacity":
        p, h = (grid.ravel() for grid in np.meshgrid(np.geomspace(1e5, 1e8, 8), np.geomspace(1e5, 1e9, 6)))
        return {"P": p, "H": h}
    table = np.array([0.0, 0.5, 4.0, 30.0, 250.0])
    n, d, ratio = (grid.ravel() for grid in np.meshgrid(sizes[::2], tokens[::2], table, indexing="ij"))
    return {"N": n, "D": d, "M": n * ratio}


BOUNDS: dict[str, tuple[str, dict[str, float], tuple[str, ...]]] = {
    "power, no offset": ("power", {"E": 0.0}, ()),
    "chinchilla, no offset": ("chinchilla", {"E": 0.0, "A": 6.0, "B": 40.0, "alpha": 0.05, "beta": 0.22}, ()),
    "overtraining, no offset": ("overtraining", {"E": 0.0, "eta": 0.05, "a": 15.0, "b": 25.0}, ()),
    "overtraining, a = 0": ("overtraining", {"a": 0.0}, ()),
    "isoflop, flat": ("isoflop", {"k": 0.0}, ("Nopt",)),
    "data_constrained, no offset": ("data_constrained", {"E": 0.0}, ()),
    "data_constrained, repeats as good as new": ("data_constrained", {"Rd": 1e9}, ()),
    "data_constrained, surplus as good": ("data_constrained", {"Rn": 1e9}, ()),
    "saturating, no gain": ("saturating", {"gain": 0.0}, ("R0", "gamma")),
    "sigmoid_link, no span": ("sigmoid_link", {"span": 0.0}, ("k", "L0")),
    "exponential_link, k = 0": ("exponential_link", {"k": 0.0}, ("gamma",)),
    "capacity, sharp": ("capacity", {"k": 1e6}, ()),
    "joint1, no offset": ("joint1", {"E": 0.0}, ()),
    "joint1, no memory": ("joint1", {"gamma": 0.0}, ("rho",)),
    "joint2, s = 0": ("joint2", {"s": 0.0}, ("rho", "gamma")),
    "joint2, s = 1": ("joint2", {"s": 1.0}, ()),
    "joint3, kappa = 0": ("joint3", {"kappa": 0.0}, ("gamma",)),
    "joint4, kappa infinite": ("joint4", {"kappa": 1e12}, ("phi",)),
    "joint4, sharp": ("joint4", {"phi": 1e3}, ()),
}
"""Laws with their truth at a bound: the law, what differs from TRUTH, and the parameters that then mean nothing."""


def bounded_truth(case: str) -> dict[str, float]:
    """The true parameters of a case of BOUNDS."""
    name, changes, _ = BOUNDS[case]
    return TRUTH[name] | changes


def truth(name: str, x: dict[str, np.ndarray], values: dict[str, float] | None = None) -> np.ndarray:
    """The law at its true parameters, or at others."""
    with np.errstate(all="ignore"):
        y = np.asarray(LAWS[name].value(values or TRUTH[name], x), float)
    return y + np.zeros(len(next(iter(x.values()))))


def simulated(
    name: str, noise: float, seed: int, delta: float = np.inf, values: dict[str, float] | None = None
) -> Problem:
    """A problem with noise: relative for laws fitted in logarithms, else a share of the output's range.

    `values`: other true parameters than TRUTH's.
    """
    law, x = LAWS[name], inputs(name)
    y = truth(name, x, values)
    error = np.random.default_rng(seed).normal(0, noise, len(y))
    unit = np.ptp(y) if np.ptp(y) > 0 else 1.0
    return Problem(law, x, y * np.exp(error) if law.residuals == "log" else y + error * unit, delta)


def table(name: str, noise: float = 0.0, seed: int = 0) -> pd.DataFrame:
    """The same as a table of columns."""
    problem = simulated(name, noise, seed)
    return pd.DataFrame({**problem.x, LAWS[name].output: problem.y})
