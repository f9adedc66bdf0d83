"""Where the model comes from: the demo model, a folder, a single file or a repo of the Hub."""

import platform
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline

from nemo_prune.checkpoint.conversion import Conversion, convert_pickled, convert_single_file, pickled_weights
from nemo_prune.checkpoint.folder import INDEX_FILE, CheckpointFiles, scan_folder
from nemo_prune.checkpoint.single_file import SUFFIXES, is_single_file
from nemo_prune.engine.memory import named_shortage
from nemo_prune.errors import ModelError
from nemo_prune.facts import BaseFacts
from nemo_prune.files.hashing import file_hash, text_hash
from nemo_prune.hub.download import download_configs, download_pipeline
from nemo_prune.models.demo import DEMO_MODEL, demo_folder
from nemo_prune.models.known import KnownModel, known_model
from nemo_prune.models.validation import check_pipeline, stock_pipeline

# Whose configs, tokenizer and scheduler a single file of Stable Diffusion 1.x takes.
DEFAULT_CONFIG = "stable-diffusion-v1-5/stable-diffusion-v1-5"
# What the results of a localization depend on.
_RELEVANT_COMPONENTS = {"unet", "text_encoder", "tokenizer", "scheduler"}
_USUAL_GUIDANCE, _USUAL_NORM_STEP = KnownModel.guidance_scale, KnownModel.norm_step


