"""The whole way, from a model and prompts to a pruned release."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image

from nemo_prune.checkpoint.weights import stored_dtypes
from nemo_prune.compute.local import LocalSession
from nemo_prune.compute.session import Session
from nemo_prune.corpus.prompts import Corpus
from nemo_prune.engine.calibration import Calibration
from nemo_prune.engine.diffusion import NoisePredictor
from nemo_prune.engine.localize import Localizer, PromptLocalization
from nemo_prune.engine.memo import Memo
from nemo_prune.errors import OutputError
from nemo_prune.facts import ExportReport, SparedPoint
from nemo_prune.files.hashing import text_hash
from nemo_prune.files.json_values import to_json
from nemo_prune.files.layout import ReleaseLayout
from nemo_prune.files.staging import check_new_file
from nemo_prune.files.work import LineLog, WorkFolder, claim_work_folder
from nemo_prune.mask import NeuronMask, Pruning
from nemo_prune.models.known import OrdinaryCaptions
from nemo_prune.models.source import ModelSource, load_pipeline
from nemo_prune.progress import Listener, Stage, Timed
from nemo_prune.proof.bits import SuppressedPredictions, check_pruned_equals_suppressed
from nemo_prune.proof.evidence import Evidence, published_facts
from nemo_prune.proof.sampling import stratified
from nemo_prune.proof.training_images import TrainingImageFiles
from nemo_prune.proof.utility import split_ordinary
from nemo_prune.release.evidence_report import REPORT_FILE, PromptNeurons, ReportContext, write_evidence_report
from nemo_prune.release.licence import licence_of
from nemo_prune.release.prompt_hashes import prompt_references, secret_key
from nemo_prune.release.record import MaskRecord, Record
from nemo_prune.release.recording import base_facts, mask_facts, measured_by_a_run, prompt_facts, versions
from nemo_prune.release.report import save_grids, write_report
from nemo_prune.release.writing import (
    StagedRelease,
    check_release,
    staged_release,
    write_documents,
    write_mask,
    write_weights,
)
from nemo_prune.settings import LocalizationPlan, LocalizationSettings, ModelOptions, Plan
from nemo_prune.stages.calibrate import calibrate_session, measure_calibration
from nemo_prune.stages.estimate import estimate_run
from nemo_prune.stages.examined import ExaminedPrompt, refuse_no_effect, with_verdicts
from nemo_prune.stages.find_mask import find_mask
from nemo_prune.stages.localize import localize_corpus, weigh_neurons
from nemo_prune.stages.prove import ImageProof, measure_cost, score_again
from nemo_prune.stages.pursue import judge_mask, spare_ordinary
from nemo_prune.stages.run_evidence import gather_for_a_run
from nemo_prune.stages.verify_bench import IMAGES_FOLDER


@dataclass(frozen=True)
class RunResult:
    """What a run did.

    Attributes:
        record: what it found and measured, without any caption or path.
        out: the pruned model, a folder or a single file; None where there was nothing to prune.
        report: the full report in the work folder.
        mask: the whole mask, in the work folder too; None where there was nothing to prune.
    """

    record: Record
    out: Path | None
    report: Path
    mask: Path | None = None


def prune_model(
    source: ModelSource, corpus: Corpus, ordinary: OrdinaryCaptions, plan: Plan, listener: Listener = Listener()
) -> RunResult:
    """Localize the memorization neurons of a corpus, prune them, prove it and write the release.

    Args:
        source: the model, see :func:`nemo_prune.models.source.resolve_model`.
        corpus: what to examine.
        ordinary: captions that the model does not memorize.
        plan: where to write, and how.
        listener: hears stages, progress and what the user should know.

    Raises:
        NemoPruneError: something can't be done as asked; nothing that looks finished is left.
    """
    plan, timed = plan.fitted_to(source.guidance_scale), Timed(listener)
    base, licence = base_facts(source, plan.statement), licence_of(source, plan.statement)
    _check_places(source, plan)
    with timed.stage(Stage.LOAD):
        training_images = TrainingImageFiles(corpus.prompts)
        session = LocalSession(source, plan.model, plan.settings)
        plan = replace(plan, model=session.options)
        work = _open_work(session, corpus, ordinary, plan)
        _tell_a_long_run(session, corpus, ordinary, plan, work, timed)
    localizer = _calibrated(session, ordinary, plan, work, timed)
    for warning in (*source.notes, *licence.warnings()):
        timed.say(warning)
    bar, mask, localizations = find_mask(session, localizer, corpus, ordinary, training_images, plan, work, timed)
    mask, curve = spare_ordinary(bar, mask, plan.max_utility_loss, timed)
    spared = [SparedPoint(len(point.neurons), point.change, len(point.gone), point.hold) for point in curve]

    # The search suppresses; from here on the pruning is proven as the release will hold it.
    scaled = session.released(scale=plan.scale) if plan.scale else bar.released
    mask = scaled.in_weights(mask)
    pruning = Pruning(mask, plan.scale)
    examined = _score_again(session, scaled, corpus, localizations, pruning, localizer, plan, work, timed)
    judged = judge_mask(bar, scaled, mask, timed)
    examined = with_verdicts(examined, judged.memorized)
    cost = measure_cost(
        session.predictor, scaled, ordinary.texts[: plan.verification.cost_prompts], pruning, localizer.calibration,
        work.cost,
    )  # fmt: skip
    record = Record(
        versions=versions(),
        base=base,
        licence=licence,
        mask=_mask_record(mask, scaled, plan),
        prompts=prompt_facts(examined, corpus.num_duplicates, plan.include_unresolved),
        files=ExportReport(),
        measured=measured_by_a_run(plan, localizer, examined, judged.ordinary, {}, cost, False, timed.seconds, spared),
    )
    if not mask.num_neurons:
        return RunResult(record, None, write_report(work.path, record, examined))

    refuse_no_effect(examined)
    proof = _image_proof(examined, ordinary, pruning, plan, work, training_images)
    proof.draw_before(session.pipe, timed)
    stored = stored_dtypes(source.files, "unet", source.variant)
    suppressed = SuppressedPredictions.of(session.float32, plan.settings, pruning, ordinary.texts[:2], stored)
    # The device need not hold the pruned model beside the unpruned one.
    session.free()
    with staged_release(plan.out, plan.overwrite) as release:
        with timed.stage(Stage.EXPORT):
            files = write_weights(source, pruning, release)
            pruned = load_pipeline(release.folder, session.device, session.dtype, source.variant)
            check_pruned_equals_suppressed(suppressed, session.in_float32(pruned, release.folder))
        proof.draw_after(pruned, timed)
        examined = proof.added_to(examined)
        evidence = gather_for_a_run(session, pruned, examined, ordinary, proof, plan.verification, work.evidence, timed)
        ordinary_images = {text: proof.evidence(text) for text in proof.texts if text not in set(corpus.texts)}
        measured = measured_by_a_run(
            plan, localizer, examined, judged.ordinary, ordinary_images, cost, True, timed.seconds, spared,
            published_facts(evidence.summary) if evidence else None,
        )  # fmt: skip
        record = replace(record, files=files, measured=measured)
        grid = save_grids(work.path, _memorized(examined), proof)
        _publish(release, work, source, record, examined, pruning, plan, grid)
        report = write_report(work.path, record, examined)
        if evidence:
            report = _write_evidence(work, evidence, examined, training_images, localizer, plan, spared)
    return RunResult(record, plan.out, report, work.mask)


def calibrate_model(
    source: ModelSource,
    ordinary: OrdinaryCaptions,
    out: Path,
    options: ModelOptions,
    settings: LocalizationSettings,
    overwrite: bool = False,
    listener: Listener = Listener(),
) -> Calibration:
    """The first stage alone: measure what is usual and keep it in a file; an old file stays until then.

    Raises:
        OutputError: the file is there already.
    """
    check_new_file(out, overwrite)
    with listener.stage(Stage.LOAD):
        session = LocalSession(source, options, settings)
    with listener.stage(Stage.CALIBRATE) as advance:
        return measure_calibration(session, ordinary.texts, out, advance)


def localize_model(
    session: Session,
    corpus: Corpus,
    ordinary: OrdinaryCaptions,
    plan: LocalizationPlan,
    listener: Listener = Listener(),
) -> tuple[Path, Sequence[PromptLocalization]]:
    """The stages up to the localization: results for a later merge, in the work folder.

    Args:
        session: the model, here or on workers.
        corpus: what to examine.
        ordinary: captions that the model does not memorize; none are needed with a finished calibration.
        plan: where to write, and how.
        listener: hears stages and progress.

    Returns:
        The result file and what it holds.
    """
    identity = _identity(session, corpus, ordinary, plan, "union", 0.0)
    work = WorkFolder(plan.work, identity, plan.overwrite)
    calibration = calibrate_session(session, ordinary, plan, work.calibration, listener)
    threshold = plan.settings.threshold or calibration.threshold
    found = localize_corpus(
        session, corpus.texts, calibration, threshold, work.localizations, listener, plan.include_unresolved
    )
    return work.localizations, found


def _mask_record(mask: NeuronMask, released: NoisePredictor, plan: Plan) -> MaskRecord:
    return MaskRecord.of(
        mask,
        held=released.compensation.hold if released.is_combining else None,
        scale=plan.scale,
        merge=plan.merge,
        preserve=plan.preserve,
        search=plan.search,
        max_utility_loss=plan.max_utility_loss,
    )


def _check_places(source: ModelSource, plan: Plan) -> None:
    """What can be known of OUT and the work folder before the long work."""
    check_release(source, plan.out, plan.overwrite)
    for published in (plan.out, ReleaseLayout.of(plan.out).folder):
        if plan.work == published or published in plan.work.parents:
            raise OutputError(
                f"The work folder {plan.work} must not be in {published}: what is there can be published."
            )
    claim_work_folder(plan.work)


def _open_work(session: Session, corpus: Corpus, ordinary: OrdinaryCaptions, plan: Plan) -> WorkFolder:
    identity = _identity(session, corpus, ordinary, plan, plan.merge, plan.preserve)
    return WorkFolder(plan.work, identity, plan.overwrite)


def _identity(
    session: Session,
    corpus: Corpus,
    ordinary: OrdinaryCaptions,
    plan: Plan | LocalizationPlan,
    merge: str,
    preserve: float,
) -> dict:
    """What the results in a work folder depend on."""
    return {
        "model": session.model_digest,
        "prompts": text_hash(corpus.texts),
        "calibration prompts": text_hash(ordinary.texts),
        "settings": to_json(plan.settings),
        "dtype": session.options.dtype,
        "merge": merge,
        "search": plan.search if isinstance(plan, Plan) else "greedy",
        "preserve": preserve,
        "ablation": plan.ablation if isinstance(plan, Plan) else "zero",
        "unresolved refined": plan.include_unresolved,
        "published calibration": ordinary.published is not None and plan.calibration is None,
    }


def _tell_a_long_run(
    session: LocalSession, corpus: Corpus, ordinary: OrdinaryCaptions, plan: Plan, work: WorkFolder, listener: Listener
) -> None:
    is_calibrated = plan.calibration or ordinary.published or work.calibration.exists()
    num_ordinary = 0 if is_calibrated else len(ordinary.texts)
    estimate = estimate_run(session.predictor, len(corpus.prompts), num_ordinary, plan)
    if estimate.is_long:
        listener.say(estimate.described(len(corpus.prompts)))


def _calibrated(
    session: LocalSession, ordinary: OrdinaryCaptions, plan: Plan, work: WorkFolder, listener: Listener
) -> Localizer:
    """What the localization works with: the model, what is usual for it, and what its neurons cost."""
    calibration = calibrate_session(session, ordinary, plan, work.calibration, listener)
    if ordinary.published and plan.calibration is None:
        listener.say(f"The calibration is {calibration.origin}.")
    threshold = plan.settings.threshold or calibration.threshold
    preserve = weigh_neurons(session, ordinary.texts, plan, work, listener)
    memo = Memo(work.detected, LineLog(work.answers, {"threshold": threshold}))
    # A union is the paper's: there its very sets are wanted.
    exactly = plan.merge == "union"
    return Localizer(session.scorer, calibration, threshold, preserve, plan.include_unresolved, exactly, memo)


def _score_again(
    session: LocalSession,
    scaled: NoisePredictor,
    corpus: Corpus,
    localizations: Sequence[PromptLocalization],
    pruning: Pruning,
    localizer: Localizer,
    plan: Plan,
    work: WorkFolder,
    listener: Listener,
) -> list[ExaminedPrompt]:
    """The prompts with all that is known of them but their images."""
    scorer = session.scorer_of(scaled)
    under_mask = score_again(localizer, scorer, localizations, pruning, plan.verification, work.verified, listener)
    references = prompt_references(secret_key(work.prompt_key), corpus.texts)
    return [
        ExaminedPrompt.scored(prompt, references[prompt.text], localization, scores, localizer.threshold)
        for prompt, localization, scores in zip(corpus.prompts, localizations, under_mask, strict=True)
    ]


def _image_proof(
    examined: Sequence[ExaminedPrompt],
    ordinary: OrdinaryCaptions,
    pruning: Pruning,
    plan: Plan,
    work: WorkFolder,
    training_images: Mapping[str, Image.Image],
) -> ImageProof:
    """The images to compare: memorized captions first, spread over types and near-duplicates, then ordinary ones."""
    verification, memorized = plan.verification, [each.prompt for each in examined if each.is_memorized]
    spread = [memorized[place].text for place in stratified(memorized)][: verification.max_prompts]
    apart, _ = split_ordinary(ordinary.held_out or ordinary.texts, _memorized(examined), verification.ordinary_images)
    return ImageProof(work.images, [*spread, *apart], pruning, verification, training_images)


def _memorized(examined: Sequence[ExaminedPrompt]) -> list[str]:
    return [each.text for each in examined if each.is_memorized]


def _write_evidence(
    work: WorkFolder,
    evidence: Evidence,
    examined: Sequence[ExaminedPrompt],
    training_images: Mapping[str, Image.Image],
    localizer: Localizer,
    plan: Plan,
    spared: Sequence[SparedPoint],
) -> Path:
    """The report of the evidence, with captions and images: it stays in the work folder."""
    context = ReportContext(
        training_images=training_images,
        layer_sizes=localizer.scorer.predictor.sizes,
        prompts=[PromptNeurons.of(each.localization, each.prompt.kind, each.under_mask) for each in examined],
        threshold=localizer.threshold,
        settings={"dtype": plan.model.dtype},
        versions=versions(),
        spared=spared,
    )
    return write_evidence_report(work.path / REPORT_FILE, evidence, work.evidence / IMAGES_FOLDER, context)


def _publish(
    release: StagedRelease,
    work: WorkFolder,
    source: ModelSource,
    record: Record,
    examined: Sequence[ExaminedPrompt],
    pruning: Pruning,
    plan: Plan,
    grid: Path,
) -> None:
    """Put mask, record, plot and card beside the weights; captions and the grid only if asked for.

    The whole mask stays in the work folder.
    """
    layout = release.layout
    facts = mask_facts(source, record, examined, pruning, plan)
    pruning.mask.save(work.mask, facts)
    write_mask(release, pruning.mask, facts)
    examples: list[str] = []
    if plan.publish_examples:
        examples = [each.text for each in examined if each.is_memorized and each.images]
        shutil.copyfile(grid, layout.grid)
    write_documents(layout, record, examples)
