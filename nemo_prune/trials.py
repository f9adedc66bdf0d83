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
        threshold: what the similarity will be compared with; whoever answers may take more care near it.
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


# Seeds differ by about as much where a whole layer acts again.
_CLOSE = 0.1


class Record:
    """The trials made so far; none is made twice.

    Attributes:
        seeds: the seeds, the one that refuted a set last in front.
        margin: the smallest distance of any similarity from its threshold.
    """

    def __init__(self, seeds: Sequence[int]) -> None:
        self.seeds = list(seeds)
        self.margin = inf
        self._similarities: dict[tuple[frozenset[Neuron], int], float] = {}
        self._limits: dict[tuple[frozenset[Neuron], int], set[Limit]] = {}

    def ask(self, pairs: Sequence[tuple[frozenset[Neuron], int]], limit: Limit) -> Search[list[float]]:
        """Similarities of sets on seeds. To suppress nothing is never enough, and is not tried."""
        unknown = [pair for pair in dict.fromkeys(pairs) if pair[0] and pair not in self._similarities]
        if unknown:
            answers = yield [Trial(neurons, seed, limit.value) for neurons, seed in unknown]
            self._similarities.update(zip(unknown, answers, strict=True))
        for pair in pairs:
            if pair[0]:
                self._limits.setdefault(pair, set()).add(limit)
                self.margin = min(self.margin, abs(self._similarities[pair] - limit.value))
        return [self._similarities.get(pair, inf) for pair in pairs]

    def score(self, neurons: frozenset[Neuron], limit: Limit) -> Search[float]:
        """The highest similarity over all seeds, NaN where any is."""
        similarities = yield from self.ask([(neurons, seed) for seed in self.seeds], limit)
        return max(similarities, key=lambda value: (value != value, value))

    def highest_known(self, neurons: frozenset[Neuron]) -> float:
        """The highest similarity of the seeds that were tried under a set."""
        pairs = [(neurons, seed) for seed in self.seeds]
        return max(self._similarities[pair] for pair in pairs if pair in self._similarities)

    def is_refuted(self, neurons: frozenset[Neuron], limit: Limit) -> Search[bool]:
        """Whether the seed that refuted last refutes this set too: one trial."""
        (similarity,) = yield from self.ask([(neurons, self.seeds[0])], limit)
        return not limit.holds(similarity)

    def is_closely_refuted(self, neurons: frozenset[Neuron], limit: Limit) -> Search[bool]:
        """The same, but where that seed is close to the limit all seeds are asked."""
        (similarity,) = yield from self.ask([(neurons, self.seeds[0])], limit)
        if similarity < limit.value - _CLOSE:
            return False
        return (yield from self.refuting_seed(neurons, limit)) is not None

    def refuting_seed(self, neurons: frozenset[Neuron], limit: Limit) -> Search[int | None]:
        """A seed that is not under the limit, None if all are; it becomes the first to be asked."""
        for seeds in (self.seeds[:1], self.seeds[1:]):
            similarities = yield from self.ask([(neurons, seed) for seed in seeds], limit)
            for seed, similarity in zip(seeds, similarities, strict=True):
                if not limit.holds(similarity):
                    self.seeds.remove(seed)
                    self.seeds.insert(0, seed)
                    return seed
        return None

    def likely_refuter(self, neurons: frozenset[Neuron], limit: Limit) -> int:
        """The seed to ask first: one that even a larger set did not pass, if there is one."""
        for (larger, seed), similarity in reversed(self._similarities.items()):
            if neurons <= larger and not limit.holds(similarity):
                return seed
        return self.seeds[0]

    def contradicts_monotonicity(self) -> bool:
        """Whether a set failed a seed that a part of it passed."""
        passed, failed = [], []
        for pair, limits in self._limits.items():
            for limit in limits:
                (passed if limit.holds(self._similarities[pair]) else failed).append((*pair, limit))
        return any(
            seed == other_seed and limit == other_limit and part < whole
            for whole, seed, limit in failed
            for part, other_seed, other_limit in passed
        )
