"""Every prompt scored again under the final mask."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from nemo_prune.engine.localize import Localizer, PromptLocalization
from nemo_prune.engine.pool import batches_of
from nemo_prune.engine.scorer import Scorer
from nemo_prune.engine.trials import Trial, Why
from nemo_prune.mask import NeuronMask


@dataclass(frozen=True)
class ScoresUnderMask:
    """One prompt under the final mask.

    Attributes:
        suppressed_similarity: highest similarity with and without the mask over the kept seeds of
            the detection; None where no seed was kept.
        score_before: memorization score on fresh latents, nothing suppressed.
        score_after: the same under the mask.
    """

    suppressed_similarity: float | None
    score_before: float
    score_after: float


def score_under_mask(
    localizer: Localizer,
    scorer: Scorer,
    localizations: Sequence[PromptLocalization],
    mask: NeuronMask,
    fresh_latents: Tensor,
) -> list[ScoresUnderMask]:
    """Score prompts again under the final mask, on the detection's latents and on fresh ones.

    Args:
        localizer: has the memorized prompts as they were detected.
        scorer: the unpruned model; what it suppresses it multiplies as the pruning does.
        localizations: of the prompts, as many as are in memory at once.
        mask: the final one.
        fresh_latents: initial latents that the localization never saw [S, channels, height, width].
    """
    neurons, similarities = frozenset(mask.neurons), _suppressed(localizer, scorer, localizations, mask)
    before, after = [], []
    for start in range(0, len(localizations), scorer.prompts_at_once):
        texts = [each.prompt for each in localizations[start : start + scorer.prompts_at_once]]
        for scores, suppressed in ((before, frozenset()), (after, neurons)):
            scored = scorer.score_prompts(texts, fresh_latents, suppressed, Why.SCORE_AGAIN)
            scores += [each.memorization.score for each in scored]
    return [
        ScoresUnderMask(max(similarities[each.prompt], default=None), of_before, of_after)
        for each, of_before, of_after in zip(localizations, before, after, strict=True)
    ]


def _suppressed(
    localizer: Localizer, scorer: Scorer, localizations: Sequence[PromptLocalization], mask: NeuronMask
) -> dict[str, list[float]]:
    """Prompt -> similarities with and without the mask of its kept seeds, the range of the data taken over them."""
    neurons, found = frozenset(mask.neurons), {each.prompt: [] for each in localizations}
    if not neurons:
        return {each.prompt: [1.0 for _ in each.kept_seeds] for each in localizations}
    memorized = [each for each in localizations if each.kept_seeds]
    detected = {each.scored.prompt: each.scored for each in localizer.detect([each.prompt for each in memorized])}
    trials = [
        (each.prompt, Trial(neurons, seed, localizer.threshold, each.kept_seeds, True, Why.SCORE_AGAIN))
        for each in memorized
        for seed in each.kept_seeds
    ]
    keyed = [trial._replace(seed=(prompt, trial.seed)) for prompt, trial in trials]
    for batch in batches_of(keyed, scorer.predictor.batch_size, lambda trial: trial.seed[0]):
        asked = [(detected[trial.seed[0]], trial._replace(seed=trial.seed[1])) for trial in batch]
        for trial, similarity in zip(batch, scorer.answer(asked), strict=True):
            found[trial.seed[0]].append(similarity)
    return found
