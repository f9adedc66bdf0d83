"""The demo model's files: `nemo-prune demo`."""

from pathlib import Path
from typing import Annotated

import typer

from nemo_prune.cli.console import app, errors_reported


@app.command()
def demo(folder: Annotated[Path, typer.Argument(help="A new folder.")]) -> None:
    """Write out the demo model with its captions and training images.

    Example: `nemo-prune demo demo-model/`
    """
    from nemo_prune.models.demo import CALIBRATION_FILE, PROMPTS_FILE, write_demo
    from nemo_prune.models.known import DEMO

    with errors_reported():
        write_demo(folder)
    typer.echo(f"The demo model is in {folder}. The same run by path:")
    typer.echo(
        f"nemo-prune run --model {folder} --prompts {folder / PROMPTS_FILE} --calibration-prompts "
        f"{folder / CALIBRATION_FILE} --guidance-scale {DEMO.guidance_scale:g} --out pruned/"
    )
