"""The mask of a run: found for its prompts by the search that the plan names, and what it is judged against."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

from PIL import Image

from nemo_prune.compute.local import LocalSession
from nemo_prune.corpus.prompts import Corpus
from nemo_prune.engine.diffusion import NoisePredictor
from nemo_prune.engine.localize import Localizer, PromptLocalization
from nemo_prune.engine.memo import Memo
from nemo_prune.files.work import LineLog, WorkFolder
from nemo_prune.mask import NeuronMask
from nemo_prune.models.known import OrdinaryCaptions
from nemo_prune.progress import Listener, Stage
from nemo_prune.settings import Plan
from nemo_prune.stages.bar import Bar
from nemo_prune.stages.compensate import hold_what_is_left, released_predictor
from nemo_prune.stages.localize import localize_for_a_mask
from nemo_prune.stages.merge import merge_localizations
from nemo_prune.stages.pursue import CopyLooks, detect_corpus, pursue_mask


def find_mask(
    session: LocalSession,
    localizer: Localizer,
    corpus: Corpus,
    ordinary: OrdinaryCaptions,
    training_images: Mapping[str, Image.Image],
    plan: Plan,
    work: WorkFolder,
    listener: Listener,
) -> tuple[Bar, NeuronMask, Sequence[PromptLocalization]]:
    """The mask that the plan's search finds, with what it is judged against, and the prompts as they are under it.

    Args:
        session: the model.
        localizer: the same with what is usual for it.
        corpus: what to examine.
        ordinary: captions that the model does not memorize.
        training_images: caption -> its training image, where one is known.
        plan: names search, merge and limit.
        work: where everything is kept as it comes.
        listener: hears the stages.
    """
    if plan.search == "greedy":
        found = localize_for_a_mask(session, localizer, corpus.texts, work.localizations, listener)
    else:
        with listener.stage(Stage.LOCALIZE):
            found = detect_corpus(localizer, corpus.texts)
    memorized = [each.prompt for each in found if each.is_memorized]
    released = released_predictor(session, memorized, plan, work, listener)
    bar = Bar(localizer, released, memorized, ordinary.texts, work)
    prompts = {each.text: each for each in corpus.prompts}
    looks = CopyLooks(
        released, [prompts[text] for text in memorized], ordinary.texts, training_images, plan.verification, work.looks
    )
    first = None
    if plan.search == "greedy":
        thin = partial(bar.thinned, max_utility_loss=plan.max_utility_loss)
        as_released = _as_released(session, localizer, released, work)
        first, found = merge_localizations(localizer, as_released, found, thin, plan, listener)
        # The union is the paper's: it stays what the paper makes it.
        if plan.merge == "union":
            return bar, first, found
        hold_what_is_left(bar, first, looks, plan, work, listener)
    return bar, *pursue_mask(bar, found, first, looks, plan, work, listener)


def _as_released(session: LocalSession, localizer: Localizer, released: NoisePredictor, work: WorkFolder) -> Localizer:
    """The localizer, which asks what a release would answer; what it asked is kept apart."""
    if released.compensation is localizer.scorer.predictor.compensation:
        return localizer
    memo = Memo(work.detected, LineLog(work.released_answers, {"threshold": localizer.threshold}))
    return replace(localizer, scorer=session.scorer_of(released), memo=memo)
