"""The whole way, from a model and prompts to a pruned release."""

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from diffusers import StableDiffusionPipeline
from PIL import Image, UnidentifiedImageError

from nemo_prune.compute.session import BaseSession, Session, choose_dtype, digest
from nemo_prune.corpus.prompts import Corpus, Prompt
from nemo_prune.engine.calibration import Calibration
from nemo_prune.engine.diffusion import NoisePredictor
from nemo_prune.engine.localize import PromptLocalization, localize_prompts
from nemo_prune.engine.merge import localize_incrementally, settle_mask, union_mask
from nemo_prune.engine.preserve import Preserve, neuron_costs
from nemo_prune.engine.results import ResultsFile
from nemo_prune.engine.scorer import Scorer
from nemo_prune.errors import OutputError, PromptError
from nemo_prune.files.images import ImageFolder
from nemo_prune.files.layout import folder_beside
from nemo_prune.files.staging import check_new_file
from nemo_prune.files.work import LineLog, WorkFolder
from nemo_prune.mask import NeuronMask
from nemo_prune.models.known import KNOWN_MODELS, KnownModel
from nemo_prune.models.source import ModelSource, load_pipeline
from nemo_prune.progress import Notify, Progress, silently, unheard
from nemo_prune.proof.bits import check_pruned_equals_suppressed
from nemo_prune.proof.cost import full_mask, matched_random_mask, noise_change
from nemo_prune.proof.images import compare_images, draw_images
from nemo_prune.proof.scores import PromptVerification, verify_prompt
from nemo_prune.release.documents import release_run
from nemo_prune.release.licence import licence_of
from nemo_prune.release.prompt_hashes import prompt_references, secret_key
from nemo_prune.release.pruned import write_weights
from nemo_prune.release.record import Findings, described_base
from nemo_prune.release.report import save_grids, write_report
from nemo_prune.release.targets import check_release, staged_release
from nemo_prune.settings import LocalizationSettings, ModelOptions, RunOptions, VerificationSettings
from nemo_prune.stages.estimate import estimate_run

_NUM_COST_PROMPTS = 16
_NUM_WEIGHING_PROMPTS = 5
_NUM_ORDINARY_IMAGES = 4


@dataclasses.dataclass(frozen=True)
class RunResult:
    """What a run did.

    Attributes:
        facts: the record, JSON values only, without any caption or path.
        out: the pruned model, a folder or a single file; None where there was nothing to prune.
        report: the full report in the work folder.
    """

    facts: dict
    out: Path | None
    report: Path


