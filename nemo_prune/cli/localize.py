"""The localization alone: `nemo-prune localize`."""

import json
from pathlib import Path
from typing import Annotated

import typer

from nemo_prune.cli.console import app, errors_reported, progress_bar, quieten_libraries
from nemo_prune.cli.options import (
    DEFAULTS,
    MODEL_DEFAULTS,
    BatchSizeOption,
    CalibrationOption,
    ColumnOption,
    ConfigOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    LimitOption,
    MarginOption,
    ModelOption,
    NumSamplesOption,
    OrdinaryOption,
    PresetOption,
    ProjectionsOption,
    PromptsOption,
    RayOption,
    RayWorkersOption,
    RevisionOption,
    SeedOption,
    ThresholdOption,
    VariantOption,
    examined_corpus,
    ordinary_texts,
)
from nemo_prune.settings import LocalizationSettings, ModelOptions, RunOptions


@app.command()
def localize(
    model: ModelOption,
    work: Annotated[Path, typer.Option(help="Folder of the results; not for publication.")],
    prompts: PromptsOption = None,
    prompt_column: ColumnOption = None,
    limit: LimitOption = None,
    calibration_prompts: OrdinaryOption = None,
    calibration: CalibrationOption = None,
    preset: PresetOption = "released-code",
    projections: ProjectionsOption = DEFAULTS.projections,
    seed: SeedOption = None,
    num_samples: NumSamplesOption = None,
    threshold: ThresholdOption = None,
    config: ConfigOption = None,
    revision: RevisionOption = None,
    variant: VariantOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "float32",
    batch_size: BatchSizeOption = None,
    margin: MarginOption = MODEL_DEFAULTS.margin,
    ray: RayOption = None,
    ray_workers: RayWorkersOption = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Discard another run's work folder.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Find the memorization neurons of each caption and keep them for `merge`; nothing is pruned.

    Example: [bold]nemo-prune localize --model demo --calibration calibration.safetensors --work found/[/]
    """
    with errors_reported(), progress_bar(quiet=as_json) as progress:
        settings = LocalizationSettings.preset(
            preset, projections=projections, seed=seed, num_samples=num_samples, threshold=threshold
        )
        options = RunOptions(
            out=work, work=work, model=ModelOptions(device, dtype, batch_size, margin), calibration=calibration,
            published_calibration=calibration_prompts is None, overwrite=overwrite,
        )  # fmt: skip
        quieten_libraries()
        from nemo_prune.compute.session import open_session
        from nemo_prune.engine.localize import count_statuses
        from nemo_prune.models.source import resolve_model
        from nemo_prune.run import localize_model

        examined = examined_corpus(model, prompts, prompt_column, limit)
        ordinary = [] if calibration else ordinary_texts(model, calibration_prompts)
        source = resolve_model(model, revision, variant, config)
        with open_session(source, options.model, settings, ray, ray_workers) as session:
            file, localizations = localize_model(session, examined, ordinary, options, progress)
        facts = count_statuses(localizations)
    if as_json:
        typer.echo(json.dumps({**facts, "results": str(file)}, indent=2))
    else:
        for status, number in facts.items():
            typer.echo(f"{status.replace('_', ' ')}: {number}")
        typer.echo(f"Results, not for publication: {file}")
