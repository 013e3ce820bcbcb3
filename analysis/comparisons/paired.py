"""Comparisons of every variant with the reference family, paired over seeds.

The unit is the run: a pair is two runs that share base size, data and seed, and therefore data order and the initial
values of shared weights. Outcomes: log E50 (its difference is a ratio of exposures), bits learned at one exposure that
every run of the contrast reached, and final scores if both runs were trained on the same number of tokens.

Two final scores are paired only if they measure the same thing (analysis.records.scores); the others are listed.

A contrast with censored runs, which never reached half of N H, has no t-interval. The E50 of a censored run is taken at
its last probe, which bounds the ratio of the pair from one side. The contrast is stated as a bound, with the number of
pairs whose direction is certain and an exact sign test over them. A pair of two censored runs, or one whose direction
is open, counts as unknown.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import groupby

import numpy as np
import pandas as pd

from analysis.comparisons.crossed import crossed_difference
from analysis.comparisons.statistics import MIN_PAIRS, Difference, holm, paired_by_group, sign_test
from analysis.errors import InputError
from analysis.records.grid_data import DONE, EQUAL, GridData
from analysis.records.scores import setting

E50 = "e50"
TERMS = ("few_shot", "n", "precision")
"""What `setting` states of a score."""
SAME_TOKENS = 0.01
"""Runs whose tokens differ by less than this share ended at the same number of tokens."""
NAN = float("nan")


@dataclass(frozen=True)
class ScoreDifference:
    """A difference of one final score over pairs of runs.

    `crossed` is its 95 % interval over runs x questions, if the answers of every run are recorded by question.
    """

    key: str
    few_shot: float
    n: float
    difference: Difference
    crossed: tuple[float, float] | None = None
    precision: str = "fp32"


@dataclass(frozen=True)
class Unpaired:
    """A score that both runs of some pairs have, but that does not measure the same thing."""

    key: str
    seeds: tuple[int, ...]
    ours: str
    theirs: str


@dataclass
class Contrast:
    """One variant against one variant of the reference at the same base and data."""

    base: str
    variant: str
    reference: str
    family: str
    control: bool
    """Whether the reference is a control of equal MACs, not the family's plain model."""
    macs_ratio: float
    params_ratio: float
    bytes_ratio: float
    planned: int = 0
    speed_ratio: float = NAN
    primary: bool = False
    metric: str = ""
    """What the contrast is tested on: e50, or the key of a final score; empty without any outcome."""
    seeds: list[int] = field(default_factory=list)
    log_e50: Difference | None = None
    e50: Difference | None = None
    bound: str = ""
    censored: tuple[int, int] = (0, 0)
    decided: tuple[int, int] = (0, 0)
    sign_p: float = NAN
    exposure: float = NAN
    bits_share: Difference | None = None
    bits: Difference | None = None
    log_wall: Difference | None = None
    log_flops: Difference | None = None
    e50_ratios: np.ndarray = field(default_factory=lambda: np.array([]))
    """E50 of the variant over that of the reference, by pair; empty if a run is censored."""
    flops_ratios: np.ndarray = field(default_factory=lambda: np.array([]))
    """Training FLOPs to E50 of the reference over those of the variant, by pair; empty if a run is censored."""
    finals: list[ScoreDifference] = field(default_factory=list)
    unpaired: list[Unpaired] = field(default_factory=list)
    p_holm: float = NAN

    @property
    def equal_flop(self) -> bool:
        """Whether MACs per token are within 5 %, so that the comparison may be called equal-FLOP."""
        return abs(self.macs_ratio - 1) <= EQUAL

    @property
    def final(self) -> ScoreDifference | None:
        """The final score that the contrast is tested on."""
        return next((score for score in self.finals if score.key == self.metric), None)

    @property
    def p(self) -> float:
        """The p-value of its metric, before Holm's adjustment."""
        if self.metric == E50 and self.log_e50 is not None:
            return self.sign_p if self.bound else self.log_e50.p
        return self.final.difference.p if self.final else NAN


