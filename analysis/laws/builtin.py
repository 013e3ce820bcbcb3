"""The built-in laws: `LAWS` is the registry, one entry per law.

Parameters that enter linearly are marked: they are solved for, not searched. Start ranges are of the nonlinear
parameters; those with units take theirs from the data (`starts`).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from analysis.errors import InputError
from analysis.laws.autodiff import exp, expm1, log, log1p, minimum, softplus
from analysis.laws.formula import formula_law
from analysis.laws.joint import JOINT, joint
from analysis.laws.law import Inputs, Law, Parameter, Values, across, around, coefficient, offset, signed, spanned

POWER = Law(
    "power",
    "y = E + A x^-alpha",
    "Hestness et al. 2017 (arXiv 1712.00409)",
    {"x": "any size or compute"},
    "y",
    (offset("E", "offset, units of y"), coefficient("A", "units of y x^alpha"), Parameter("alpha", "exponent")),
    lambda p, x: p["E"] + p["A"] * x["x"] ** -p["alpha"],
    lambda x: x["x"],
)

FRONTIER = Law(
    "frontier",
    "y = k C^a",
    "compute-optimal sizes: Hoffmann et al. 2022 (arXiv 2203.15556), approaches 1 and 2",
    {"C": "training FLOPs"},
    "y",
    (coefficient("k", "units of y per FLOP^a"), signed("a", "exponent")),
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
        coefficient("A", "nats params^alpha"),
        coefficient("B", "nats tokens^beta"),
        offset(),
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
        offset(),
        coefficient("a", "nats FLOP^eta"),
        coefficient("b", "nats FLOP^eta"),
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
        offset("Lmin", "loss at the optimum, nats per token"),
        Parameter("k", "curvature, nats", log=False, linear=True, at_bound="the runs show no minimum"),
        Parameter("Nopt", "parameters at the optimum"),
    ),
    lambda p, x: p["Lmin"] + p["k"] * _square(np.log(x["N"]) - log(p["Nopt"])),
    lambda x: x["N"],
    starts=lambda x: {"Nopt": around(x["N"])},
)


def _square(x: Any) -> Any:
    return x * x


def _data_constrained(p: Values, x: Inputs) -> Any:
    """Return the data-constrained law's values, in effective D' and N'.

    Repeated tokens and surplus parameters are worth exponentially less.

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
        offset(),
        Parameter("alpha", "exponent of parameters", start=(0.15, 0.8)),
        Parameter("beta", "exponent of tokens", start=(0.15, 0.8)),
        Parameter("Rn", "surplus parameters worth having, in multiples", start=(1.0, 30.0)),
        Parameter("Rd", "repeats worth having", start=(1.0, 50.0)),
    ),
    _data_constrained,
    lambda x: x["N"] * x["D"],
    constant_allowed=frozenset({"U"}),
    starts=lambda x: {"A": around(x["N"], power=0.35), "B": around(x["D"], power=0.35)},
)

LOGLINEAR = Law(
    "loglinear",
    "y = a + b ln R",
    "the form of Memory Layers at Scale (arXiv 2412.09764), figure 1",
    {"R": "memory rows, above 0"},
    "y",
    (signed("a", "y at one row", linear=True), signed("b", "gain per factor e", linear=True)),
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
        signed("base", "y without a table", linear=True),
        signed("gain", "y at R to infinity, above base", linear=True),
        Parameter("R0", "rows at which it bends"),
        Parameter("gamma", "exponent", start=(0.1, 2.0)),
    ),
    lambda p, x: p["base"] - p["gain"] * expm1(-p["gamma"] * log1p(x["R"] / p["R0"])),
    lambda x: x["R"],
    residuals="linear",
    zero_allowed=frozenset({"R"}),
    starts=lambda x: {"R0": spanned(x["R"])},
)

SIGMOID_LINK = Law(
    "sigmoid_link",
    "y = low + span / (1 + exp(k (L - L0)))",
    "loss to accuracy: Llama 3 (arXiv 2407.21783), section 3.2.1",
    {"L": "loss, nats, or another measure that falls as models get better"},
    "y",
    (
        signed("low", "accuracy by chance", linear=True),
        Parameter("span", "accuracy from low to top", log=False, linear=True),
        Parameter("k", "steepness, per nat"),
        signed("L0", "loss at half"),
    ),
    lambda p, x: p["low"] + p["span"] / (1.0 + exp(p["k"] * (x["L"] - p["L0"]))),
    lambda x: -x["L"],
    residuals="linear",
    any_sign=frozenset({"L"}),
    starts=lambda x: {"k": across(x["L"], 1.0, 100.0), "L0": (2 * x["L"].min() - x["L"].max(), x["L"].max())},
)

