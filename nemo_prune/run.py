"""The whole way, from a model and prompts to a pruned release."""

import dataclasses
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from PIL import Image, UnidentifiedImageError

from nemo_prune.calibration import Calibration, calibrate
from nemo_prune.diffusion import NoisePredictor
from nemo_prune.errors import OutputError, PromptError, SettingsError
from nemo_prune.export import check_target, export_checkpoint, export_size, file_hash, files_to_export, staged_folder
from nemo_prune.localize import PromptLocalization, localize_prompts
from nemo_prune.mask import NeuronMask
from nemo_prune.prompts import Prompt
from nemo_prune.record import Findings
from nemo_prune.release import save_images, write_release, write_report
from nemo_prune.scorer import Scorer
from nemo_prune.settings import LocalizationSettings, RunOptions, VerificationSettings
from nemo_prune.source import ModelSource, load_pipeline
from nemo_prune.verify import (
    PromptVerification,
    check_pruned_equals_suppressed,
    compare_images,
    draw_images,
    full_mask,
    matched_random_mask,
    noise_change,
    verify_prompt,
)
from nemo_prune.work import WorkFolder

Progress = Callable[[str, int, int], None]

_NUM_COST_PROMPTS = 16
_NUM_ORDINARY_IMAGES = 4


@dataclasses.dataclass(frozen=True)
class RunResult:
    """What a run did.

    Attributes:
        facts: the record, JSON values only, without any caption or path.
        out: the pruned model, None where there was nothing to prune.
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
    prompts: Sequence[Prompt],
    calibration_texts: Sequence[str],
    options: RunOptions,
    settings: LocalizationSettings,
    verification: VerificationSettings,
    progress: Progress = lambda stage, done, total: None,
) -> RunResult:
    """Localize the memorization neurons of a corpus, prune them, prove it and write the release.

    Args:
        source: the model, see :func:`nemo_prune.source.resolve_model`.
        prompts: what to examine.
        calibration_texts: ordinary prompts, none of ``prompts`` that are memorized among them.
        options: where to and how.
        settings: the numbers of the method.
        verification: what is measured on images.
        progress: called with the stage's name, what is done and how much there is.

    Raises:
        NemoPruneError: something can't be done as asked; nothing that looks finished is left.
    """
    _check(source, options)
    stages = _Stages(progress)
    with stages.stage("load"):
        device = _choose_device(options.device)
        pipe = load_pipeline(source, device, _dtype(options.dtype))
        training_images = _open_training_images(prompts)
        work = _open_work(source, prompts, calibration_texts, options, settings)
        predictor = NoisePredictor(pipe, settings)
        scorer = Scorer(predictor)
    with stages.stage("calibrate") as report_progress:
        calibration = work.load_calibration()
        if calibration is None:
            calibration = calibrate(scorer, calibration_texts, report_progress)
            work.save_calibration(calibration)
    threshold = settings.threshold or calibration.threshold
    with stages.stage("localize") as report_progress:
        localizations = _localize_all(scorer, prompts, calibration, threshold, work, report_progress)
    mask = merge_localizations(localizations, predictor.sizes, options.include_unresolved)
    with stages.stage("score again") as report_progress:
        verified = _verify_all(scorer, localizations, mask, verification, report_progress)
        cost = _cost(predictor, calibration_texts, mask, calibration)
    findings = Findings(
        source, options, settings, verification, calibration, threshold, localizations, mask, verified, cost
    )
    if not mask.num_neurons:
        facts = findings.facts(stages.seconds)
        return RunResult(facts, None, write_report(work.path, findings, facts, prompts))

    shown = findings.memorized[: verification.max_prompts] + list(calibration_texts[:_NUM_ORDINARY_IMAGES])
    with stages.stage("images before") as report_progress:
        before = _draw_all(pipe, shown, verification, report_progress)
    with staged_folder(options.out, options.overwrite) as folder:
        with stages.stage("export"):
            exported = export_checkpoint(source.folder, mask, folder)
        with stages.stage("images after") as report_progress:
            pruned_pipe = load_pipeline(dataclasses.replace(source, folder=folder), device, _dtype(options.dtype))
            check_pruned_equals_suppressed(predictor, pruned_pipe, mask, calibration_texts[:2])
            after = _draw_all(pruned_pipe, shown, verification, report_progress)
        known, cut = list(training_images.values()), verification.replication_cut
        evidence = [compare_images(text, before[text], after[text], known, cut) for text in shown]
        findings = dataclasses.replace(findings, evidence=evidence, exported=exported)
        facts = findings.facts(stages.seconds)
        grid = save_images(work.path, findings.memorized, training_images, before, after)
        report = write_report(work.path, findings, facts, prompts)
        write_release(folder, findings, facts, grid)
    return RunResult(facts, options.out, report)


def merge_localizations(
    localizations: Sequence[PromptLocalization], sizes: dict[str, int], include_unresolved: bool = False
) -> NeuronMask:
    """The union of the localized prompts' neurons.

    Sets of unresolved prompts stay out unless asked for: on SD v1-4 they would take a third of all.
    """
    statuses = {"localized", "unresolved"} if include_unresolved else {"localized"}
    return NeuronMask.from_neurons(
        (neuron for each in localizations if each.status in statuses for neuron in each.neurons), sizes
    )


def _check(source: ModelSource, options: RunOptions) -> None:
    """What can be known before the long work."""
    out, work = options.out.absolute(), options.work.absolute()
    check_target(out, options.overwrite)
    if work == out or out in work.parents:
        raise OutputError(f"The work folder {work} must not lie in {out}: what lies there can be published.")
    if source.folder == out.resolve() or source.folder in out.resolve().parents:
        raise OutputError(f"{out} lies in the model's own folder. Choose another --out.")
    existing = next(folder for folder in out.parents if folder.exists())
    needed, free = export_size(source.folder), shutil.disk_usage(existing).free
    if needed > free:
        raise OutputError(
            f"{existing} has {free / 1e9:.1f} GB free, the pruned model takes {needed / 1e9:.1f} GB. Make room or "
            "choose another --out."
        )


def _choose_device(device: str) -> str:
    if device != "auto":
        try:
            torch.zeros(1, device=device)
        except (RuntimeError, AssertionError) as error:
            raise SettingsError(f"The device `{device}` can't be used: {error}") from error
        return device
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def _dtype(name: str) -> torch.dtype:
    if name not in ("float32", "float16", "bfloat16"):
        raise SettingsError(f"`{name}` is no dtype for the weights. Use float32, float16 or bfloat16.")
    return getattr(torch, name)


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
    source: ModelSource,
    prompts: Sequence[Prompt],
    calibration_texts: Sequence[str],
    options: RunOptions,
    settings: LocalizationSettings,
) -> WorkFolder:
    relevant = {"unet", "text_encoder", "tokenizer", "scheduler"}
    files = [path for path in files_to_export(source.folder)[0] if path.parts[0] in relevant]
    identity = {
        "model": _digest([path.as_posix() + file_hash(source.folder / path) for path in files]),
        "variant": source.variant,
        "prompts": _digest([prompt.text for prompt in prompts]),
        "calibration prompts": _digest(calibration_texts),
        "settings": dataclasses.asdict(settings),
        "dtype": options.dtype,
    }
    return WorkFolder(options.work, identity, options.overwrite)


def _digest(texts: Sequence[str]) -> str:
    return sha256("\0".join(texts).encode()).hexdigest()


def _localize_all(
    scorer: Scorer,
    prompts: Sequence[Prompt],
    calibration: Calibration,
    threshold: float,
    work: WorkFolder,
    progress: Callable[[int, int], None],
) -> list[PromptLocalization]:
    known = work.localizations()
    waiting = [prompt.text for prompt in prompts if prompt.text not in known]
    progress(len(known), len(prompts))
    for localization in localize_prompts(scorer, waiting, calibration, threshold):
        work.append_localization(localization)
        known[localization.prompt] = localization
        progress(len(known), len(prompts))
    return [known[prompt.text] for prompt in prompts]


def _verify_all(
    scorer: Scorer,
    localizations: Sequence[PromptLocalization],
    mask: NeuronMask,
    verification: VerificationSettings,
    progress: Callable[[int, int], None],
) -> list[PromptVerification]:
    fresh_latents = scorer.predictor.initial_latents(seed=verification.score_seed)
    verified = []
    for done, localization in enumerate(localizations, start=1):
        verified.append(verify_prompt(scorer, localization, mask, fresh_latents))
        progress(done, len(localizations))
    return verified


def _cost(
    predictor: NoisePredictor, calibration_texts: Sequence[str], mask: NeuronMask, calibration: Calibration
) -> dict[str, float]:
    """Change on ordinary prompts under the mask, beside as many random neurons and everything."""
    masks = {
        "mask": mask,
        "random": matched_random_mask(mask, calibration.statistics.mean, predictor.settings.seed),
        "everything": full_mask(predictor.sizes),
    }
    return noise_change(predictor, calibration_texts[:_NUM_COST_PROMPTS], masks)


def _draw_all(
    pipe: StableDiffusionPipeline,
    texts: Sequence[str],
    verification: VerificationSettings,
    progress: Callable[[int, int], None],
) -> dict[str, list[Image.Image]]:
    images = {}
    for done, text in enumerate(texts, start=1):
        images[text] = draw_images(pipe, text, verification)
        progress(done, len(texts))
    return images
