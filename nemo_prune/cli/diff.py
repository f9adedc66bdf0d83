"""What a release changed: `nemo-prune diff`."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from nemo_prune.cli.console import app, errors_reported, quieten_libraries
from nemo_prune.cli.options import JsonOption, RevisionOption, VariantOption
from nemo_prune.untrusted import printable


@app.command()
def diff(
    base: Annotated[str, typer.Argument(help="The unpruned model: `demo`, a diffusers folder or a Hub id.")],
    out: Annotated[str, typer.Argument(help="The pruned model: a diffusers folder or a Hub id.")],
    mask: Annotated[
        Path | None, typer.Option(help="Mask whose rows may differ. (default: the one that lies in OUT)")
    ] = None,
    revision: RevisionOption = None,
    variant: VariantOption = None,
    as_json: JsonOption = False,
) -> None:
    """List every file, tensor and row that differs; exit code 1 if anything but masked rows does.

    Example: [bold]nemo-prune diff demo pruned/[/]
    """
    with errors_reported():
        quieten_libraries()
        from nemo_prune.diff import diff_folders
        from nemo_prune.layout import MASK_FILE
        from nemo_prune.mask import NeuronMask
        from nemo_prune.source import resolve_model

        before, after = resolve_model(base, revision, variant).folder, resolve_model(out).folder
        file = mask or (after / MASK_FILE if (after / MASK_FILE).exists() else None)
        differences = list(diff_folders(before, after, NeuronMask.load(file) if file else None))
        unexpected = [each for each in differences if not each.expected]
    if as_json:
        typer.echo(json.dumps({"differences": [asdict(each) for each in differences], "unexpected": len(unexpected)}))
    else:
        for each in differences:
            rows = f" rows {', '.join(map(str, each.rows))}" if each.rows else ""
            mark = "" if each.expected else "  <- not accounted for"
            typer.echo(printable(f"{each.file}: {each.tensor or each.what}{rows}{mark}"))
        typer.echo(
            f"{len(unexpected)} differences that no mask accounts for." if unexpected
            else "Nothing but masked rows differs, beside the files that a release adds or leaves out."
        )  # fmt: skip
    raise typer.Exit(1 if unexpected else 0)
