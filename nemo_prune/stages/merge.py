"""One mask for the corpus."""

from collections.abc import Sequence

from nemo_prune.engine.localize import Localizer, PromptLocalization
from nemo_prune.engine.merge import Thin, settle_mask, union_mask
from nemo_prune.mask import NeuronMask
from nemo_prune.progress import Listener, Stage
from nemo_prune.settings import Plan


def merge_localizations(
    localizer: Localizer,
    released: Localizer,
    localizations: Sequence[PromptLocalization],
    thin: Thin,
    plan: Plan,
    listener: Listener,
) -> tuple[NeuronMask, Sequence[PromptLocalization]]:
    """The corpus' mask, and the prompts as they are under it.

    Args:
        localizer: the model and what is usual for it.
        released: the same; what it suppresses is stood in for as a release does. Asked of a thinned mask.
        localizations: one per prompt.
        thin: what is left of neurons without those that cost ordinary prompts most.
        plan: names the way of merging.
        listener: hears the stage.
    """
    with listener.stage(Stage.MERGE) as advance:
        if plan.merge == "union":
            sizes = localizer.scorer.predictor.sizes
            return union_mask(localizations, sizes, plan.include_unresolved), localizations
        if plan.merge == "thinned":
            settled = settle_mask(localizer, localizations, advance, thin, released)
        else:
            settled = settle_mask(localizer, localizations, advance)
        return settled.mask, settled.localizations
