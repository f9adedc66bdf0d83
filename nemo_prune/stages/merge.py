"""One mask for the corpus."""

from collections.abc import Sequence
from pathlib import Path

from nemo_prune.engine.localize import Localizer, PromptLocalization
from nemo_prune.engine.merge import settle_mask, union_mask
from nemo_prune.mask import NeuronMask
from nemo_prune.progress import Listener, Stage
from nemo_prune.settings import Plan


def merge_localizations(
    localizer: Localizer, localizations: Sequence[PromptLocalization], plan: Plan, log_file: Path, listener: Listener
) -> tuple[NeuronMask, Sequence[PromptLocalization]]:
    """The corpus' mask, and the prompts as they are under it.

    Args:
        localizer: the model and what is usual for it.
        localizations: one per prompt.
        plan: names the way of merging.
        log_file: where it is kept which neurons are needed.
        listener: hears the stage.
    """
    with listener.stage(Stage.MERGE) as advance:
        if plan.merge == "union":
            sizes = localizer.scorer.predictor.sizes
            return union_mask(localizations, sizes, plan.include_unresolved), localizations
        settled = settle_mask(localizer, localizations, advance, log_file)
        return settled.mask, settled.localizations
