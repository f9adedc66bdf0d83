"""Every prompt scored again under the final mask."""

from dataclasses import dataclass

from torch import Tensor

from nemo_prune.engine.localize import PromptLocalization
from nemo_prune.engine.scorer import Scorer
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
    scorer: Scorer, localization: PromptLocalization, mask: NeuronMask, fresh_latents: Tensor
) -> ScoresUnderMask:
    """Score a prompt again under the final mask, on the detection's latents and on fresh ones.

    Args:
        scorer: the unpruned model.
        localization: of the prompt.
        mask: the final one.
        fresh_latents: initial latents that the localization never saw [S, channels, height, width].
    """
    prompt, neurons = localization.prompt, frozenset(mask.neurons)
    similarity = None
    if localization.kept_seeds:
        (scored,) = scorer.score_prompts([prompt])
        similarity = max(scorer.suppressed_similarities(scored, localization.kept_seeds, neurons))
    (before,) = scorer.score_prompts([prompt], fresh_latents)
    (after,) = scorer.score_prompts([prompt], fresh_latents, neurons)
    return ScoresUnderMask(similarity, before.memorization.score, after.memorization.score)
