"""What lies where in a release, as paths relative to its folder."""

from pathlib import Path, PurePath

CARD_FILE = "README.md"
RECORD_FILE = "nemo_prune.json"
MASK_FILE = "nemo_prune/mask.safetensors"
GRID_FILE = "nemo_prune/before_after.png"
PLOT_FILE = "nemo_prune/neurons_per_layer.png"
# A checkpoint in one file, such as model.safetensors, has the other files in a folder beside it: model.nemo_prune/.
SINGLE_SUFFIX = ".nemo_prune"
SAFETENSORS = ".safetensors"
# They can run programs when they are read, so that none is written.
PICKLES = (".ckpt", ".bin", ".pt", ".pth")

_LICENCE_SUFFIXES = ("", ".md", ".txt", ".rst", ".html", ".pdf")


def is_single_file(out: Path) -> bool:
    """Whether a release with this name is a single file; else it is a folder."""
    return out.suffix in (SAFETENSORS, *PICKLES)


def folder_beside(out: Path) -> Path:
    """The folder of all that belongs to a single file but the weights."""
    return out.with_suffix(SINGLE_SUFFIX)


def work_folder(out: Path) -> Path:
    """Where a run keeps what it knows, unless it is told: beside the release."""
    return out.with_suffix(".work") if is_single_file(out) else out.with_name(f"{out.name}.work")


def is_licence_file(name: str) -> bool:
    """Whether a file at the root of a model is a licence text or notice, whatever it is called exactly."""
    upper, suffix = name.upper(), PurePath(name).suffix.lower()
    named = "LICENSE" in upper or "LICENCE" in upper or upper.startswith(("NOTICE", "COPYING", "USE_POLICY"))
    return named and (suffix in _LICENCE_SUFFIXES or suffix[1:].isdigit())