@dataclass(frozen=True)
class ModelSource:
    """A pipeline's files on this machine, looked through once, and where they are from.

    Attributes:
        files: the diffusers folder with safetensors weights: which files a release keeps, which it leaves out and why.
        model: what `--model` takes for it anywhere: ``demo`` or a Hub id; None for what is local.
        commit: the commit that the revision resolved to, None for what is local.
        variant: weights variant such as ``fp16``, None for the plain files.
        given: what was given, where the folder was converted from it: a single file, or a folder.
        config: what a single file took its configs from: a folder or a Hub id.
        converted: what was converted, in words; None where nothing was.
        left_out: what the conversion left out -> why.
        notes: what the user should know of how the model is used, in sentences.
    """

    files: CheckpointFiles
    model: str | None = None
    commit: str | None = None
    variant: str | None = None
    given: Path | None = None
    config: str | None = None
    converted: str | None = None
    left_out: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def folder(self) -> Path:
        """The diffusers folder."""
        return self.files.folder

    @property
    def repo_id(self) -> str | None:
        """The Hub id; None for the demo and for what is local."""
        return None if self.model == DEMO_MODEL else self.model

    @property
    def known(self) -> KnownModel | None:
        """What is known about the model."""
        return known_model(self.model) if self.model else None

    @property
    def guidance_scale(self) -> float:
        """Guidance that suits images of the model."""
        return self.known.guidance_scale if self.known else _USUAL_GUIDANCE

    @property
    def norm_step(self) -> int:
        """The step, of 50, at which a sieve takes the norm."""
        return self.known.norm_step if self.known else _USUAL_NORM_STEP

    @property
    def single_file(self) -> Path | None:
        """The single file that was given, None for all other forms."""
        return self.given if self.config else None

    @cached_property
    def digest(self) -> str:
        """sha256 over the names and contents of the files that results depend on."""
        paths = [path for path in self.files.kept if path.parts[0] in _RELEVANT_COMPONENTS]
        hashed = [self.variant or "", *(path.as_posix() + file_hash(self.folder / path) for path in paths)]
        return text_hash(hashed)

    @property
    def facts(self) -> BaseFacts:
        """For the record: never a path of the machine."""
        name = "the nemo-prune demo model" if self.model == DEMO_MODEL else self.model or "a local checkpoint"
        config = "a local folder" if self.config and _is_local(self.config) else self.config
        return BaseFacts(name, self.repo_id, self.commit, self.variant, self.converted, config, self.model)


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
        ModelError: there is no such model, it is gated, damaged, or not a Stable Diffusion pipeline.
        OutputError: what was converted can't be kept.
    """
    path = Path(model)
    if is_single_file(path) and not path.is_dir():
        return _checked(_single_file(path, revision or variant, config), model)
    if config is not None:
        raise ModelError(f"--config is for single files, and {model} is not one. Leave it out.")
    if model == DEMO_MODEL:
        source = ModelSource(_scan(demo_folder(), model), DEMO_MODEL, variant=variant)
    elif path.is_dir():
        source = ModelSource(_scan(path.resolve(), model), variant=variant)
    elif path.is_file():
        raise ModelError(
            f"{model} has an unsupported ending. Give a single file ({', '.join(SUFFIXES)}), a diffusers folder, a Hub "
            "id or `demo`."
        )
    elif _looks_like_path(model):
        raise ModelError(
            f"There is no model at {model}. Give a diffusers folder, a single file ({', '.join(SUFFIXES)}), a Hub id "
            "or `demo`."
        )
    else:
        folder = download_pipeline(model, revision, variant)
        # The cache names a snapshot's folder by its commit.
        source = ModelSource(_scan(folder, model), model, folder.name, variant)
    if pickled := pickled_weights(source.files, variant):
        source = _converted(replace(source, given=source.folder), convert_pickled(source.files, pickled))
    return _checked(source, model)


def find_again(source: ModelSource) -> ModelSource:
    """The same model on another machine: a Hub repo at the same commit, a folder or file at the same path.

    Raises:
        ModelError: it is not there.
    """
    if source.model:
        return resolve_model(source.model, source.commit, source.variant)
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


def load_pipeline(
    folder: Path, device: str, dtype: torch.dtype, variant: str | None = None, draws: bool = True
) -> StableDiffusionPipeline:
    """Load a pipeline in evaluation mode, without its safety checker, onto a device.

    Args:
        folder: a diffusers folder.
        device: torch device.
        dtype: of the weights.
        variant: weights variant such as ``fp16``.
        draws: whether images will be drawn; without, the autoencoder is not loaded.

    Raises:
        ModelError: it can't be loaded, is of a family that is not supported, holds NaN, or memory is short.
    """
    options = {"safety_checker": None, "requires_safety_checker": False} | ({} if draws else {"vae": None})
    try:
        with named_shortage("the weights of the model"):
            pipe = stock_pipeline(folder, dtype=dtype, variant=variant, **options)
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(f"The model can't be loaded: {error}") from error
    pipe.set_progress_bar_config(disable=True)
    with named_shortage("the weights of the model"):
        pipe.to(device)
        for component in ("unet", "text_encoder"):
            _refuse_nan(getattr(pipe, component), component)
    return pipe


def load_predicting(
    folder: Path, device: str, dtype: torch.dtype, variant: str | None = None
) -> StableDiffusionPipeline:
    """A pipeline that predicts noise and draws nothing, without its autoencoder; see :func:`load_pipeline`."""
    return load_pipeline(folder, device, dtype, variant, draws=False)


def _single_file(path: Path, chosen: str | None, config: str | None) -> ModelSource:
    if not path.is_file():
        raise ModelError(f"There is no single file at {path}. Check the name.")
    if chosen:
        raise ModelError(f"A single file has no variants or revisions, so `{chosen}` names nothing. Leave it out.")
    config = str(Path(config).resolve()) if config and Path(config).is_dir() else config or DEFAULT_CONFIG
    configs = _scan(Path(config) if _is_local(config) else download_configs(config), config)
    source = ModelSource(configs, given=path.resolve(), config=config)
    return _converted(source, convert_single_file(path.resolve(), configs))


def _checked(source: ModelSource, model: str) -> ModelSource:
    """The source, which is whole."""
    return replace(source, notes=check_pipeline(source.files, model, source.variant))


def _converted(source: ModelSource, conversion: Conversion) -> ModelSource:
    files = scan_folder(conversion.folder)
    return replace(source, files=files, converted=conversion.converted, left_out=conversion.left_out)


def _scan(folder: Path, model: str) -> CheckpointFiles:
    """Look through a folder that has the parts of a Stable Diffusion pipeline."""
    if not (folder / INDEX_FILE).is_file():
        raise ModelError(
            f"{model} is not a diffusers pipeline: it has no {INDEX_FILE}. Give a diffusers folder, or a single file "
            f"({', '.join(SUFFIXES)})."
        )
    return scan_folder(folder)


def _refuse_nan(module: torch.nn.Module, component: str) -> None:
    for name, parameter in module.named_parameters():
        if not parameter.isfinite().all():
            raise ModelError(
                f"Weight `{name}` of the {component} holds NaN or infinity. The checkpoint is damaged, or "
                "its values don't fit --dtype: try float32, or fetch it again."
            )


def _is_local(name: str) -> bool:
    return Path(name).is_absolute()


def _looks_like_path(model: str) -> bool:
    return model.startswith((".", "/", "~")) or "\\" in model or model.count("/") > 1 or Path(model).exists()
