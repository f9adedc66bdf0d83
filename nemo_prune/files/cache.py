"""The folder where nemo-prune keeps what it fetched or converted: it can be deleted at any time."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """``nemo_prune`` under the user's cache folder: ``XDG_CACHE_HOME``, else ``~/.cache``."""
    return (Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nemo_prune").absolute()
