"""Which files of a pipeline's component hold its weights, by the names that stock loaders look for."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from nemo_prune.checkpoint.folder import CheckpointFiles
from nemo_prune.errors import ModelError
from nemo_prune.files.safetensors_header import FLOAT_DTYPES, read_header

_NAME = re.compile(r"(diffusion_pytorch_model|pytorch_model|model)([\w.-]*)\.(safetensors|bin)", re.ASCII)
_SHARD = re.compile(r"-\d+-of-\d+")
_PART_OF = re.compile(r"-(\d{5})-of-(\d{5})\.")


@dataclass(frozen=True)
class WeightsFile:
    """A file of weights and what its name says.

    Attributes:
        path: relative to the model's folder.
        variant: such as ``fp16``; None for the plain weights.
        is_shard: whether it holds only a part of the weights.
        is_safetensors: whether it is safetensors; otherwise a pickle, a ``.bin``.
    """

    path: Path
    variant: str | None
    is_shard: bool
    is_safetensors: bool

    @property
    def converted_name(self) -> str:
        """The safetensors file that replaces it, in one piece."""
        stem = "diffusion_pytorch_model" if self.path.name.startswith("diffusion") else "model"
        return f"{stem}.{self.variant}.safetensors" if self.variant else f"{stem}.safetensors"


def weights_files(files: CheckpointFiles, component: str) -> list[WeightsFile]:
    """The files of weights of a component, sorted by name."""
    found = []
    for path in sorted([*files.kept, *files.left_out]):
        if path.parent == Path(component) and (match := _NAME.fullmatch(path.name)):
            variant = _SHARD.sub("", match[2]).strip(".") or None
            found.append(WeightsFile(path, variant, bool(_SHARD.search(match[2])), match[3] == "safetensors"))
    return found


def loaded_weights(files: Iterable[WeightsFile], variant: str | None) -> list[WeightsFile]:
    """The files that a loader takes: of the variant if there are any, safetensors first, in one piece first."""
    files = list(files)
    chosen = [each for each in files if each.variant == variant] or [each for each in files if each.variant is None]
    chosen = [each for each in chosen if each.is_safetensors] or chosen
    return [each for each in chosen if not each.is_shard] or chosen


def safetensors_of(files: CheckpointFiles, component: str, variant: str | None) -> list[Path]:
    """The safetensors files that a loader takes for a component, relative to the model's folder.

    Raises:
        ModelError: there is none.
    """
    found = [each.path for each in loaded_weights(weights_files(files, component), variant) if each.is_safetensors]
    if not found:
        raise ModelError(f"The {component} of the model has no safetensors weights. Fetch the model again.")
    return found


def refuse_missing_shards(component: str, files: Iterable[WeightsFile]) -> None:
    """Refuse weights in shards of which one is not there.

    Raises:
        ModelError: one is missing.
    """
    numbers = {match.groups() for each in files if (match := _PART_OF.search(each.path.name))}
    for total in {total for _, total in numbers}:
        there = {int(number) for number, of in numbers if of == total}
        if absent := [number for number in range(1, int(total) + 1) if number not in there]:
            raise ModelError(
                f"The weights of the {component} are {int(total)} shards, and {len(absent)} of them are missing, the "
                f"first is number {absent[0]}. Fetch the missing files."
            )


def stored_dtypes(files: CheckpointFiles, component: str, variant: str | None) -> dict[str, torch.dtype]:
    """Name -> dtype of the float tensors that a loader takes for a component. Raises as :func:`safetensors_of`."""
    stored = [read_header(files.folder / path) for path in safetensors_of(files, component, variant)]
    named = [(name, each.dtype) for header in stored for name, each in header.items()]
    return {name: FLOAT_DTYPES[dtype] for name, dtype in named if dtype in FLOAT_DTYPES}
