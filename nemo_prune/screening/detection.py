"""How well a value tells memorized from ordinary captions, and where to cut; all with their uncertainty."""

import math
from dataclasses import dataclass

import numpy as np

_Z = 1.959964
_NUM_RESAMPLES = 2000
FALSE_POSITIVE_RATE = 0.01


@dataclass(frozen=True)
class Estimate:
    """A measured number with its 95% confidence interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Separation:
    """How well a value separates memorized from ordinary captions.

    Attributes:
        num_memorized: memorized captions that were compared.
        num_ordinary: ordinary ones; with fewer than 100, a rate of 1% allows no false alarm at all.
        auroc: chance that a memorized caption has a higher value than an ordinary one.
        tpr: share of the memorized captions above all but 1% of the ordinary ones.
    """

    num_memorized: int
    num_ordinary: int
    auroc: Estimate
    tpr: Estimate


@dataclass(frozen=True)
class Cut:
    """The cut for a false discovery rate, with the counts behind it.

    Attributes:
        cut: captions at or above it pass; None if the ordinary captions are too few to support one.
        asked: the false discovery rate that was asked for.
        num_prompts: captions that were screened, M.
        num_ordinary: ordinary captions that the cut was calibrated on, N.
        num_passed: captions at or above the cut.
        ordinary_above: ordinary captions at or above it.
        fdr: estimated share of false alarms among what passed, 0 to 1.
        fdr_high: the same for the upper limit of the ordinary captions' rate (Clopper and Pearson, one-sided 95%).
        needed_ordinary: without a cut, how many ordinary captions could support one; None if no number can,
            because no caption is above all ordinary ones.
    """

    cut: float | None
    asked: float
    num_prompts: int
    num_ordinary: int
    num_passed: int = 0
    ordinary_above: int = 0
    fdr: float | None = None
    fdr_high: float | None = None
    needed_ordinary: int | None = None


def separation(memorized: np.ndarray, ordinary: np.ndarray, seed: int = 0) -> Separation:
    """Compare the values of memorized and ordinary captions; neither may be empty.

    Args:
        memorized: values [m].
        ordinary: values [n].
        seed: of the resampling.
    """
    return Separation(
        len(memorized), len(ordinary), auroc(memorized, ordinary), true_positive_rate(memorized, ordinary, seed)
    )


def auroc(memorized: np.ndarray, ordinary: np.ndarray) -> Estimate:
    """The chance that a memorized value is above an ordinary one, ties counting half.

    The interval is Newcombe's method 5 (Statistics in Medicine 25, 2006): the values whose standard error (Hanley
    and McNeil's) reaches the estimate. Unlike resampling it does not claim certainty if no values overlap.
    """
    values = np.sort(ordinary)
    below = np.searchsorted(values, memorized, "left") + np.searchsorted(values, memorized, "right")
    m, n = len(memorized), len(ordinary)
    estimate = float(below.sum() / (2 * m * n))
    more = (m + n) / 2 - 1

    def reaches(area: float) -> bool:
        spread = 1 + more * (1 - area) / (2 - area) + more * area / (1 + area)
        return abs(area - estimate) <= _Z * math.sqrt(area * (1 - area) * spread / (m * n))

    return Estimate(estimate, _bisect(reaches, estimate, 0.0), _bisect(reaches, estimate, 1.0))


def true_positive_rate(
    memorized: np.ndarray, ordinary: np.ndarray, seed: int = 0, rate: float = FALSE_POSITIVE_RATE
) -> Estimate:
    """The share of memorized values above all but a share of the ordinary ones.

    The interval holds both uncertainties: the ordinary values are resampled, which moves the cut (its place in a
    resample follows a beta distribution, so none has to be drawn), and the share above it has Jeffreys'
    posterior, which does not claim certainty if all are above.
    """
    values, found = np.sort(ordinary), np.sort(memorized)
    m, n = len(memorized), len(ordinary)
    # Slightly more, so 1% of 100 is 1 in spite of rounding.
    allowed = int(rate * n + 1e-9)
    generator = np.random.default_rng(seed)
    places = (generator.beta(n - allowed, allowed + 1, _NUM_RESAMPLES) * n).astype(int).clip(0, n - 1)
    above = m - np.searchsorted(found, values[places], "right")
    low, high = np.quantile(generator.beta(above + 0.5, m - above + 0.5), (0.025, 0.975))
    estimate = (m - int(np.searchsorted(found, values[n - 1 - allowed], "right"))) / m
    return Estimate(estimate, min(float(low), estimate), max(float(high), estimate))


def fdr_cut(values: np.ndarray, ordinary: np.ndarray, fdr: float) -> Cut:
    """The lowest cut that keeps the false discovery rate.

    If all M captions were ordinary, M * p(cut) of them would be above a cut, with p = (above + 1) / (N + 1) among
    the N ordinary captions. This takes the lowest cut at which that is at most a share ``fdr`` of what is above it:
    Benjamini and Hochberg's rule on conformal p-values (Bates et al., arXiv 2104.08279). It holds on average if the
    ordinary captions are like those of the corpus.

    Args:
        values: of the captions that were screened [M].
        ordinary: of the ordinary captions [N].
        fdr: share of false alarms among what passes that is accepted, above 0 and below 1.
    """
    known, ranked = np.sort(ordinary), np.sort(values)
    total, n = len(values), len(ordinary)
    passed = total - np.searchsorted(ranked, ranked, "left")
    above = n - np.searchsorted(known, ranked, "left")
    estimates = total * (above + 1) / (n + 1) / passed
    good = np.flatnonzero(estimates <= fdr)
    if not len(good):
        top = total - int(np.searchsorted(ranked, known[-1], "right"))
        return Cut(None, fdr, total, n, needed_ordinary=math.ceil(total / (fdr * top)) - 1 if top else None)
    place = good[0]
    high = total * upper_limit(int(above[place]), n) / passed[place]
    return Cut(
        float(ranked[place]), fdr, total, n, int(passed[place]), int(above[place]),
        float(estimates[place]), min(1.0, float(high)),
    )  # fmt: skip


def upper_limit(count: int, total: int, confidence: float = 0.95) -> float:
    """Clopper and Pearson's one-sided upper limit of a rate of which ``count`` of ``total`` were seen."""
    if count >= total:
        return 1.0
    seen = np.arange(count + 1)
    ways = np.array([math.lgamma(total + 1) - math.lgamma(k + 1) - math.lgamma(total - k + 1) for k in seen])

    def possible(rate: float) -> bool:
        terms = ways + seen * math.log(rate) + (total - seen) * math.log1p(-rate)
        return float(np.exp(terms).sum()) >= 1 - confidence

    return _bisect(possible, max(count, 1e-9) / total, 1.0)


def _bisect(holds, inside: float, outside: float) -> float:
    """The last number from ``inside`` towards ``outside`` for which something holds, to 9 digits."""
    for _ in range(60):
        middle = (inside + outside) / 2
        if holds(middle):
            inside = middle
        else:
            outside = middle
    return inside if abs(inside - outside) > 1e-9 else outside
