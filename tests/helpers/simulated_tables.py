"""Designs and true parameters from which each law's data are simulated."""

from __future__ import annotations

import numpy as np
import pandas as pd

from analysis.fits.fit import Problem
from analysis.fits.laws import LAWS

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


def truth(name: str, x: dict[str, np.ndarray]) -> np.ndarray:
    """The law at its true parameters."""
    return np.asarray(LAWS[name].value(TRUTH[name], x), float) + np.zeros(len(next(iter(x.values()))))


def simulated(name: str, noise: float, seed: int, delta: float = np.inf) -> Problem:
    """A problem with noise: relative for laws fitted in logarithms, else a share of the output's range."""
    law, x = LAWS[name], inputs(name)
    y = truth(name, x)
    error = np.random.default_rng(seed).normal(0, noise, len(y))
    return Problem(law, x, y * np.exp(error) if law.residuals == "log" else y + error * np.ptp(y), delta)


def table(name: str, noise: float = 0.0, seed: int = 0) -> pd.DataFrame:
    """The same as a table of columns."""
    problem = simulated(name, noise, seed)
    return pd.DataFrame({**problem.x, LAWS[name].output: problem.y})
