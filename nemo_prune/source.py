"""Where the model comes from: the demo model, a local folder or a repo of the Hub."""

import json
import platform
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline, UNet2DConditionModel
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from nemo_prune.demo import DEMO_MODEL, demo_folder
from nemo_prune.errors import ModelError
from nemo_prune.layout import CARD_FILE, is_licence_file

# The client's transport differs between its versions; its errors are the bases of the client's own.
_NO_ANSWER = HfHubHTTPError.__bases__


@dataclass(frozen=True)
class ModelSource:
    """A pipeline's files on this machine and where they are from.

    Attributes:
        folder: the diffusers folder.
        repo_id: the Hub id, None for a local folder.
        commit: the commit that the revision resolved to, None for a local folder.
        variant: weights variant such as ``fp16``, None for the plain files.
        is_demo: whether it is the demo model that the package carries.
    """

    folder: Path
    repo_id: str | None = None
    commit: str | None = None
    variant: str | None = None
    is_demo: bool = False

    @property
    def public_name(self) -> str:
        """How a published card may call it: never a path of the machine."""
        if self.is_demo:
            return "the nemo-prune demo model"
        return self.repo_id or "a local checkpoint"

    def described(self) -> dict:
        """For the record, as JSON values: never a path of the machine."""
        return {"name": self.public_name, "repo_id": self.repo_id, "commit": self.commit, "variant": self.variant}


def resolve_model(model: str, revision: str | None = None, variant: str | None = None) -> ModelSource:
    """Bring a model's files to this machine, or find them there.

    Args:
        model: ``demo``, a local diffusers folder, or a Hub id such as ``CompVis/stable-diffusion-v1-4``.
        revision: branch, tag or commit of the Hub repo.
        variant: weights variant such as ``fp16``.

    Raises:
        ModelError: there is no such folder or repo, it is gated, or it is no Stable Diffusion pipeline.
    """
    if model == DEMO_MODEL:
        source = ModelSource(demo_folder(), variant=variant, is_demo=True)
    elif Path(model).is_dir():
        source = ModelSource(Path(model).resolve(), variant=variant)
    elif _looks_like_path(model):
        raise ModelError(f"There is no model at {model}. Give a diffusers folder, a Hub id or `demo`.")
    else:
        source = _download(model, revision, variant)
    _check_pipeline(source.folder, model)
    return source


def find_again(source: ModelSource) -> ModelSource:
    """The same model on another machine: a Hub repo at the same commit, a folder at the same path.

    Raises:
        ModelError: it is not there.
    """
    if source.is_demo:
        return resolve_model(DEMO_MODEL, variant=source.variant)
    if source.repo_id:
        return resolve_model(source.repo_id, source.commit, source.variant)
    if not source.folder.is_dir():
        raise ModelError(
            f"The machine {platform.node()} has no folder {source.folder}. Put the model on a path that all machines "
            "share, or give a Hub id."
        )
    return source


def load_pipeline(source: ModelSource, device: str, dtype: torch.dtype) -> StableDiffusionPipeline:
    """Load a pipeline in evaluation mode, without its safety checker, onto a device.

    Raises:
        ModelError: it can't be loaded, is of a family that is not supported, or holds NaN.
    """
    index = json.loads((source.folder / "model_index.json").read_text())
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


def _looks_like_path(model: str) -> bool:
    return model.startswith((".", "/", "~")) or "\\" in model or model.count("/") > 1 or Path(model).exists()


def _check_pipeline(folder: Path, model: str) -> None:
    try:
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelError(
            f"{model} is no diffusers pipeline: it has no model_index.json. A single-file checkpoint "
            "must be converted to a diffusers folder first."
        ) from error
    except ValueError as error:
        raise ModelError(f"The model_index.json of {model} is damaged: {error}") from error
    missing = [part for part in ("unet", "text_encoder", "tokenizer", "scheduler") if part not in index]
    if missing:
        raise ModelError(f"{model} is no Stable Diffusion pipeline: its model_index.json has no {', '.join(missing)}.")


def _download(repo_id: str, revision: str | None, variant: str | None) -> ModelSource:
    where = f"`{repo_id}`" + (f" at revision `{revision}`" if revision else "")
    try:
        listed = _listed_files(repo_id, revision)
        folder = Path(
            DiffusionPipeline.download(repo_id, revision=revision, variant=variant, local_files_only=listed is None)
        )
        # diffusers leaves card and licence behind when it downloads a pipeline; the release needs them.
        for name in listed or ():
            if "/" not in name and (name == CARD_FILE or is_licence_file(name)):
                _fetch_if_there(repo_id, name, folder.name)
    except GatedRepoError as error:
        raise ModelError(
            f"{where} is gated. Accept its terms on its page and log in: `hf auth login`, or set HF_TOKEN."
        ) from error
    except RevisionNotFoundError as error:
        raise ModelError(f"The Hub has no {where}. Check --revision.") from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise ModelError(
            f"{where} is neither a local folder nor a repo of the Hub that you may read. Check the name; "
            "for a private repo log in: `hf auth login`, or set HF_TOKEN."
        ) from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, ConnectionError) as error:
        raise ModelError(
            f"{where} is not in the local cache and the Hub can't be reached. Connect (unset "
            "HF_HUB_OFFLINE), or give a local folder or `demo`."
        ) from error
    except HfHubHTTPError as error:
        raise ModelError(f"The Hub refused {where}: {error}") from error
    except (OSError, ValueError) as error:
        raise ModelError(f"{where} can't be downloaded as a pipeline: {error}") from error
    # The cache names a snapshot's folder by its commit.
    return ModelSource(folder, repo_id, folder.name, variant)


def _listed_files(repo_id: str, revision: str | None) -> list[str] | None:
    """The files of a repo; what the Hub refuses is an error, its silence is None and leaves the local cache."""
    try:
        info = HfApi().model_info(repo_id, revision=revision)
    except HfHubHTTPError:
        raise
    except _NO_ANSWER:
        return None
    return [sibling.rfilename for sibling in info.siblings or ()]


def _fetch_if_there(repo_id: str, name: str, commit: str) -> None:
    with suppress(EntryNotFoundError):
        hf_hub_download(repo_id, name, revision=commit)
