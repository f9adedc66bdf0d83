"""The demo model that the package carries: small, really memorizing, ready offline."""

import shutil
from pathlib import Path

from nemo_prune.errors import OutputError

DEMO_MODEL = "demo"
DEMO_GUIDANCE_SCALE = 3.0
# At the first step its ordinary captions move the prediction as much as memorized ones do: they name its colours.
DEMO_NORM_STEP = 25
PROMPTS_FILE = "prompts.csv"
CALIBRATION_FILE = "calibration.csv"
TEST_FILE = "test.csv"


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
