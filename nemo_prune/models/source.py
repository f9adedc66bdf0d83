"""Where the model comes from: the demo model, a folder, a single file or a repo of the Hub."""

import json
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline, UNet2DConditionModel

from nemo_prune.checkpoint.conversion import Conversion, convert_pickled, convert_single_file, pickled_weights
from nemo_prune.checkpoint.folder import INDEX_FILE, read_model_index
from nemo_prune.checkpoint.single_file import SUFFIXES
from nemo_prune.errors import ModelError
from nemo_prune.hub.download import download_configs, download_pipeline
from nemo_prune.models.demo import DEMO_MODEL, demo_folder

# Whose configs, tokenizer and scheduler a single file of Stable Diffusion 1.x takes.
DEFAULT_CONFIG = "stable-diffusion-v1-5/stable-diffusion-v1-5"


@dataclass(frozen=True)
class ModelSource:
    """A pipeline's files on this machine and where they are from.

    Attributes:
        folder: the diffusers folder, with safetensors weights.
        repo_id: the Hub id, None for what is local.
        commit: the commit that the revision resolved to, None for what is local.
        variant: weights variant such as ``fp16``, None for the plain files.
        is_demo: whether it is the demo model that the package carries.
        given: what was given, where the folder was converted from it: a single file, or a folder.
        config: what a single file took its configs from: a folder or a Hub id.
        converted: what was converted, in words; None where nothing was.
        left_out: what the conversion left out -> why.
    """

    folder: Path
    repo_id: str | None = None
    commit: str | None = None
    variant: str | None = None
    is_demo: bool = False
    given: Path | None = None
    config: str | None = None
    converted: str | None = None
    left_out: Mapping[str, str] = field(default_factory=dict)

    @property
    def single_file(self) -> Path | None:
        """The single file that was given, None for all other forms."""
        return self.given if self.config else None

    @property
    def public_name(self) -> str:
        """How a published card may call it: never a path of the machine."""
        if self.is_demo:
            return "the nemo-prune demo model"
        return self.repo_id or "a local checkpoint"

    def described(self) -> dict:
        """For the record, as JSON values: never a path of the machine."""
        config = "a local folder" if self.config and _is_local(self.config) else self.config
        return {
            "name": self.public_name,
            "repo_id": self.repo_id,
            "commit": self.commit,
            "variant": self.variant,
            "converted": self.converted,
            "config": config,
        }


def resolve_model(
    model: str, revision: str | None = None, variant: str | None = None, config: str | None = None
) -> ModelSource:
    """Bring a model's files to this machine, or find them there; other forms are converted, in the cache.

    Args:
        model: ``demo``, a local diffusers folder, a single file (.safetensors or .ckpt), or a Hub id such as
            ``CompVis/stable-diffusion-v1-4``.
        revision: branch, tag or commit of the Hub repo.
        variant: weights variant such as ``fp16``.
        config: for a single file: a diffusers folder or a Hub id of the same architecture, whose configs, tokenizer
            and scheduler it takes; those of Stable Diffusion v1-5 unless given.

    Raises:
        ModelError: there is no such model, it is gated, damaged, or no Stable Diffusion pipeline.
        OutputError: what was converted can't be kept.
    """
    path = Path(model)
    if path.suffix in SUFFIXES and not path.is_dir():
        return _single_file(path, revision or variant, config)
    if config is not None:
        raise ModelError(f"--config is for single files, and {model} is none. Leave it out.")
    if model == DEMO_MODEL:
        source = ModelSource(demo_folder(), variant=variant, is_demo=True)
    elif path.is_dir():
        source = ModelSource(path.resolve(), variant=variant)
    elif _looks_like_path(model):
        raise ModelError(
            f"There is no model at {model}. Give a diffusers folder, a single file ({', '.join(SUFFIXES)}), a Hub id "
            "or `demo`."
        )
    else:
        folder = download_pipeline(model, revision, variant)
        # The cache names a snapshot's folder by its commit.
        source = ModelSource(folder, model, folder.name, variant)
    _check_pipeline(source.folder, model)
    pickled = pickled_weights(source.folder, variant)
    if not pickled:
        return source
    return _converted(replace(source, given=source.folder), convert_pickled(source.folder, pickled))


