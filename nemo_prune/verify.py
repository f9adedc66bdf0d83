"""The evidence on any candidate beside its base, from models and captions to a report: `nemo-prune verify`."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from nemo_prune.compute.local import choose_device
from nemo_prune.corpus.prompts import Corpus
from nemo_prune.engine.layers import find_text_projections, layer_sizes
from nemo_prune.engine.localize import PromptLocalization
from nemo_prune.engine.results import read_results
from nemo_prune.errors import OutputError, PromptError, RecordError
from nemo_prune.files.json_values import from_json
from nemo_prune.files.layout import ReleaseLayout
from nemo_prune.files.work import LineLog, WorkFiles, WorkFolder
from nemo_prune.mask import Neuron
from nemo_prune.models.source import ModelSource, load_pipeline, resolve_model
from nemo_prune.progress import Listener, Stage
from nemo_prune.proof.evidence import Evidence, EvidenceSettings
from nemo_prune.proof.scores import ScoresUnderMask
from nemo_prune.proof.training_images import known_training_images
from nemo_prune.release.evidence_report import REPORT_FILE, PromptNeurons, ReportContext, write_evidence_report
from nemo_prune.release.evidence_wording import broken_limits
from nemo_prune.release.record import Record
from nemo_prune.release.recording import versions
from nemo_prune.settings import ModelOptions
from nemo_prune.stages.verify import gather_evidence
from nemo_prune.stages.verify_bench import IMAGES_FOLDER


@dataclass(frozen=True)
class Limits:
    """What a candidate must keep.

    Attributes:
        max_replication: largest accepted share of images of memorized captions that are copies.
        max_utility_loss: largest accepted relative change of the noise prediction on captions held out.
    """

    max_replication: float | None = None
    max_utility_loss: float | None = None


@dataclass(frozen=True)
class RunResults:
    """What the work folder of a run knows of its prompts.

    Attributes:
        localizations: one per prompt.
        scores: caption -> its scores under the final mask.
        threshold: tau; None where nothing is known.
    """

    localizations: Sequence[PromptLocalization] = ()
    scores: Mapping[str, ScoresUnderMask] | None = None
    threshold: float | None = None

    @property
    def neurons(self) -> dict[str, Sequence[Neuron]]:
        """Caption -> its own neurons, where it has any."""
        return {each.prompt: each.neurons for each in self.localizations if each.neurons}

    def prompt_neurons(self, kinds: Mapping[str, str | None]) -> list[PromptNeurons]:
        """Which neurons serve which prompts, with each caption's type."""
        scores = self.scores or {}
        return [PromptNeurons.of(each, kinds.get(each.prompt), scores.get(each.prompt)) for each in self.localizations]


@dataclass(frozen=True)
class VerifyResult:
    """What was measured.

    Attributes:
        evidence: all of it.
        report: the file, not for publication.
        broken: a sentence per stated limit that is broken.
    """

    evidence: Evidence
    report: Path
    broken: Sequence[str]


def verify_models(
    base: ModelSource,
    candidate: ModelSource,
    corpus: Corpus,
    ordinary: Sequence[str],
    settings: EvidenceSettings,
    options: ModelOptions,
    folder: Path,
    listener: Listener = Listener(),
    limits: Limits = Limits(),
    known: RunResults = RunResults(),
    overwrite: bool = False,
) -> VerifyResult:
    """Judge a candidate beside its base and write the report.

    Args:
        base: the unpruned model.
        candidate: any model of its architecture.
        corpus: captions that the base memorizes.
        ordinary: captions that it does not, held out from calibration.
        settings: what is measured, and how much it may cost.
        options: device and precision.
        folder: where everything is kept, never for publication.
        listener: hears stages and progress.
        limits: what the candidate must keep.
        known: what a run found out about the prompts.
        overwrite: discard a folder of other models.

    Raises:
        NemoPruneError: something can't be done as asked.
    """
    _refuse_a_release(folder, candidate)
    WorkFolder(folder, {"base": base.digest, "candidate": candidate.digest}, overwrite)
    with listener.stage(Stage.LOAD):
        options = options.on(choose_device(options.device))
        pipes = [
            load_pipeline(each.folder, options.device, getattr(torch, options.dtype), each.variant)
            for each in (base, candidate)
        ]
        training = known_training_images(corpus.prompts)
    for text, reason in training.not_available.items():
        listener.say(f"The training image of {text!r} is not available: {reason}.")
    evidence = gather_evidence(
        *pipes, corpus.prompts, ordinary, settings, folder, listener,
        names=(_name(base), _name(candidate)), neurons=known.neurons, training=training,
    )  # fmt: skip
    context = ReportContext(
        training_images=training.images,
        layer_sizes=layer_sizes(find_text_projections(pipes[0].unet, "both")),
        prompts=known.prompt_neurons({prompt.text: prompt.kind for prompt in corpus.prompts}),
        threshold=known.threshold,
        settings={"device": options.device, "dtype": options.dtype},
        versions=versions(),
        max_replication=limits.max_replication,
        max_utility_loss=limits.max_utility_loss,
    )
    report = write_evidence_report(folder / REPORT_FILE, evidence, folder / IMAGES_FOLDER, context)
    broken = broken_limits(evidence.summary, limits.max_replication, limits.max_utility_loss)
    return VerifyResult(evidence, report, broken)


def base_of_release(out: Path) -> ModelSource:
    """The base that a release's record names.

    Raises:
        RecordError: there is no record, or the base was on its publisher's machine.
        ModelError: the base can't be fetched.
    """
    base = Record.load(ReleaseLayout.found(out).record).base
    if not base.model:
        raise RecordError(f"The record of {out} does not say where its base is. Name the base with --base.")
    return resolve_model(base.model, base.commit, base.variant)


def run_results(work: Path) -> RunResults:
    """What a run's work folder knows; nothing where it is not there any more."""
    files = WorkFiles(work)
    if not files.localizations.is_file():
        return RunResults()
    results = read_results(files.localizations)
    scores = {}
    if files.verified.is_file():
        # The first line says what the others depend on.
        for line in list(LineLog(files.verified))[1:]:
            text = line.pop("prompt")
            try:
                scores[text] = from_json(ScoresUnderMask, line)
            except ValueError as error:
                raise PromptError(f"{files.verified} is damaged: {error}. Remove it, or repeat the run.") from error
    return RunResults(results.localizations, scores, results.header.threshold)


def _refuse_a_release(folder: Path, candidate: ModelSource) -> None:
    folder = folder.absolute()
    published = (candidate.folder, ReleaseLayout.found(candidate.given or candidate.folder).folder)
    if any(each == folder or each in folder.parents for each in map(Path.absolute, published)):
        raise OutputError(f"The folder {folder} must not be in the candidate's: what is there can be published.")


def _name(source: ModelSource) -> str:
    """What to call a model: its Hub id with the commit, or the last part of its path."""
    if source.model:
        return source.facts.name + (f" at {source.commit[:12]}" if source.commit else "")
    return (source.given or source.folder).name


def evidence_values(result: VerifyResult) -> dict:
    """What `--json` prints."""
    values = json.loads(json.dumps(result.evidence.to_json()))
    return {**values, "broken_limits": list(result.broken), "report": str(result.report)}