def contrasts(data: GridData) -> list[Contrast]:
    """Return every variant against the plain variants of the reference family, and against its controls of equal MACs.

    The contrast that the grid declares is primary and comes first. Holm's adjustment covers all others.

    Raises:
        InputError: Two runs of one variant and one seed.
    """
    sides = _sides(data)
    return _tested(data, compared(data, sides), sides)


def compared(data: GridData, sides: pd.DataFrame) -> list[Contrast]:
    """Return one contrast per row of `sides`, without tests: `ours` and `theirs` are the first runs of two variants.

    Raises:
        InputError: Two runs of one variant and one seed.
    """
    if sides.empty:
        return []
    result = [_contrast(data.runs, *side) for side in sides[["ours", "theirs", "control"]].itertuples(index=False)]
    pairs = _pairs(data, sides)
    planned = pairs.groupby("contrast").agg(planned=("seed", "size"), speed=("speed_ratio", "median"))
    for at, row in planned.iterrows():
        result[int(str(at))].planned, result[int(str(at))].speed_ratio = int(row["planned"]), float(row["speed"])
    pairs = pairs[pairs["done"]]
    for at, part in pairs.groupby("contrast")["seed"]:
        result[int(str(at))].seeds = [int(seed) for seed in part]
    _compare_e50(result, pairs)
    _compare_bits(data, result, pairs)
    _compare_finals(data, result, pairs)
    return result


def first_runs(data: GridData) -> pd.DataFrame:
    """Return one row per variant (label at one base and data): the position of its first run, and its number as
    index."""
    runs = data.runs[data.runs["macs"].notna()]
    first = runs.assign(position=runs.index).drop_duplicates(["pairing", "label"])
    return first.set_index(["pairing", "label"])


def _sides(data: GridData) -> pd.DataFrame:
    """Return one row per contrast: the first run of each side, whether it is to a control, and whether it is
    primary."""
    columns = ["pairing", "label", "family", "reshaped", "smaller", "train_key", "macs", "position"]
    variants = first_runs(data).reset_index()[columns]
    reference = variants[variants["family"] == data.reference]
    both = variants.merge(reference, on="pairing", suffixes=("", "_ref"))
    plain = both[~both["reshaped_ref"]]
    several = plain.groupby(["pairing", "label"])["label_ref"].transform("size") > 1
    plain = plain[~several | (plain["train_key"] == plain["train_key_ref"])]
    plain = plain[(plain["label"] != plain["label_ref"]) & ((plain["family"] != data.reference) | plain["reshaped"])]
    controls = both[both["reshaped_ref"] & ~both["smaller_ref"] & (both["family"] != data.reference)]
    controls = controls[(controls["macs"] / controls["macs_ref"] - 1).abs() <= EQUAL]
    sides = pd.concat([plain.assign(control=False), controls.assign(control=True)], ignore_index=True)
    sides = sides.rename(columns={"position": "ours", "position_ref": "theirs"})[["ours", "theirs", "control"]]
    sides = sides.sort_values(["ours", "control", "theirs"]).assign(primary=False)
    declared = _declared(data, variants)
    if declared is not None:
        ours, theirs = declared
        rest = sides[(sides["ours"] != ours) | (sides["theirs"] != theirs)]
        first = pd.DataFrame({"ours": [ours], "theirs": [theirs], "control": [False], "primary": [True]})
        sides = pd.concat([first, rest])
    return sides.reset_index(drop=True)


def _declared(data: GridData, variants: pd.DataFrame) -> tuple[int, int] | None:
    """Return the first runs of the two sides of the grid's contrast; None without a contrast or without runs, and for
    one over several worlds (analysis.comparisons.pooled)."""
    if data.contrast is None or data.contrast.over is not None:
        return None
    firsts = []
    for side in (data.contrast.treatment, data.contrast.reference):
        members = data.runs[data.runs["run"].isin(side)]
        of_variant = variants.merge(members[["pairing", "label"]].drop_duplicates(), on=["pairing", "label"])
        if of_variant.empty:
            return None
        firsts.append(int(of_variant["position"].iloc[0]))
    return firsts[0], firsts[1]


