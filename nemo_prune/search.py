"""Which set of neurons to score next: NeMo's search (Alg. 3 and 4) with as few scores as it can.

The search knows no tensors. It is a generator: it yields the trials that it wants to know about and
is sent their similarities, so that whoever drives it can put the trials of many prompts into one
batch. Three things make it cheap:

- A set fails as soon as one seed exceeds the threshold. So a set is tried on the seed first that
  refuted a set last, and the other seeds are asked only about what would be the result.
- Runs of dispensable neurons go with one trial: the next neuron that can't be spared is searched
  for by halving (adaptive group testing), in the very order of the greedy sweep.
- The selection's sets are nested, so its schedule is searched instead of walked.

The last two hold only if the similarity is monotone: suppressing more never raises it. The result is
therefore proven: every seed under the threshold, and for every neuron a seed above it without that
neuron. Where this, or any two trials on the way, contradict monotonicity, the prompt is searched
again as the released code does it, one set after the other.
"""

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from math import inf, log
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


class Candidates(NamedTuple):
    """A step of the selection's schedule.

    Attributes:
        theta: the cut on |z|.
        k: how many of the most active neurons of each layer are added.
        neurons: the candidates, in the order in which the refinement tests them within a layer.
    """

    theta: float
    k: int
    neurons: tuple[Neuron, ...]


@dataclass(frozen=True)
class SearchResult:
    """What a search found.

    Attributes:
        selected: the step of the schedule at which the selection ended.
        resolved: whether that set reached tau; otherwise it is the schedule's last.
        selected_score: the highest similarity of those seeds that were tried under that set; the
            others are under tau because they are so under the refined set, a part of it.
        neurons: the refined set, in the order of the tests.
        neurons_score: the highest similarity of any seed under it.
        fell_back: whether the scores were not monotone, so that every set was tried in turn.
        margin: the smallest distance of any similarity from what it was compared with.
    """

    selected: Candidates
    resolved: bool
    selected_score: float
    neurons: tuple[Neuron, ...]
    neurons_score: float
    fell_back: bool
    margin: float


def search_neurons(
    schedule: Sequence[Candidates],
    seeds: Sequence[int],
    threshold: float,
    layer_order: Sequence[str],
    costs: Mapping[Neuron, float] | None = None,
    widening: float = 0.0,
) -> Search[SearchResult]:
    """Find the neurons without which a prompt's seeds no longer agree (Alg. 3 and 4).

    A set is enough when no seed's similarity is above tau; in the refinement when all are strictly
    below it, as in the released code. A similarity that is NaN counts as too high.

    Args:
        schedule: the candidates per step, each set a part of the next.
        seeds: positions of the kept seeds.
        threshold: tau.
        layer_order: dotted module names in the order in which the refinement tests the layers.
        costs: what suppressing each neuron costs; with them the refinement departs from the paper: it
            tests single neurons alone, the most costly first, so that what remains is cheap.
        widening: with costs, how much of the schedule behind the first set that is enough is added to
            it, 0 to 1: the more candidates there are, the more of the costly ones can be spared.
    """
    record = _Record(seeds)
    neurons, monotone, rounds = None, True, 0
    # A round that ends without neurons has refuted an initial set, so that the next begins with a larger one.
    while neurons is None and monotone and rounds < len(schedule):
        selection = yield from _select(schedule, record, threshold)
        start = _first_sweep(selection, schedule, layer_order, costs, widening)
        neurons = yield from _refine(start, selection, record)
        monotone = not record.contradicts_monotonicity()
        rounds += 1
    fell_back = neurons is None or not monotone
    if fell_back:
        selection = yield from _select_in_turn(schedule, record, threshold)
        start = _first_sweep(selection, schedule, layer_order, costs, widening)
        neurons = yield from _refine_in_turn(start, selection.limit, record)
    score = yield from record.score(frozenset(neurons), selection.limit)
    return SearchResult(
        selected=selection.step,
        # Candidates that were widened were never tried as a whole.
        resolved=selection.resolved and score <= threshold,
        selected_score=record.highest_known(frozenset(selection.step.neurons)),
        neurons=neurons,
        neurons_score=score,
        fell_back=fell_back,
        margin=record.margin,
    )


