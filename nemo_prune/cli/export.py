"""A base and a mask into a release: `nemo-prune export`."""

import json
from typing import Annotated

import typer

from nemo_prune.cli.console import app, errors_reported, quieten_libraries, tell
from nemo_prune.cli.options import (
    BaseModelOption,
    ConfigOption,
    JsonOption,
    LicenseLinkOption,
    LicenseNameOption,
    LicenseOption,
    ModelOption,
    OutOption,
    RevisionOption,
    ScaleOption,
    VariantOption,
)
from nemo_prune.settings import Statement


@app.command()
def export(
    model: ModelOption,
    mask: Annotated[str, typer.Option(help="A mask file, a release, or a Hub id of either: owner/name[@revision].")],
    out: OutOption,
    scale: ScaleOption = 0.0,
    force: Annotated[
        bool, typer.Option("--force", help="Prune another base than the mask was made for; the card says so.")
    ] = False,
    config: ConfigOption = None,
    base_model: BaseModelOption = None,
    license: LicenseOption = None,
    license_name: LicenseNameOption = None,
    license_link: LicenseLinkOption = None,
    revision: RevisionOption = None,
    variant: VariantOption = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Prune a model by a finished mask: whoever has base and mask gets the same weights.

    Example: [bold]nemo-prune export --model demo --mask mask.safetensors --out pruned/[/]
    """
    with errors_reported():
        statement = Statement(base_model, license, license_name, license_link)
        quieten_libraries()
        from nemo_prune.models.mask_source import find_mask
        from nemo_prune.models.source import resolve_model
        from nemo_prune.release.from_mask import export_model

        source = resolve_model(model, revision, variant, config)
        facts = export_model(source, find_mask(mask), out, scale, force, overwrite, statement, tell)
    if as_json:
        typer.echo(json.dumps({**facts, "out": str(out)}, indent=2))
    else:
        typer.echo(f"{facts['mask']['num_neurons']} neurons pruned. Pruned model: {out}")
