"""What a model still gives back and still can do, beside its base: `nemo-prune verify`."""

import re
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from nemo_prune.cli.console import app, console_listener, errors_reported, print_json, quieten_libraries
from nemo_prune.cli.options import (
    CAPTIONS,
    DEFAULT_DTYPE,
    MEASURING,
    MODEL,
    MODEL_DEFAULTS,
    RELEASE,
    ColumnOption,
    ConfigOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    LimitOption,
    PromptsOption,
    VariantOption,
    model_options,
    option,
)
from nemo_prune.errors import ModelError, PromptError, SettingsError

if TYPE_CHECKING:
    from nemo_prune.corpus.prompts import Corpus
    from nemo_prune.models.source import ModelSource
    from nemo_prune.verify import VerifyResult

Scheduler = StrEnum("Scheduler", {name: name for name in ("ddim", "euler", "dpm", "pndm")})
_BUDGET = re.compile(r"(\d+)|(\d+(?:\.\d+)?)m(?:in)?", re.ASCII)
DEFAULT_BUDGET = "30000"


@app.command()
def verify(
    out: Annotated[
        Path | None, typer.Argument(help="A release: its record names the base. Short for --base and --candidate.")
    ] = None,
    base: Annotated[
        str | None, option(MODEL, "The unpruned model: `demo`, a folder, a single file or a Hub id.", "--base")
    ] = None,
    candidate: Annotated[
        str | None,
        option(
            MODEL, "The model to judge, from the same sources: pruned, fine-tuned or edited by any tool.", "--candidate"
        ),
    ] = None,
    prompts: PromptsOption = None,
    prompt_column: ColumnOption = None,
    limit: LimitOption = None,
    ordinary: Annotated[
        str | None,
        option(
            CAPTIONS,
            "Ordinary captions, held out from calibration, from the same sources as --prompts. The demo "
            "and the known models have their own.",
            "--ordinary",
        ),
    ] = None,
    work: Annotated[
        Path | None,
        option(
            RELEASE,
            "Folder of everything that is measured, not for publication. (default: beside the candidate, "
            ".evidence; of a release: OUT.work/evidence)",
            "--work",
        ),
    ] = None,
    budget: Annotated[
        str,
        option(
            MEASURING, "What it may cost: passes of one sample through a U-Net, or minutes such as 10m.", "--budget"
        ),
    ] = DEFAULT_BUDGET,
    scheduler: Annotated[
        Scheduler, option(MEASURING, "Sampler of the images, on the model's own schedule.", "--scheduler")
    ] = Scheduler.ddim,
    steps: Annotated[int, option(MEASURING, "Steps of that sampler.", "--steps", min=1)] = 50,
    guidance_scale: Annotated[
        float | None,
        option(
            MEASURING, "Classifier-free guidance. (default: what suits the base: 7, the demo 3)", "--guidance-scale"
        ),
    ] = None,
    seed: Annotated[int, option(MEASURING, "Seed of the first image.", "--seed")] = 3001,
    sscd: Annotated[
        Path | None,
        option(
            MEASURING,
            "Copy detector, such as SSCD, as TorchScript or ONNX. (default: multi-scale SSIM and correlation)",
            "--sscd",
        ),
    ] = None,
    cut: Annotated[
        float | None,
        option(MEASURING, "Similarity from which an image counts as a copy. (default: .5, with --sscd .7)", "--cut"),
    ] = None,
    clip: Annotated[
        Path | None, option(MEASURING, "Folder of a CLIP model, for the alignment of captions and images.", "--clip")
    ] = None,
    features: Annotated[
        Path | None,
        option(MEASURING, "TorchScript network that describes images of 299 pixels, for FID and KID.", "--features"),
    ] = None,
    max_replication: Annotated[
        float | None,
        option(
            MEASURING,
            "Exit code 1 where more than this share of the candidate's images of memorized captions are copies.",
            "--max-replication",
            min=0,
            max=1,
        ),
    ] = None,
    max_utility_loss: Annotated[
        float | None,
        option(
            MEASURING,
            "Exit code 1 where the noise prediction on held-out captions changes by more than this share.",
            "--max-utility-loss",
            min=0,
        ),
    ] = None,
    overwrite: Annotated[bool, option(RELEASE, "Discard a work folder of other models.", "--overwrite")] = False,
    config: ConfigOption = None,
    variant: VariantOption = None,
    device: DeviceOption = MODEL_DEFAULTS.device,
    dtype: DtypeOption = DEFAULT_DTYPE,
    as_json: JsonOption = False,
) -> None:
    """Measure what a candidate still gives back and what it still can do; exit code 1 where a stated limit is broken.

    Example: `nemo-prune verify --base demo --candidate pruned/`
    """
    with errors_reported(), console_listener(quiet=as_json) as listener:
        passes, minutes = _budget(budget)
        options = model_options(device, dtype, None)
        if (out is None) == (candidate is None):
            raise SettingsError("Give either a release, or --base and --candidate.")
        if out is None and base is None:
            raise SettingsError("Name the unpruned model with --base: without it nothing can be compared.")
        quieten_libraries()
        from nemo_prune.models.source import resolve_model
        from nemo_prune.proof.drawing import Drawing
        from nemo_prune.proof.evidence import EvidenceSettings
        from nemo_prune.verify import Limits, RunResults, base_of_release, run_results, verify_models

        before = resolve_model(base, None, variant, _config_for(base, config)) if base else base_of_release(out)
        name = str(out) if out else candidate
        after = resolve_model(name, None, variant, _config_for(name, config) or _config_of(before, name))
        drawing = Drawing(scheduler.value, steps, before.guidance_scale if guidance_scale is None else guidance_scale)
        settings = EvidenceSettings(
            budget=passes, minutes=minutes, drawing=drawing, seed=seed, sscd=sscd, cut=cut, clip=clip, features=features
        )
        known, folder = RunResults(), work or _beside(name)
        if out is not None:
            from nemo_prune.files.layout import ReleaseLayout

            known, folder = (
                run_results(ReleaseLayout.found(out).work),
                work or ReleaseLayout.found(out).work / "evidence",
            )
        result = verify_models(
            before,
            after,
            _corpus(before, prompts, prompt_column, limit),
            _ordinary(before, ordinary),
            settings,
            options,
            folder,
            listener,
            Limits(max_replication, max_utility_loss),
            known,
            overwrite,
        )
    if as_json:
        from nemo_prune.verify import evidence_values

        print_json(evidence_values(result))
    else:
        _show(result)
    raise typer.Exit(1 if result.broken else 0)


