"""What few measurements allow to say: exact intervals, intervals over groups, tests of equivalence."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np
from scipy import stats

from nemo_prune.facts import Counted

CONFIDENCE = 0.95
_RESAMPLES = 2000


@dataclass(frozen=True)
class Rate(Counted):
    """How often something happened, with its exact interval (Clopper-Pearson): 0 to 1 where nothing was measured.

    Attributes:
        confidence: of the interval.
    """

    confidence: float = CONFIDENCE

    @classmethod
    def of(cls, count: int, total: int, confidence: float = CONFIDENCE) -> "Rate":
        """The rate of a count."""
        if not total:
            return cls(0, 0, 0.0, 1.0, confidence)
        interval = stats.binomtest(count, total).proportion_ci(confidence, method="exact")
        return cls(count, total, float(interval.low), float(interval.high), confidence)

    @property
    def share(self) -> float | None:
        """The observed share; None where nothing was measured."""
        return self.count / self.total if self.total else None


def upper_bound(count: int, total: int, looks: int = 1, confidence: float = CONFIDENCE) -> float:
    """Exact one-sided upper bound of a rate, also where the count was looked at several times.

    Args:
        count: how often it happened.
        total: out of how many.
        looks: how many times the count may be looked at before one stops. The allowed error is divided among them,
            so the bound holds wherever one stops (Bonferroni).
        confidence: with which the bound holds.
    """
    if count >= total:
        return 1.0
    return float(stats.beta.ppf(1 - (1 - confidence) / looks, count + 1, total - count))


@dataclass(frozen=True)
class Spread:
    """A median with the median absolute deviation, as the paper's Table 1 has them.

    Attributes:
        median: of the values.
        deviation: median of the distances from it.
        count: how many values there are.
    """

    median: float
    deviation: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread | None":
        """The spread of values; None where there are none."""
        if not values:
            return None
        middle = median(values)
        return cls(middle, median(abs(value - middle) for value in values), len(values))


@dataclass(frozen=True)
class GroupedShare:
    """A share of images, with an interval over groups of near-duplicate captions.

    Images of one caption and captions of one group are not independent, so groups are drawn anew (bootstrap).

    Attributes:
        share: mean over all groups of the mean of their captions' shares.
        low: lower end of the interval.
        high: its upper end.
        groups: how many groups there are.
        any: groups in which it happened at all.
    """

    share: float
    low: float
    high: float
    groups: int
    any: Rate

    @classmethod
    def of(cls, by_group: Mapping[int, Sequence[float]], seed: int = 0) -> "GroupedShare | None":
        """The share of captions' shares by group; None where there are none."""
        if not by_group:
            return None
        means = np.array([float(np.mean(shares)) for shares in by_group.values()])
        occurred = Rate.of(int((means > 0).sum()), len(means))
        low = high = float(means.mean())
        # Where nothing varies, drawing anew can say nothing: the exact interval over groups does.
        if len(means) > 1 and means.std() > 0:
            interval = stats.bootstrap(
                (means,), np.mean, n_resamples=_RESAMPLES, confidence_level=CONFIDENCE, method="percentile",
                rng=np.random.default_rng(seed),
            ).confidence_interval  # fmt: skip
            low, high = float(interval.low), float(interval.high)
        elif not means.any():
            high = occurred.high
        elif means.all():
            low = occurred.low
        return cls(float(means.mean()), low, high, len(means), occurred)


@dataclass(frozen=True)
class Equivalence:
    """Two one-sided paired t-tests: whether a difference is smaller than a margin that was set beforehand.

    Attributes:
        what: what was compared.
        mean: mean difference.
        low: lower end of the 90% interval, which belongs to two tests at 5%.
        high: its upper end.
        margin: the margin, set before anything was measured.
        p_value: the larger one of the two tests.
        pairs: how many pairs there were.
    """

    what: str
    mean: float
    low: float
    high: float
    margin: float
    p_value: float
    pairs: int

    @property
    def holds(self) -> bool:
        """Whether the two are equivalent within the margin, at 5%."""
        return self.p_value < 1 - CONFIDENCE

    @classmethod
    def of(cls, what: str, differences: Sequence[float], margin: float) -> "Equivalence | None":
        """Test paired differences; None where there are fewer than three."""
        values = np.asarray(differences, dtype=float)
        if len(values) < 3:
            return None
        mean, error = float(values.mean()), float(values.std(ddof=1) / len(values) ** 0.5)
        if error == 0:
            return cls(what, mean, mean, mean, margin, 0.0 if abs(mean) < margin else 1.0, len(values))
        freedom = len(values) - 1
        p_value = max(stats.t.sf((mean + margin) / error, freedom), stats.t.cdf((mean - margin) / error, freedom))
        reach = float(stats.t.ppf(CONFIDENCE, freedom)) * error
        return cls(what, mean, mean - reach, mean + reach, margin, float(p_value), len(values))
