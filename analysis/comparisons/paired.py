"""Comparisons of a family with dense, paired over seeds.

The run is the unit: a pair is two runs that share base size, data and seed (hence initial shared weights
and data order). Outcomes: log E50 (its difference is a ratio of exposures), bits learned at one exposure
that every run of the contrast reached, and final scores where both runs saw the same number of tokens.

Censored runs (half of N H never reached) leave no t-interval: their E50 is taken at the last exposure they
were probed at, which bounds the pair's ratio from one side; such a contrast is printed as a bound, with the
number of pairs whose direction is certain and an exact sign test over them. A pair of two censored runs, or
one whose direction the bound leaves open, counts as unknown.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from analysis.comparisons.crossed import crossed_difference
from analysis.errors import InputError
from analysis.records.runs import EQUAL, Run, at_exposure, summary

MIN_PAIRS = 5
"""Below this many pairs a point is given without an interval."""
PRIMARY_FAMILY = "memory_plus"
Answers = dict[str, tuple[str, np.ndarray]]


@dataclass(frozen=True)
class Difference:
    """A mean paired difference; low and high are the 95 % t-interval, NaN below MIN_PAIRS; p is of the
    paired t-test."""

    mean: float
    low: float
    high: float
    p: float
    n: int


@dataclass
class Contrast:
    """One variant against one dense reference at the same base and data."""

    base: str
    variant: str
    reference: str
    family: str
    primary: bool
    control: bool
    planned: int
    macs_ratio: float
    params_ratio: float
    bytes_ratio: float
    speed_ratio: float
    seeds: list[int] = field(default_factory=list)
    log_e50: Difference | None = None
    e50: Difference | None = None
    bound: str = ""
    censored: tuple[int, int] = (0, 0)
    decided: tuple[int, int] = (0, 0)
    sign_p: float = float("nan")
    exposure: float = float("nan")
    bits_share: Difference | None = None
    bits: Difference | None = None
    log_wall: Difference | None = None
    log_flops: Difference | None = None
    finals: dict[str, Difference] = field(default_factory=dict)
    crossed: dict[str, tuple[float, float]] = field(default_factory=dict)
    p_holm: float = float("nan")

    @property
    def equal_flop(self) -> bool:
        """Whether MACs per token are within 5 %, so that the comparison may be called equal-FLOP."""
        return abs(self.macs_ratio - 1) <= EQUAL

    @property
    def p(self) -> float:
        """The contrast's own p-value, before Holm: of log E50, of the first final score where there is no
        E50."""
        if self.log_e50 is not None:
            return self.log_e50.p if not self.bound else self.sign_p
        return next(iter(self.finals.values())).p if self.finals else float("nan")


def paired(differences: np.ndarray) -> Difference:
    """Mean with its 95 % t-interval, from MIN_PAIRS values on; of paired differences, or of one variant's
    runs."""
    from scipy.special import stdtr, stdtrit

    values = np.asarray(differences, float)
    n, nothing = len(values), float("nan")
    if n == 0:
        return Difference(nothing, nothing, nothing, nothing, 0)
    mean = float(values.mean())
    if n < MIN_PAIRS:
        return Difference(mean, nothing, nothing, nothing, n)
    error = float(values.std(ddof=1) / math.sqrt(n))
    reach = float(stdtrit(n - 1, 0.975)) * error
    p = (1.0 if mean == 0 else 0.0) if error == 0 else float(2 * stdtr(n - 1, -abs(mean) / error))
    return Difference(mean, mean - reach, mean + reach, p, n)


def holm(p_values: list[float]) -> list[float]:
    """Holm's step-down adjusted p-values; NaN stays NaN and is not counted."""
    order = sorted((p, position) for position, p in enumerate(p_values) if not math.isnan(p))
    adjusted = [float("nan")] * len(p_values)
    largest = 0.0
    for rank, (p, position) in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p))
        adjusted[position] = largest
    return adjusted


def sign_test(lower: int, higher: int) -> float:
    """Exact two-sided binomial p of `lower` against `higher` under equal chances; NaN below MIN_PAIRS
    decided pairs."""
    n = lower + higher
    if n < MIN_PAIRS:
        return float("nan")
    tail = sum(math.comb(n, k) for k in range(min(lower, higher) + 1)) / 2**n
    return min(1.0, 2 * tail)


