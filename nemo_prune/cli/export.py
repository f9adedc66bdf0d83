"""A release from a base and a mask: `nemo-prune export`."""

from typing import Annotated

import typer

from nemo_prune.cli.console import app, console_listener, errors_reported, print_json, quieten_libraries
from nemo_prune.cli.options import (
    RELEASE,
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
    option,
)
from nemo_prune.settings import Statement


@app.command()
def export(
    model: ModelOption,
    mask: Annotated[
        str,
        option(
            RELEASE, "A mask file, the work folder of a run, a release, or a Hub id: owner/name or owner/name@revision."
        ),
    ],
    out: OutOption,
    scale: ScaleOption = 0.0,
    force: Annotated[
        bool, option(RELEASE, "Prune a base that the mask was not made for; the card says so.", "--force")
    ] = False,
    config: ConfigOption = None,
    base_model: BaseModelOption = None,
    license: LicenseOption = None,
    license_name: LicenseNameOption = None,
    license_link: LicenseLinkOption = None,
    revision: RevisionOption = None,
    variant: VariantOption = None,
    overwrite: Annotated[bool, option(RELEASE, "Replace OUT.", "--overwrite")] = False,
    as_json: JsonOption = False,
) -> None:
    """Prune a model by a finished mask: base and mask always give the same weights, byte for byte.

    A mask holds the sha256 of every base tensor that it touches, in float32, float16 and bfloat16. A base that differs
    there is refused without --force.

    Example: `nemo-prune export --model demo --mask mask.safetensors --out pruned/`
    """
    with errors_reported(), console_listener(quiet=as_json) as listener:
        statement = Statement(base_model, license, license_name, license_link)
        quieten_libraries()
        from nemo_prune.models.mask_source import find_mask
        from nemo_prune.models.source import resolve_model
        from nemo_prune.release.from_mask import export_model

        source = resolve_model(model, revision, variant, config)
        record = export_model(source, find_mask(mask), out, scale, force, overwrite, statement, listener)
    if as_json:
        print_json({**record.to_json(), "out": str(out)})
    else:
        typer.echo(f"{record.mask.num_neurons} neurons pruned. Pruned model: {out}")
