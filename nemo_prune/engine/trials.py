"""Questions to the model about sets of neurons, and the record of what is known: no question is asked twice."""

from collections.abc import Callable, Generator, Hashable, Mapping, Sequence
from enum import Enum
from math import inf
from typing import NamedTuple, TypeVar

from nemo_prune.mask import Neuron

Result = TypeVar("Result")


class Why(Enum):
    """What a pass is needed for."""

    DETECTION = "detection: seeds compared with nothing suppressed"
    EVERYTHING = "whether everything suppressed is enough"
    SELECTION = "the first candidates that are enough"
    REFINEMENT = "what of them can be spared"
    ENOUGH = "whether all seeds agree that the rest is enough"
    WAY = "whether the sets that were jumped over are enough too"
    NOTHING_TO_SPARE = "whether any single neuron of the rest can be spared"
    IN_TURN = "set by set, because scores are not monotone"
    TOGETHER = "all seeds at once, because one was too close to decide alone"
    SILENCE = "whether a prompt is silent under the mask so far"
    DROPPING = "which neurons of the mask no prompt needs"
    SCORE_AGAIN = "scores under the final mask"


class Trial(NamedTuple):
    """A question to the model: how similar is a seed's noise difference with these neurons suppressed?

    Attributes:
        neurons: what is suppressed; never empty.
        seed: position of the seed.
        threshold: what the similarity will be compared with; whoever answers may take more care near it.
        together: the seeds over which the range of the data is taken jointly; empty for the one alone.
        at_once: whether all of these are asked with these neurons in the same call, so that it can be.
        why: what the answer is needed for.
    """

    neurons: frozenset[Neuron]
    seed: Hashable
    threshold: float
    together: tuple[Hashable, ...] = ()
    at_once: bool = False
    why: Why = Why.REFINEMENT


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
# Sets whose bits are at hand; a set of hundreds of neurons takes kilobytes, its bits a hundred.
_MOST_REMEMBERED = 32
# Neuron -> its place in the bits of a set. A table a record would fill the memory: a corpus has thousands of these.
_PLACES: dict[Neuron, int] = {}