def contrasts(runs: list[Run]) -> list[Contrast]:
    """Every variant against plain dense, and against dense controls of equal MACs, paired over seeds.

    One contrast is primary: Memory+ against plain dense at the base and table with the most planned pairs
    (ties: the larger table), a choice made from the grid alone. Holm's adjustment covers all the others.
    """
    by_name = {run.name: run for run in runs}
    table = summary(runs)
    table = table[table["macs"].notna()]
    found = []
    for (pairing, _label), members in table.groupby(["pairing", "label"], sort=False):
        for reference, control in _references(table, str(pairing), members):
            found.append(_contrast(members, reference, control, by_name))
    candidates = [c for c in found if c.family == PRIMARY_FAMILY and not c.control]
    if candidates:
        max(candidates, key=lambda c: (c.planned, c.params_ratio)).primary = True
    rest = [c for c in found if not c.primary]
    for contrast, p in zip(rest, holm([c.p for c in rest]), strict=True):
        contrast.p_holm = p
    return found


def _references(table: pd.DataFrame, pairing: str, members: pd.DataFrame) -> list[tuple[pd.DataFrame, bool]]:
    """The dense variants this variant is held against: plain dense, then controls within 5 % of its MACs.

    Among several plain dense variants (a tuning grid) only one trained alike is a partner.
    """
    first = members.iloc[0]
    dense = table[(table["pairing"] == pairing) & (table["family"] == "dense")]
    plain = [group for _, group in dense[~dense["reshaped"]].groupby("label", sort=False)]
    if len(plain) > 1:
        plain = [group for group in plain if group.iloc[0]["train_key"] == first["train_key"]]
    chosen = [(group, False) for group in plain if group.iloc[0]["label"] != first["label"]]
    if first["family"] == "dense":
        return chosen if first["reshaped"] else []
    for _, group in dense[dense["reshaped"]].groupby("label", sort=False):
        if abs(first["macs"] / group.iloc[0]["macs"] - 1) <= EQUAL:
            chosen.append((group, True))
    return chosen


def _contrast(ours: pd.DataFrame, theirs: pd.DataFrame, control: bool, runs: dict[str, Run]) -> Contrast:
    """All outcomes of one variant against one reference."""
    a, b = ours.iloc[0], theirs.iloc[0]
    for part in (ours, theirs):
        if (twice := part["seed"].duplicated(keep=False)).any():
            names = ", ".join(part.loc[twice, "run"])
            raise InputError(f"{part['label'].iloc[0]}: {names}: of one seed, and equal in all else that is compared")
    joined = ours.merge(theirs, on="seed", suffixes=("", "_ref"))
    contrast = Contrast(
        base=a["base"],
        variant=a["label"],
        reference=b["label"],
        family=a["family"],
        primary=False,
        control=control,
        planned=len(joined),
        macs_ratio=_ratio(a, b, "macs"),
        params_ratio=_ratio(a, b, "params_total"),
        bytes_ratio=_ratio(a, b, "bytes_per_token"),
        speed_ratio=float((joined["tokens_per_s"] / joined["tokens_per_s_ref"]).median()),
    )
    joined = joined[(joined["state"] == "done") & (joined["state_ref"] == "done")]
    contrast.seeds = [int(seed) for seed in joined["seed"]]
    if len(joined):
        _compare_e50(contrast, joined)
        _compare_bits(contrast, [(runs[x], runs[y]) for x, y in zip(joined["run"], joined["run_ref"], strict=True)])
        _compare_finals(contrast, joined, runs)
    return contrast


def _ratio(a: pd.Series, b: pd.Series, key: str) -> float:
    return float(a[key] / b[key]) if a[key] and b[key] else float("nan")


def _compare_e50(contrast: Contrast, joined: pd.DataFrame) -> None:
    """Fill in the E50 fields from pairs whose two runs have storage probes; see the module's note on
    censoring."""
    known = joined[(joined["e50_state"] != "none") & (joined["e50_state_ref"] != "none")]
    if known.empty:
        return
    ours, theirs = known["e50"].to_numpy(float), known["e50_ref"].to_numpy(float)
    late, late_ref = (known[key].eq("censored").to_numpy() for key in ("e50_state", "e50_state_ref"))
    early, early_ref = (known[key].eq("early").to_numpy() for key in ("e50_state", "e50_state_ref"))
    contrast.censored = (int(late.sum()), int(late_ref.sum()))
    logs = np.log(ours / theirs)
    least_known = not (late.any() or early_ref.any())
    most_known = not (late_ref.any() or early.any())
    lower = (ours < theirs) & ~late & ~early_ref
    higher = (ours > theirs) & ~late_ref & ~early
    contrast.decided = (int(lower.sum()), int(higher.sum()))
    contrast.sign_p = sign_test(*contrast.decided)
    contrast.log_e50, contrast.e50 = paired(logs), paired(ours - theirs)
    if not (least_known and most_known):
        contrast.bound = "at most" if least_known else "at least" if most_known else "unknown"
        nothing = float("nan")
        contrast.log_e50 = Difference(contrast.log_e50.mean, nothing, nothing, nothing, len(known))
        contrast.e50 = Difference(contrast.e50.mean, nothing, nothing, nothing, len(known))
    else:
        contrast.log_wall, contrast.log_flops = (_log_ratio(known, key) for key in ("wall_to_e50", "flops_to_e50"))