def _contrast(runs: pd.DataFrame, ours: int, theirs: int, control: bool) -> Contrast:
    """Return a contrast without its outcomes."""
    a, b = runs.iloc[ours].to_dict(), runs.iloc[theirs].to_dict()
    macs, params, read = (_ratio(a[key], b[key]) for key in ("macs", "params_total", "bytes_per_token"))
    return Contrast(a["base"], a["label"], b["label"], a["family"], control, macs, params, read)


def _ratio(a: float, b: float) -> float:
    return float(a / b) if a and b else NAN


def _pairs(data: GridData, sides: pd.DataFrame) -> pd.DataFrame:
    """Return one row per pair of runs: contrast, seed, positions `ours` and `theirs`, and the columns of both
    (`_ref`)."""
    runs = data.runs.assign(position=data.runs.index)
    variant = runs.groupby(["pairing", "label"], sort=False)["position"].transform("first")
    columns = ["seed", "state", "tokens_per_s", "tokens", "e50", "e50_state", "wall_to_e50", "flops_to_e50", "bits_max"]
    columns += ["steady", "run", "label"]
    members = runs[[*columns, "position"]].assign(variant=variant)
    _refuse_repeats(members, sides)
    numbered = sides.assign(contrast=sides.index)[["contrast", "ours", "theirs"]]
    ours = numbered.merge(members, left_on="ours", right_on="variant")
    theirs = numbered[["contrast", "theirs"]].merge(members, left_on="theirs", right_on="variant")
    pairs = ours.merge(theirs, on=["contrast", "seed"], suffixes=("", "_ref"))
    pairs = pairs.assign(ours=pairs["position"], theirs=pairs["position_ref"])
    done = (pairs["state"] == DONE) & (pairs["state_ref"] == DONE)
    return pairs.assign(done=done, speed_ratio=pairs["tokens_per_s"] / pairs["tokens_per_s_ref"])


def _refuse_repeats(members: pd.DataFrame, sides: pd.DataFrame) -> None:
    compared = members[members["variant"].isin(pd.concat([sides["ours"], sides["theirs"]]))]
    repeated = compared[compared.duplicated(["variant", "seed"], keep=False)]
    if len(repeated):
        same = repeated[repeated["variant"] == repeated["variant"].iloc[0]]
        raise InputError(
            f"{same['label'].iloc[0]}: {', '.join(same['run'])}: these runs share seed and settings; keep one of them"
        )


def _grouped(values: pd.Series | np.ndarray, pairs: pd.DataFrame, contrasts: int) -> list[Difference]:
    return paired_by_group(np.asarray(values, float), pairs["contrast"].to_numpy(int), contrasts)


