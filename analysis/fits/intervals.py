"""How far a fit can be trusted: bootstrap, profile intervals, leave-one-out, leverage, held-out largest cells."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from analysis.fits.fit import Fit, Problem, fit, lengths
from analysis.fits.solver import huber, minimise, objective

OPEN_AFTER = 12.0
"""A profile that has not risen enough this far from the optimum (in theta: a factor e^12) is open."""
DRAWS_AT_ONCE = 1000


@dataclass(frozen=True)
class Bootstrap:
    """Refits to resampled data: values (draws,) by parameter; draws with too few distinct points are left out."""

    values: dict[str, np.ndarray]
    theta: np.ndarray
    requested: int
    units: int

    @property
    def kept(self) -> int:
        """Number of draws that could be fitted."""
        return len(self.theta)

    def interval(self, name: str, level: float = 0.95) -> tuple[float, float]:
        """Expanded percentile interval of a parameter; NaN without draws.

        Percentiles of a normal quantile widened by t / z and sqrt(n / (n - p)), n resampled units: plain percentiles
        are too narrow in small samples (Hesterberg 2015, The American Statistician 69(4), section 4.3).
        """
        from scipy.special import ndtr, stdtrit

        free = self.units - self.theta.shape[1]
        if not self.kept or free < 1:
            return math.nan, math.nan
        quantile = float(stdtrit(free, 0.5 + level / 2)) * math.sqrt(self.units / free)
        tail = 100 * float(ndtr(-quantile))
        low, high = np.percentile(self.values[name], [tail, 100 - tail])
        return float(low), float(high)

    def standard_error(self, name: str) -> float:
        """Standard deviation over draws."""
        return float(self.values[name].std(ddof=1)) if self.kept > 1 else math.nan


def bootstrap(
    found: Fit, draws: int, seed: int = 0, clusters: np.ndarray | None = None, strata: np.ndarray | None = None
) -> Bootstrap:
    """Refit to data drawn with replacement: points, or whole clusters (runs), within strata (cells) if given.

    Every refit starts from the two best of the fit's bank for its own draw, so another optimum can be reached.
    """
    problem, generator = found.problem, np.random.default_rng(seed)
    units = problem.n if clusters is None else len(np.unique(clusters))
    parts = []
    for start in range(0, draws, DRAWS_AT_ONCE):
        counts = _counts(problem.n, min(DRAWS_AT_ONCE, draws - start), generator, clusters, strata)
        counts = counts[(counts > 0).sum(1) > len(problem.free)]
        if len(counts):
            parts.append(_refitted(found, counts * problem.w))
    theta = np.concatenate([np.empty((0, len(found.theta))), *parts])
    return Bootstrap(problem.natural(theta), theta, draws, units)


def _refitted(found: Fit, weights: np.ndarray) -> np.ndarray:
    """The optimum under each row of weights (draws, n), as theta (draws, p)."""
    problem = found.problem
    losses = huber(problem.residual(found.bank)[0], problem.delta)
    order = np.argsort(weights @ np.nan_to_num(losses, nan=np.inf, posinf=1e300).T, 1)[:, :2]
    tries = [minimise(problem.residual, found.bank[order[:, i]], weights, problem.delta) for i in range(order.shape[1])]
    return np.asarray(np.where((tries[0][1] <= tries[-1][1])[:, None], tries[0][0], tries[-1][0]))


def _counts(
    n: int, draws: int, generator: np.random.Generator, clusters: np.ndarray | None, strata: np.ndarray | None
) -> np.ndarray:
    """How often each point is drawn, (draws, n).

    Within strata one unit fewer is drawn than there are and all are scaled up to their number: plain draws of a few
    runs vary too little (Rao and Wu 1988, JASA 83(401)). A stratum of one unit keeps it.
    """
    group = np.arange(n) if clusters is None else np.unique(clusters, return_inverse=True)[1].reshape(-1)
    layer = np.zeros(n, int) if strata is None else np.unique(strata, return_inverse=True)[1].reshape(-1)
    times = np.zeros((draws, group.max() + 1))
    for name in np.unique(layer):
        members = np.unique(group[layer == name])
        drawn = len(members) if strata is None else max(len(members) - 1, 1)
        picks = generator.multinomial(drawn, np.full(len(members), 1 / len(members)), draws)
        times[:, members] = picks * (len(members) / drawn)
    return times[:, group]


def _moments(found: Fit) -> tuple[float, float]:
    """E psi^2, corrected by n/(n - p), and E psi', of Huber's psi at the optimum.

    Under Huber's loss with a small delta few points lie in the quadratic zone; E psi' = P(|r| <= delta) is then
    estimated over a wider band around 0, without the p points that such a fit goes through.
    """
    problem, r = found.problem, found.residuals
    free = max(problem.n - len(problem.free), 1)
    squared = float((problem.w * np.clip(r, -problem.delta, problem.delta) ** 2).sum()) / free
    if math.isinf(problem.delta):
        return squared, 1.0
    spread = 1.4826 * float(np.median(np.abs(r)))
    band = max(problem.delta, 0.8 * spread * problem.n**-0.2)
    near = int((np.abs(r) <= band).sum()) - len(problem.free)
    return squared, max(near, 1) / free * problem.delta / band


def noise_scale(found: Fit) -> float:
    """E psi^2 / E psi', by which twice a rise of the objective is compared with chi-squared."""
    squared, slope = _moments(found)
    return squared / slope


