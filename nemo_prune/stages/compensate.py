"""What neurons still give: measured on ordinary captions before the search, on memorized ones after it."""

from collections.abc import Sequence

from nemo_prune.compute.local import LocalSession
from nemo_prune.engine.attended import as_tensors, attended_moments, from_tensors
from nemo_prune.engine.compensation import Moments
from nemo_prune.engine.completing import Looks
from nemo_prune.engine.diffusion import NoisePredictor
from nemo_prune.engine.holding import hold_harder
from nemo_prune.files.json_values import to_json
from nemo_prune.files.kept_tensors import kept_tensors
from nemo_prune.files.work import LineLog, WorkFiles
from nemo_prune.mask import NeuronMask
from nemo_prune.progress import Listener, Stage
from nemo_prune.settings import Plan
from nemo_prune.stages.bar import Bar, afforded

# Ordinary prompts that it is measured on.
USUAL_PROMPTS = 96


def usual_moments(predictor: NoisePredictor, texts: Sequence[str]) -> dict[str, Moments]:
    """What attention takes on ordinary prompts: the last ones, because of the first the change is looked at.

    Args:
        predictor: the model.
        texts: ordinary prompts.
    """
    return attended_moments(predictor, texts[-USUAL_PROMPTS:])


def keep_means(session: LocalSession, texts: Sequence[str], plan: Plan, work: WorkFiles) -> None:
    """Let the session's suppressed neurons keep their means on ordinary prompts, if the plan wants any of that.

    Args:
        session: the model.
        texts: ordinary prompts, of which some are used.
        plan: says what a pruned neuron still gives.
        work: where what was measured is kept.
    """
    if plan.ablation != "zero" and texts:
        measured = kept_tensors(work.usual_moments, lambda: as_tensors(usual_moments(session.predictor, texts)))
        session.keep_means(from_tensors(measured))


def released_predictor(
    session: LocalSession, memorized: Sequence[str], plan: Plan, work: WorkFiles, listener: Listener
) -> NoisePredictor:
    """What predicts as a release will: kept neurons stand in for those that are suppressed, if the plan wants that.

    Args:
        session: the model, whose suppressed neurons keep their means.
        memorized: the memorized prompts, on which nothing must stand in.
        plan: says what a pruned neuron still gives.
        work: where what was measured is kept.
        listener: hears the stage.
    """
    if plan.ablation != "compensated" or session.predictor.compensation is None or not memorized:
        return session.released()
    with listener.stage(Stage.COMPENSATE):
        measured = kept_tensors(
            work.memorized_moments, lambda: as_tensors(attended_moments(session.predictor, memorized))
        )
        return session.released(from_tensors(measured))


def hold_what_is_left(
    bar: Bar, mask: NeuronMask, looks: Looks, plan: Plan, work: WorkFiles, listener: Listener
) -> None:
    """Hold memorized prompts harder that a mask leaves, from now on, as far as ordinary ones afford it.

    Args:
        bar: what the mask is judged against; its predictor's compensation is replaced.
        mask: what is pruned.
        looks: draws images under it and says what copies.
        plan: names the limit on what ordinary prompts may lose, if there is one.
        work: where the rounds are kept.
        listener: hears the stage, and what it did.
    """
    if not bar.released.is_combining or not mask.num_neurons:
        return
    limits = afforded(plan.max_utility_loss)
    log = LineLog(work.held, {"mask": mask.digest, "limits": to_json(limits)})
    with listener.stage(Stage.HOLD) as advance:
        first, taken = hold_harder(
            bar.released, bar.corpus, bar.states, mask.neurons, limits, looks, log, bar.log, advance
        )
    if taken is not first:
        listener.say(
            f"{len(first.left)} prompts were not gone, or copied in images, and are held harder: {len(taken.left)} are "
            f"left. Ordinary prompts change by {taken.change:.2f} of what everything suppressed changes, "
            f"{first.change:.2f} before."
        )