def _compare_e50(result: list[Contrast], pairs: pd.DataFrame) -> None:
    """Fill in the E50 fields from pairs whose two runs have storage probes; see the module's note on censoring."""
    pairs = pairs[(pairs["e50_state"] != "none") & (pairs["e50_state_ref"] != "none")]
    if pairs.empty:
        return
    late, late_ref = (pairs[key] == "censored" for key in ("e50_state", "e50_state_ref"))
    early, early_ref = (pairs[key] == "early" for key in ("e50_state", "e50_state_ref"))
    ours, theirs = pairs["e50"].astype(float), pairs["e50_ref"].astype(float)
    pairs = pairs.assign(
        late=late,
        late_ref=late_ref,
        from_below=late | early_ref,
        from_above=late_ref | early,
        lower=(ours < theirs) & ~late & ~early_ref,
        higher=(ours > theirs) & ~late_ref & ~early,
        e50_ratio=ours / theirs,
        flops_ratio=pairs["flops_to_e50_ref"] / pairs["flops_to_e50"],
    )
    counts = pairs.groupby("contrast")[["late", "late_ref", "lower", "higher", "from_below", "from_above"]].sum()
    logs, plain = (_grouped(values, pairs, len(result)) for values in (np.log(ours / theirs), ours - theirs))
    wall, flops = (
        _grouped(np.log(pairs[key] / pairs[f"{key}_ref"]), pairs, len(result))
        for key in ("wall_to_e50", "flops_to_e50")
    )
    ratios = {int(str(at)): part for at, part in pairs.groupby("contrast")[["e50_ratio", "flops_ratio"]]}
    for at, count in counts.astype(int).iterrows():
        contrast = result[int(str(at))]
        contrast.censored = (int(count["late"]), int(count["late_ref"]))
        contrast.decided = (int(count["lower"]), int(count["higher"]))
        contrast.sign_p = sign_test(*contrast.decided)
        contrast.log_e50, contrast.e50 = logs[int(str(at))], plain[int(str(at))]
        if count["from_below"] or count["from_above"]:
            contrast.bound = "unknown" if count["from_below"] and count["from_above"] else "at least"
            contrast.bound = "at most" if not count["from_below"] else contrast.bound
            contrast.log_e50, contrast.e50 = _unbounded(contrast.log_e50), _unbounded(contrast.e50)
        else:
            contrast.log_wall, contrast.log_flops = (_or_none(values[int(str(at))]) for values in (wall, flops))
            contrast.e50_ratios, contrast.flops_ratios = ratios[int(str(at))].to_numpy(float).T


def _unbounded(difference: Difference) -> Difference:
    return Difference(difference.mean, NAN, NAN, NAN, difference.n)


def _or_none(difference: Difference) -> Difference | None:
    """Return the values of all pairs; None where some pair lacks one."""
    return difference if np.isfinite(difference.mean) else None


def _compare_bits(data: GridData, result: list[Contrast], pairs: pd.DataFrame) -> None:
    """Compare bits learned at the last exposure that every run of a contrast reached."""
    curves, last = data.curves("storage_bits"), data.curves("epoch").last_x()
    probed = curves.count > 0
    pairs = pairs[probed[pairs["ours"]] & probed[pairs["theirs"]] & pairs["steady"] & pairs["steady_ref"]]
    if pairs.empty:
        return
    ends = np.minimum(last[pairs["ours"]], last[pairs["theirs"]])
    exposure = pd.Series(ends, index=pairs.index).groupby(pairs["contrast"]).transform("min").to_numpy(float)
    ours, theirs = (curves.at(exposure, pairs[side].to_numpy(int)) for side in ("ours", "theirs"))
    bits = _grouped(ours - theirs, pairs, len(result))
    shares = _grouped((ours - theirs) / pairs["bits_max"].to_numpy(float), pairs, len(result))
    for at, where in pd.Series(exposure, index=pairs["contrast"]).groupby(level=0).first().items():
        contrast = result[int(str(at))]
        contrast.exposure, contrast.bits, contrast.bits_share = float(where), bits[int(str(at))], shares[int(str(at))]


def _compare_finals(data: GridData, result: list[Contrast], pairs: pd.DataFrame) -> None:
    """Compare final scores, where the two runs of every pair ended at the same number of tokens."""
    unequal = (pairs["tokens"] / pairs["tokens_ref"] - 1).abs() > SAME_TOKENS
    pairs = pairs[~unequal.groupby(pairs["contrast"]).transform("any")][["contrast", "seed", "ours", "theirs"]]
    columns = ["run", "score", "key", "few_shot", "n", "precision", "value", "answers"]
    ours = pairs.merge(data.scores[columns], left_on="ours", right_on="run")
    theirs = pairs[["contrast", "seed", "theirs"]].merge(data.scores[columns], left_on="theirs", right_on="run")
    same = ours.merge(theirs, on=["contrast", "seed", "score"], suffixes=("", "_ref"))
    for at, finals in _final_differences(same):
        result[at].finals = finals
    for at, unpaired in _unpaired(ours, theirs, same):
        result[at].unpaired = unpaired