# --- what is known ---


class _Limit(NamedTuple):
    """A threshold and whether a similarity must be strictly below it."""

    value: float
    strict: bool

    def holds(self, similarity: float) -> bool:
        return similarity < self.value or (similarity == self.value and not self.strict)


# Seeds differ by about as much where a whole layer acts again.
_CLOSE = 0.1


class _Record:
    """The trials made so far; none is made twice.

    Attributes:
        seeds: the seeds, the one that refuted a set last in front.
        margin: the smallest distance of any similarity from its threshold.
    """

    def __init__(self, seeds: Sequence[int]) -> None:
        self.seeds = list(seeds)
        self.margin = inf
        self._similarities: dict[tuple[frozenset[Neuron], int], float] = {}
        self._limits: dict[tuple[frozenset[Neuron], int], set[_Limit]] = {}

    def ask(self, pairs: Sequence[tuple[frozenset[Neuron], int]], limit: _Limit) -> Search[list[float]]:
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

    def score(self, neurons: frozenset[Neuron], limit: _Limit) -> Search[float]:
        """The highest similarity over all seeds, NaN where any is."""
        similarities = yield from self.ask([(neurons, seed) for seed in self.seeds], limit)
        return max(similarities, key=lambda value: (value != value, value))

    def highest_known(self, neurons: frozenset[Neuron]) -> float:
        """The highest similarity of the seeds that were tried under a set."""
        pairs = [(neurons, seed) for seed in self.seeds]
        return max(self._similarities[pair] for pair in pairs if pair in self._similarities)

    def is_refuted(self, neurons: frozenset[Neuron], limit: _Limit) -> Search[bool]:
        """Whether the seed that refuted last refutes this set too: one trial."""
        (similarity,) = yield from self.ask([(neurons, self.seeds[0])], limit)
        return not limit.holds(similarity)

    def is_closely_refuted(self, neurons: frozenset[Neuron], limit: _Limit) -> Search[bool]:
        """The same, but where that seed is close to the limit all seeds are asked."""
        (similarity,) = yield from self.ask([(neurons, self.seeds[0])], limit)
        if similarity < limit.value - _CLOSE:
            return False
        return (yield from self.refuting_seed(neurons, limit)) is not None

    def refuting_seed(self, neurons: frozenset[Neuron], limit: _Limit) -> Search[int | None]:
        """A seed that is not under the limit, None if all are; it becomes the first to be asked."""
        for seeds in (self.seeds[:1], self.seeds[1:]):
            similarities = yield from self.ask([(neurons, seed) for seed in seeds], limit)
            for seed, similarity in zip(seeds, similarities, strict=True):
                if not limit.holds(similarity):
                    self.seeds.remove(seed)
                    self.seeds.insert(0, seed)
                    return seed
        return None

    def likely_refuter(self, neurons: frozenset[Neuron], limit: _Limit) -> int:
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


# --- selection (Alg. 3) ---


@dataclass(frozen=True)
class _Selection:
    """Where the selection ended, and what the refinement must stay under.

    The limit is tau, or after giving up the score that was reached.
    """

    step: Candidates
    resolved: bool
    limit: _Limit


def _select(schedule: Sequence[Candidates], record: _Record, threshold: float) -> Search[_Selection]:
    """Search the nested sets for the first that the first seed does not refute: doubling, then halving.

    The other seeds are asked about the refined set alone: if they are under the limit there, they
    are so under this larger one.
    """
    limit = _Limit(threshold, strict=False)
    sets = [frozenset(step.neurons) for step in schedule]
    fails, enough, stride = -1, len(sets), 1
    while enough - fails > 1:
        probe = min(fails + stride, len(sets) - 1) if enough == len(sets) else (fails + enough) // 2
        stride *= 2
        if (yield from record.is_refuted(sets[probe], limit)):
            fails = probe
        else:
            enough = probe
    if enough < len(sets):
        return _Selection(schedule[enough], True, _Limit(threshold, strict=True))
    return (yield from _given_up(schedule, record, limit))


