"""Joint laws of base parameters N, table parameters M and tokens D."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from analysis.laws.autodiff import exp, log, softplus
from analysis.laws.law import Inputs, Law, Parameter, Values, around, coefficient, offset

JOINT = {
    "joint1": "L = E + A N^-alpha (1 + M/(rho N))^-gamma + B D^-beta",
    "joint2": "L = E + A N^-alpha [(1-s) + s (1 + M/(rho N))^-gamma] + B D^-beta",
    "joint3": "L = E + A (N (1 + kappa (M/N)^gamma))^-alpha + B D^-beta",
    "joint4": "as joint1 with M replaced by (M^-phi + (kappa D)^-phi)^(-1/phi)",
}


def _joint_value(name: str, with_d: bool) -> Callable[[Values, Inputs], Any]:
    """Return the joint laws' values; the A term's factor is exactly 1 at M = 0."""

    def value(p: Values, x: Inputs) -> Any:
        n, m = x["N"], x["M"]
        a_term = p["A"] * n ** -p["alpha"]
        if name == "joint1":
            a_term = a_term * (1.0 + m / n / p["rho"]) ** -p["gamma"]
        elif name == "joint2":
            a_term = a_term * (1.0 + p["s"] * ((1.0 + m / n / p["rho"]) ** -p["gamma"] - 1.0))
        elif name == "joint3":
            a_term = a_term * (1.0 + p["kappa"] * (m / n) ** p["gamma"]) ** -p["alpha"]
        else:
            share = p["phi"] * log(np.maximum(m / x["D"], 1e-300) / p["kappa"])
            used = m / n / p["rho"] * exp(-softplus(share) / p["phi"])
            a_term = a_term * (1.0 + used) ** -p["gamma"]
        return p["E"] + a_term + (p["B"] * x["D"] ** -p["beta"] if with_d else 0.0)

    return value


def joint(name: str, with_d: bool = True) -> Law:
    extra = {
        "joint1": (
            Parameter("rho", "table parameters worth one of N", start=(0.02, 50.0)),
            Parameter(
                "gamma", "exponent of memory", log=False, start=(0.02, 1.0), at_bound="the data show no effect of M"
            ),
        ),
        "joint2": (
            Parameter("rho", "table parameters worth one of N", start=(0.02, 50.0)),
            Parameter("gamma", "exponent of memory", start=(0.1, 2.0)),
            Parameter("s", "share of the A term memory can remove", high=1.0, log=False, start=(0.1, 0.9)),
        ),
        "joint3": (
            Parameter("kappa", "worth of table parameters at M = N", start=(0.02, 5.0)),
            Parameter("gamma", "exponent of M/N", start=(0.1, 1.5)),
        ),
        "joint4": (
            Parameter("rho", "table parameters worth one of N", start=(0.02, 50.0)),
            Parameter(
                "gamma", "exponent of memory", log=False, start=(0.02, 1.0), at_bound="the data show no effect of M"
            ),
            Parameter("kappa", "table parameters a token can fill"),
            Parameter("phi", "sharpness of the bend", start=(0.3, 5.0)),
        ),
    }[name]
    inputs = {"N": "non-embedding base parameters", "M": "distinct table parameters, rows x width; 0 without"}
    dense: tuple[Parameter, ...] = (
        coefficient("A", "nats params^alpha"),
        offset(),
        Parameter("alpha", "exponent of N"),
    )
    if with_d:
        inputs["D"] = "training tokens"
        dense += (coefficient("B", "nats tokens^beta"), Parameter("beta", "exponent of D"))
    return Law(
        name,
        JOINT[name] if with_d else JOINT[name].replace(" + B D^-beta", ""),
        "ours",
        inputs,
        "L",
        dense + extra,
        _joint_value(name, with_d),
        lambda x: x["N"] + x["M"],
        zero_allowed=frozenset({"M"}),
        starts=(lambda x: {"kappa": around(x["M"] / x["D"], factor=20.0)}) if name == "joint4" else (lambda x: {}),
        dense="chinchilla",
    )
