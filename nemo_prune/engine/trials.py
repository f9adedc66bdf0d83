"""Questions to the model about sets of neurons, and the record of what is known: no question is asked twice."""

from collections.abc import Callable, Generator, Sequence
from math import inf
from typing import NamedTuple, TypeVar

from nemo_prune.mask import Neuron

Result = TypeVar("Result")


class Trial(NamedTuple):
    """A question to the model: how similar is a seed's noise difference with these neurons suppressed?

    Attributes:
        neurons: what is suppressed; never empty.
        seed: position of the seed.
        threshold: what the similarity will be compared with; an answer near it may need more precision.
    """

    neurons: frozenset[Neuron]
    seed: int
    threshold: float


Search = Generator[list[Trial], list[float], Result]


def drive(search: Search[Result], answer: Callable[[list[Trial]], list[float]]) -> Result:
    """Run one search to its end with a function that answers its trials."""
    try:
        trials = next(search)
        while True:
            trials = search.send(answer(trials))
    except StopIteration as finished:
        return finished.value


class Limit(NamedTuple):
    """A threshold and whether a similarity must be strictly below it."""

    value: float
    strict: bool

    def holds(self, similarity: float) -> bool:
        return similarity < self.value or (similarity == self.value and not self.strict)


# Seeds differ by about as much when a whole layer is switched back on.
_CLOSE = 0.1


class Record:
    """The trials made so far; none is repeated.

    Similarities are monotone as long as suppressing more never raises them. What follows from a set's similarity
    for larger and smaller sets is only *reckoned*, with a slack for how far scores were seen to depart from this.

    Attributes:
        seeds: the seeds, first the one that refuted a set last.
        margin: the smallest distance of any similarity from its threshold.
        slack: how much higher the similarity of a set may be than that of a part of it; with infinity
            nothing is reckoned and everything is asked.
    """

    def __init__(self, seeds: Sequence[int]) -> None:
        self.seeds = list(seeds)
        self.margin = inf
        self.slack = inf
        self._similarities: dict[int, dict[frozenset[Neuron], float]] = {seed: {} for seed in seeds}
        self._limits: dict[tuple[frozenset[Neuron], int], set[Limit]] = {}

    def ask(self, pairs: Sequence[tuple[frozenset[Neuron], int]], limit: Limit) -> Search[list[float]]:
        """Similarities of sets on seeds. The empty set is never enough and is not tried."""
        known = self._similarities
        unknown = [pair for pair in dict.fromkeys(pairs) if pair[0] and pair[0] not in known[pair[1]]]
        if unknown:
            answers = yield [Trial(neurons, seed, limit.value) for neurons, seed in unknown]
            for (neurons, seed), answer in zip(unknown, answers, strict=True):
                known[seed][neurons] = answer
        for neurons, seed in pairs:
            if neurons:
                self._limits.setdefault((neurons, seed), set()).add(limit)
                self.margin = min(self.margin, abs(known[seed][neurons] - limit.value))
        return [known[seed].get(neurons, inf) for neurons, seed in pairs]

    def score(self, neurons: frozenset[Neuron], limit: Limit) -> Search[float]:
        """The highest similarity over all seeds, NaN if any is NaN."""
        similarities = yield from self.ask([(neurons, seed) for seed in self.seeds], limit)
        return max(similarities, key=lambda value: (value != value, value))

    def highest_known(self, neurons: frozenset[Neuron]) -> float:
        """The highest similarity of the seeds that were tried under a set."""
        return max(known[neurons] for known in self._similarities.values() if neurons in known)

    def is_refuted(self, neurons: frozenset[Neuron], limit: Limit) -> Search[bool]:
        """Whether the seed that refuted last refutes this set too: one trial."""
        (similarity,) = yield from self.ask([(neurons, self.seeds[0])], limit)
        return not limit.holds(similarity)

    def is_closely_refuted(self, neurons: frozenset[Neuron], limit: Limit) -> Search[bool]:
        """The same, but if that seed is close to the limit, all seeds are asked."""
        (similarity,) = yield from self.ask([(neurons, self.seeds[0])], limit)
        if similarity < limit.value - _CLOSE:
            return False
        return (yield from self.refuting_seed(neurons, limit)) is not None

    def refuting_seed(self, neurons: frozenset[Neuron], limit: Limit) -> Search[int | None]:
        """A seed that is not under the limit, None if all are; it becomes the first to be asked.

        Answers that follow from other sets and the slack are not asked.
        """
        found = next((seed for seed in self.seeds if self._must_be_above(neurons, seed, limit)), None)
        if found is None:
            open_seeds = [seed for seed in self.seeds if not self._must_be_below(neurons, seed, limit)]
            for seeds in (open_seeds[:1], open_seeds[1:]):
                similarities = yield from self.ask([(neurons, seed) for seed in seeds], limit)
                above = (seed for seed, each in zip(seeds, similarities, strict=True) if not limit.holds(each))
                found = next(above, None)
                if found is not None:
                    break
        if found is not None:
            self.seeds.remove(found)
            self.seeds.insert(0, found)
        return found

    def likely_refuter(self, neurons: frozenset[Neuron], limit: Limit) -> int:
        """The seed to ask first: one on which even a larger set failed, if there is one."""
        for seed in self.seeds:
            for larger, similarity in self._similarities[seed].items():
                if neurons <= larger and not limit.holds(similarity):
                    return seed
        return self.seeds[0]

    def contradicts_monotonicity(self) -> bool:
        """Whether a set failed on a seed on which a part of it passed."""
        passed, failed = [], []
        for (neurons, seed), limits in self._limits.items():
            for limit in limits:
                holds = limit.holds(self._similarities[seed][neurons])
                (passed if holds else failed).append((neurons, seed, limit))
        return any(
            seed == other_seed and limit == other_limit and part < whole
            for whole, seed, limit in failed
            for part, other_seed, other_limit in passed
        )

    def largest_violation(self) -> float:
        """By how much, at most, a set's similarity was seen to exceed that of a part of it; infinite for NaN."""
        found = [
            similarity - of_part
            for known in self._similarities.values()
            for whole, similarity in known.items()
            for part, of_part in known.items()
            if part < whole and not similarity <= of_part
        ]
        return max((inf if value != value else value for value in found), default=0.0)

    def _must_be_above(self, neurons: frozenset[Neuron], seed: int, limit: Limit) -> bool:
        """Whether a seed is known to be at or above the limit, or must be because a larger set is far above it."""
        known = self._similarities[seed]
        if neurons in known:
            return not limit.holds(known[neurons])
        return any(neurons < larger and similarity - self.slack > limit.value for larger, similarity in known.items())

    def _must_be_below(self, neurons: frozenset[Neuron], seed: int, limit: Limit) -> bool:
        """Whether a seed must be under the limit because a part of the set is far below it."""
        known = self._similarities[seed]
        return any(part < neurons and similarity + self.slack < limit.value for part, similarity in known.items())
