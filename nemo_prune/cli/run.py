"""The whole way: `nemo-prune run`."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from nemo_prune.cli.console import app, errors_reported, progress_bar, quieten_libraries, tell
from nemo_prune.cli.options import (
    DEFAULTS,
    MODEL_DEFAULTS,
    AllowResidualOption,
    BaseModelOption,
    BatchSizeOption,
    CalibrationOption,
    ColumnOption,
    ConfigOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    LicenseLinkOption,
    LicenseNameOption,
    LicenseOption,
    LimitOption,
    MarginOption,
    ModelOption,
    NumSamplesOption,
    OrdinaryOption,
    OutOption,
    PresetOption,
    PrivateOption,
    ProjectionsOption,
    PromptsOption,
    PushToOption,
    RevisionOption,
    ScaleOption,
    SeedOption,
    ThresholdOption,
    VariantOption,
    examined_corpus,
    image_guidance,
    ordinary_texts,
)
from nemo_prune.cli.push import PushAtTheEnd
from nemo_prune.files.layout import work_folder
from nemo_prune.settings import LocalizationSettings, ModelOptions, RunOptions, Statement, VerificationSettings


@app.command()
def run(
    model: ModelOption,
    out: OutOption,
    work: Annotated[
        Path | None, typer.Option(help="Folder of what the run knows; not for publication. (default: OUT.work)")
    ] = None,
    prompts: PromptsOption = None,
    from_screen: Annotated[
        Path | None,
        typer.Option("--from-screen", help="A file of `nemo-prune screen`: localize what passed, not --prompts."),
    ] = None,
    prompt_column: ColumnOption = None,
    limit: LimitOption = None,
    calibration_prompts: OrdinaryOption = None,
    calibration: CalibrationOption = None,
    preset: PresetOption = "released-code",
    projections: ProjectionsOption = DEFAULTS.projections,
    seed: SeedOption = None,
    num_samples: NumSamplesOption = None,
    threshold: ThresholdOption = None,
    merge: Annotated[
        str | None,
        typer.Option(
            help="`incremental`: each prompt on top of those before it, or `union` of all prompts' neurons (the "
            "paper's). (default: incremental; with --include-unresolved union)"
        ),
    ] = None,
    preserve: Annotated[
        float, typer.Option(help="0 (the paper's search) to 1: how much to favour ordinary captions.")
    ] = 0.0,
    guidance_scale: Annotated[
        float | None,
        typer.Option(
            help="Guidance of the images that are compared; detection uses none. "
            f"(default: {VerificationSettings().guidance_scale:g}, demo 3)"
        ),
    ] = None,
    scale: ScaleOption = 0.0,
    include_unresolved: Annotated[
        bool, typer.Option("--include-unresolved", help="Also prune the sets of unresolved prompts.")
    ] = False,
    publish_examples: Annotated[
        bool, typer.Option("--publish-examples", help="Put captions and a before/after grid into the card.")
    ] = False,
    config: ConfigOption = None,
    base_model: BaseModelOption = None,
    license: LicenseOption = None,
    license_name: LicenseNameOption = None,
    license_link: LicenseLinkOption = None,
    revision: RevisionOption = None,
    variant: VariantOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "float32",
    batch_size: BatchSizeOption = None,
    margin: MarginOption = MODEL_DEFAULTS.margin,
    push_to: PushToOption = None,
    private: PrivateOption = False,
    allow_residual: AllowResidualOption = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace OUT, and discard another run's work folder.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Find the memorization neurons, prune them and write a model that stock diffusers loads.

    Example: [bold]nemo-prune run --model demo --out pruned/[/]
    """
    with errors_reported(), progress_bar(quiet=as_json) as progress:
        settings = LocalizationSettings.preset(
            preset, projections=projections, seed=seed, num_samples=num_samples, threshold=threshold
        )
        out = out.absolute()
        options = RunOptions(
            out=out,
            work=work or work_folder(out),
            model=ModelOptions(device, dtype, batch_size, margin),
            merge=merge,
            preserve=preserve,
            calibration=calibration,
            published_calibration=calibration_prompts is None,
            scale=scale,
            include_unresolved=include_unresolved,
            publish_examples=publish_examples,
            statement=Statement(base_model, license, license_name, license_link),
            overwrite=overwrite,
        )
        push_at_the_end = PushAtTheEnd(push_to, private, allow_residual, quiet=as_json)
        push_at_the_end.check()
        # torch and diffusers take seconds to import; a mistyped setting should not have to wait for them.
        quieten_libraries()
        from nemo_prune.models.source import resolve_model
        from nemo_prune.run import prune_model

        examined = examined_corpus(model, prompts, prompt_column, limit, from_screen)
        ordinary = ordinary_texts(model, calibration_prompts)
        verification = VerificationSettings(guidance_scale=image_guidance(model, guidance_scale))
        source = resolve_model(model, revision, variant, config)
        result = prune_model(source, examined, ordinary, options, settings, verification, progress, tell)
    if not as_json:
        _show_result(result)
    with errors_reported():
        url = None
        try:
            url = push_at_the_end.push(result.out)
        finally:
            if as_json:
                where = {"out": str(result.out) if result.out else None, "pushed": url}
                typer.echo(json.dumps({**result.facts, **where}, indent=2))
    if url and not as_json:
        typer.echo(f"Pushed: {url}")


def _show_result(result: Any) -> None:
    """Tables on the terminal: what was found, what changed and where to look."""
    # The card's rows are the terminal's rows: one wording for both.
    from nemo_prune.release.wording import before_after_rows

    facts, console = result.facts, Console()
    prompts = facts["prompts"]
    found = Table("prompts", "number", title="Found")
    for status in ("localized", "not_memorized", "unresolved"):
        found.add_row(status.replace("_", " "), str(prompts[status]))
    layers = Table("layer", "pruned", "of", title="Neurons")
    for name, count in facts["mask"]["counts"].items():
        layers.add_row(name, str(count), str(facts["mask"]["sizes"][name]))
    layers.add_row("all", str(facts["mask"]["num_neurons"]), str(sum(facts["mask"]["sizes"].values())))
    console.print(found, layers)
    if result.out is None:
        console.print("No memorization neuron was found, so there is nothing to prune and no model was written.")
    else:
        effect = Table("measured", "before", "after", title="Effect")
        for row in before_after_rows(facts):
            effect.add_row(*row)
        console.print(effect)
        console.print(f"Pruned model, ready for publication: {result.out}", markup=False, soft_wrap=True)
    console.print(
        f"Report with captions and images, not for publication: {result.report}", markup=False, soft_wrap=True
    )