def _select_in_turn(schedule: Sequence[Candidates], record: _Record, threshold: float) -> Search[_Selection]:
    """Try one set after the other, as the released code does."""
    limit = _Limit(threshold, strict=False)
    for step in schedule:
        if (yield from record.refuting_seed(frozenset(step.neurons), limit)) is None:
            return _Selection(step, True, _Limit(threshold, strict=True))
    return (yield from _given_up(schedule, record, limit))


def _given_up(schedule: Sequence[Candidates], record: _Record, limit: _Limit) -> Search[_Selection]:
    score = yield from record.score(frozenset(schedule[-1].neurons), limit)
    return _Selection(schedule[-1], False, _Limit(score, strict=True))


# --- refinement (Alg. 4) ---


@dataclass(frozen=True)
class _Sweep:
    """Where the greedy sweep stands.

    Attributes:
        kept: what is suppressed, in the order of the tests.
        pending: groups that are still to be tested: layers first, then single neurons.
        of_layers: whether the groups are layers.
        needed: how many groups of this kind were found to be needed.
        tested: how many groups of this kind were decided.
    """

    kept: tuple[Neuron, ...]
    pending: tuple[tuple[Neuron, ...], ...]
    of_layers: bool
    needed: int = 0
    tested: int = 0

    def without(self, groups: int) -> frozenset[Neuron]:
        """What remains suppressed when so many pending groups act again."""
        return frozenset(self.kept).difference(*self.pending[:groups])

    def after(self, dropped: int, needed: int) -> "_Sweep":
        """The sweep after so many groups were dropped and so many after them found to be needed."""
        remaining = self.without(dropped)
        return _Sweep(
            kept=tuple(neuron for neuron in self.kept if neuron in remaining),
            pending=self.pending[dropped + needed :],
            of_layers=self.of_layers,
            needed=self.needed + needed,
            tested=self.tested + dropped + needed,
        )

    def of_neurons(self) -> "_Sweep":
        """The sweep over single neurons, after that over layers."""
        return _Sweep(self.kept, tuple((neuron,) for neuron in self.kept), of_layers=False)

    @property
    def likely_run(self) -> int:
        """How many groups at once are dispensable with about even odds, going by those so far.

        Layers are tested one by one: there are few, and what they do is the least monotone.
        """
        if self.of_layers:
            return 1
        share_needed = (self.needed + 1) / (self.tested + 3)
        return min(len(self.pending), max(1, round(log(2) / share_needed)))


def _first_sweep(
    selection: _Selection,
    schedule: Sequence[Candidates],
    layer_order: Sequence[str],
    costs: Mapping[Neuron, float] | None,
    widening: float,
) -> _Sweep:
    if costs is not None:
        first = schedule.index(selection.step)
        pool = schedule[first + round(widening * (len(schedule) - 1 - first))].neurons
        return _Sweep(tuple(sorted(pool, key=lambda neuron: -costs[neuron])), (), of_layers=True)
    ordered = sorted(selection.step.neurons, key=lambda neuron: layer_order.index(neuron.layer))
    layers = [tuple(neuron for neuron in ordered if neuron.layer == layer) for layer in layer_order]
    return _Sweep(tuple(ordered), tuple(layer for layer in layers if layer), of_layers=True)