def _theta_variance(found: Fit) -> float:
    """E psi^2 / (E psi')^2, the variance that multiplies the inverse of J'J."""
    squared, slope = _moments(found)
    return squared / slope**2


def _scaled_jacobian(found: Fit) -> tuple[np.ndarray, np.ndarray]:
    """Weighted derivatives of the residuals by theta at the optimum, in columns of unit length, and those lengths."""
    _, jacobian = found.problem.residual(found.theta[None])
    weighted = np.nan_to_num(jacobian[0], posinf=0, neginf=0) * np.sqrt(found.problem.w)[:, None]
    unit = lengths(weighted, 0)
    return weighted / unit, unit


def standard_errors(found: Fit) -> dict[str, float]:
    """Large-sample standard errors by the delta method; infinite along directions the data do not fix."""
    problem = found.problem
    scaled, unit = _scaled_jacobian(found)
    _, singular, right = np.linalg.svd(scaled, full_matrices=False)
    with np.errstate(divide="ignore"):
        inverse = np.where(singular > 1e-9 * singular[0], 1 / singular, np.inf)
    with np.errstate(invalid="ignore"):
        spread = np.nan_to_num(right.T * inverse, nan=0.0, posinf=np.inf, neginf=np.inf)
    error = np.sqrt((spread**2).sum(1) * _theta_variance(found)) / unit
    step = 1e-6
    moved = found.theta[None] + step * np.eye(len(found.theta))
    values = problem.natural(moved)
    slopes = [abs(float(values[p.name][i]) - found.parameters[p.name]) / step for i, p in enumerate(problem.free)]
    with np.errstate(over="ignore", invalid="ignore"):  # a parameter near an end of the floats has an infinite error
        errors = np.nan_to_num(np.array(slopes) * error, nan=np.inf, posinf=np.inf)
    return {p.name: float(value) for p, value in zip(problem.free, errors, strict=True)}


