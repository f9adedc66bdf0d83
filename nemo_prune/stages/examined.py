"""One prompt's way through a run: from the corpus to what the pruned model makes of it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from nemo_prune.corpus.prompts import Prompt
from nemo_prune.engine.gone import Verdict
from nemo_prune.engine.localize import PromptLocalization
from nemo_prune.errors import EffectError
from nemo_prune.proof.images import ImageEvidence
from nemo_prune.proof.scores import ScoresUnderMask

# Of the similarity, whose last digits are rounding.
_UNCHANGED = 1e-4


@dataclass(frozen=True)
class ExaminedPrompt:
    """A prompt and all that a run found out about it.

    Attributes:
        prompt: from the corpus.
        reference: what published files call it, see :mod:`nemo_prune.release.prompt_hashes`.
        localization: its status and its neurons.
        under_mask: its scores under the final mask.
        images: its images before and after; None where none were drawn.
        verdict: whether it is gone under the mask by its noise predictions; None where nobody judged.
    """

    prompt: Prompt
    reference: str
    localization: PromptLocalization
    under_mask: ScoresUnderMask
    images: ImageEvidence | None = None
    verdict: Verdict | None = None

    @classmethod
    def scored(
        cls,
        prompt: Prompt,
        reference: str,
        localization: PromptLocalization,
        under_mask: ScoresUnderMask,
        threshold: float,
    ) -> "ExaminedPrompt":
        """A prompt under the final mask: one that stays awake there is not localized, whatever was found for it."""
        similarity = under_mask.suppressed_similarity
        if localization.status == "localized" and similarity is not None and similarity > threshold:
            localization = replace(localization, status="unresolved", silenced_by_others=False)
        return cls(prompt, reference, localization, under_mask)

    @property
    def text(self) -> str:
        """The caption."""
        return self.prompt.text

    @property
    def is_gone(self) -> bool:
        """Whether nothing of it shows in the noise predictions and no image that was drawn copies anything."""
        copies = self.images.copies_after if self.images else None
        return self.verdict is not None and self.verdict.is_gone and not copies

    @property
    def is_memorized(self) -> bool:
        """Whether the model memorizes it, be it resolved or not."""
        return self.localization.is_memorized


def refuse_no_effect(examined: Sequence[ExaminedPrompt]) -> None:
    """Refuse a pruning that leaves every memorized prompt's noise prediction as it was.

    Raises:
        EffectError: nothing that can be measured changes.
    """
    similarities = [each.under_mask.suppressed_similarity for each in examined if each.is_memorized]
    if similarities and all(similarity >= 1 - _UNCHANGED for similarity in similarities):
        raise EffectError(
            "The pruning changes nothing that can be measured on the prompts that it was made for, so nothing was "
            "written. Are these rows zero in the model already, or is --scale nearly 1?"
        )


def with_verdicts(examined: Sequence[ExaminedPrompt], verdicts: Sequence[Verdict]) -> list[ExaminedPrompt]:
    """The prompts, with what was judged of those that were judged."""
    by_text = {each.prompt: each for each in verdicts}
    return [replace(each, verdict=by_text.get(each.text)) for each in examined]
