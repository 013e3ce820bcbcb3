"""How far a fit can be trusted: bootstrap, profile intervals, leave-one-out, leverage, held-out largest cells."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from analysis.fits.fit import Fit, fit
from analysis.fits.problem import Problem, lengths
from analysis.fits.solver import huber, minimise, objective

DRAWS_AT_ONCE = 1000


@dataclass(frozen=True)
class Bootstrap:
    """Refits to resampled data: values (draws,) by parameter; draws with too few distinct points are left out."""

    values: dict[str, np.ndarray]
    theta: np.ndarray
    requested: int
    units: int

    @property
    def completed(self) -> int:
        """Number of draws that could be fitted."""
        return len(self.theta)

    def interval(self, name: str, level: float = 0.95) -> tuple[float, float]:
        """Return the expanded percentile interval of a parameter; NaN without draws.

        Percentiles of a normal quantile widened by t / z and sqrt(n / (n - p)), n resampled units: plain percentiles
        are too narrow in small samples (Hesterberg 2015, The American Statistician 69(4), section 4.3).
        """
        from scipy.special import ndtr, stdtrit

        free = self.units - self.theta.shape[1]
        if not self.completed or free < 1:
            return math.nan, math.nan
        quantile = float(stdtrit(free, 0.5 + level / 2)) * math.sqrt(self.units / free)
        tail = 100 * float(ndtr(-quantile))
        low, high = np.percentile(self.values[name], [tail, 100 - tail])
        return float(low), float(high)

    def standard_error(self, name: str) -> float:
        """Return the standard deviation over draws."""
        return float(self.values[name].std(ddof=1)) if self.completed > 1 else math.nan


def bootstrap(
    estimate: Fit, draws: int, seed: int = 0, clusters: np.ndarray | None = None, strata: np.ndarray | None = None
) -> Bootstrap:
    """Refit to data drawn with replacement: points, or whole clusters (runs), within strata (cells) if any.

    Every refit starts from the two best of the fit's bank for its own draw, so another optimum can be reached.

    Args:
        estimate: The fit.
        draws: Number of refits.
        seed: Seed of the draws.
        clusters: The cluster of each point, (n,); None: points are drawn.
        strata: The stratum of each point, (n,), within which is drawn; None: one stratum.
    """
    problem, generator = estimate.problem, np.random.default_rng(seed)
    units = problem.n if clusters is None else len(np.unique(clusters))
    parts = []
    for start in range(0, draws, DRAWS_AT_ONCE):
        counts = _counts(problem.n, min(DRAWS_AT_ONCE, draws - start), generator, clusters, strata)
        counts = counts[(counts > 0).sum(1) > len(problem.free)]
        if len(counts):
            parts.append(_refitted(estimate, counts * problem.w))
    theta = np.concatenate([np.empty((0, len(estimate.theta))), *parts])
    return Bootstrap(problem.natural(theta), theta, draws, units)


def _refitted(estimate: Fit, weights: np.ndarray) -> np.ndarray:
    """Return the optimum under each row of weights (draws, n), as theta (draws, p)."""
    problem = estimate.problem
    losses = huber(problem.residual(estimate.bank)[0], problem.delta)
    order = np.argsort(weights @ np.nan_to_num(losses, nan=np.inf, posinf=1e300).T, 1)[:, :2]
    tries = [
        minimise(problem.residual, estimate.bank[order[:, i]], weights, problem.delta, problem.box)
        for i in range(order.shape[1])
    ]
    return np.asarray(np.where((tries[0][1] <= tries[-1][1])[:, None], tries[0][0], tries[-1][0]))


def _counts(
    n: int, draws: int, generator: np.random.Generator, clusters: np.ndarray | None, strata: np.ndarray | None
) -> np.ndarray:
    """Return how often each point is drawn, (draws, n).

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


def _moments(estimate: Fit) -> tuple[float, float]:
    """Return E psi^2, corrected by n/(n - p), and E psi', of Huber's psi at the optimum.

    Under Huber's loss with a small delta few points lie in the quadratic zone; E psi' = P(|r| <= delta) is then
    estimated over a wider band around 0, without the p points that such a fit goes through.
    """
    problem, r = estimate.problem, estimate.residuals
    free = max(problem.n - estimate.dimension, 1)
    squared = float((problem.w * np.clip(r, -problem.delta, problem.delta) ** 2).sum()) / free
    squared = max(squared, problem.least_variance)
    if math.isinf(problem.delta):
        return squared, 1.0
    spread = 1.4826 * float(np.median(np.abs(r)))
    band = max(problem.delta, 0.8 * spread * problem.n**-0.2)
    near = int((np.abs(r) <= band).sum()) - estimate.dimension
    return squared, max(near, 1) / free * problem.delta / band


def noise_scale(estimate: Fit) -> float:
    """Return E psi^2 / E psi', by which twice a rise of the objective is compared with chi-squared."""
    squared, slope = _moments(estimate)
    return squared / slope


def theta_variance(estimate: Fit) -> float:
    """Return E psi^2 / (E psi')^2, the variance that multiplies the inverse of J'J."""
    squared, slope = _moments(estimate)
    return squared / slope**2


