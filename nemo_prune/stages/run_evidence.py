"""The evidence of a run: the images that it draws anyway, judged again, and a small budget beside them."""

from collections.abc import Sequence
from pathlib import Path

from diffusers import StableDiffusionPipeline

from nemo_prune.compute.local import LocalSession
from nemo_prune.engine.memory import named_shortage
from nemo_prune.models.known import OrdinaryCaptions
from nemo_prune.models.source import load_pipeline
from nemo_prune.progress import Listener
from nemo_prune.proof.drawing import BASE, CANDIDATE
from nemo_prune.proof.evidence import Evidence, EvidenceSettings
from nemo_prune.settings import VerificationSettings
from nemo_prune.stages.examined import ExaminedPrompt
from nemo_prune.stages.prove import ImageProof
from nemo_prune.stages.verify import gather_evidence


def gather_for_a_run(
    session: LocalSession,
    pruned: StableDiffusionPipeline,
    examined: Sequence[ExaminedPrompt],
    ordinary: OrdinaryCaptions,
    proof: ImageProof,
    verification: VerificationSettings,
    folder: Path,
    listener: Listener,
) -> Evidence | None:
    """Judge the pruned model beside its base; None where no evidence is wanted.

    Args:
        session: knows the base, which is loaded anew.
        pruned: as the release has it.
        examined: the prompts; the memorized ones are asked for.
        ordinary: captions of which some are held out from calibration.
        proof: has drawn both models' images.
        verification: says how they were drawn, and what the rest may cost.
        folder: where results are kept.
        listener: hears stages and progress.

    Raises:
        ModelError: the device's memory does not take both models.
    """
    if not verification.evidence_budget:
        return None
    source = session.source
    with named_shortage("the evidence, which --no-verify leaves out"):
        base = load_pipeline(source.folder, session.device, session.dtype, source.variant)
        return gather_evidence(
            base,
            pruned,
            [each.prompt for each in examined if each.is_memorized],
            ordinary.held_out or ordinary.texts,
            EvidenceSettings.of_a_run(verification),
            folder,
            listener,
            names=(source.facts.name, "the pruned model"),
            drawn={BASE: proof.before, CANDIDATE: proof.after},
            is_held_out=bool(ordinary.held_out),
        )
