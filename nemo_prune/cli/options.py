"""Options that several commands share, and the prompts that they name."""

from pathlib import Path
from typing import Annotated, Any

import typer

from nemo_prune.errors import PromptError
from nemo_prune.settings import LocalizationSettings, ModelOptions, VerificationSettings

DEFAULTS = LocalizationSettings()
MODEL_DEFAULTS = ModelOptions()

ModelOption = Annotated[
    str,
    typer.Option(
        "--model", help="`demo`, a diffusers folder, a single file (.safetensors, .ckpt), or a Hub id: owner/name."
    ),
]
OutOption = Annotated[
    Path,
    typer.Option(
        "--out", help="The pruned model, for publication: a folder, or a single file whose name ends in .safetensors."
    ),
]
PromptsOption = Annotated[
    str | None,
    typer.Option("--prompts", help="Captions to examine: files (.txt .csv .jsonl .parquet, .gz), or a Hub data set "
                 "owner/name:split:column. The demo has its own."),
]  # fmt: skip
OrdinaryOption = Annotated[
    str | None,
    typer.Option("--calibration-prompts", help="Ordinary captions, from the same sources; the demo has its own."),
]
ColumnOption = Annotated[str | None, typer.Option("--prompt-column", help="Column of the captions. (default: found)")]
LimitOption = Annotated[int | None, typer.Option("--limit", min=1, help="Examine the first so many captions only.")]
CalibrationOption = Annotated[
    Path | None, typer.Option("--calibration", help="A calibration that `nemo-prune calibrate` made of them.")
]
PresetOption = Annotated[str, typer.Option("--preset", help="`released-code` (the published numbers) or `paper`.")]
SeedOption = Annotated[
    int | None, typer.Option("--seed", help=f"Seed of the initial latents. (default: {DEFAULTS.seed})")
]
NumSamplesOption = Annotated[
    int | None,
    typer.Option("--num-samples", help=f"Initial latents per prompt. (default: {DEFAULTS.num_samples})"),
]
ThresholdOption = Annotated[
    float | None,
    typer.Option("--threshold", help="Similarity above which a prompt counts as memorized. (default: calibrated)"),
]
ProjectionsOption = Annotated[
    str,
    typer.Option("--projections", help="Whose neurons are searched: `value` (the paper's), `key` or `both`."),
]
ScaleOption = Annotated[
    float,
    typer.Option("--scale", help="What the masked rows are multiplied by; the paper also tries -1 to 0.75."),
]
RevisionOption = Annotated[str | None, typer.Option("--revision", help="Branch, tag or commit of the Hub repo.")]
ConfigOption = Annotated[
    str | None,
    typer.Option(
        "--config",
        help="Diffusers folder or Hub id whose configs and tokenizer a single file takes. (default: those of "
        "Stable Diffusion v1-5, from the Hub)",
    ),
]
VariantOption = Annotated[str | None, typer.Option("--variant", help="Weights variant, such as fp16.")]
DeviceOption = Annotated[str, typer.Option("--device", help="torch device; `auto` takes a GPU where there is one.")]
DtypeOption = Annotated[str, typer.Option("--dtype", help="float32, float16 or bfloat16.")]
BatchSizeOption = Annotated[
    int | None,
    typer.Option("--batch-size", help="Latents at once. (default: those of one prompt, on a GPU of four)"),
]
MarginOption = Annotated[
    float,
    typer.Option("--margin", help="Below float32: distance from the threshold within which float32 decides again."),
]
RayOption = Annotated[
    str | None,
    typer.Option("--ray", help="Compute on Ray workers: `auto` on this machine's GPUs, or HOST:PORT of a cluster."),
]
RayWorkersOption = Annotated[
    int | None,
    typer.Option("--ray-workers", min=1, help="How many, each with a model. (default: all free GPUs, of CPUs 8)"),
]
PrivateOption = Annotated[
    bool, typer.Option("--private", help="Create the repo as a private one; a public one is refused.")
]
PushToOption = Annotated[
    str | None, typer.Option("--push-to", metavar="OWNER/NAME", help="Push the release to this repo of the Hub.")
]
AllowResidualOption = Annotated[
    bool,
    typer.Option("--allow-residual", help="Push although something remains, or was not measured; the card says so."),
]
BaseModelOption = Annotated[
    str | None, typer.Option("--base-model", help="Hub id of a local base, for the card; nobody checks it.")
]
LicenseOption = Annotated[
    str | None,
    typer.Option("--license", help="Licence where the base's card names none, as the Hub lists them, or `other`."),
]
LicenseNameOption = Annotated[str | None, typer.Option("--license-name", help="Its name, where it is `other`.")]
LicenseLinkOption = Annotated[str | None, typer.Option("--license-link", help="Where its text stands: https://...")]
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON object on stdout, and nothing else there.")]


def examined_corpus(
    model: str, prompts: str | None, column: str | None, limit: int | None, from_screen: Path | None = None
) -> Any:
    """The captions to examine, or those that passed a screening; the demo and the known models have their own."""
    from nemo_prune.corpus.prompts import read_corpus

    if from_screen is not None:
        from nemo_prune.screening.screened import read_passed

        if prompts is not None or column is not None:
            raise PromptError("--from-screen names the captions already. Leave out --prompts and --prompt-column.")
        return read_passed(from_screen, limit)
    return read_corpus(prompts or own_prompts(model, "memorized"), column, limit)


def ordinary_texts(model: str, prompts: str | None) -> list[str]:
    """Ordinary captions; the demo and the models that are known have their own."""
    from nemo_prune.corpus.prompts import read_prompts

    return [prompt.text for prompt in read_prompts(prompts or own_prompts(model, "ordinary"))]


def own_prompts(model: str, kind: str) -> Path:
    """A file of captions that a model ``memorized``, or of ``ordinary`` ones, where it is known to have them."""
    from nemo_prune.models.demo import CALIBRATION_FILE, DEMO_MODEL, PROMPTS_FILE, demo_folder

    if model == DEMO_MODEL:
        return demo_folder() / {"memorized": PROMPTS_FILE, "ordinary": CALIBRATION_FILE}[kind]
    from nemo_prune.models.known import KNOWN_MODELS, fetch

    if model in KNOWN_MODELS:
        return fetch(getattr(KNOWN_MODELS[model], kind))
    raise PromptError(
        f"No {kind} prompts are known for this model. Give the captions to examine with --prompts, and ordinary ones "
        "that it does not memorize, hundreds at best, with --calibration-prompts. Known are the demo and "
        f"{', '.join(KNOWN_MODELS)}."
    )


def image_guidance(model: str, given: float | None) -> float:
    """Guidance of the images that are drawn: the given one, or what suits the model."""
    from nemo_prune.models.demo import DEMO_GUIDANCE_SCALE, DEMO_MODEL

    if given is not None:
        return given
    return DEMO_GUIDANCE_SCALE if model == DEMO_MODEL else VerificationSettings.guidance_scale
