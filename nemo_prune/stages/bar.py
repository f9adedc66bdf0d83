"""What the masks of a run are judged against, measured once, when it is asked for."""

from collections.abc import Collection, Sequence
from functools import cached_property

from nemo_prune.engine.budget import thinned
from nemo_prune.engine.completing import Limits
from nemo_prune.engine.diffusion import NoisePredictor
from nemo_prune.engine.gone import Corpus, gather_corpus
from nemo_prune.engine.localize import Localizer
from nemo_prune.engine.ordinary import OrdinaryStates
from nemo_prune.engine.pursuit import PursuitSettings
from nemo_prune.engine.scorer import ScoredPrompt
from nemo_prune.engine.views import Seeds
from nemo_prune.files.hashing import text_hash
from nemo_prune.files.work import LineLog, Replay, WorkFolder
from nemo_prune.mask import Neuron, NeuronMask

# Seeds of what the final proof must not have seen.
_JUDGE_SEED = 4001
FRESH_SEEDS, WATCHED = 5, 16
# What ordinary captions may lose by a thinned mask, as a share of what everything suppressed changes.
AFFORDED = 0.15
# The same with more done for captions that such a mask leaves, unless their images really copy.
_AFFORDED_LEFT = 0.2


def afforded(max_utility_loss: float | None = None) -> Limits:
    """What ordinary captions may lose by what is done for captions that a thinned mask leaves.

    Args:
        max_utility_loss: the limit that a user names; None where there is none.
    """
    return Limits(_AFFORDED_LEFT) if max_utility_loss is None else Limits(max_utility_loss, max_utility_loss)


class Bar:
    """What the masks of a run are judged against, measured once, when it is asked for.

    Args:
        localizer: the unpruned model and what is usual for it.
        released: the same; what it suppresses is stood in for as a release does.
        memorized: captions that are to be gone.
        ordinary: ordinary captions, of which some are watched, and some walked from noise to image.
        work: where measures, predictions and thinned masks are kept as they come.
    """

    def __init__(
        self,
        localizer: Localizer,
        released: NoisePredictor,
        memorized: Sequence[str],
        ordinary: Sequence[str],
        work: WorkFolder,
    ) -> None:
        self.localizer, self.released, self.memorized, self.ordinary = localizer, released, memorized, ordinary
        captions = [*memorized, "", *ordinary[:WATCHED]]
        self.log = LineLog(work.judged, {"captions": text_hash(captions), "seeds": [_JUDGE_SEED, FRESH_SEEDS]})
        self._views, self._thinned = work.views, work.thinned

    @cached_property
    def corpus(self) -> Corpus:
        """The captions on the seeds of the detection and on fresh ones."""
        predictor = self.localizer.scorer.predictor
        seeds = Seeds.draw(predictor) + Seeds.draw(predictor, _JUDGE_SEED, FRESH_SEEDS)

        def detected(prompts: Sequence[str]) -> list[ScoredPrompt]:
            return [each.scored for each in self.localizer.detect(prompts)]

        return gather_corpus(
            predictor, self.memorized, self.ordinary[:WATCHED], seeds, self.localizer.threshold, log=self.log,
            detected=detected, folder=self._views,
        )  # fmt: skip

    @cached_property
    def states(self) -> OrdinaryStates:
        """Points on the ways of ordinary captions, on which a search keeps their change small."""
        return PursuitSettings().states(self.released, self.ordinary)

    def thinned(self, neurons: Collection[Neuron], max_utility_loss: float | None = None) -> list[Neuron]:
        """A mask without the most costly neurons, see :func:`nemo_prune.engine.budget.thinned`; it is kept.

        Args:
            neurons: the mask.
            max_utility_loss: the limit; what is afforded unless given.
        """
        limit = AFFORDED if max_utility_loss is None else max_utility_loss
        if self.released.is_combining:
            # A lower limit is kept in the end by holding memorized captions less: fewer rows alone save little.
            limit = max(limit, AFFORDED)
        whole = NeuronMask.from_neurons(neurons, self.released.sizes)
        log = LineLog(self._thinned, {"mask": whole.digest, "limit": limit})
        kept = Replay(log)(lambda: {"neurons": thinned(self.released, self.states, neurons, limit)})
        return [Neuron(*each) for each in kept["neurons"]]
