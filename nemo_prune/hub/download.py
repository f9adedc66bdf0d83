"""Models of the Hub on this machine: downloaded, or found in the cache of the Hub's client."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from diffusers import DiffusionPipeline
from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from nemo_prune.errors import ModelError
from nemo_prune.files.layout import CARD_FILE, is_licence_file
from nemo_prune.hub.errors import NO_ANSWER, named_errors

_CONFIGS = ("*.json", "*.txt", "*.model")
# They name weight files, which are not fetched with the configs.
_NO_CONFIGS = ("*.index.json", "*.index.*.json")


def download_pipeline(repo_id: str, revision: str | None, variant: str | None) -> Path:
    """The folder of a pipeline's files; it is named by its commit.

    Raises:
        ModelError: they can't be downloaded.
    """
    with _named_errors(repo_id, revision, "give a local folder or `demo`"):
        listed = _listed_files(repo_id, revision)
        folder = Path(
            DiffusionPipeline.download(repo_id, revision=revision, variant=variant, local_files_only=listed is None)
        )
        # diffusers leaves card and licence behind when it downloads a pipeline; the release needs them.
        for name in listed or ():
            if "/" not in name and (name == CARD_FILE or is_licence_file(name)):
                _fetch_if_there(repo_id, name, folder.name)
        return folder


def download_configs(repo_id: str) -> Path:
    """The folder of a pipeline's configs and tokenizer, without its weights.

    Raises:
        ModelError: they can't be downloaded.
    """
    with _named_errors(repo_id, None, "give a local folder with --config"):
        return Path(snapshot_download(repo_id, allow_patterns=_CONFIGS, ignore_patterns=_NO_CONFIGS))


@contextmanager
def _named_errors(repo_id: str, revision: str | None, instead: str) -> Iterator[None]:
    """The Hub's errors, with remedies for a user who gave the name of a model."""
    where = f"`{repo_id}`" + (f" at revision `{revision}`" if revision else "")
    unknown = (
        "it is neither a local folder nor a repo of the Hub that you may read. Check the name; for a private repo log "
        "in: `hf auth login`, or set HF_TOKEN."
    )
    absent = f"it is not in the local cache and the Hub can't be reached. Connect (unset HF_HUB_OFFLINE), or {instead}."
    remedies = {
        RevisionNotFoundError: "the Hub has no such branch, tag or commit of it. Check --revision.",
        LocalEntryNotFoundError: absent,
        OfflineModeIsEnabled: absent,
        RepositoryNotFoundError: unknown,
        HFValidationError: unknown,
        ConnectionError: absent,
    }
    with named_errors(ModelError, f"The model {where} can't be loaded", remedies):
        yield


def _listed_files(repo_id: str, revision: str | None) -> list[str] | None:
    """The files of a repo; a refusal of the Hub is an error; None if it does not answer, so the local cache is used."""
    try:
        info = HfApi().model_info(repo_id, revision=revision)
    except HfHubHTTPError:
        raise
    except NO_ANSWER:
        return None
    return [sibling.rfilename for sibling in info.siblings or ()]


def _fetch_if_there(repo_id: str, name: str, commit: str) -> None:
    with suppress(EntryNotFoundError):
        hf_hub_download(repo_id, name, revision=commit)
