"""Whether memorized prompts are silent under a set of neurons: no kept seed's similarity is above the threshold."""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence

from nemo_prune.engine.localize import Localizer
from nemo_prune.engine.memo import Detected
from nemo_prune.engine.pool import Pool, Questions
from nemo_prune.engine.trials import Limit, Record, Why
from nemo_prune.mask import Neuron

# Prompts whose tensors are in memory at once.
_AT_ONCE = 256


class Silence:
    """Memorized prompts, asked together whether they are silent; the seed that was above last is asked first.

    Args:
        localizer: the model.
        prompts: prompt -> positions of its kept seeds.

    Attributes:
        prompts: the same.
        passes: prompt -> sample passes that were made to ask it.
    """

    def __init__(self, localizer: Localizer, prompts: Mapping[str, tuple[int, ...]]) -> None:
        self.prompts = dict(prompts)
        self.passes: Counter[str] = Counter()
        self._localizer = localizer
        self._limit = Limit(localizer.threshold, strict=False)
        self._records: dict[str, Record] = {}

    def awake(self, prompts: Sequence[str], neurons: Collection[Neuron]) -> list[str]:
        """Those of some prompts that are not silent under a set, in their order; under none all are awake."""
        if not neurons:
            return list(prompts)
        # One set for all prompts.
        awake, neurons = set(), frozenset(neurons)
        for start in range(0, len(prompts), _AT_ONCE):
            pool: Pool[str, bool] = self._localizer.pool()
            for detected in self._localizer.detect(prompts[start : start + _AT_ONCE]):
                pool.add(detected.scored.prompt, self._is_awake(detected, neurons))
            for finished in pool.finish(lambda: self._localizer.batch_size):
                self.passes[finished.key] += finished.sample_passes
                if finished.result:
                    awake.add(finished.key)
        return [prompt for prompt in prompts if prompt in awake]

    def known(self, prompt: str, neurons: frozenset[Neuron], seed: int) -> float | None:
        """A similarity that was asked for here."""
        return self._records[prompt].similarity(neurons, seed) if prompt in self._records else None

    def hardest_seed(self, prompt: str, neurons: frozenset[Neuron]) -> int:
        """The seed whose similarity under a set, as it was asked for here, is the highest."""
        return self._records[prompt].highest_seed(neurons)

    def _is_awake(self, detected: Detected, neurons: frozenset[Neuron]) -> Questions[bool]:
        record = self._records.get(detected.scored.prompt)
        if record is None:
            seeds = self.prompts[detected.scored.prompt]
            record = self._records[detected.scored.prompt] = Record(seeds, reach=self._localizer.reach)
        record.why = Why.SILENCE
        search, answers = record.refuting_seed(neurons, self._limit), None
        while True:
            try:
                trials = search.send(answers)
            except StopIteration as finished:
                return finished.value is not None
            answers = yield [(detected.scored, trial) for trial in trials]