def _refine(start: _Sweep, selection: _Selection, record: _Record) -> Search[tuple[Neuron, ...] | None]:
    """The greedy sweep, with runs dropped at once; None where the result can't be proven.

    While the sweep goes on a set is refuted by one seed alone. What it ends with is tried on all. A
    seed that refutes it takes the sweep back to where this seed was still under the limit, and is
    the first to be asked from then on. If that is nowhere, the initial set was not enough.
    """
    limit, sweeps = selection.limit, [start]
    while True:
        sweep = sweeps[-1]
        if sweep.pending:
            sweeps.append((yield from _next_needed(sweep, limit, record)))
        elif sweep.of_layers:
            sweeps.append(sweep.of_neurons())
        elif (yield from _is_enough(sweep, start, selection, record)):
            break
        else:
            sweeps = yield from _still_unrefuted(sweeps, selection, record)
            if not sweeps or record.contradicts_monotonicity():
                return None
    neurons = sweeps[-1].kept
    proven = yield from _none_can_be_spared(neurons, limit, record)
    return neurons if proven else None


def _is_enough(sweep: _Sweep, start: _Sweep, selection: _Selection, record: _Record) -> Search[bool]:
    """Whether no seed refutes what the sweep ended with."""
    limit = selection.limit
    if sweep.kept == start.kept:
        if not selection.resolved:
            # Nothing could be spared, and the initial set can't be below its own score.
            return True
        # The initial set need only not be above tau; what is a part of it must be below.
        limit = _Limit(limit.value, strict=False)
    return (yield from record.refuting_seed(sweep.without(0), limit)) is None


def _next_needed(sweep: _Sweep, limit: _Limit, record: _Record) -> Search[_Sweep]:
    """Drop the likely run of groups, or find the first of them that can't be spared."""
    passes, fails = 0, sweep.likely_run + 1
    probe = sweep.likely_run
    is_refuted = record.is_closely_refuted if sweep.of_layers else record.is_refuted
    while True:
        if (yield from is_refuted(sweep.without(probe), limit)):
            fails = probe
        else:
            passes = probe
        if passes == sweep.likely_run:
            return sweep.after(dropped=passes, needed=0)
        if fails - passes == 1:
            return sweep.after(dropped=passes, needed=1)
        probe = (passes + fails) // 2


def _still_unrefuted(sweeps: Sequence[_Sweep], selection: _Selection, record: _Record) -> Search[list[_Sweep]]:
    """The part of the way along which the first seed refuted nothing, found by halving."""
    passes, fails = 0, len(sweeps) - 1
    if selection.resolved:
        of_selection = _Limit(selection.limit.value, strict=False)
        if (yield from record.is_refuted(sweeps[0].without(0), of_selection)):
            return []
    while fails - passes > 1:
        probe = (passes + fails) // 2
        if (yield from record.is_refuted(sweeps[probe].without(0), selection.limit)):
            fails = probe
        else:
            passes = probe
    return list(sweeps[: passes + 1])


def _none_can_be_spared(neurons: Sequence[Neuron], limit: _Limit, record: _Record) -> Search[bool]:
    """Whether every neuron's absence is refuted by some seed: one trial a neuron, if all goes well."""
    smaller = [frozenset(neurons) - {neuron} for neuron in neurons]
    pairs = [(each, record.likely_refuter(each, limit)) for each in smaller]
    similarities = yield from record.ask(pairs, limit)
    for each, similarity in zip(smaller, similarities, strict=True):
        if limit.holds(similarity) and (yield from record.refuting_seed(each, limit)) is None:
            return False
    return True


def _refine_in_turn(start: _Sweep, limit: _Limit, record: _Record) -> Search[tuple[Neuron, ...]]:
    """The greedy sweep as the released code does it: one group after the other."""
    sweep = start
    while sweep.pending or sweep.of_layers:
        if not sweep.pending:
            sweep = sweep.of_neurons()
            continue
        seed = yield from record.refuting_seed(sweep.without(1), limit)
        sweep = sweep.after(1, 0) if seed is None else sweep.after(0, 1)
    return sweep.kept


def drive(search: Search[Result], answer: Callable[[list[Trial]], list[float]]) -> Result:
    """Run one search to its end with a function that answers its trials."""
    try:
        trials = next(search)
        while True:
            trials = search.send(answer(trials))
    except StopIteration as finished:
        return finished.value