def _log_ratio(pairs: pd.DataFrame, key: str) -> Difference | None:
    """Paired difference of the logarithm of a column; None where a pair lacks it."""
    ratio = pairs[key].to_numpy(float) / pairs[f"{key}_ref"].to_numpy(float)
    return paired(np.log(ratio)) if np.isfinite(ratio).all() else None


def _compare_bits(contrast: Contrast, pairs: list[tuple[Run, Run]]) -> None:
    """Bits learned at the last exposure that every run of the contrast reached."""
    pairs = [pair for pair in pairs if all("storage_bits" in run.probes and run.steady for run in pair)]
    if not pairs:
        return
    contrast.exposure = min(float(run.probes["epoch"].iloc[-1]) for pair in pairs for run in pair)
    bits = np.array([[bits_at(run, contrast.exposure) for run in pair] for pair in pairs])
    most = np.array([float(x.probes["storage_bits_max"].iloc[-1]) for x, _ in pairs])
    contrast.bits = paired(bits[:, 0] - bits[:, 1])
    contrast.bits_share = paired((bits[:, 0] - bits[:, 1]) / most)


def bits_at(run: Run, exposure: float, column: str = "storage_bits") -> float:
    """A probe's column at an exposure, linear in log exposure between probes."""
    probes = run.probes.dropna(subset=[column])
    return at_exposure(probes["epoch"].to_numpy(float), probes[column].to_numpy(float), exposure)


def _compare_finals(contrast: Contrast, joined: pd.DataFrame, runs: dict[str, Run]) -> None:
    """Final scores, only where every pair's two runs ended at the same number of tokens (within 1 %)."""
    if ((joined["tokens"] / joined["tokens_ref"] - 1).abs() > 0.01).any():
        return
    ours, theirs = ([final_scores(runs[name]) for name in joined[key]] for key in ("run", "run_ref"))
    shared = set.intersection(*(set(scores) for scores in ours + theirs)) if ours else set()
    for key in sorted(shared, key=lambda key: (key != "eval/nll", key)):  # the first is what the contrast is tested on
        if not key.endswith("/bits_max"):
            contrast.finals[key] = paired(np.array([x[key] - y[key] for x, y in zip(ours, theirs, strict=True)]))
    if len(joined) >= MIN_PAIRS:
        _cross(contrast, *([answers(runs[name]) for name in joined[key]] for key in ("run", "run_ref")))


def _cross(contrast: Contrast, ours: list[Answers], theirs: list[Answers]) -> None:
    """95 % intervals over runs x questions, of scores for which every run has its answers to the same questions."""
    for key in contrast.finals:
        every = [found.get(key) for found in ours + theirs]
        asked = {None if answer is None else (answer[0], len(answer[1])) for answer in every}
        if len(asked) != 1 or None in asked:
            continue
        scores = np.array([answer[1] for answer in every if answer is not None])
        if scores.shape[1] > 1:
            _, *ends = crossed_difference(scores[: len(ours)], scores[len(ours) :])
            contrast.crossed[key] = ends[0], ends[1]


def answers(run: Run) -> Answers:
    """`task/metric` -> (the questions' fingerprint, 1.0 or 0.0 by question) of all evaluations of a run."""
    return {
        f"{task}/{metric}": (str(scored.get("prompt_hash")), np.array(list(text), float))
        for evaluation in run.evals
        for task, scored in evaluation.get("tasks", {}).items()
        for metric, text in (scored.get("answers") or {}).items()
    }


def final_scores(run: Run) -> dict[str, float]:
    """`task/metric` -> value over all evaluations of a run, and `eval/nll`, the last evaluation-mode loss."""
    scores = {}
    for evaluation in run.evals:
        for task, scored in evaluation.get("tasks", {}).items():
            for metric, score in scored.get("metrics", {}).items():
                if score.get("value") is not None:
                    scores[f"{task}/{metric}"] = float(score["value"])
    last = run.last("eval_loss")
    return scores if math.isnan(last) else {"eval/nll": last} | scores
