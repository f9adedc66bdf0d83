"""Every prompt of a corpus localized; each result is kept as it comes."""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from nemo_prune.compute.local import LocalSession
from nemo_prune.compute.session import Session
from nemo_prune.engine.calibration import Calibration
from nemo_prune.engine.gates import all_neurons
from nemo_prune.engine.localize import Localizer, PromptLocalization, localize_prompts
from nemo_prune.engine.preserve import Preserve, neuron_costs
from nemo_prune.engine.results import ResultsFile
from nemo_prune.files.kept_tensors import kept_tensors
from nemo_prune.files.work import WorkFiles
from nemo_prune.progress import Listener, Stage
from nemo_prune.settings import Plan
from nemo_prune.stages.compensate import keep_means

# Ordinary prompts that the neurons are weighed on.
WEIGHING_PROMPTS = 8


def weigh_neurons(
    session: LocalSession, texts: Sequence[str], plan: Plan, work: WorkFiles, listener: Listener
) -> Preserve | None:
    """What ordinary prompts need of each neuron: its mean, where the plan keeps it, and what it costs them.

    Args:
        session: the model; its suppressed neurons keep their means from now on.
        texts: ordinary prompts, of which a few are used.
        plan: says how much the search departs from the paper in favour of them.
        work: where means and costs are kept.
        listener: hears the stage.

    Returns:
        The costs; None where nobody minds.
    """
    with listener.stage(Stage.WEIGH):
        keep_means(session, texts, plan, work)
        if not weighs_neurons(plan) or not texts:
            return None
        costs = kept_tensors(work.neuron_costs, lambda: {"costs": _costs(session, texts[:WEIGHING_PROMPTS])})["costs"]
        return Preserve(dict(zip(all_neurons(session.sizes), costs.tolist(), strict=True)), plan.preserve)


def _costs(session: LocalSession, texts: Sequence[str]) -> Tensor:
    """What each neuron costs, [neurons], all layers joined."""
    return torch.tensor(list(neuron_costs(session.predictor, texts).values()))


def weighs_neurons(plan: Plan) -> bool:
    """Whether anything in a plan depends on what single neurons cost: what is dropped first, or what is searched."""
    return plan.search == "greedy" and (plan.merge == "minimal" or plan.preserve > 0)


def localize_corpus(
    session: Session,
    texts: Sequence[str],
    calibration: Calibration,
    threshold: float,
    file: Path,
    listener: Listener,
    refine_unresolved: bool = False,
) -> list[PromptLocalization]:
    """Localize prompts each for itself, here or on workers.

    Args:
        session: the model.
        texts: the prompts.
        calibration: what is usual.
        threshold: tau.
        file: where the results are kept.
        listener: hears the stage.
        refine_unresolved: whether the sets of unresolved prompts are wanted.

    Returns:
        One result per prompt, in their order.
    """
    task = partial(_localize_chunk, calibration=calibration, threshold=threshold, refine_unresolved=refine_unresolved)
    results = ResultsFile(file, session.results_header(threshold))
    with listener.stage(Stage.LOCALIZE) as advance:
        return results.completed(texts, lambda waiting, _: session.map(task, session.chunks_of(waiting)), advance)


def localize_for_a_mask(
    session: Session, localizer: Localizer, texts: Sequence[str], file: Path, listener: Listener
) -> list[PromptLocalization]:
    """Localize the prompts of a run each for itself; what was detected stays at hand for the merge.

    Args:
        session: the model.
        localizer: the same with what is usual for it.
        texts: the prompts.
        file: where the results are kept.
        listener: hears the stage.
    """
    results = ResultsFile(file, session.results_header(localizer.threshold))
    with listener.stage(Stage.LOCALIZE) as advance:
        return results.completed(texts, lambda waiting, _: localize_prompts(localizer, waiting), advance)


def _localize_chunk(
    session: LocalSession, texts: Sequence[str], calibration: Calibration, threshold: float, refine_unresolved: bool
) -> Iterator[PromptLocalization]:
    localizer = Localizer(session.scorer, calibration, threshold, refine_unresolved=refine_unresolved, check_way=True)
    return localize_prompts(localizer, texts)
