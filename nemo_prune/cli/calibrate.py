"""The first stage alone: `nemo-prune calibrate`."""

from pathlib import Path
from typing import Annotated

import typer

from nemo_prune.cli.console import app, console_listener, errors_reported, print_json, quieten_libraries
from nemo_prune.cli.options import (
    DEFAULT_DTYPE,
    DEFAULT_PRESET,
    DEFAULT_PROJECTIONS,
    DEFAULTS,
    MODEL_DEFAULTS,
    RELEASE,
    BatchSizeOption,
    ConfigOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    MarginOption,
    ModelOption,
    NumSamplesOption,
    OrdinaryColumnOption,
    OrdinaryOption,
    PresetOption,
    ProjectionsOption,
    RevisionOption,
    SeedOption,
    VariantOption,
    method_settings,
    model_options,
    option,
    ordinary_captions,
)


@app.command()
def calibrate(
    model: ModelOption,
    out: Annotated[Path, option(RELEASE, "The file to write, such as calibration.safetensors.")],
    calibration_prompts: OrdinaryOption = None,
    calibration_column: OrdinaryColumnOption = None,
    preset: PresetOption = DEFAULT_PRESET,
    projections: ProjectionsOption = DEFAULT_PROJECTIONS,
    seed: SeedOption = DEFAULTS.seed,
    num_samples: NumSamplesOption = DEFAULTS.num_samples,
    config: ConfigOption = None,
    revision: RevisionOption = None,
    variant: VariantOption = None,
    device: DeviceOption = MODEL_DEFAULTS.device,
    dtype: DtypeOption = DEFAULT_DTYPE,
    batch_size: BatchSizeOption = None,
    margin: MarginOption = MODEL_DEFAULTS.margin,
    overwrite: Annotated[bool, option(RELEASE, "Replace the file.", "--overwrite")] = False,
    as_json: JsonOption = False,
) -> None:
    """Measure on ordinary captions what is usual for a model: the first stage of `run` alone.

    OUT keeps the threshold and the activation statistics. It is refused for another model or other settings.

    Example: `nemo-prune calibrate --model demo --out calibration.safetensors`
    """
    with errors_reported(), console_listener(quiet=as_json) as listener:
        settings = method_settings(preset, projections=projections.value, seed=seed, num_samples=num_samples)
        options = model_options(device, dtype, batch_size, margin)
        quieten_libraries()
        from nemo_prune.models.source import resolve_model
        from nemo_prune.run import calibrate_model

        ordinary = ordinary_captions(model, calibration_prompts, calibration_column)
        source = resolve_model(model, revision, variant, config)
        found = calibrate_model(source, ordinary, out, options, settings, overwrite, listener)
    facts = {"threshold": found.threshold, "similarity_mean": found.similarity_mean,
             "similarity_std": found.similarity_std, "num_prompts": found.statistics.num_prompts}  # fmt: skip
    if as_json:
        print_json({**facts, "out": str(out)})
    else:
        for name, value in facts.items():
            typer.echo(f"{name}: {value:.4g}")
        typer.echo(f"Calibration: {out}")