def find_again(source: ModelSource) -> ModelSource:
    """The same model on another machine: a Hub repo at the same commit, a folder or file at the same path.

    Raises:
        ModelError: it is not there.
    """
    if source.is_demo:
        return resolve_model(DEMO_MODEL, variant=source.variant)
    if source.repo_id:
        return resolve_model(source.repo_id, source.commit, source.variant)
    if source.folder.is_dir():
        return source
    given = source.given or source.folder
    if not given.exists():
        kind = "file" if source.single_file else "folder"
        raise ModelError(
            f"The machine {platform.node()} has no {kind} {given}. Put the model on a path that all machines share, or "
            "give a Hub id."
        )
    return resolve_model(str(given), None, source.variant, source.config)


def _single_file(path: Path, chosen: str | None, config: str | None) -> ModelSource:
    if not path.is_file():
        raise ModelError(f"There is no single file at {path}. Check the name.")
    if chosen:
        raise ModelError(f"A single file has no variants or revisions, so that `{chosen}` names nothing. Leave it out.")
    config = str(Path(config).resolve()) if config and Path(config).is_dir() else config or DEFAULT_CONFIG
    configs = Path(config) if _is_local(config) else download_configs(config)
    _check_pipeline(configs, config)
    source = ModelSource(configs, given=path.resolve(), config=config)
    return _converted(source, convert_single_file(path.resolve(), configs))


def _converted(source: ModelSource, conversion: Conversion) -> ModelSource:
    return replace(source, folder=conversion.folder, converted=conversion.converted, left_out=conversion.left_out)


def load_pipeline(source: ModelSource, device: str, dtype: torch.dtype) -> StableDiffusionPipeline:
    """Load a pipeline in evaluation mode, without its safety checker, onto a device.

    Raises:
        ModelError: it can't be loaded, is of a family that is not supported, or holds NaN.
    """
    index = json.loads((source.folder / INDEX_FILE).read_text())
    without_checker = {"safety_checker": None, "requires_safety_checker": False}
    options = without_checker if "safety_checker" in index else {}
    try:
        pipe = DiffusionPipeline.from_pretrained(
            source.folder, dtype=dtype, variant=source.variant, local_files_only=True, **options
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(f"The model can't be loaded: {error}") from error
    if not isinstance(pipe, StableDiffusionPipeline) or not isinstance(pipe.unet, UNet2DConditionModel):
        raise ModelError(
            f"The model is a {type(pipe).__name__}; supported are Stable Diffusion 1.x pipelines "
            "(StableDiffusionPipeline with a UNet2DConditionModel)."
        )
    pipe.set_progress_bar_config(disable=True)
    pipe.to(device)
    for component in ("unet", "text_encoder"):
        _refuse_nan(getattr(pipe, component), component)
    return pipe


def _refuse_nan(module: torch.nn.Module, component: str) -> None:
    for name, parameter in module.named_parameters():
        if not parameter.isfinite().all():
            raise ModelError(
                f"Weight `{name}` of the {component} holds NaN or infinity. The checkpoint is damaged, or "
                "its values don't fit --dtype: try float32, or fetch it anew."
            )


def _is_local(name: str) -> bool:
    return Path(name).is_absolute()


def _looks_like_path(model: str) -> bool:
    return model.startswith((".", "/", "~")) or "\\" in model or model.count("/") > 1 or Path(model).exists()


def _check_pipeline(folder: Path, model: str) -> None:
    if not (folder / INDEX_FILE).is_file():
        raise ModelError(
            f"{model} is no diffusers pipeline: it has no {INDEX_FILE}. Give a diffusers folder, or a single file "
            f"({', '.join(SUFFIXES)})."
        )
    index = read_model_index(folder)
    missing = [part for part in ("unet", "text_encoder", "tokenizer", "scheduler") if part not in index]
    if missing:
        raise ModelError(f"{model} is no Stable Diffusion pipeline: its {INDEX_FILE} has no {', '.join(missing)}.")
