"""The whole way: `nemo-prune run`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from nemo_prune.cli.console import app, console_listener, errors_reported, print_json, quieten_libraries
from nemo_prune.cli.options import (
    CAPTIONS,
    DEFAULT_DTYPE,
    DEFAULT_PRESET,
    DEFAULT_PROJECTIONS,
    DEFAULT_SEARCH,
    DEFAULTS,
    MEASURING,
    METHOD,
    MODEL_DEFAULTS,
    RELEASE,
    Ablation,
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
    Merge,
    ModelOption,
    NumSamplesOption,
    OrdinaryColumnOption,
    OrdinaryOption,
    OutOption,
    PresetOption,
    PrivateOption,
    ProjectionsOption,
    PromptsOption,
    PushToOption,
    RevisionOption,
    ScaleOption,
    SearchName,
    SeedOption,
    ThresholdOption,
    VariantOption,
    examined_corpus,
    method_settings,
    model_options,
    option,
    ordinary_captions,
    setting,
)
from nemo_prune.cli.push_at_the_end import PushAtTheEnd
from nemo_prune.settings import Plan, Statement, VerificationSettings

if TYPE_CHECKING:
    from nemo_prune.run import RunResult


@app.command()
def run(
    model: ModelOption,
    out: OutOption,
    work: Annotated[Path | None, setting(RELEASE, Plan, "work")] = None,
    prompts: PromptsOption = None,
    from_screen: Annotated[
        Path | None,
        option(CAPTIONS, "A file of `nemo-prune screen`, instead of --prompts: examine what passed.", "--from-screen"),
    ] = None,
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
    merge: Annotated[Merge | None, setting(METHOD, Plan, "merge")] = None,
    search: Annotated[SearchName, setting(METHOD, Plan, "search")] = DEFAULT_SEARCH,
    ablation: Annotated[Ablation | None, setting(METHOD, Plan, "ablation")] = None,
    max_utility_loss: Annotated[float | None, setting(METHOD, Plan, "max_utility_loss")] = None,
    preserve: Annotated[float, setting(METHOD, Plan, "preserve")] = 0.0,
    guidance_scale: Annotated[float | None, setting(MEASURING, VerificationSettings, "guidance_scale")] = None,
    no_verify: Annotated[
        bool,
        option(
            MEASURING,
            "Gather no evidence: neither attacks on the text embedding nor utility beside its baselines. `nemo-prune "
            "verify` gathers it later, and more of it.",
            "--no-verify",
        ),
    ] = False,
    scale: ScaleOption = 0.0,
    include_unresolved: Annotated[bool, setting(METHOD, Plan, "include_unresolved", "--include-unresolved")] = False,
    publish_examples: Annotated[bool, setting(RELEASE, Plan, "publish_examples", "--publish-examples")] = False,
    config: ConfigOption = None,
    base_model: BaseModelOption = None,
    license: LicenseOption = None,
    license_name: LicenseNameOption = None,
    license_link: LicenseLinkOption = None,
    revision: RevisionOption = None,
    variant: VariantOption = None,
    device: DeviceOption = MODEL_DEFAULTS.device,
    dtype: DtypeOption = DEFAULT_DTYPE,
    batch_size: BatchSizeOption = None,
    margin: MarginOption = MODEL_DEFAULTS.margin,
    push_to: PushToOption = None,
    private: PrivateOption = False,
    allow_residual: AllowResidualOption = False,
    overwrite: Annotated[bool, setting(RELEASE, Plan, "overwrite", "--overwrite")] = False,
    as_json: JsonOption = False,
) -> None:
    """Find the memorization neurons, prune them and write a model that stock diffusers loads.

    A run can be stopped at any moment: run the same command again to resume. OUT appears whole or not at all.

    Example: `nemo-prune run --model demo --out pruned/`
    """
    with errors_reported(), console_listener(quiet=as_json) as listener:
        plan = Plan(
            out=out,
            work=work,
            settings=method_settings(
                preset, projections=projections.value, seed=seed, num_samples=num_samples, threshold=threshold
            ),
            verification=_verification(guidance_scale, no_verify),
            model=model_options(device, dtype, batch_size, margin),
            merge=merge.value if merge else None,
            search=search.value,
            ablation=ablation.value if ablation else None,
            max_utility_loss=max_utility_loss,
            preserve=preserve,
            calibration=calibration,
            scale=scale,
            include_unresolved=include_unresolved,
            publish_examples=publish_examples,
            statement=Statement(base_model, license, license_name, license_link),
            overwrite=overwrite,
        )
        push_at_the_end = PushAtTheEnd(push_to, private, allow_residual, quiet=as_json)
        push_at_the_end.check()
        # torch and diffusers take seconds to import; a wrong setting is reported before that.
        quieten_libraries()
        from nemo_prune.models.source import resolve_model
        from nemo_prune.run import prune_model

        examined = examined_corpus(model, prompts, prompt_column, limit, from_screen)
        ordinary = ordinary_captions(model, calibration_prompts, calibration_column)
        source = resolve_model(model, revision, variant, config)
        result = prune_model(source, examined, ordinary, plan, listener)
    if not as_json:
        _show_result(result)
    with errors_reported():
        url = None
        try:
            url = push_at_the_end.push(result.out)
        finally:
            if as_json:
                where = {"out": str(result.out) if result.out else None, "pushed": url}
                print_json({**result.record.to_json(), **where})
    if url and not as_json:
        typer.echo(f"Pushed: {url}")


def _verification(guidance_scale: float | None, no_verify: bool) -> VerificationSettings:
    return VerificationSettings(guidance_scale=guidance_scale, **({"evidence_budget": 0} if no_verify else {}))


def _show_result(result: "RunResult") -> None:
    """Tables on the terminal: what was found, what changed and where to look."""
    # The terminal shows the card's rows: one wording for both.
    from nemo_prune.release.residual import residual_findings
    from nemo_prune.release.wording import before_after_rows, evidence_rows

    record, console = result.record, Console()
    found = Table("prompts", "number", title="Found")
    for status in ("localized", "not_memorized", "unresolved"):
        found.add_row(status.replace("_", " "), str(getattr(record.prompts, status)))
    layers = Table("layer", "pruned", "of", title="Neurons")
    for name, count in record.mask.counts.items():
        layers.add_row(name, str(count), str(record.mask.sizes[name]))
    layers.add_row("all", str(record.mask.num_neurons), str(sum(record.mask.sizes.values())))
    console.print(found, layers)
    if result.out is None:
        nothing = "A limit allows none to be pruned" if record.measured.spared else "No memorization neuron was found"
        console.print(f"{nothing}, so there is nothing to prune and no model was written.")
    else:
        effect = Table("measured", "before", "after", title="Effect")
        for row in before_after_rows(record):
            effect.add_row(*row)
        console.print(effect)
        if record.measured.evidence is not None:
            evidence = Table("measured", "base", "pruned", title="Evidence")
            for row in evidence_rows(record.measured.evidence):
                evidence.add_row(*row)
            console.print(evidence)
        findings = residual_findings(record)
        ready = "not ready for publication, because something remains" if findings else "ready for publication"
        console.print(f"Pruned model, {ready}: {result.out}", markup=False, soft_wrap=True)
        for finding in findings:
            console.print(f"- {finding}", markup=False, highlight=False, soft_wrap=True)
    console.print(
        f"Report with captions and images, not for publication: {result.report}", markup=False, soft_wrap=True
    )