EXPONENTIAL_LINK = Law(
    "exponential_link",
    "y = eps - k exp(-gamma L)",
    "loss to error: Gadre et al. 2024 (arXiv 2403.08540), equation 5",
    {"L": "loss, nats"},
    "y",
    (
        offset("eps", "error at infinite loss"),
        coefficient("k", "error removed at loss 0, extrapolated"),
        Parameter("gamma", "per nat"),
    ),
    lambda p, x: p["eps"] - p["k"] * exp(-p["gamma"] * x["L"]),
    lambda x: -x["L"],
    residuals="linear",
    starts=lambda x: {"gamma": across(x["L"], 0.1, 20.0)},
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
    lambda p, x: x["H"] * exp(-softplus(-p["k"] * log(p["c"] * (x["P"] / x["H"]))) / p["k"]),
    lambda x: x["P"],
    constant_allowed=frozenset({"H"}),
    starts=lambda x: {"c": around(x["H"] / x["P"], factor=1e3)},
)

OUTER = formula_law(
    "L = E + (A*N**-alpha + B*D**-beta)**k",
    ("N", "D", "L"),
    "alpha ~ 0.1..1.5, beta ~ 0.1..1.5, k ~ 0.3..3",
    name="outer",
    source="Chinchilla's law with an outer exponent",
    meaning={
        "N": "parameters",
        "D": "training tokens",
        "E": "irreducible loss, nats per token",
        "A": "nats^(1/k) params^alpha",
        "B": "nats^(1/k) tokens^beta",
        "k": "outer exponent",
    },
    option="outer",
)

POWER2 = formula_law(
    "y = k*N**a*D**b",
    ("N", "D", "y"),
    "a free, b free",
    name="power2",
    source="learning rate and batch size: Li et al. 2025 (arXiv 2503.04715)",
    meaning={"N": "parameters, or any first size", "D": "training tokens, or any second size"},
    option="power2",
)

SHIFTED = formula_law(
    "y = E + A*(x + x0)**-alpha",
    ("x", "y"),
    name="shifted",
    source="Alabdulmohsin et al. 2022 (arXiv 2209.06640), M3",
    meaning={"x": "any size or compute", "x0": "where the law bends, units of x", "E": "offset, units of y"},
    option="shifted",
)

BROKEN = formula_law(
    "y = E + A*x**-a*(1 + (x/d)**(1/f))**(-c*f)",
    ("x", "y"),
    "f ~ 0.1..1, c free",
    name="broken",
    source="Caballero et al. 2023 (arXiv 2210.14891), one break",
    meaning={
        "x": "any size or compute",
        "d": "where the law breaks, units of x",
        "f": "width of the break",
        "c": "exponent gained at the break",
        "E": "offset, units of y",
    },
    option="broken",
)

THREE_TERMS = formula_law(
    "L = E + A*N**-alpha + B*D**-beta + G*V**-gamma",
    ("N", "D", "V", "L"),
    "E free",
    name="three_terms",
    source="Chinchilla's law with a third size, as the vocabulary of Tao et al. 2024 (arXiv 2407.13623)",
    residuals="linear",
    meaning={
        "N": "parameters",
        "D": "training tokens",
        "V": "a third size, as vocabulary parameters",
        "E": "loss at infinite sizes, of any sign",
        "A": "units of L N^alpha",
        "B": "units of L D^beta",
        "G": "units of L V^gamma",
    },
    option="three_terms",
)


def mixture(columns: set[str]) -> Law:
    """Return the law L = E + exp(sum of w_i s_i) over the columns s1, s2, ... (Ye et al. 2024, arXiv 2403.16952)."""
    shares = sorted(
        (name for name in columns if name[:1] == "s" and name[1:].isdigit()), key=lambda name: int(name[1:])
    )
    if len(shares) < 2:
        raise InputError("--columns: law mixture needs the shares as s1, s2, ... and L")
    weights = [f"w{share[1:]}" for share in shares]
    return formula_law(
        f"L = E + exp({' + '.join(f'{w}*{s}' for w, s in zip(weights, shares, strict=True))})",
        (*shares, "L"),
        ", ".join(f"{weight} free" for weight in weights),
        name="mixture",
        source="data mixing laws: Ye et al. 2024 (arXiv 2403.16952)",
        meaning={
            **dict.fromkeys(shares, "share of the training data"),
            **{w: f"log loss per share of {s[1:]}" for w, s in zip(weights, shares, strict=True)},
            "E": "offset, units of L",
        },
        option="mixture",
    )


MIXTURE = mixture({"s1", "s2", "s3"})

LAWS: dict[str, Law] = {
    law.name: law
    for law in (
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
        OUTER,
        POWER2,
        SHIFTED,
        BROKEN,
        THREE_TERMS,
        MIXTURE,
        *(joint(name) for name in JOINT),
    )
}


def law(name: str, columns: set[str]) -> Law:
    """Return the law of that name; a joint law without the column D comes without its D term. InputError if unknown."""
    if name not in LAWS:
        raise InputError(f"--law: got {name!r}, allowed: joint, {', '.join(LAWS)}")
    if name == "mixture":
        return mixture(columns)
    if name in JOINT and "D" not in columns:
        if name == "joint4":
            raise InputError(f"--columns: law {name} needs D, the training tokens")
        return joint(name, with_d=False)
    return LAWS[name]