def scaled_jacobian(estimate: Fit, bounded: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Return the weighted derivatives of the residuals by theta at the optimum, in columns of unit length, and those
    lengths.

    Columns of parameters at a bound are 0, unless they are requested as well.
    """
    _, jacobian = estimate.problem.residual(estimate.theta[None])
    weighted = np.nan_to_num(jacobian[0], posinf=0, neginf=0) * np.sqrt(estimate.problem.w)[:, None]
    if not bounded:
        weighted = weighted * ~estimate.bounded
    unit = lengths(weighted, 0)
    return weighted / unit, unit


def standard_errors(estimate: Fit) -> dict[str, float]:
    """Return the large-sample standard errors by the delta method; infinite along directions the data do not fix."""
    problem = estimate.problem
    scaled, unit = scaled_jacobian(estimate)
    _, singular, right = np.linalg.svd(scaled, full_matrices=False)
    with np.errstate(divide="ignore"):
        inverse = np.where(singular > 1e-9 * singular[0], 1 / singular, np.inf)
    with np.errstate(invalid="ignore"):
        spread = np.nan_to_num(right.T * inverse, nan=0.0, posinf=np.inf, neginf=np.inf)
    error = np.sqrt((spread**2).sum(1) * theta_variance(estimate)) / unit
    step = 1e-6
    moved = estimate.theta[None] + step * np.eye(len(estimate.theta))
    values = problem.natural(moved)
    slopes = [abs(float(values[p.name][i]) - estimate.parameters[p.name]) / step for i, p in enumerate(problem.free)]
    with np.errstate(over="ignore", invalid="ignore"):  # a parameter near an end of the floats has an infinite error
        errors = np.nan_to_num(np.array(slopes) * error, nan=np.inf, posinf=np.inf)
    return {p.name: float(value) for p, value in zip(problem.free, errors, strict=True)}


def leverage(estimate: Fit) -> np.ndarray:
    """Return the diagonal of the hat matrix of the linearised fit, (n,)."""
    scaled, _unit = scaled_jacobian(estimate)
    q, singular, _ = np.linalg.svd(scaled, full_matrices=False)
    return (q[:, singular > 1e-9 * singular[0]] ** 2).sum(1)


def leave_one_out(estimate: Fit) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Refit without each point in turn: parameter values (n,), and each point's residual under the fit without it."""
    problem = estimate.problem
    weights = problem.w * (1 - np.eye(problem.n))
    theta, _ = minimise(
        problem.residual, np.repeat(estimate.theta[None], problem.n, 0), weights, problem.delta, problem.box
    )
    return problem.natural(theta), np.diagonal(problem.residual(theta)[0]).copy()


@dataclass(frozen=True)
class HeldOut:
    """The largest cells, predicted by a fit to the rest before any refit. `reason` is why there are none."""

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


def no_hold_out(rule: str, reason: str) -> HeldOut:
    """Return no held-out points, and why."""
    return HeldOut(rule, np.array([], int), np.array([]), np.array([]), reason)


def hold_out(problem: Problem, size: np.ndarray, share: float, rule: str, seed: int = 0) -> HeldOut:
    """Hold out the points of the largest sizes, about `share` of all and equal sizes together; fit the rest; predict.

    At least one size is held out. If the rest would be too few for the law, nothing is.

    Args:
        problem: The problem.
        size: The size of each point, (n,).
        share: The share of the points to hold out, 0 to 1.
        rule: How the sizes were chosen, for reports.
        seed: Seed of the fit's starts.
    """
    order = np.unique(size)[::-1]
    rows = np.zeros(problem.n, bool)
    for value in order:
        rows |= size >= value - 1e-9 * abs(value)
        if rows.sum() >= share * problem.n:
            break
    rest = problem.n - int(rows.sum())
    if rest < len(problem.free) + 1:
        reason = f"{rest} points would remain, too few for {len(problem.free)} parameters"
        return no_hold_out(rule, reason)
    remaining = problem.restricted(~rows)
    if remaining.different < len(problem.free):
        reason = f"{remaining.different} different points would remain, too few for {len(problem.free)} parameters"
        return no_hold_out(rule, reason)
    estimate = fit(remaining, seed)
    predicted = estimate.predict({name: values[rows] for name, values in problem.x.items()})
    return HeldOut(rule, np.flatnonzero(rows), predicted, problem.y[rows])


def refit(estimate: Fit, weights: np.ndarray) -> Fit:
    """Return the same problem under other weights, from the fit's bank of starts."""
    problem = replace(estimate.problem, weights=weights)
    repeated = np.broadcast_to(weights, (len(estimate.bank), problem.n))
    theta, value = minimise(problem.residual, estimate.bank, repeated, problem.delta, problem.box)
    best = int(np.argmin(value))
    assert np.isfinite(objective(problem.residual(theta[best : best + 1])[0], weights, problem.delta)[0])
    return Fit(problem, theta[best], float(value[best]), theta, estimate.agreeing)
