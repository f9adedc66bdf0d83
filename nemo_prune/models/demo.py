"""The demo model that the package carries: small, really memorizing, ready offline."""

import shutil
from dataclasses import dataclass
from pathlib import Path

from nemo_prune.errors import OutputError

DEMO_MODEL = "demo"
PROMPTS_FILE = "prompts.csv"
CALIBRATION_FILE = "calibration.csv"
TEST_FILE = "test.csv"


@dataclass(frozen=True)
class PackagedFile:
    """A file beside the demo model, by its name."""

    name: str

    def locate(self) -> Path:
        """Where the file is."""
        return demo_folder() / self.name


def demo_folder() -> Path:
    """The demo model's diffusers folder, with its prompts and training images, inside the package."""
    return Path(__file__).parent.parent / "demo_model"


def write_demo(folder: Path) -> None:
    """Copy the demo model with its prompts and training images into a new folder.

    Raises:
        OutputError: the folder exists and is not empty, or can't be written.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise OutputError(f"{folder} exists and is not empty. Choose another folder.")
    try:
        shutil.copytree(demo_folder(), folder, dirs_exist_ok=True)
    except OSError as error:
        raise OutputError(f"The demo model can't be written to {folder}: {error}") from error
