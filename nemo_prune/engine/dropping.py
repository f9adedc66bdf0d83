"""What of a corpus' mask no prompt needs: neurons are let go as long as all prompts stay silent.

It is a greedy sweep over single neurons, as the refinement of one prompt (Alg. 4) is, with the kept seeds of all
prompts in the place of one prompt's. On its way only those are asked that a neuron is likely to wake: the prompts in
whose own sets it is, and all that woke when it was let go before. What the sweep ends with is asked of all. Seeds that
wake there take the sweep back to where they were still silent. At the end every neuron is proven to be needed: without
it alone some seed is awake.
"""

from collections.abc import Mapping, Sequence

from nemo_prune.engine.localize import Localizer
from nemo_prune.engine.pool import batches_of
from nemo_prune.engine.refinement import Sweep, drop_likely_run
from nemo_prune.engine.silence import Silence
from nemo_prune.engine.trials import Limit, Record, Search, Trial, Why, drive
from nemo_prune.mask import Neuron
from nemo_prune.progress import Advance, ignored

# A kept seed of a prompt.
Seed = tuple[str, int]


def drop_unneeded(
    localizer: Localizer,
    silence: Silence,
    prompts: Sequence[str],
    tried: Sequence[Neuron],
    needing: Mapping[Neuron, Sequence[str]],
    advance: Advance = ignored,
) -> set[Neuron]:
    """What remains of neurons that are let go one after the other as long as all prompts stay silent.

    Args:
        localizer: the model.
        silence: the corpus; what its prompts are asked is counted there.
        prompts: those that are silent under all the neurons.
        tried: the neurons, in the order in which they are tried.
        needing: neuron -> the prompts that it is likely to wake.
        advance: called with the neurons that are decided and their number.
    """
    if not prompts or not tried:
        return set()
    seeds = {prompt: silence.prompts[prompt] for prompt in prompts}
    together = {
        (prompt, seed): tuple((prompt, other) for other in of_prompt)
        for prompt, of_prompt in seeds.items()
        for seed in of_prompt
    }
    record = Record(list(together), together, localizer.reach)
    record.why = Why.DROPPING
    likely = {neuron: [(prompt, seeds[prompt][0]) for prompt in waking] for neuron, waking in needing.items()}
    limit = Limit(localizer.threshold, strict=False)
    search = _Dropping(record, limit, likely, localizer.batch_size, advance).search(tried)
    return set(drive(search, lambda trials: _answer(localizer, silence, trials)))


def _answer(localizer: Localizer, silence: Silence, trials: Sequence[Trial]) -> list[float]:
    """Answer trials on the seeds of many prompts; the prompts of a batch are in memory at once, no more."""
    known = {
        trial: similarity
        for trial in trials
        if not trial.at_once and (similarity := silence.known(trial.seed[0], trial.neurons, trial.seed[1])) is not None
    }
    found = iter(_asked(localizer, silence, [trial for trial in trials if trial not in known]))
    return [known[trial] if trial in known else next(found) for trial in trials]


def _asked(localizer: Localizer, silence: Silence, trials: Sequence[Trial]) -> list[float]:
    answers: list[float] = []
    for batch in batches_of(trials, localizer.batch_size, lambda trial: trial.seed[0]):
        texts = list(dict.fromkeys(trial.seed[0] for trial in batch))
        scored = {each.scored.prompt: each.scored for each in localizer.detect(texts)}
        silence.passes.update(trial.seed[0] for trial in batch)
        answers += localizer.answer(
            [
                (
                    scored[trial.seed[0]],
                    trial._replace(seed=trial.seed[1], together=tuple(seed for _, seed in trial.together)),
                )
                for trial in batch
            ]
        )
    return answers