class Record:
    """The trials made so far; none is made twice.

    Similarities are monotone as long as suppressing more never raises them. What a set's similarity on a seed
    must then be on others is only *reckoned*, with a slack for how far scores were seen to be from it.

    Sets are kept as the bits of a whole number, one per neuron, the same in all records: whether one is a part of
    another is one operation.

    Args:
        seeds: the seeds; one that refutes a set moves to the front.
        together: seed -> the seeds over which the range of the data is taken jointly; all of them unless given.
        reach: how far below the joint similarity the one of a seed alone may be. What is below a limit by less is
            asked again, all seeds at once.

    Attributes:
        seeds: the seeds, the one that refuted a set last in front.
        margin: the smallest distance of any similarity from its threshold.
        slack: how much higher the similarity of a set may be than that of a part of it; with infinity
            nothing is reckoned, and everything asked.
        why: what the trials are for that are asked now.
        careful: whether what is close below a limit is asked again, all seeds at once. Not on a way whose end is.
    """

    def __init__(
        self,
        seeds: Sequence[Hashable],
        together: Mapping[Hashable, tuple[Hashable, ...]] | None = None,
        reach: float = 0.0,
    ) -> None:
        self.seeds = list(seeds)
        self.margin = inf
        self.slack = inf
        self.why = Why.REFINEMENT
        self.careful = True
        self._together = together or dict.fromkeys(seeds, tuple(seeds))
        self._reach = reach
        self._bits: dict[frozenset[Neuron], int] = {}
        self._known: dict[Hashable, dict[int, float]] = {seed: {} for seed in seeds}
        self._joint: set[tuple[int, Hashable]] = set()
        self._decided: dict[tuple[Hashable, Limit], tuple[set[int], set[int], list[int], list[int]]] = {}
        self._contradicted = False
        self._compared: dict[Hashable, int] = dict.fromkeys(seeds, 0)
        self._violation = 0.0

    def ask(self, pairs: Sequence[tuple[frozenset[Neuron], Hashable]], limit: Limit) -> Search[list[float]]:
        """Similarities of sets on seeds. To suppress nothing is never enough, and is not tried."""
        pairs = [(neurons, seed, self._bits_of(neurons)) for neurons, seed in pairs]
        unknown = {(bits, seed): neurons for neurons, seed, bits in pairs if neurons and bits not in self._known[seed]}
        if unknown:
            yield from self._learn(unknown, limit, at_once=False)
        if self._reach and self.careful:
            close = {}
            for neurons, seed, bits in pairs:
                if neurons and self._is_close(bits, seed, limit):
                    close |= {(bits, other): neurons for other in self._together[seed]}
            if close:
                yield from self._learn(close, limit, at_once=True)
        for neurons, seed, bits in pairs:
            if neurons:
                self.margin = min(self.margin, abs(self._known[seed][bits] - limit.value))
                if self.careful or not self._is_close(bits, seed, limit):
                    self._note(bits, seed, limit)
        return [self._known[seed].get(bits, inf) for _, seed, bits in pairs]

    def score(self, neurons: frozenset[Neuron], limit: Limit) -> Search[float]:
        """The highest similarity over all seeds, NaN where any is."""
        similarities = yield from self.ask([(neurons, seed) for seed in self.seeds], limit)
        return max(similarities, key=lambda value: (value != value, value))

    def joint_score(self, neurons: frozenset[Neuron], limit: Limit) -> Search[float]:
        """The same with the range of the data taken over all seeds, for a score that others are compared with."""
        bits = self._bits_of(neurons)
        if self._reach:
            yield from self._learn({(bits, seed): neurons for seed in self.seeds}, limit, at_once=True)
        return (yield from self.score(neurons, limit))

    def similarity(self, neurons: frozenset[Neuron], seed: Hashable) -> float | None:
        """What is known of a set on a seed."""
        return self._known[seed].get(self._bits_of(neurons))

    def highest_known(self, neurons: frozenset[Neuron]) -> float:
        """The highest similarity of the seeds that were tried under a set."""
        bits = self._bits_of(neurons)
        return max(known[bits] for known in self._known.values() if bits in known)

    def highest_seed(self, neurons: frozenset[Neuron]) -> Hashable:
        """The seed whose known similarity under a set is the highest."""
        bits = self._bits_of(neurons)
        return max(self.seeds, key=lambda seed: self._known[seed].get(bits, -inf))

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

    def refuting_seed(self, neurons: frozenset[Neuron], limit: Limit) -> Search[Hashable | None]:
        """A seed that is not under the limit, None if all are; it becomes the first to be asked.

        What must be so, going by other sets and the slack, is not asked.
        """
        found = self.known_refuter(neurons, limit)
        if found is None:
            open_seeds = self.open_seeds(neurons, limit)
            for seeds in (open_seeds[:1], open_seeds[1:]):
                similarities = yield from self.ask([(neurons, seed) for seed in seeds], limit)
                above = (seed for seed, each in zip(seeds, similarities, strict=True) if not limit.holds(each))
                found = next(above, None)
                if found is not None:
                    break
        if found is not None:
            self.put_first(found)
        return found

    def known_refuter(self, neurons: frozenset[Neuron], limit: Limit) -> Hashable | None:
        """A seed that is known to refute a set, or must, because a larger set is far above the limit."""
        return next((seed for seed in self.seeds if self._must_be_above(neurons, seed, limit)), None)

    def open_seeds(self, neurons: frozenset[Neuron], limit: Limit) -> list[Hashable]:
        """The seeds that must be asked about a set: those that a part of it does not decide."""
        return [seed for seed in self.seeds if not self._must_be_below(neurons, seed, limit)]

    def put_first(self, seed: Hashable) -> None:
        """Ask a seed before all others from now on."""
        self.seeds.remove(seed)
        self.seeds.insert(0, seed)

    def likely_refuter(self, neurons: frozenset[Neuron], limit: Limit) -> Hashable:
        """The seed to ask first: one that even a larger set did not pass, if there is one."""
        bits = self._bits_of(neurons)
        for seed in self.seeds:
            if any(not bits & ~larger and not limit.holds(value) for larger, value in self._known[seed].items()):
                return seed
        return self.seeds[0]

    def contradicts_monotonicity(self) -> bool:
        """Whether a set failed a seed that a part of it passed."""
        return self._contradicted

    def largest_violation(self) -> float:
        """By how much, at most, a set's similarity was seen to be higher than that of a part of it; NaN is endless."""
        for seed, known in self._known.items():
            sets = list(known.items())
            for place in range(self._compared[seed], len(sets)):
                bits, value = sets[place]
                for other, of_other in sets[:place]:
                    if not bits & ~other:
                        self._see_violation(of_other, value)
                    elif not other & ~bits:
                        self._see_violation(value, of_other)
            self._compared[seed] = len(sets)
        return self._violation

    def _see_violation(self, of_whole: float, of_part: float) -> None:
        if not of_whole <= of_part:
            difference = of_whole - of_part
            self._violation = max(self._violation, inf if difference != difference else difference)

    def _learn(
        self, asked: Mapping[tuple[int, Hashable], frozenset[Neuron]], limit: Limit, at_once: bool
    ) -> Search[None]:
        why = Why.TOGETHER if at_once else self.why
        answers = yield [
            Trial(neurons, seed, limit.value, self._together[seed] if self._reach else (), at_once, why)
            for (_, seed), neurons in asked.items()
        ]
        for (bits, seed), answer in zip(asked, answers, strict=True):
            if bits in self._known[seed] and self._compared[seed]:
                # What was compared already has another value now.
                self._compared[seed] = 0
            self._known[seed][bits] = answer
            if at_once or len(self._together[seed]) == 1:
                self._joint.add((bits, seed))

    def _is_close(self, bits: int, seed: Hashable, limit: Limit) -> bool:
        """Whether a similarity below the limit might be above it with the range taken over all seeds."""
        value = self._known[seed][bits]
        return (bits, seed) not in self._joint and limit.holds(value) and not limit.holds(value + self._reach)

    def _bits_of(self, neurons: frozenset[Neuron]) -> int:
        bits = self._bits.get(neurons)
        if bits is None:
            bits = 0
            for neuron in neurons:
                bits |= 1 << _PLACES.setdefault(neuron, len(_PLACES))
            if len(self._bits) == _MOST_REMEMBERED:
                self._bits.clear()
            self._bits[neurons] = bits
        return bits

    def _note(self, bits: int, seed: Hashable, limit: Limit) -> None:
        """Keep what a set decided, and notice where it contradicts what is known.

        Of the sets that passed those with no smaller one among them are enough to compare with, of those that failed
        those with no larger one.
        """
        noted = self._decided.setdefault((seed, limit), (set(), set(), [], []))
        passed, failed, smallest, largest = noted
        if limit.holds(self._known[seed][bits]):
            if bits not in passed:
                passed.add(bits)
                self._contradicted |= any(bits != whole and not bits & ~whole for whole in largest)
                if not any(not part & ~bits for part in smallest):
                    smallest[:] = [each for each in smallest if bits & ~each] + [bits]
        elif bits not in failed:
            failed.add(bits)
            self._contradicted |= any(bits != part and not part & ~bits for part in smallest)
            if not any(not bits & ~whole for whole in largest):
                largest[:] = [each for each in largest if each & ~bits] + [bits]

    def _must_be_above(self, neurons: frozenset[Neuron], seed: Hashable, limit: Limit) -> bool:
        """Whether a seed is known not to be under the limit, or must be so because a larger set is far above it."""
        known, bits = self._known[seed], self._bits_of(neurons)
        if bits in known and not (self._reach and self._is_close(bits, seed, limit)):
            return not limit.holds(known[bits])
        if self.slack == inf:
            return False
        return any(
            value - self.slack > limit.value and bits != larger and not bits & ~larger
            for larger, value in known.items()
        )

    def _must_be_below(self, neurons: frozenset[Neuron], seed: Hashable, limit: Limit) -> bool:
        """Whether a seed must be under the limit because a part of the set is far below it."""
        if self.slack == inf:
            return False
        room, bits = self.slack + self._reach, self._bits_of(neurons)
        return any(
            value + room < limit.value and bits != part and not part & ~bits
            for part, value in self._known[seed].items()
        )
