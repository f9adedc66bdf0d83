"""Every prompt scored again under the final mask."""

from dataclasses import dataclass

from torch import Tensor

from nemo_prune.engine.localize import PromptLocalization
from nemo_prune.engine.scorer import Scorer
from nemo_prune.mask import NeuronMask


@dataclass(frozen=True)
class PromptVerification:
    """One prompt under the final mask.

    Attributes:
        prompt: its text.
        suppressed_similarity: highest similarity with and without the mask over the kept seeds of
            the detection; None where no seed was kept.
        score_before: memorization score on fresh latents, nothing suppressed.
        score_after: the same under the mask.
    """

    prompt: str
    suppressed_similarity: float | None
    score_before: float
    score_after: float


def verify_prompt(
    scorer: Scorer, localization: PromptLocalization, mask: NeuronMask, fresh_latents: Tensor
) -> PromptVerification:
    """Score a prompt again under the final mask, on the detection's latents and on fresh ones."""
    prompt, neurons = localization.prompt, frozenset(mask.neurons)
    similarity = None
    if localization.kept_seeds:
        (scored,) = scorer.score_prompts([prompt])
        similarity = max(scorer.suppressed_similarities(scored, localization.kept_seeds, neurons))
    (before,) = scorer.score_prompts([prompt], fresh_latents)
    (after,) = scorer.score_prompts([prompt], fresh_latents, neurons)
    return PromptVerification(
        prompt=prompt,
        suppressed_similarity=similarity,
        score_before=before.memorization.score,
        score_after=after.memorization.score,
    )
