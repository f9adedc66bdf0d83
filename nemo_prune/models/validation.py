"""Whether a diffusers folder is a whole Stable Diffusion 1.x pipeline, which stock diffusers loads."""

from pathlib import Path

from diffusers import StableDiffusionPipeline
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from diffusers.utils.logging import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled

from nemo_prune.checkpoint.architecture import built_on_meta
from nemo_prune.checkpoint.completeness import check_complete
from nemo_prune.checkpoint.folder import INDEX_FILE, CheckpointFiles, component_classes, read_model_index
from nemo_prune.checkpoint.parts import PARTS, REQUIRED_PARTS, WEIGHT_STEMS
from nemo_prune.checkpoint.privacy import PIPELINE_CLASS
from nemo_prune.errors import ModelError
from nemo_prune.files.untrusted import read_json

_CLASSES = {
    "unet": ("UNet2DConditionModel",),
    "vae": ("AutoencoderKL",),
    "text_encoder": ("CLIPTextModel",),
    "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"),
    "safety_checker": (StableDiffusionSafetyChecker.__name__,),
    "feature_extractor": ("CLIPImageProcessor", "CLIPFeatureExtractor", "CLIPImageProcessorFast"),
    "image_encoder": ("CLIPVisionModelWithProjection",),
}
# Parts of other families: their pipelines have more than Stable Diffusion 1.x knows.
_OF_OTHERS = ("text_encoder_2", "text_encoder_3", "tokenizer_2", "transformer", "prior", "decoder", "movq")
_LATENT_CHANNELS = 4


def check_pipeline(files: CheckpointFiles, model: str, variant: str | None) -> tuple[str, ...]:
    """Refuse a folder that is not a whole Stable Diffusion 1.x pipeline.

    Args:
        files: of the folder.
        model: what to call it.
        variant: of its weights.

    Returns:
        What the user should know of how it is used, in sentences.

    Raises:
        ModelError: a part is missing, incomplete, of another kind, or can't be loaded.
    """
    folder, classes = files.folder, component_classes(files.folder)
    for path in files.kept:
        if path.suffix == ".json":
            _read(folder, path)
    notes = _check_classes(folder, model, classes)
    for part in classes:
        if part in PARTS and not any(path.parts[0] == part for path in files.kept):
            raise ModelError(
                f"{INDEX_FILE} names the {part}, and its folder is not there or holds nothing that stock loaders take. "
                f"Fetch the model anew; a safety_checker or feature_extractor may also be set to [null, null]."
            )
    _check_unet(folder)
    check_complete(files, variant)
    check_loads(folder, classes)
    return notes


def check_loads(folder: Path, classes: dict[str, tuple[str, str]] | None = None) -> None:
    """Make stock diffusers load a folder, its weights on the meta device: they were compared with their configs.

    Args:
        folder: the diffusers folder.
        classes: part -> library and class, where they are known.

    Raises:
        ModelError: it can't be loaded.
    """
    classes = component_classes(folder) if classes is None else classes
    given = {part: built_on_meta(folder, part) for part in classes if part in WEIGHT_STEMS}
    given |= {part: None for part in ("safety_checker", "feature_extractor") if part not in classes}
    try:
        pipe = stock_pipeline(folder, requires_safety_checker="safety_checker" in classes, **given)
        pipe.tokenizer("a")
        pipe.scheduler.set_timesteps(1)
    except (OSError, ValueError, RuntimeError, TypeError, KeyError, AttributeError, ImportError) as error:
        raise ModelError(
            f"Stock diffusers can't load {folder.name}: {_first_line(error)}. Fetch the model anew, or correct the "
            "part that it names."
        ) from error


def stock_pipeline(folder: Path, **options: object) -> StableDiffusionPipeline:
    """Load a folder with stock diffusers, without its progress bar. Raises what diffusers raises."""
    was_shown = is_progress_bar_enabled()
    disable_progress_bar()
    try:
        return StableDiffusionPipeline.from_pretrained(folder, local_files_only=True, **options)
    finally:
        if was_shown:
            enable_progress_bar()


def _check_classes(folder: Path, model: str, classes: dict[str, tuple[str, str]]) -> tuple[str, ...]:
    missing = [part for part in REQUIRED_PARTS if part not in classes]
    if missing:
        raise ModelError(f"{model} is not a Stable Diffusion pipeline: its {INDEX_FILE} has no {', '.join(missing)}.")
    pipeline = read_model_index(folder).get("_class_name")
    if not isinstance(pipeline, str):
        raise ModelError(
            f"`_class_name` of {INDEX_FILE} is {pipeline!r}, expected the name of a class such as {PIPELINE_CLASS}. "
            "Correct it, or fetch it anew."
        )
    others = [part for part in classes if part in _OF_OTHERS]
    wrong = [part for part, names in _CLASSES.items() if part in classes and classes[part][1] not in names]
    if others or wrong:
        shown = ", ".join([*others, *(f"{part} ({classes[part][1]})" for part in wrong)])
        raise ModelError(
            f"The model is a {pipeline} with parts that Stable Diffusion 1.x does not have: {shown}. Supported are "
            f"Stable Diffusion 1.x pipelines ({PIPELINE_CLASS} with a UNet2DConditionModel, an AutoencoderKL and a "
            "CLIPTextModel)."
        )
    if pipeline == PIPELINE_CLASS:
        return ()
    return (
        f"The model names the pipeline class {pipeline}; its parts are those of Stable Diffusion 1.x, so it is loaded, "
        f"measured and released as a {PIPELINE_CLASS}.",
    )


def _read(folder: Path, path: Path) -> object:
    try:
        return read_json(folder / path)
    except (ValueError, OSError) as error:
        raise ModelError(f"{path} of the model {folder} can't be read: {error}. Fetch it anew.") from error


def _check_unet(folder: Path) -> None:
    config = _read(folder, Path("unet", "config.json"))
    if not isinstance(config, dict):
        raise ModelError(f"unet/config.json of the model {folder} is not a JSON object. Fetch it anew.")
    channels = config.get("in_channels", _LATENT_CHANNELS)
    if channels != _LATENT_CHANNELS:
        kind = "an inpainting model" if channels == 9 else "another kind of model"
        raise ModelError(
            f"The U-Net has {channels} input channels ({kind}); supported are text-to-image models with "
            f"{_LATENT_CHANNELS}. Prune the text-to-image model that it was made from."
        )
    if config.get("time_cond_proj_dim") is not None:
        raise ModelError(
            "The U-Net takes the guidance as an embedding (`time_cond_proj_dim`: a latent consistency model), which "
            "the scores do not give it. Prune the model that it was distilled from."
        )
    for name in ("addition_embed_type", "class_embed_type", "encoder_hid_dim"):
        if config.get(name) is not None:
            raise ModelError(
                f"The U-Net takes more than a text (`{name}` is {config[name]!r}); supported are Stable Diffusion 1.x "
                "models."
            )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