def _final_differences(same: pd.DataFrame) -> Iterator[tuple[int, list[ScoreDifference]]]:
    """Return the differences of each contrast by score, LOSS first."""
    if same.empty:
        return
    numbered = same.assign(group=same.groupby(["contrast", "score"]).ngroup())
    first = numbered.drop_duplicates("group").set_index("group").sort_index()
    values = (numbered["value"] - numbered["value_ref"]).to_numpy(float)
    differences = paired_by_group(values, numbered["group"].to_numpy(int), len(first))
    crossed = dict(_crossed(numbered))
    rows = zip(first.reset_index().to_dict("records"), differences, strict=True)
    for at, group in groupby(rows, key=lambda row: int(row[0]["contrast"])):
        yield (
            at,
            [
                ScoreDifference(
                    row["key"], row["few_shot"], row["n"], difference, crossed.get(row["group"]), row["precision"]
                )
                for row, difference in group
            ],
        )


def _crossed(same: pd.DataFrame) -> Iterator[tuple[int, tuple[float, float]]]:
    """Group -> 95 % interval over runs x questions, of groups whose runs all have recorded answers."""
    answered = same["answers"].notna() & same["answers_ref"].notna()
    complete = answered.groupby(same["group"]).transform("all")
    enough = same.groupby("group")["group"].transform("size") >= MIN_PAIRS
    for group, part in same[complete & enough].groupby("group"):
        texts = [*part["answers"], *part["answers_ref"]]
        if len({len(text) for text in texts}) == 1 and len(texts[0]) > 1:
            scores = np.frombuffer("".join(texts).encode(), np.uint8).reshape(len(texts), -1) - float(ord("0"))
            _, low, high = crossed_difference(scores[: len(part)], scores[len(part) :])
            yield int(str(group)), (low, high)


def _unpaired(ours: pd.DataFrame, theirs: pd.DataFrame, same: pd.DataFrame) -> Iterator[tuple[int, list[Unpaired]]]:
    """Return, for each contrast, the scores that both runs of a pair have, but that never measure the same thing."""
    place = ["contrast", "seed", "key"]
    both = ours.drop_duplicates(place).merge(theirs.drop_duplicates(place), on=place, suffixes=("", "_ref"))
    index = pd.MultiIndex.from_frame(both[place])
    both = both[~index.isin(pd.MultiIndex.from_frame(same[place]))]
    for at, part in both.groupby("contrast"):
        scores = []
        for key, rows in part.groupby("key"):
            sides = [
                " or ".join(
                    sorted({setting(*terms) for terms in zip(*(rows[f"{t}{side}"] for t in TERMS), strict=True)})
                )
                for side in ("", "_ref")
            ]
            scores.append(Unpaired(str(key), tuple(int(seed) for seed in rows["seed"]), *sides))
        yield int(str(at)), scores


def _tested(data: GridData, result: list[Contrast], sides: pd.DataFrame) -> list[Contrast]:
    """Mark the primary contrast and what each is tested on, and adjust the p-values of all others."""
    declared = data.contrast.metric if data.contrast else None
    for contrast, primary in zip(result, sides["primary"], strict=True):
        contrast.primary = bool(primary)
        available = [E50] if contrast.log_e50 else []
        available += [score.key for score in contrast.finals]
        contrast.metric = declared if declared in available else next(iter(available), "")
        if contrast.primary and declared:
            contrast.metric = declared
    rest = [contrast for contrast in result if not contrast.primary]
    for contrast, p in zip(rest, holm([contrast.p for contrast in rest]), strict=True):
        contrast.p_holm = p
    return result
