"""One prompt's way through a run: from the corpus to what the pruned model makes of it."""

from dataclasses import dataclass

from nemo_prune.corpus.prompts import Prompt
from nemo_prune.engine.localize import PromptLocalization
from nemo_prune.proof.images import ImageEvidence
from nemo_prune.proof.scores import ScoresUnderMask


@dataclass(frozen=True)
class ExaminedPrompt:
    """A prompt and all that a run found out about it.

    Attributes:
        prompt: from the corpus.
        reference: what published files call it, see :mod:`nemo_prune.release.prompt_hashes`.
        localization: its status and its neurons.
        under_mask: its scores under the final mask.
        images: its images before and after; None where none were drawn.
    """

    prompt: Prompt
    reference: str
    localization: PromptLocalization
    under_mask: ScoresUnderMask
    images: ImageEvidence | None = None

    @property
    def text(self) -> str:
        """The caption."""
        return self.prompt.text

    @property
    def is_memorized(self) -> bool:
        """Whether the model memorizes it, be it resolved or not."""
        return self.localization.is_memorized
