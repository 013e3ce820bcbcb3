"""The laws: formula, parameters with units, inputs, source. One entry per law; `LAWS` is the registry.

Parameters that enter linearly are marked: they are solved for, not searched. A positive parameter is fitted by its
logarithm. Start ranges are of the nonlinear parameters; those that have units take theirs from the data (`starts`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from analysis.errors import InputError
from analysis.fits.autodiff import exp, expm1, log, log1p, minimum

Inputs = Mapping[str, np.ndarray]
Values = Mapping[str, Any]


@dataclass(frozen=True)
class Parameter:
    """One parameter: `positive` and `unit` (0 to 1) are fitted on a log and a logistic scale."""

    name: str
    meaning: str
    kind: Literal["positive", "free", "unit"] = "positive"
    linear: bool = False
    start: tuple[float, float] = (0.05, 2.0)


@dataclass(frozen=True)
class Law:
    """A law y = value(parameters, inputs). `residuals`: on the logarithm of y, or on y itself."""

    name: str
    formula: str
    source: str
    inputs: Mapping[str, str]
    output: str
    parameters: tuple[Parameter, ...]
    value: Callable[[Values, Inputs], Any]
    size: Callable[[Inputs], np.ndarray]
    residuals: Literal["log", "linear"] = "log"
    zero_allowed: frozenset[str] = frozenset()
    any_sign: frozenset[str] = frozenset()
    starts: Callable[[Inputs], dict[str, tuple[float, float]]] = lambda x: {}
    dense: str | None = None

    @property
    def names(self) -> list[str]:
        """Parameter names, in order."""
        return [parameter.name for parameter in self.parameters]


def law(name: str, columns: set[str]) -> Law:
    """The law of that name; a joint law without the column D comes without its D term. InputError if unknown."""
    if name not in LAWS:
        raise InputError(f"--law: got {name!r}, allowed: joint, {', '.join(LAWS)}")
    found = LAWS[name]
    if name in JOINT and "D" not in columns:
        if name == "joint4":
            raise InputError(f"--columns: law {name} needs D, the training tokens")
        return _joint(name, with_d=False)
    return found


def _e(meaning: str = "irreducible loss, nats per token") -> Parameter:
    return Parameter("E", meaning, linear=True)


def _coefficient(name: str, meaning: str) -> Parameter:
    return Parameter(name, meaning, linear=True)


def _around(x: np.ndarray, factor: float = 100.0, power: float = 1.0) -> tuple[float, float]:
    """From a factor below to a factor above a power of the median of the positive values."""
    middle = float(np.exp(power * np.median(np.log(x[x > 0])))) if (x > 0).any() else 1.0
    return middle / factor, middle * factor


def _across(x: np.ndarray, low: float, high: float) -> tuple[float, float]:
    """Per unit of x, from `low` to `high` over the range of its values."""
    span = float(np.ptp(x))
    return low / span, high / span


POWER = Law(
    "power",
    "y = E + A x^-alpha",
    "Hestness et al. 2017 (arXiv 1712.00409)",
    {"x": "any size or compute"},
    "y",
    (_e("offset, units of y"), _coefficient("A", "units of y x^alpha"), Parameter("alpha", "exponent")),
    lambda p, x: p["E"] + p["A"] * x["x"] ** -p["alpha"],
    lambda x: x["x"],
)

FRONTIER = Law(
    "frontier",
    "y = k C^a",
    "compute-optimal sizes: Hoffmann et al. 2022 (arXiv 2203.15556), approaches 1 and 2",
    {"C": "training FLOPs"},
    "y",
    (_coefficient("k", "units of y per FLOP^a"), Parameter("a", "exponent", "free", start=(-1, 1))),
    lambda p, x: p["k"] * x["C"] ** p["a"],
    lambda x: x["C"],
)

CHINCHILLA = Law(
    "chinchilla",
    "L = E + A N^-alpha + B D^-beta",
    "Hoffmann et al. 2022 (arXiv 2203.15556), approach 3",
    {"N": "parameters", "D": "training tokens"},
    "L",
    (
        _coefficient("A", "nats params^alpha"),
        _coefficient("B", "nats tokens^beta"),
        _e(),
        Parameter("alpha", "exponent of parameters"),
        Parameter("beta", "exponent of tokens"),
    ),
    lambda p, x: p["E"] + p["A"] * x["N"] ** -p["alpha"] + p["B"] * x["D"] ** -p["beta"],
    lambda x: x["N"] * x["D"],
)

OVERTRAINING = Law(
    "overtraining",
    "L = E + (a M^eta + b M^-eta) C^-eta",
    "Gadre et al. 2024 (arXiv 2403.08540), equation 4",
    {"C": "training FLOPs, 6 N D", "M": "tokens per parameter, D / N"},
    "L",
    (
        _e(),
        _coefficient("a", "nats FLOP^eta"),
        _coefficient("b", "nats FLOP^eta"),
        Parameter("eta", "half the exponent of N and D"),
    ),
    lambda p, x: p["E"] + (p["a"] * x["M"] ** p["eta"] + p["b"] * x["M"] ** -p["eta"]) * x["C"] ** -p["eta"],
    lambda x: x["C"],
    residuals="linear",
)

ISOFLOP = Law(
    "isoflop",
    "L = Lmin + k (ln N - ln Nopt)^2",
    "Hoffmann et al. 2022 (arXiv 2203.15556), approach 2",
    {"N": "parameters, all at one compute budget"},
    "L",
    (
        _coefficient("Lmin", "loss at the optimum, nats per token"),
        _coefficient("k", "curvature, nats"),
        Parameter("Nopt", "parameters at the optimum"),
    ),
    lambda p, x: p["Lmin"] + p["k"] * _square(np.log(x["N"]) - log(p["Nopt"])),
    lambda x: x["N"],
    starts=lambda x: {"Nopt": _around(x["N"])},
)


def _square(x: Any) -> Any:
    return x * x


def _data_constrained(p: Values, x: Inputs) -> Any:
    """Repeated tokens and surplus parameters are worth less, exponentially: effective D' and N'.

    expm1, because 1 - exp(-x) of a large Rn or Rd is rounding noise that a fit would follow.
    """
    fresh = np.minimum(x["U"], x["D"])
    g = (p["alpha"] * p["A"] / (p["beta"] * p["B"])) ** (1.0 / (p["alpha"] + p["beta"]))
    best_n = minimum(g * exp(log(g * fresh) * p["beta"] / p["alpha"]), x["N"])
    surplus, repeats = x["N"] / best_n - 1.0, x["D"] / fresh - 1.0
    n = best_n - best_n * p["Rn"] * expm1(-surplus / p["Rn"])
    d = fresh - fresh * p["Rd"] * expm1(-repeats / p["Rd"])
    return p["E"] + p["A"] * n ** -p["alpha"] + p["B"] * d ** -p["beta"]


DATA_CONSTRAINED = Law(
    "data_constrained",
    "L = E + A N'^-alpha + B D'^-beta, D' = U + U Rd (1 - exp(-(D/U - 1)/Rd)), "
    "N' likewise with Rn above the N that is optimal for U",
    "Muennighoff et al. 2023 (arXiv 2305.16264), equations 5 and 6",
    {"N": "parameters", "D": "training tokens, repeats included", "U": "unique tokens available"},
    "L",
    (
        Parameter("A", "nats params^alpha"),
        Parameter("B", "nats tokens^beta"),
        _e(),
        Parameter("alpha", "exponent of parameters", start=(0.15, 0.8)),
        Parameter("beta", "exponent of tokens", start=(0.15, 0.8)),
        Parameter("Rn", "surplus parameters worth having, in multiples", start=(1.0, 30.0)),
        Parameter("Rd", "repeats worth having", start=(1.0, 50.0)),
    ),
    _data_constrained,
    lambda x: x["N"] * x["D"],
    starts=lambda x: {"A": _around(x["N"], power=0.35), "B": _around(x["D"], power=0.35)},
)

LOGLINEAR = Law(
    "loglinear",
    "y = a + b ln R",
    "the form of Memory Layers at Scale (arXiv 2412.09764), figure 1",
    {"R": "memory rows, above 0"},
    "y",
    (Parameter("a", "y at one row", "free", linear=True), Parameter("b", "gain per factor e", "free", linear=True)),
    lambda p, x: p["a"] + p["b"] * np.log(x["R"]),
    lambda x: x["R"],
    residuals="linear",
)

SATURATING = Law(
    "saturating",
    "y = base + gain (1 - (1 + R/R0)^-gamma)",
    "ours; at R = 0 it gives the model without a table",
    {"R": "memory rows, 0 without a table"},
    "y",
    (
        Parameter("base", "y without a table", "free", linear=True),
        Parameter("gain", "y at R to infinity, above base", "free", linear=True),
        Parameter("R0", "rows at which it bends"),
        Parameter("gamma", "exponent", start=(0.1, 2.0)),
    ),
    lambda p, x: p["base"] - p["gain"] * expm1(-p["gamma"] * log1p(x["R"] / p["R0"])),
    lambda x: x["R"],
    residuals="linear",
    zero_allowed=frozenset({"R"}),
    starts=lambda x: {"R0": _around(x["R"])},
)

SIGMOID_LINK = Law(
    "sigmoid_link",
    "y = low + span / (1 + exp(k (L - L0)))",
    "loss to accuracy: Llama 3 (arXiv 2407.21783), section 3.2.1",
    {"L": "loss, nats, or another measure that falls as models get better"},
    "y",
    (
        Parameter("low", "accuracy by chance", "free", linear=True),
        _coefficient("span", "accuracy from low to top"),
        Parameter("k", "steepness, per nat"),
        Parameter("L0", "loss at half", "free"),
    ),
    lambda p, x: p["low"] + p["span"] / (1.0 + exp(p["k"] * (x["L"] - p["L0"]))),
    lambda x: -x["L"],
    residuals="linear",
    any_sign=frozenset({"L"}),
    starts=lambda x: {"k": _across(x["L"], 1.0, 100.0), "L0": (2 * x["L"].min() - x["L"].max(), x["L"].max())},
)

EXPONENTIAL_LINK = Law(
    "exponential_link",
    "y = eps - k exp(-gamma L)",
    "loss to error: Gadre et al. 2024 (arXiv 2403.08540), equation 5",
    {"L": "loss, nats"},
    "y",
    (
        Parameter("eps", "error at infinite loss", linear=True),
        _coefficient("k", "error removed at loss 0, extrapolated"),
        Parameter("gamma", "per nat"),
    ),
    lambda p, x: p["eps"] - p["k"] * exp(-p["gamma"] * x["L"]),
    lambda x: -x["L"],
    residuals="linear",
    starts=lambda x: {"gamma": _across(x["L"], 0.1, 20.0)},
)

CAPACITY = Law(
    "capacity",
    "B = ((c P)^-k + H^-k)^(-1/k)",
    "ours, a smooth min(c P, H); c: Allen-Zhu and Li, part 3.3 (arXiv 2404.05405)",
    {"P": "parameters", "H": "bits the data hold"},
    "B",
    (
        Parameter("c", "bits per parameter"),
        Parameter("k", "sharpness of the bend", start=(0.3, 10.0)),
    ),
    lambda p, x: x["H"] * (1.0 + (p["c"] * (x["P"] / x["H"])) ** -p["k"]) ** (-1.0 / p["k"]),
    lambda x: x["P"],
    starts=lambda x: {"c": _around(x["H"] / x["P"], factor=1e3)},
)

JOINT = {
    "joint1": "L = E + A N^-alpha (1 + M/(rho N))^-gamma + B D^-beta",
    "joint2": "L = E + A N^-alpha [(1-s) + s (1 + M/(rho N))^-gamma] + B D^-beta",
    "joint3": "L = E + A (N (1 + kappa (M/N)^gamma))^-alpha + B D^-beta",
    "joint4": "as joint1 with M replaced by (M^-phi + (kappa D)^-phi)^(-1/phi)",
}


def _joint_value(name: str, with_d: bool) -> Callable[[Values, Inputs], Any]:
    """The joint laws' values; the A term's factor is exactly 1 at M = 0."""

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
            share = exp(p["phi"] * log(np.maximum(m / x["D"], 1e-300) / p["kappa"]))
            a_term = a_term * (1.0 + m / n / p["rho"] * (1.0 + share) ** (-1.0 / p["phi"])) ** -p["gamma"]
        return p["E"] + a_term + (p["B"] * x["D"] ** -p["beta"] if with_d else 0.0)

    return value


def _joint(name: str, with_d: bool = True) -> Law:
    extra = {
        "joint1": (
            Parameter("rho", "table parameters worth one of N", start=(0.02, 50.0)),
            Parameter("gamma", "exponent of memory", start=(0.02, 1.0)),
        ),
        "joint2": (
            Parameter("rho", "table parameters worth one of N", start=(0.02, 50.0)),
            Parameter("gamma", "exponent of memory", start=(0.1, 2.0)),
            Parameter("s", "share of the A term memory can remove", "unit", start=(0.1, 0.9)),
        ),
        "joint3": (
            Parameter("kappa", "worth of table parameters at M = N", start=(0.02, 5.0)),
            Parameter("gamma", "exponent of M/N", start=(0.1, 1.5)),
        ),
        "joint4": (
            Parameter("rho", "table parameters worth one of N", start=(0.02, 50.0)),
            Parameter("gamma", "exponent of memory", start=(0.02, 1.0)),
            Parameter("kappa", "table parameters a token can fill"),
            Parameter("phi", "sharpness of the bend", start=(0.3, 5.0)),
        ),
    }[name]
    inputs = {"N": "non-embedding base parameters", "M": "distinct table parameters, rows x width; 0 without"}
    dense: tuple[Parameter, ...] = (_coefficient("A", "nats params^alpha"), _e(), Parameter("alpha", "exponent of N"))
    if with_d:
        inputs["D"] = "training tokens"
        dense += (_coefficient("B", "nats tokens^beta"), Parameter("beta", "exponent of D"))
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
        starts=(lambda x: {"kappa": _around(x["M"] / x["D"], factor=20.0)}) if name == "joint4" else (lambda x: {}),
        dense="chinchilla",
    )


LAWS: dict[str, Law] = {
    entry.name: entry
    for entry in (
        POWER,
        FRONTIER,
        CHINCHILLA,
        OVERTRAINING,
        ISOFLOP,
        DATA_CONSTRAINED,
        LOGLINEAR,
        SATURATING,
        SIGMOID_LINK,
        EXPONENTIAL_LINK,
        CAPACITY,
        *(_joint(name) for name in JOINT),
    )
}