def profile(found: Fit, level: float = 0.95) -> dict[str, tuple[float, float]]:
    """Profile intervals: where the objective, minimised over all else, has risen by the level's t-quantile squared.

    An end that is not reached within e^12 of the optimum is infinite (or 0, or 1, as the parameter's range has it).
    """
    from scipy.special import stdtrit

    problem = found.problem
    p, free = len(problem.free), problem.n - len(problem.free)
    rise = 0.5 * float(stdtrit(free, 0.5 + level / 2)) ** 2 * noise_scale(found)
    target = found.objective + max(rise, 1e-15 * max(found.objective, 1e-300))
    errors = _theta_errors(found)
    side = np.concatenate([-np.ones(p), np.ones(p)])
    which = np.tile(np.arange(p), 2)
    mask = np.ones((2 * p, p), bool)
    mask[np.arange(2 * p), which] = False
    inner, inner_theta = np.zeros(2 * p), np.repeat(found.theta[None], 2 * p, 0)
    outer = np.full(2 * p, np.nan)
    reach = np.minimum(errors[which] * 2, OPEN_AFTER / 4)
    weights = np.broadcast_to(problem.w, (2 * p, problem.n))
    limits = _limits(problem, which, errors)

    def value_at(distance: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        start = inner_theta[rows].copy()
        start[np.arange(len(rows)), which[rows]] = found.theta[which[rows]] + side[rows] * distance
        theta, value = minimise(problem.residual, start, weights[rows], problem.delta, mask[rows], 100)
        return theta, value

    pending = np.arange(2 * p)
    for _ in range(40):
        if not len(pending):
            break
        theta, value = value_at(reach[pending], pending)
        above = np.asarray(~(value < target))
        outer[pending[above]] = reach[pending[above]]
        under = pending[~above]
        inner[under], inner_theta[under] = reach[under], theta[~above]
        reach[under] *= 1.8
        pending = under[inner[under] < limits[under]]
        reach[pending] = np.minimum(reach[pending], limits[pending])
    closed = np.flatnonzero(np.isfinite(outer))
    for _ in range(12):
        if not len(closed):
            break
        middle = 0.5 * (inner[closed] + outer[closed])
        theta, value = value_at(middle, closed)
        below = value < target
        inner[closed] = np.where(below, middle, inner[closed])
        inner_theta[closed] = np.where(below[:, None], theta, inner_theta[closed])
        outer[closed] = np.where(below, outer[closed], middle)
    return _ends(found, side * np.where(np.isfinite(outer), 0.5 * (inner + outer), np.inf))


def _limits(problem: Problem, which: np.ndarray, errors: np.ndarray) -> np.ndarray:
    """How far a profile is followed: a fixed reach on logarithmic scales, many standard errors for free parameters."""
    kinds = np.array([p.kind == "free" for p in problem.free])[which]
    return np.where(kinds, 1e4 * errors[which], OPEN_AFTER)


def _theta_errors(found: Fit) -> np.ndarray:
    """Standard errors in theta, bounded to useful first steps."""
    scaled, unit = _scaled_jacobian(found)
    covariance = np.linalg.pinv(scaled.T @ scaled, rcond=1e-10)
    error = np.sqrt(np.maximum(np.diag(covariance), 1e-30) * max(_theta_variance(found), 1e-300)) / unit
    return np.maximum(error, 1e-9 * (1 + np.abs(found.theta)))


def _ends(found: Fit, offsets: np.ndarray) -> dict[str, tuple[float, float]]:
    """Natural values of the profile's ends, (2 p,) lower ends first."""
    problem = found.problem
    p = len(problem.free)
    low, high = found.theta + offsets[:p], found.theta + offsets[p:]
    ends = {}
    for i, parameter in enumerate(problem.free):
        closed = {"positive": (0.0, math.inf), "unit": (0.0, 1.0), "free": (-math.inf, math.inf)}[parameter.kind]
        values = []
        for theta, bound in ((low[i], closed[0]), (high[i], closed[1])):
            row = found.theta.copy()
            row[i] = theta if math.isfinite(theta) else 0.0
            values.append(float(problem.natural(row[None])[parameter.name][0]) if math.isfinite(theta) else bound)
        ends[parameter.name] = (values[0], values[1])
    return ends


def identified(found: Fit, intervals: dict[str, tuple[float, float]]) -> dict[str, bool]:
    """Whether the 95 % profile of each parameter is closed on both sides."""
    closed = {}
    for parameter in found.problem.free:
        low, high = intervals[parameter.name]
        floor, ceiling = {"positive": (0.0, math.inf), "unit": (0.0, 1.0)}.get(parameter.kind, (-math.inf, math.inf))
        closed[parameter.name] = low > floor and high < ceiling
    return closed


def leverage(found: Fit) -> np.ndarray:
    """Diagonal of the hat matrix of the linearised fit, (n,)."""
    scaled, _unit = _scaled_jacobian(found)
    q, singular, _ = np.linalg.svd(scaled, full_matrices=False)
    return (q[:, singular > 1e-9 * singular[0]] ** 2).sum(1)


def leave_one_out(found: Fit) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Refits without each point in turn: parameter values (n,), and each point's residual under the fit without it."""
    problem = found.problem
    weights = problem.w * (1 - np.eye(problem.n))
    theta, _ = minimise(problem.residual, np.repeat(found.theta[None], problem.n, 0), weights, problem.delta)
    return problem.natural(theta), np.diagonal(problem.residual(theta)[0]).copy()


@dataclass(frozen=True)
class HeldOut:
    """The largest cells, predicted by a fit to the rest before any refit. `reason` says why there is none."""

    rule: str
    rows: np.ndarray
    predicted: np.ndarray
    observed: np.ndarray
    reason: str = ""

    @property
    def relative_errors(self) -> np.ndarray:
        """predicted / observed - 1."""
        return self.predicted / self.observed - 1

    @property
    def rms_log(self) -> float:
        """Root mean square of log(predicted / observed); NaN where a prediction is not positive."""
        with np.errstate(all="ignore"):
            return float(np.sqrt(np.mean(np.log(self.predicted / self.observed) ** 2))) if len(self.rows) else math.nan

    @property
    def rms(self) -> float:
        """Root mean square of predicted - observed."""
        if not len(self.rows):
            return math.nan
        errors = self.predicted - self.observed
        return float(lengths(errors, 0) / math.sqrt(len(errors)))


def hold_out(problem: Problem, size: np.ndarray, share: float, rule: str, seed: int = 0) -> HeldOut:
    """Hold out the points of the largest sizes, about `share` of all and equal sizes together; fit the rest; predict.

    At least one size is held out; nothing is where the rest would be too few for the law.
    """
    order = np.unique(size)[::-1]
    rows = np.zeros(problem.n, bool)
    for value in order:
        rows |= size >= value - 1e-9 * abs(value)
        if rows.sum() >= share * problem.n:
            break
    nothing = np.array([])
    rest = problem.n - int(rows.sum())
    if rest < len(problem.free) + 1:
        reason = f"{rest} points would remain, too few for {len(problem.free)} parameters"
        return HeldOut(rule, nothing, nothing, nothing, reason)
    remaining = problem.restricted(~rows)
    if remaining.different < len(problem.free):
        reason = f"{remaining.different} different points would remain, too few for {len(problem.free)} parameters"
        return HeldOut(rule, nothing, nothing, nothing, reason)
    found = fit(remaining, seed)
    predicted = found.predict({name: values[rows] for name, values in problem.x.items()})
    return HeldOut(rule, np.flatnonzero(rows), predicted, problem.y[rows])


def refit(found: Fit, weights: np.ndarray) -> Fit:
    """The same problem under other weights, from the fit's bank of starts."""
    problem = replace(found.problem, weights=weights)
    repeated = np.broadcast_to(weights, (len(found.bank), problem.n))
    theta, value = minimise(problem.residual, found.bank, repeated, problem.delta)
    best = int(np.argmin(value))
    assert np.isfinite(objective(problem.residual(theta[best : best + 1])[0], weights, problem.delta)[0])
    return Fit(problem, theta[best], float(value[best]), theta, found.agreeing)