class _Dropping:
    """The sweep, and what is known of who wakes.

    Args:
        record: the trials, on the kept seeds of all prompts.
        limit: tau.
        likely: neuron -> the seeds that it is likely to wake.
        at_once: seeds that are asked together, before it is looked whether one is awake.
        advance: called with the neurons that are decided and their number.
    """

    def __init__(
        self,
        record: Record,
        limit: Limit,
        likely: Mapping[Neuron, Sequence[Seed]],
        at_once: int,
        advance: Advance,
    ) -> None:
        self._at_once = at_once
        self._record, self._limit, self._likely, self._advance = record, limit, likely, advance
        self._all = list(record.seeds)
        self._woken: dict[Neuron, dict[Seed, None]] = {}
        self._wakes: dict[Neuron, Seed] = {}

    def search(self, tried: Sequence[Neuron]) -> Search[tuple[Neuron, ...]]:
        """What remains of the neurons."""
        sweeps, went_back = [Sweep(tuple(tried), tuple((neuron,) for neuron in tried), of_layers=False)], False
        while True:
            sweep, self._record.careful = sweeps[-1], went_back
            if sweep.pending:
                sweeps.append((yield from self._next_needed(sweep)))
                self._advance(len(tried) - len(sweeps[-1].pending), len(tried))
                continue
            self._record.careful = went_back = True
            awake = yield from self._awake(sweep.without(0), self._all)
            if not awake:
                return (yield from self._without_spare(sweep.kept))
            sweeps = yield from self._still_silent(sweeps, awake)

    def _next_needed(self, sweep: Sweep) -> Search[Sweep]:
        """Drop the likely run of neurons, or find the first of them that can't be spared."""

        def wakes_any(groups: int) -> Search[bool]:
            dropped = [neuron for group in sweep.pending[:groups] for neuron in group]
            asked = dict.fromkeys(
                seed for each in dropped for seed in (*self._woken.get(each, ()), *self._likely.get(each, ()))
            )
            woken = yield from self._first_awake(sweep.without(groups), list(asked))
            if woken is not None:
                self._wakes[dropped[-1]] = woken
            return woken is not None

        return (yield from drop_likely_run(sweep, wakes_any))

    def _still_silent(self, sweeps: Sequence[Sweep], seeds: Sequence[Seed]) -> Search[list[Sweep]]:
        """The part of the way along which all of some seeds were silent, found by halving for each of them."""
        silent, awake = dict.fromkeys(seeds, 0), dict.fromkeys(seeds, len(sweeps) - 1)
        while halved := [seed for seed in seeds if awake[seed] - silent[seed] > 1]:
            probes = {seed: (silent[seed] + awake[seed]) // 2 for seed in halved}
            pairs = [(sweeps[probes[seed]].without(0), seed) for seed in halved]
            similarities = yield from self._record.ask(pairs, self._limit)
            for seed, similarity in zip(halved, similarities, strict=True):
                ends = silent if self._limit.holds(similarity) else awake
                ends[seed] = probes[seed]
        for seed in seeds:
            for neuron in set(sweeps[silent[seed]].kept) - set(sweeps[awake[seed]].kept):
                self._woken.setdefault(neuron, {})[seed] = None
        return list(sweeps[: min(silent.values()) + 1])

    def _without_spare(self, kept: Sequence[Neuron]) -> Search[tuple[Neuron, ...]]:
        """The neurons without those that can be spared after all, because scores are not monotone."""
        kept = list(kept)
        for neuron, awake in zip(kept, (yield from self._wake_without(kept)), strict=True):
            without = frozenset(kept) - {neuron}
            if not awake and without and not (yield from self._awake(without, self._all)):
                return (yield from self._without_spare([each for each in kept if each != neuron]))
        return tuple(kept)

    def _wake_without(self, kept: Sequence[Neuron]) -> Search[list[bool]]:
        """For every neuron, whether the seed that it woke before wakes without it: one trial a neuron."""
        pairs = []
        for neuron in kept:
            seeds = [self._wakes[neuron]] if neuron in self._wakes else list(self._likely.get(neuron, self._all))
            pairs.append((frozenset(kept) - {neuron}, seeds[0]))
        similarities = yield from self._record.ask(pairs, self._limit)
        return [not self._limit.holds(each) for each in similarities]

    def _first_awake(self, neurons: frozenset[Neuron], seeds: Sequence[Seed]) -> Search[Seed | None]:
        """A seed that is awake; no more are asked than must be."""
        for start in range(0, len(seeds), self._at_once):
            awake = yield from self._awake(neurons, seeds[start : start + self._at_once])
            if awake:
                return awake[0]
        return None

    def _awake(self, neurons: frozenset[Neuron], seeds: Sequence[Seed]) -> Search[list[Seed]]:
        similarities = yield from self._record.ask([(neurons, seed) for seed in seeds], self._limit)
        return [seed for seed, each in zip(seeds, similarities, strict=True) if not self._limit.holds(each)]
