"""Confidence intervals of error rates, by drawing identities again with replacement.

Pairs of tracklets are not independent: whoever looks like everybody is in many of them. So people
are drawn, not pairs. A person drawn w times brings what is theirs alone w times, and a pair of
people (i, j) counts w_i w_j times.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Counts = NDArray[np.int64]
Floats = NDArray[np.floating[Any]]
_EDGES_AT_ONCE = 4096  # 16 MB of weights at 1,000 rounds


class Rate(NamedTuple):
    """An error rate and how sure it is.

    Args:
        value: Measured, 0 to 1.
        low: Lower end of the confidence interval.
        high: Upper end.
    """

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Plan:
    """How identities are drawn again.

    Args:
        rounds: How often.
        confidence: Of the intervals, like 0.95.
        seed: Of the draws.
    """

    rounds: int = 1000
    confidence: float = 0.95
    seed: int = 0

    def weigh(self, identities: int) -> NDArray[np.float32]:
        """How often each identity is drawn, (identities, rounds) float32; columns sum to it."""
        generator = np.random.default_rng(self.seed)
        weights = np.empty((identities, self.rounds), np.float32)
        for number in range(self.rounds):
            drawn = generator.integers(identities, size=identities)
            weights[:, number] = np.bincount(drawn, minlength=identities)
        return weights


@dataclass(frozen=True, slots=True, eq=False)
class PairErrors:
    """Errors of pairs of identities; pairs without an error may be left out.

    Args:
        first: (E,) an identity's number.
        second: (E,) another's; which of the two comes first does not matter.
        errors: (E,) errors of each pair.
    """

    first: Counts
    second: Counts
    errors: Counts | Floats


def rate_of_identities(errors: Counts, trials: Counts, plan: Plan) -> Rate:
    """The rate of errors that belong to one identity each.

    Args:
        errors: (I,) of each identity.
        trials: (I,) of each identity, at least one in all.
        plan: How to draw.
    """
    took_part = trials > 0
    errors, trials = errors[took_part], trials[took_part]
    weights = plan.weigh(len(trials))
    value = float(errors.sum() / trials.sum())
    drawn = (errors @ weights) / np.maximum(trials @ weights, 1)
    rate = _interval(value, drawn, errors - value * trials, plan)
    # One who had an error is hardly more to draw from than none.
    bound = unseen(len(trials), plan)
    return Rate(value, min(rate.low, 1 - bound), max(rate.high, bound))


def rate_of_pairs(found: PairErrors, cameras: Counts, plan: Plan, *, across: bool) -> Rate:
    """The rate of errors among all pairs of tracklets of different identities.

    Args:
        found: The pairs of identities with errors, each pair once.
        cameras: (I, C) tracklets of each identity in each camera.
        plan: How to draw.
        across: Whether only pairs of tracklets from different cameras are compared.
    """
    tracklets = cameras.sum(axis=1).astype(np.float64)
    # Pairs of tracklets in the same camera, which are not compared, go by these.
    together = cameras.astype(np.float64) if across else np.zeros((len(cameras), 1))
    own = tracklets**2 - (together**2).sum(axis=1)
    trials = tracklets * tracklets.sum() - together @ together.sum(axis=0) - own  # (I,)
    weights = plan.weigh(len(cameras))
    # Half of what is left when each is paired with each: less same camera, less same identity.
    pairs = (tracklets @ weights) ** 2 - ((together.T @ weights) ** 2).sum(axis=0)
    pairs = (pairs - own @ weights**2) / 2
    value = float(found.errors.sum() / (trials.sum() / 2))
    drawn = _weigh(found, weights) / np.maximum(pairs, 1)
    return _interval(value, drawn, _ends(found, len(cameras)) - value * trials, plan)


def rate_of_nearest(found: PairErrors, plan: Plan) -> Rate:
    """The rate of errors among queries, each of which is one pair: who asked, and who was nearest.

    Args:
        found: One entry a query, with or without an error (0 or 1).
        plan: How to draw.
    """
    _, ends = np.unique(np.stack([found.first, found.second]), return_inverse=True)
    first, second = ends.reshape(2, -1)
    weights = plan.weigh(int(ends.max()) + 1)
    value = float(found.errors.mean())
    hits = _weigh(PairErrors(first, second, found.errors), weights)
    asked = _weigh(PairErrors(first, second, np.ones_like(first)), weights)
    excess = PairErrors(first, second, found.errors - value)
    return _interval(value, hits / np.maximum(asked, 1), _ends(excess, len(weights)), plan)


def _weigh(pairs: PairErrors, weights: NDArray[np.float32]) -> NDArray[np.float64]:
    """The sum of errors_ij w_i w_j over pairs, (rounds,)."""
    total = np.zeros(weights.shape[1])
    for part in _parts(pairs):
        total += part.errors.astype(np.float32) @ (weights[part.first] * weights[part.second])
    return total


def _parts(pairs: PairErrors) -> Iterator[PairErrors]:
    for begin in range(0, len(pairs.errors), _EDGES_AT_ONCE):
        part = slice(begin, begin + _EDGES_AT_ONCE)
        yield PairErrors(pairs.first[part], pairs.second[part], pairs.errors[part])


def _ends(pairs: PairErrors, identities: int) -> NDArray[np.float64]:
    """Errors in which each identity has a part, (I,)."""
    ends = np.zeros(identities)
    for side in (pairs.first, pairs.second):
        ends += np.bincount(side, pairs.errors, identities)
    return ends


def _interval(
    value: float, drawn: NDArray[np.float64], influences: NDArray[np.float64], plan: Plan
) -> Rate:
    """The bias-corrected and accelerated interval, BCa (Efron 1987, section 3).

    Plain percentiles would be too low: without the few who look like everybody, a set seems to
    make fewer mistakes than it does, and most small sets are without them.

    Args:
        value: The rate.
        drawn: (rounds,) the rate in each round.
        influences: (I,) how much each identity moves the rate, in any unit.
        plan: Says which percentiles.
    """
    if not influences.any():  # no error, or nothing else: drawing again shows nothing new
        bound = unseen(len(influences), plan)
        return Rate(value, min(value, 1 - bound), max(value, bound))
    normal = NormalDist()
    below = ((drawn < value).mean() + (drawn <= value).mean()) / 2
    bias = normal.inv_cdf(float(np.clip(below, 1 / plan.rounds, 1 - 1 / plan.rounds)))
    acceleration = float((influences**3).sum() / (6 * (influences**2).sum() ** 1.5))
    levels = []
    for level in ((1 - plan.confidence) / 2, (1 + plan.confidence) / 2):
        shifted = bias + normal.inv_cdf(level)
        levels.append(normal.cdf(bias + shifted / max(1 - acceleration * shifted, 0.1)))
    low, high = np.quantile(drawn, levels)
    return Rate(value, float(min(low, value)), float(min(max(high, value), 1)))


def unseen(trials: int, plan: Plan) -> float:
    """The greatest rate at which so many independent trials may well pass without an error.

    The upper end of the exact (Clopper-Pearson) interval; at 95 % about 3.7 / trials.
    """
    return float(1 - ((1 - plan.confidence) / 2) ** (1 / trials))
