"""What of a corpus' mask no prompt needs: neurons are let go as long as all prompts stay silent.

It is a greedy sweep over single neurons, as the refinement of one prompt (Alg. 4) is, with the kept seeds of all
prompts in the place of one prompt's:

1. Of every neuron it is asked whether the whole mask without it wakes the seed that it is likeliest to wake. Where it
   does, the neuron is needed in any smaller mask too.
2. The others are let go one after the other, as far as they wake none of the seeds that they are likely to wake: the
   hardest seed of each prompt in whose own set a neuron is. The next few are asked about at once.
3. All seeds are asked about what remains. Where one is awake, the neuron that woke it is found by halving the way, and
   taken back.
4. From 1 on again, until every neuron of the rest wakes a seed that is named: none of it can be spared.
"""

from collections import Counter, deque
from collections.abc import Collection, Mapping, Sequence

from nemo_prune.engine.localize import Localizer
from nemo_prune.engine.pool import batches_of
from nemo_prune.engine.silence import Silence
from nemo_prune.engine.trials import Limit, Record, Search, Trial, Why, drive
from nemo_prune.mask import Neuron
from nemo_prune.progress import Advance, ignored

# Scores are not monotone: a neuron that wakes others as often as that stays.
_MOST_TAKEN_BACK = 2
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
        needing: neuron -> the prompts in whose own sets it is.
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
    whole, hardest = frozenset(tried), {}
    for prompt in prompts:
        hardest[prompt] = (prompt, silence.hardest_seed(prompt, whole))
    likely = {neuron: [hardest[prompt] for prompt in needing.get(neuron, ())] for neuron in tried}
    limit = Limit(localizer.threshold, strict=False)
    dropping = _Dropping(record, limit, tried, likely, localizer.batch_size, advance)
    return set(drive(dropping.search(), lambda trials: _answer(localizer, silence, trials)))


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
        tried: the neurons, in the order in which they are let go.
        likely: neuron -> the seeds that it is likely to wake.
        at_once: trials that fill a batch.
        advance: called with the neurons that are decided and their number.
    """

    def __init__(
        self,
        record: Record,
        limit: Limit,
        tried: Sequence[Neuron],
        likely: Mapping[Neuron, list[Seed]],
        at_once: int,
        advance: Advance,
    ) -> None:
        self._record, self._limit, self._tried = record, limit, tuple(tried)
        self._likely = {neuron: list(seeds) for neuron, seeds in likely.items()}
        self._at_once, self._advance = at_once, advance
        self._taken_back: Counter[Neuron] = Counter()

    def search(self) -> Search[frozenset[Neuron]]:
        """What remains of the neurons."""
        dropped: list[Neuron] = []
        while True:
            spare = yield from self._spare(self._without(dropped))
            self._advance(len(self._tried) - len(spare), len(self._tried))
            if not spare:
                return self._without(dropped)
            dropped = yield from self._drop(dropped, spare)
            dropped = yield from self._take_back(dropped)

    def _spare(self, kept: frozenset[Neuron]) -> Search[list[Neuron]]:
        """The neurons without which, each alone, the seed that each is likeliest to wake stays silent."""
        # Without its last neuron a mask is none.
        asked = [n for n in self._tried if n in kept and len(kept) > 1 and self._taken_back[n] < _MOST_TAKEN_BACK]
        pairs = {neuron: (kept - {neuron}, self._likely[neuron][0]) for neuron in asked if self._likely[neuron]}
        awake = yield from self._are_awake(list(pairs.values()))
        needed = {neuron for neuron, each in zip(pairs, awake, strict=True) if each}
        return [neuron for neuron in asked if neuron not in needed]

    def _drop(self, dropped: Sequence[Neuron], spare: Sequence[Neuron]) -> Search[list[Neuron]]:
        """Let go of neurons in their order, as far as they wake no seed that is likely to wake.

        The next few are asked about at once, each as if those before it were let go. Where one of them is needed, what
        was asked of the prompts that it woke is of no use for those behind it, which are asked again.
        """
        dropped, waiting = list(dropped), deque(spare)
        while waiting:
            run, trials = [], 0
            while waiting and (not run or trials + len(self._likely[waiting[0]]) <= self._at_once):
                run.append(waiting.popleft())
                trials += len(self._likely[run[-1]])
            # To suppress nothing is never enough: the last neuron stays.
            sets = {neuron: self._without([*dropped, *run[: place + 1]]) for place, neuron in enumerate(run)}
            pairs = [(sets[neuron], seed) for neuron in run for seed in self._likely[neuron]]
            awake = {pair for pair, each in zip(pairs, (yield from self._are_awake(pairs)), strict=True) if each}
            woken: set[str] = set()
            again = []
            for neuron in run:
                wakes = [seed for seed in self._likely[neuron] if (sets[neuron], seed) in awake]
                if woken & {prompt for prompt, _ in self._likely[neuron]}:
                    again.append(neuron)
                elif wakes:
                    woken |= {prompt for prompt, _ in wakes}
                    self._put_first(neuron, wakes[0])
                else:
                    dropped.append(neuron)
            waiting.extendleft(reversed(again))
        return dropped

    def _take_back(self, dropped: Sequence[Neuron]) -> Search[list[Neuron]]:
        """What may stay dropped: all seeds are asked, and for each that is awake the neuron that woke it comes back."""
        dropped, asked = list(dropped), list(self._record.seeds)
        while True:
            rest = self._without(dropped)
            awake = yield from self._are_awake([(rest, seed) for seed in asked], careful=True)
            asked = [seed for seed, each in zip(asked, awake, strict=True) if each]
            if not asked or not dropped:
                return dropped
            silent, awake_at = dict.fromkeys(asked, 0), dict.fromkeys(asked, len(dropped))
            while halved := [seed for seed in asked if awake_at[seed] - silent[seed] > 1]:
                probes = {seed: (silent[seed] + awake_at[seed]) // 2 for seed in halved}
                pairs = [(self._without(dropped[: probes[seed]]), seed) for seed in halved]
                for seed, awake in zip(halved, (yield from self._are_awake(pairs, careful=True)), strict=True):
                    (awake_at if awake else silent)[seed] = probes[seed]
            woke = {seed: dropped[awake_at[seed] - 1] for seed in asked}
            for seed, neuron in woke.items():
                self._put_first(neuron, seed)
            self._taken_back.update(set(woke.values()))
            dropped = [neuron for neuron in dropped if neuron not in woke.values()]

    def _are_awake(self, pairs: Sequence[tuple[frozenset[Neuron], Seed]], careful: bool = False) -> Search[list[bool]]:
        self._record.careful = careful
        similarities = yield from self._record.ask(pairs, self._limit)
        return [not self._limit.holds(each) for each in similarities]

    def _without(self, dropped: Collection[Neuron]) -> frozenset[Neuron]:
        return frozenset(self._tried).difference(dropped)

    def _put_first(self, neuron: Neuron, seed: Seed) -> None:
        """Ask a seed first, from now on, whether it wakes without a neuron."""
        self._likely[neuron] = [seed, *(each for each in self._likely[neuron] if each != seed)]