def _budget(text: str) -> tuple[int, float | None]:
    """Passes, and minutes where these are given."""
    given = _BUDGET.fullmatch(text.strip())
    if given is None or float(given[1] or given[2]) <= 0:
        raise SettingsError(f"--budget is {text}, expected: a number of passes, or minutes such as 10m.")
    return (int(given[1]), None) if given[1] else (int(DEFAULT_BUDGET), float(given[2]))


def _config_for(model: str | None, config: str | None) -> str | None:
    """The config, for a single file alone: the other model may be a folder."""
    from nemo_prune.checkpoint.single_file import SUFFIXES

    return config if model and Path(model).suffix in SUFFIXES and not Path(model).is_dir() else None


def _config_of(base: "ModelSource", candidate: str) -> str | None:
    """A candidate in a single file is of the base's architecture, or can't be compared with it."""
    return _config_for(candidate, str(base.folder))


def _corpus(base: "ModelSource", prompts: str | None, column: str | None, limit: int | None) -> "Corpus":
    from nemo_prune.corpus.prompts import read_corpus
    from nemo_prune.models.known import memorized_captions

    if prompts is None and base.known is None:
        raise PromptError("No memorized captions are known for this base. Name a file of them with --prompts.")
    return read_corpus(prompts or memorized_captions(base.model), column, limit)


def _ordinary(base: "ModelSource", ordinary: str | None) -> list[str]:
    """Ordinary captions that no calibration has seen, where the base has its own."""
    from nemo_prune.corpus.prompts import read_corpus
    from nemo_prune.models.known import ordinary_captions

    if ordinary is not None:
        return read_corpus(ordinary).texts
    if base.known is None:
        raise PromptError("No ordinary captions are known for this base. Name a file of them with --ordinary.")
    if base.known.test is not None:
        return read_corpus(base.known.test.locate()).texts
    return list(ordinary_captions(base.model).texts)


def _beside(candidate: str) -> Path:
    """The folder of the evidence on a candidate: beside it, or here for one of the Hub."""
    path = Path(candidate)
    if path.exists():
        return path.absolute().with_name(f"{path.absolute().name}.evidence")
    if candidate.startswith((".", "/", "~")):
        raise ModelError(f"There is no model at {candidate}. Check the path.")
    return Path(f"{re.sub(r'[^A-Za-z0-9._-]', '_', candidate)}.evidence").absolute()


def _show(result: "VerifyResult") -> None:
    """The verdict and the key figures on the terminal."""
    from nemo_prune.proof.evidence import published_facts
    from nemo_prune.release.evidence_wording import verdict
    from nemo_prune.release.wording import evidence_rows

    console, summary = Console(), result.evidence.summary
    table = Table("measured", "base", "candidate", title="Evidence")
    for row in evidence_rows(published_facts(summary)):
        table.add_row(*row)
    console.print(table)
    console.print(verdict(summary), markup=False)
    for part, reason in summary.left_out.items():
        console.print(f"Left out: {part}: {reason}", markup=False)
    for sentence in result.broken:
        console.print(f"Limit broken: {sentence}", markup=False)
    console.print(
        f"Report with captions and images, not for publication: {result.report}", markup=False, soft_wrap=True
    )
