"""The first stage alone: `nemo-prune calibrate`."""

import json
from pathlib import Path
from typing import Annotated

import typer

from nemo_prune.cli.console import app, errors_reported, progress_bar, quieten_libraries
from nemo_prune.cli.options import (
    DEFAULTS,
    MODEL_DEFAULTS,
    BatchSizeOption,
    ConfigOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    MarginOption,
    ModelOption,
    NumSamplesOption,
    OrdinaryOption,
    PresetOption,
    ProjectionsOption,
    RevisionOption,
    SeedOption,
    VariantOption,
    ordinary_texts,
)
from nemo_prune.settings import LocalizationSettings, ModelOptions


@app.command()
def calibrate(
    model: ModelOption,
    out: Annotated[Path, typer.Option(help="The file to write, such as calibration.safetensors.")],
    calibration_prompts: OrdinaryOption = None,
    preset: PresetOption = "released-code",
    projections: ProjectionsOption = DEFAULTS.projections,
    seed: SeedOption = None,
    num_samples: NumSamplesOption = None,
    config: ConfigOption = None,
    revision: RevisionOption = None,
    variant: VariantOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "float32",
    batch_size: BatchSizeOption = None,
    margin: MarginOption = MODEL_DEFAULTS.margin,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Measure on ordinary captions what is usual for a model: the first stage of `run` alone.

    Example: [bold]nemo-prune calibrate --model demo --out calibration.safetensors[/]
    """
    with errors_reported(), progress_bar(quiet=as_json) as progress:
        settings = LocalizationSettings.preset(preset, projections=projections, seed=seed, num_samples=num_samples)
        quieten_libraries()
        from nemo_prune.models.source import resolve_model
        from nemo_prune.run import calibrate_model

        ordinary = ordinary_texts(model, calibration_prompts)
        options = ModelOptions(device, dtype, batch_size, margin)
        source = resolve_model(model, revision, variant, config)
        found = calibrate_model(source, ordinary, out, options, settings, overwrite, progress)
    facts = {"threshold": found.threshold, "similarity_mean": found.similarity_mean,
             "similarity_std": found.similarity_std, "num_prompts": found.statistics.num_prompts}  # fmt: skip
    if as_json:
        typer.echo(json.dumps({**facts, "out": str(out)}, indent=2))
    else:
        for name, value in facts.items():
            typer.echo(f"{name}: {value:.4g}")
        typer.echo(f"Calibration: {out}")
