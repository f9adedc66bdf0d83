"""The localization alone: `nemo-prune localize`."""

from pathlib import Path
from typing import Annotated

import typer

from nemo_prune.cli.console import app, console_listener, errors_reported, print_json, quieten_libraries
from nemo_prune.cli.options import (
    DEFAULT_DTYPE,
    DEFAULT_PRESET,
    DEFAULT_PROJECTIONS,
    DEFAULTS,
    METHOD,
    MODEL_DEFAULTS,
    RELEASE,
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
    OrdinaryColumnOption,
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
    method_settings,
    model_options,
    ordinary_captions,
    setting,
)
from nemo_prune.settings import LocalizationPlan


@app.command()
def localize(
    model: ModelOption,
    work: Annotated[Path, setting(RELEASE, LocalizationPlan, "work")],
    prompts: PromptsOption = None,
    prompt_column: ColumnOption = None,
    limit: LimitOption = None,
    calibration_prompts: OrdinaryOption = None,
    calibration_column: OrdinaryColumnOption = None,
    calibration: CalibrationOption = None,
    preset: PresetOption = DEFAULT_PRESET,
    projections: ProjectionsOption = DEFAULT_PROJECTIONS,
    seed: SeedOption = DEFAULTS.seed,
    num_samples: NumSamplesOption = DEFAULTS.num_samples,
    threshold: ThresholdOption = None,
    config: ConfigOption = None,
    revision: RevisionOption = None,
    variant: VariantOption = None,
    device: DeviceOption = MODEL_DEFAULTS.device,
    dtype: DtypeOption = DEFAULT_DTYPE,
    batch_size: BatchSizeOption = None,
    margin: MarginOption = MODEL_DEFAULTS.margin,
    ray: RayOption = None,
    ray_workers: RayWorkersOption = None,
    include_unresolved: Annotated[
        bool, setting(METHOD, LocalizationPlan, "include_unresolved", "--include-unresolved")
    ] = False,
    overwrite: Annotated[bool, setting(RELEASE, LocalizationPlan, "overwrite", "--overwrite")] = False,
    as_json: JsonOption = False,
) -> None:
    """Find the memorization neurons of each caption and keep them for `merge`; nothing is pruned.

    The result file has one line per caption. Run the same command again to resume after a stop.

    Example: `nemo-prune localize --model demo --calibration calibration.safetensors --work found/`
    """
    with errors_reported(), console_listener(quiet=as_json) as listener:
        settings = method_settings(
            preset, projections=projections.value, seed=seed, num_samples=num_samples, threshold=threshold
        )
        options = model_options(device, dtype, batch_size, margin)
        plan = LocalizationPlan(work, settings, options, calibration, overwrite, include_unresolved)
        quieten_libraries()
        from nemo_prune.compute.opening import open_session
        from nemo_prune.engine.localize import count_statuses
        from nemo_prune.files.work import claim_work_folder
        from nemo_prune.models.known import OrdinaryCaptions
        from nemo_prune.models.source import resolve_model
        from nemo_prune.run import localize_model

        examined = examined_corpus(model, prompts, prompt_column, limit)
        ordinary = (
            OrdinaryCaptions(()) if calibration else ordinary_captions(model, calibration_prompts, calibration_column)
        )
        source = resolve_model(model, revision, variant, config)
        claim_work_folder(work)
        with open_session(source, options, settings, ray, ray_workers) as session:
            file, localizations = localize_model(session, examined, ordinary, plan, listener)
        facts = count_statuses(localizations)
    if as_json:
        print_json({**facts, "results": str(file)})
    else:
        for status, number in facts.items():
            typer.echo(f"{status.replace('_', ' ')}: {number}")
        typer.echo(f"Results, not for publication: {file}")
