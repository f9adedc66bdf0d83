"""What lies where in a release, as paths relative to its folder."""

from pathlib import PurePath

CARD_FILE = "README.md"
RECORD_FILE = "nemo_prune.json"
MASK_FILE = "nemo_prune/mask.safetensors"
GRID_FILE = "nemo_prune/before_after.png"
PLOT_FILE = "nemo_prune/neurons_per_layer.png"

_LICENCE_SUFFIXES = ("", ".md", ".txt", ".rst", ".html", ".pdf")


def is_licence_file(name: str) -> bool:
    """Whether a file at the root of a model is a licence text or notice, whatever it is called exactly."""
    upper, suffix = name.upper(), PurePath(name).suffix.lower()
    named = "LICENSE" in upper or "LICENCE" in upper or upper.startswith(("NOTICE", "COPYING", "USE_POLICY"))
    return named and (suffix in _LICENCE_SUFFIXES or suffix[1:].isdigit())
