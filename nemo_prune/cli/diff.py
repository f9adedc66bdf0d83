"""What differs between a base and a release: `nemo-prune diff`."""

from pathlib import Path
from typing import Annotated

import typer

from nemo_prune.cli.console import app, errors_reported, print_json, quieten_libraries
from nemo_prune.cli.options import JsonOption, RevisionOption, VariantOption
from nemo_prune.files.json_values import to_json
from nemo_prune.files.untrusted import printable


@app.command()
def diff(
    base: Annotated[str, typer.Argument(help="The unpruned model: `demo`, a folder, a single file or a Hub id.")],
    out: Annotated[str, typer.Argument(help="The pruned model: a folder, a single file or a Hub id.")],
    mask: Annotated[
        str | None,
        typer.Option(help="Mask whose rows may differ: a file, a release or a Hub id. (default: the one in OUT)"),
    ] = None,
    revision: RevisionOption = None,
    variant: VariantOption = None,
    as_json: JsonOption = False,
) -> None:
    """List every file, tensor and row that differs; exit code 1 if anything does that no mask accounts for.

    Both models may be folders or single files, in any pairing.

    Example: `nemo-prune diff demo pruned/`
    """
    with errors_reported():
        quieten_libraries()
        from nemo_prune.checkpoint.diff import diff_models
        from nemo_prune.mask import NeuronMask
        from nemo_prune.models.mask_source import find_mask

        before, after = _place(base, revision, variant), _place(out, None, variant)
        file = find_mask(mask) if mask else _own_mask(after)
        differences = list(diff_models(before, after, NeuronMask.load(file) if file else None, variant))
        unexpected = [each for each in differences if not each.expected]
    if as_json:
        print_json({"differences": to_json(differences), "unexpected": len(unexpected)})
    else:
        for each in differences:
            rows = f" rows {', '.join(map(str, each.rows))}" if each.rows else ""
            mark = "" if each.expected else "  <- not accounted for"
            what = f"{each.tensor}{'' if each.rows else f' {each.what}'}" if each.tensor else each.what
            layer = f" ({each.layer})" if each.layer else ""
            typer.echo(printable(f"{each.file}: {what}{layer}{rows}{mark}"))
        typer.echo(
            f"{len(unexpected)} differences that no mask accounts for." if unexpected
            else "Nothing but what the mask prunes differs, apart from the files that a release adds or leaves out."
        )  # fmt: skip
    raise typer.Exit(1 if unexpected else 0)


def _place(name: str, revision: str | None, variant: str | None) -> Path:
    """The folder or the single file of a model."""
    from nemo_prune.models.source import resolve_model

    path = Path(name)
    return path if path.is_file() else resolve_model(name, revision, variant).folder


def _own_mask(out: Path) -> Path | None:
    """The mask of a release."""
    from nemo_prune.files.layout import ReleaseLayout

    mask = ReleaseLayout.found(out).mask
    return mask if mask.is_file() else None