class _Stages:
    """Wall time per stage, and progress under the stage's name."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[Callable[[int, int], None]]:
        started = time.perf_counter()
        yield lambda done, total: self._progress(name, done, total)
        self.seconds[name] = round(time.perf_counter() - started, 2)


def prune_model(
    source: ModelSource,
    corpus: Corpus,
    calibration_texts: Sequence[str],
    options: RunOptions,
    settings: LocalizationSettings,
    verification: VerificationSettings,
    progress: Progress = silently,
    notify: Notify = unheard,
) -> RunResult:
    """Localize the memorization neurons of a corpus, prune them, prove it and write the release.

    Args:
        source: the model, see :func:`nemo_prune.models.source.resolve_model`.
        corpus: what to examine.
        calibration_texts: ordinary prompts, none of the memorized ones among them.
        options: where to and how.
        settings: the numbers of the method.
        verification: what is measured on images.
        progress: called with the stage's name, what is done and how much there is.
        notify: called with what the user should know while the run goes on.

    Raises:
        NemoPruneError: something can't be done as asked; nothing that looks finished is left.
    """
    _check(source, options)
    base, licence = described_base(source, options.statement), licence_of(source, options.statement)
    prompts = corpus.prompts
    stages = _Stages(progress)
    with stages.stage("load"):
        training_images = _open_training_images(prompts)
        session = Session(source, options.model, settings)
        pipe, predictor = session.pipe, session.predictor
        work = _open_work(session, prompts, calibration_texts, options)
        references = prompt_references(secret_key(work.prompt_key), [prompt.text for prompt in prompts])
        estimate = estimate_run(predictor, len(prompts), verification)
        if estimate.is_long:
            notify(estimate.described(len(prompts)))
    with stages.stage("calibrate") as report_progress:
        calibration = _calibration(session, calibration_texts, options, work, report_progress)
        if _known(session, options):
            notify(f"The calibration is {calibration.origin}.")
        for warning in licence.warnings():
            notify(warning)
    threshold = settings.threshold or calibration.threshold
    with stages.stage("weigh neurons") as report_progress:
        preserve = _preserve(session, calibration_texts, options.preserve, work, report_progress)
    with stages.stage("localize") as report_progress:
        results = ResultsFile(work.localizations, session.results_header(threshold))
        localizations = _localize_all(
            session, prompts, calibration, threshold, options.merge, preserve, results, report_progress
        )
    with stages.stage("merge") as report_progress:
        if options.merge == "incremental":
            settled = settle_mask(
                session.scorer, localizations, calibration, threshold, preserve, report_progress, work.needed
            )
            mask, localizations = settled.mask, settled.localizations
        else:
            mask = union_mask(localizations, predictor.sizes, options.include_unresolved)
    with stages.stage("score again") as report_progress:
        # The search suppresses; what is proven from here on is what the release will hold.
        scaled = NoisePredictor(pipe, settings, predictor.batch_size, options.scale)
        scored = {"mask": mask.digest, "scale": options.scale, "threshold": threshold, "seed": verification.score_seed}
        log = LineLog(work.verified, scored)
        verified = _verify_all(Scorer(scaled), localizations, mask, verification, log, report_progress)
        cost = _cost(predictor, scaled, calibration_texts, mask, calibration)
    findings = Findings(
        source,
        options,
        settings,
        verification,
        calibration,
        threshold,
        localizations,
        mask,
        verified,
        cost,
        session.scorer.rechecks,
        corpus.num_duplicates,
        base,
        licence,
        references,
    )
    if not mask.num_neurons:
        facts = findings.facts(stages.seconds)
        return RunResult(facts, None, write_report(work.path, findings, facts, prompts))

    shown = findings.memorized[: verification.max_prompts] + list(calibration_texts[:_NUM_ORDINARY_IMAGES])
    drawn = {"shown": digest(shown), "mask": mask.digest, "scale": options.scale, **dataclasses.asdict(verification)}
    images = ImageFolder(work.images, drawn)
    with stages.stage("images before") as report_progress:
        before = _draw_all("before", pipe, shown, verification, images, report_progress)
    with staged_release(options.out, options.overwrite) as release:
        with stages.stage("export"):
            exported = write_weights(source, mask, release, options.scale)
        with stages.stage("images after") as report_progress:
            pruned_pipe = load_pipeline(
                dataclasses.replace(source, folder=release.folder), session.device, choose_dtype(options.model.dtype)
            )
            check_pruned_equals_suppressed(scaled, pruned_pipe, mask, calibration_texts[:2])
            after = _draw_all("after", pruned_pipe, shown, verification, images, report_progress)
        known, cut = list(training_images.values()), verification.replication_cut
        evidence = [compare_images(text, before[text], after[text], known, cut) for text in shown]
        findings = dataclasses.replace(findings, evidence=evidence, exported=exported)
        facts = findings.facts(stages.seconds)
        grid = save_grids(work.path, findings.memorized, training_images, before, after)
        report = write_report(work.path, findings, facts, prompts)
        release_run(release.beside, findings, facts, grid)
    return RunResult(facts, options.out, report)


def calibrate_model(
    source: ModelSource,
    texts: Sequence[str],
    out: Path,
    options: ModelOptions,
    settings: LocalizationSettings,
    overwrite: bool = False,
    progress: Progress = silently,
) -> Calibration:
    """The first stage alone: measure what is usual and keep it in a file; an old one stands until then.

    Raises:
        OutputError: the file is there already.
    """
    check_new_file(out, overwrite)
    session = Session(source, options, settings)
    return session.measure_calibration(texts, out, lambda done, total: progress("calibrate", done, total))


def localize_model(
    session: BaseSession,
    corpus: Corpus,
    calibration_texts: Sequence[str],
    options: RunOptions,
    progress: Progress = silently,
) -> tuple[Path, Sequence[PromptLocalization]]:
    """The stages up to the localization: results for a later merge, in the work folder.

    Args:
        session: the model, here or on workers.
        corpus: what to examine.
        calibration_texts: ordinary prompts; none are needed with a finished calibration.
        options: where to and how; ``out`` is not used.
        progress: called with the stage's name, what is done and how much there is.

    Returns:
        The result file and what it holds.
    """
    stages = _Stages(progress)
    prompts = corpus.prompts
    work = _open_work(session, prompts, calibration_texts, options)
    with stages.stage("calibrate") as report_progress:
        calibration = _calibration(session, calibration_texts, options, work, report_progress)
    threshold = session.settings.threshold or calibration.threshold
    results = ResultsFile(work.localizations, session.results_header(threshold))
    with stages.stage("localize") as report_progress:
        localizations = _localize_all(session, prompts, calibration, threshold, "union", None, results, report_progress)
    return work.localizations, localizations


def _check(source: ModelSource, options: RunOptions) -> None:
    """What can be known before the long work."""
    out, work = options.out.absolute(), options.work.absolute()
    check_release(source, out, options.overwrite)
    for published in (out, folder_beside(out)):
        if work == published or published in work.parents:
            raise OutputError(f"The work folder {work} must not lie in {published}: what lies there can be published.")


def _open_training_images(prompts: Sequence[Prompt]) -> dict[str, Image.Image]:
    images = {}
    for prompt in prompts:
        if prompt.image is not None:
            try:
                images[prompt.text] = Image.open(prompt.image).convert("RGB")
            except (OSError, UnidentifiedImageError) as error:
                raise PromptError(
                    f"The training image {prompt.image} can't be read: {error}. Mend the `image` column or drop it."
                ) from error
    return images


def _open_work(
    session: BaseSession, prompts: Sequence[Prompt], calibration_texts: Sequence[str], options: RunOptions
) -> WorkFolder:
    identity = {
        "model": session.model_digest,
        "prompts": digest([prompt.text for prompt in prompts]),
        "calibration prompts": digest(calibration_texts),
        "settings": dataclasses.asdict(session.settings),
        "dtype": options.model.dtype,
        "merge": options.merge,
        "preserve": options.preserve,
        "published calibration": _known(session, options) is not None,
    }
    return WorkFolder(options.work, identity, options.overwrite)


def _calibration(
    session: BaseSession,
    texts: Sequence[str],
    options: RunOptions,
    work: WorkFolder,
    progress: Callable[[int, int], None],
) -> Calibration:
    """The calibration that was given, or that was published for a known model, or one of the ordinary prompts."""
    if options.calibration:
        return Calibration.load(options.calibration, session.calibration_identity)
    return session.calibrate(texts, work.calibration, _known(session, options), progress)


def _known(session: BaseSession, options: RunOptions) -> KnownModel | None:
    """What was published for the model, if it may be used."""
    wanted = options.published_calibration and options.calibration is None
    return KNOWN_MODELS.get(session.source.repo_id) if wanted else None


def _preserve(
    session: Session, texts: Sequence[str], strength: float, work: WorkFolder, progress: Callable[[int, int], None]
) -> Preserve | None:
    if not strength:
        return None
    texts = texts[:_NUM_WEIGHING_PROMPTS]
    log = LineLog(work.costs, {"prompts": digest(texts)})
    return Preserve(neuron_costs(session.predictor, texts, progress, log), strength)


def _localize_all(
    session: BaseSession,
    prompts: Sequence[Prompt],
    calibration: Calibration,
    threshold: float,
    merge: str,
    preserve: Preserve | None,
    results: ResultsFile,
    progress: Callable[[int, int], None],
) -> list[PromptLocalization]:
    known = {each.prompt: each for each in results.read()}
    waiting = [prompt.text for prompt in prompts if prompt.text not in known]
    progress(len(known), len(prompts))
    if merge == "incremental":
        so_far = union_mask(list(known.values()), session.sizes).neurons
        found = localize_incrementally(session.scorer, waiting, calibration, threshold, so_far, preserve)
    else:
        task = partial(_localize_chunk, calibration=calibration, threshold=threshold, preserve=preserve)
        found = session.map(task, session.chunks_of(waiting))
    for localization in found:
        results.append(localization)
        known[localization.prompt] = localization
        progress(len(known), len(prompts))
    return [known[prompt.text] for prompt in prompts]


def _localize_chunk(
    session: Session, prompts: Sequence[str], calibration: Calibration, threshold: float, preserve: Preserve | None
) -> Iterator[PromptLocalization]:
    return localize_prompts(session.scorer, prompts, calibration, threshold, preserve)


def _verify_all(
    scorer: Scorer,
    localizations: Sequence[PromptLocalization],
    mask: NeuronMask,
    verification: VerificationSettings,
    log: LineLog,
    progress: Callable[[int, int], None],
) -> list[PromptVerification]:
    fresh_latents = scorer.predictor.initial_latents(seed=verification.score_seed)
    verified = [PromptVerification(**record) for record in log]
    for localization in localizations[len(verified) :]:
        verified.append(verify_prompt(scorer, localization, mask, fresh_latents))
        log.append(dataclasses.asdict(verified[-1]))
        progress(len(verified), len(localizations))
    return verified


def _cost(
    predictor: NoisePredictor,
    scaled: NoisePredictor,
    calibration_texts: Sequence[str],
    mask: NeuronMask,
    calibration: Calibration,
) -> dict[str, float]:
    """Change on ordinary prompts under the mask, beside as many random neurons and everything suppressed."""
    texts = calibration_texts[:_NUM_COST_PROMPTS]
    random = matched_random_mask(mask, calibration.statistics.mean, predictor.settings.seed)
    everything = noise_change(predictor, texts, {"everything": full_mask(predictor.sizes)})
    return noise_change(scaled, texts, {"mask": mask, "random": random}) | everything


def _draw_all(
    when: str,
    pipe: StableDiffusionPipeline,
    texts: Sequence[str],
    verification: VerificationSettings,
    images: ImageFolder,
    progress: Callable[[int, int], None],
) -> dict[str, list[Image.Image]]:
    drawn = {}
    for place, text in enumerate(texts):
        draw = partial(draw_images, pipe, text, verification)
        drawn[text] = images.kept_or_drawn(f"{place:03d}_{when}", verification.images_per_prompt, draw)
        progress(place + 1, len(texts))
    return drawn
