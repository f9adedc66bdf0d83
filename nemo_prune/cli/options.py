"""Options that several commands share: panels, choices, and one description each, which docs/commands.md repeats."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nemo_prune.cli.console import tell
from nemo_prune.errors import PromptError
from nemo_prune.screening.settings import SIEVES, SieveSettings
from nemo_prune.settings import (
    ABLATIONS,
    DTYPES,
    MERGES,
    PRESETS,
    PROJECTIONS,
    SEARCHES,
    LocalizationSettings,
    ModelOptions,
    Plan,
    description,
)

if TYPE_CHECKING:
    from nemo_prune.corpus.prompts import Corpus
    from nemo_prune.models.known import OrdinaryCaptions

MODEL, CAPTIONS, METHOD, MEASURING, RELEASE, HUB = (
    "Model", "Captions", "Method", "Measuring", "Release", "Hub"
)  # fmt: skip

Preset = StrEnum("Preset", {name: name for name in PRESETS})
Projections = StrEnum("Projections", {name: name for name in PROJECTIONS})
Merge = StrEnum("Merge", {name: name for name in MERGES})
Ablation = StrEnum("Ablation", {name: name for name in ABLATIONS})
SearchName = StrEnum("SearchName", {name: name for name in SEARCHES})
Dtype = StrEnum("Dtype", {name: name for name in DTYPES})
SieveName = StrEnum("SieveName", {name: name for name in SIEVES})


def option(panel: str, help: str, *names: str, **more: Any) -> Any:
    """A typer option in a panel of the help."""
    return typer.Option(*names, help=help, rich_help_panel=panel, **more)


def setting(panel: str, owner: type, name: str, *names: str, **more: Any) -> Any:
    """An option that sets an attribute, whose description is that of the attribute."""
    return option(panel, description(owner, name), *names, **more)


# --- the model ---

ModelOption = Annotated[
    str,
    option(
        MODEL, "`demo`, a diffusers folder, a single file (.safetensors, .ckpt), or a Hub id: owner/name.", "--model"
    ),
]
ConfigOption = Annotated[
    str | None,
    option(
        MODEL,
        "For a single file: a diffusers folder or Hub id whose configs, tokenizer and scheduler it takes. (default: "
        "those of Stable Diffusion v1-5, from the Hub)",
        "--config",
    ),
]
RevisionOption = Annotated[str | None, option(MODEL, "Branch, tag or commit of the Hub repo.", "--revision")]
VariantOption = Annotated[str | None, option(MODEL, "Variant of the weights, such as fp16.", "--variant")]
DeviceOption = Annotated[str, setting(MODEL, ModelOptions, "device", "--device")]
DtypeOption = Annotated[Dtype, setting(MODEL, ModelOptions, "dtype", "--dtype")]
BatchSizeOption = Annotated[int | None, setting(MODEL, ModelOptions, "batch_size", "--batch-size")]
MarginOption = Annotated[float | None, setting(MODEL, ModelOptions, "margin", "--margin")]
RayOption = Annotated[
    str | None,
    option(
        MODEL,
        "Compute on Ray workers: `auto` for this machine's GPUs, or HOST:PORT of a cluster that this machine belongs "
        "to. With --device cpu they take CPUs. Needs the extra `ray`.",
        "--ray",
    ),
]
RayWorkersOption = Annotated[
    int | None,
    option(
        MODEL,
        "Number of workers, each with a model. (default: one per free GPU; on CPUs 8 at most)",
        "--ray-workers",
        min=1,
    ),
]

# --- the captions ---

PromptsOption = Annotated[
    str | None,
    option(
        CAPTIONS,
        "Captions to examine: a file (.txt, .csv, .tsv, .json, .jsonl, .parquet, also as .gz), a folder or pattern of "
        "such files, where a .txt beside a picture of its name is the caption of that training image, or a data set of "
        "the Hub: owner/name:split:column. The demo and the known models have their own.",
        "--prompts",
    ),
]
ColumnOption = Annotated[
    str | None,
    option(
        CAPTIONS,
        "Column of the captions, in any case. (default: caption, prompt or text)",
        "--prompt-column",
    ),
]
LimitOption = Annotated[int | None, option(CAPTIONS, "Examine only the first N captions.", "--limit", min=1)]
OrdinaryOption = Annotated[
    str | None,
    option(
        CAPTIONS,
        "Ordinary captions, which the model does not memorize: at least 50, better hundreds, from the same sources as "
        "the captions to examine. The demo and the known models have their own.",
        "--calibration-prompts",
    ),
]
OrdinaryColumnOption = Annotated[
    str | None,
    option(
        CAPTIONS,
        "Column of the captions in --calibration-prompts, in any case. (default: caption, prompt or text)",
        "--calibration-column",
    ),
]
CalibrationOption = Annotated[Path | None, setting(CAPTIONS, Plan, "calibration", "--calibration")]

# --- the method ---

PresetOption = Annotated[
    Preset,
    option(
        METHOD, "`released-code`, which gave the published numbers, or `paper`, which follows the text.", "--preset"
    ),
]
ProjectionsOption = Annotated[Projections, setting(METHOD, LocalizationSettings, "projections", "--projections")]
SeedOption = Annotated[int, setting(METHOD, LocalizationSettings, "seed", "--seed")]
NumSamplesOption = Annotated[int, setting(METHOD, LocalizationSettings, "num_samples", "--num-samples")]
ThresholdOption = Annotated[float | None, setting(METHOD, LocalizationSettings, "threshold", "--threshold")]
SieveOption = Annotated[SieveName, setting(METHOD, SieveSettings, "sieve", "--sieve")]

# --- the release and the Hub ---

OutOption = Annotated[Path, setting(RELEASE, Plan, "out", "--out")]
ScaleOption = Annotated[float, setting(RELEASE, Plan, "scale", "--scale")]
BaseModelOption = Annotated[
    str | None,
    option(HUB, "Hub id of a base that is on this machine, for the card. It is not checked.", "--base-model"),
]
LicenseOption = Annotated[
    str | None,
    option(
        HUB,
        "The licence, where the base's card names none: an id as the Hub lists them, in any case, or `other`. What the "
        "base's card says is inherited and can't be contradicted.",
        "--license",
    ),
]
LicenseNameOption = Annotated[
    str | None, option(HUB, "Name of the licence, if --license is `other`.", "--license-name")
]
LicenseLinkOption = Annotated[str | None, option(HUB, "Address of the licence's text: https://...", "--license-link")]
PushToOption = Annotated[
    str | None,
    option(
        HUB,
        "Push the release to this repo of the Hub at the end. Name, token and right to write are checked before the "
        "long work.",
        "--push-to",
        metavar="OWNER/NAME",
    ),
]
PrivateOption = Annotated[bool, option(HUB, "Create a private repo; an existing public one is refused.", "--private")]
AllowResidualOption = Annotated[
    bool,
    option(HUB, "Push even if something remains or was not measured; the card says so.", "--allow-residual"),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else.")]

DEFAULTS, MODEL_DEFAULTS = LocalizationSettings(), ModelOptions()
DEFAULT_PRESET, DEFAULT_PROJECTIONS = Preset("released-code"), Projections(DEFAULTS.projections)
DEFAULT_SEARCH = SearchName(Plan.search)
DEFAULT_DTYPE, DEFAULT_SIEVE = Dtype(MODEL_DEFAULTS.dtype), SieveName(SieveSettings().sieve)


def method_settings(preset: Preset, **given: Any) -> LocalizationSettings:
    """The settings of a preset, with the values that the command line names."""
    return LocalizationSettings.preset(preset.value, **given)


def model_options(device: str, dtype: Dtype, batch_size: int | None, margin: float | None = None) -> ModelOptions:
    """How the model is computed, as the command line says."""
    return ModelOptions(device, dtype.value, batch_size, margin)


def examined_corpus(
    model: str, prompts: str | None, column: str | None, limit: int | None, from_screen: Path | None = None
) -> "Corpus":
    """The captions to examine, or those that passed a screening; a known model has its own."""
    from nemo_prune.corpus.prompts import read_corpus
    from nemo_prune.models.known import memorized_captions

    if from_screen is not None:
        from nemo_prune.screening.screened import read_passed

        if prompts is not None or column is not None:
            raise PromptError("--from-screen already names the captions. Leave out --prompts and --prompt-column.")
        return read_passed(from_screen, limit)
    return _told(read_corpus(prompts or memorized_captions(model), column, limit), prompts)


def ordinary_captions(model: str, prompts: str | None, column: str | None = None) -> "OrdinaryCaptions":
    """Captions that the model does not memorize: those that are given, or a known model's own."""
    from nemo_prune.corpus.prompts import read_corpus
    from nemo_prune.models import known

    if prompts is None:
        if column is not None:
            raise PromptError(
                f"--calibration-column {column} names a column of --calibration-prompts, which are not given. Give "
                "them, or leave the option out."
            )
        return known.ordinary_captions(model)
    return known.OrdinaryCaptions.divided(_told(read_corpus(prompts, column), prompts).texts)


def _told(corpus: "Corpus", source: str | None) -> "Corpus":
    """The same captions; the user hears of rows that have none."""
    if corpus.num_empty:
        tell(f"{corpus.num_empty} rows of {source} have no caption and are left out.")
    return corpus
