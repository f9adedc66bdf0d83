"""Which captions are memorized: `nemo-prune screen`."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from rich.console import Console
from rich.table import Table

from nemo_prune.cli.console import app, console_listener, errors_reported, print_json, quieten_libraries
from nemo_prune.cli.options import (
    CAPTIONS,
    DEFAULT_DTYPE,
    DEFAULT_PRESET,
    DEFAULT_SIEVE,
    DEFAULTS,
    MEASURING,
    METHOD,
    MODEL_DEFAULTS,
    RELEASE,
    BatchSizeOption,
    ColumnOption,
    ConfigOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    LimitOption,
    ModelOption,
    OrdinaryColumnOption,
    OrdinaryOption,
    PromptsOption,
    RayOption,
    RayWorkersOption,
    RevisionOption,
    SeedOption,
    SieveOption,
    VariantOption,
    method_settings,
    model_options,
    option,
    ordinary_captions,
    setting,
)
from nemo_prune.screening.settings import ScreenOptions, SieveSettings
from nemo_prune.settings import VerificationSettings

_SIEVE_DEFAULTS = SieveSettings()


@app.command()
def screen(
    model: ModelOption,
    out: Annotated[Path, setting(RELEASE, ScreenOptions, "out")],
    work: Annotated[Path | None, setting(RELEASE, ScreenOptions, "work")] = None,
    prompts: PromptsOption = None,
    prompt_column: ColumnOption = None,
    limit: LimitOption = None,
    calibration_prompts: OrdinaryOption = None,
    calibration_column: OrdinaryColumnOption = None,
    label_column: Annotated[
        str | None,
        option(
            CAPTIONS,
            "Column with VM, TM, 1, true, memorized, or 0, false, ordinary: report AUROC and TPR at 1% false alarms of "
            "each computed sieve, with 95% intervals. They leave out captions without a label.",
            "--label-column",
        ),
    ] = None,
    sieve: SieveOption = DEFAULT_SIEVE,
    sieve_samples: Annotated[
        int, setting(METHOD, SieveSettings, "num_samples", "--sieve-samples", min=1)
    ] = _SIEVE_DEFAULTS.num_samples,
    norm_step: Annotated[
        int | None,
        setting(METHOD, SieveSettings, "norm_step", "--norm-step", min=0, max=DEFAULTS.num_inference_steps - 1),
    ] = None,
    cosine_weight: Annotated[
        float, setting(METHOD, SieveSettings, "cosine_weight", "--cosine-weight")
    ] = _SIEVE_DEFAULTS.cosine_weight,
    fdr: Annotated[float, setting(METHOD, ScreenOptions, "fdr")] = ScreenOptions.fdr,
    confirm: Annotated[bool, setting(MEASURING, ScreenOptions, "confirm", "--confirm")] = False,
    guidance_scale: Annotated[float | None, setting(MEASURING, VerificationSettings, "guidance_scale")] = None,
    seed: SeedOption = DEFAULTS.seed,
    config: ConfigOption = None,
    revision: RevisionOption = None,
    variant: VariantOption = None,
    device: DeviceOption = MODEL_DEFAULTS.device,
    dtype: DtypeOption = DEFAULT_DTYPE,
    batch_size: BatchSizeOption = None,
    ray: RayOption = None,
    ray_workers: RayWorkersOption = None,
    overwrite: Annotated[bool, setting(RELEASE, ScreenOptions, "overwrite", "--overwrite")] = False,
    as_json: JsonOption = False,
) -> None:
    """Find out which captions of a large corpus are memorized; `run --from-screen` goes on from there.

    Every caption goes through a sieve, one or two U-Net passes on pure noise. Captions that pass the cut get NeMo's
    memorization score. OUT holds all captions, the highest value first, with the columns score, norm, anisotropy,
    passed, memorization_score and their own. Run the same command again to resume after a stop.

    The cut is set on the ordinary captions (--calibration-prompts). It keeps the false discovery rate, on average, if
    they resemble the ordinary captions of the corpus; with captions from elsewhere it means nothing. If they are too
    few, there is no cut, nothing passes, and the command says how many are needed: to find 1,000 memorized captions
    among 10 million, about 100,000. The picture distributions.png in the work folder shows all values. If memorized
    and ordinary captions overlap there, try another --norm-step on captions with labels.

    Example: `nemo-prune screen --model demo --label-column type --out screened.parquet`
    """
    with errors_reported(), console_listener(quiet=as_json, show_speed=True) as listener:
        settings = method_settings(DEFAULT_PRESET, seed=seed)
        options = ScreenOptions(out, work, model_options(device, dtype, batch_size), fdr, confirm, overwrite)
        sieve_settings = SieveSettings(sieve.value, sieve_samples, norm_step, cosine_weight=cosine_weight)
        quieten_libraries()
        from nemo_prune.compute.opening import open_session
        from nemo_prune.corpus.stream import CaptionStream
        from nemo_prune.files.work import claim_work_folder
        from nemo_prune.models.source import resolve_model
        from nemo_prune.screening.screen import screen_captions

        captions = CaptionStream(partial(_captions, model, prompts, prompt_column), limit, label_column)
        ordinary = ordinary_captions(model, calibration_prompts, calibration_column).texts
        source = resolve_model(model, revision, variant, config)
        claim_work_folder(options.work)
        verification = VerificationSettings(guidance_scale=guidance_scale)
        with open_session(source, options.model, settings, ray, ray_workers) as session:
            result = screen_captions(session, captions, ordinary, options, sieve_settings, verification, listener)
    if as_json:
        print_json({**result.facts, "out": str(options.out), "distributions": str(result.picture)})
    else:
        _show_result(result, options.out)


def _captions(model: str, prompts: str | None, column: str | None) -> Iterator[Any]:
    """The captions to screen; a known model has memorized ones and further ordinary ones, with labels."""
    from dataclasses import replace

    from nemo_prune.corpus.prompts import iter_prompts
    from nemo_prune.corpus.stream import ORDINARY
    from nemo_prune.models.known import known_model, memorized_captions

    yield from iter_prompts(prompts or memorized_captions(model), column, keep_empty=True)
    if prompts is None and (test := known_model(model).test):
        yield from (replace(prompt, kind=ORDINARY) for prompt in iter_prompts(test.locate()))


def _show_result(result: Any, out: Path) -> None:
    """Show what passed, how certain that is, and where to look."""
    console = Console()
    if result.separations:
        table = Table("sieve", "captions", "number", "AUROC", "TPR at 1% FPR", title="How well the sieves separate")
        for name, kinds in result.separations.items():
            for kind, found in kinds.items():
                table.add_row(name, kind, f"{found.num_memorized} of {found.num_memorized + found.num_ordinary}",
                              _interval(found.auroc), _interval(found.tpr))  # fmt: skip
        console.print(table)
    for line in _cut_lines(result.cut):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    if result.facts["confirmed"] is not None:
        console.print(f"{result.facts['confirmed']} of them are confirmed: their images of four seeds copy each other.")
    speed, passes = result.facts["prompts_per_second"], result.facts["sample_passes_per_prompt"]
    console.print(f"{passes:.2f} sample passes per caption" + (f", {speed:.1f} captions per second." if speed else "."))
    console.print(f"Captions by value, not for publication: {out}", markup=False, soft_wrap=True)
    console.print(f"Distributions: {result.picture}", markup=False, soft_wrap=True)


def _cut_lines(cut: Any) -> list[str]:
    if cut.cut is not None:
        return [
            f"{cut.num_passed:,} of {cut.num_prompts:,} captions pass, at or above {cut.cut:.4g}.",
            f"Estimated false alarms among them: {cut.fdr:.1%}, with 95% confidence at most {cut.fdr_high:.1%} "
            f"({cut.ordinary_above} of {cut.num_ordinary:,} ordinary captions are above the cut).",
        ]
    asked = f"No cut keeps false alarms to {cut.asked:.0%} of what passes"
    if cut.needed_ordinary is None:
        return [f"{asked}: no caption is above all {cut.num_ordinary:,} ordinary ones, so none stands out."]
    return [
        f"{asked}: for {cut.num_prompts:,} captions, {cut.num_ordinary:,} ordinary ones are too few.",
        f"With these values about {cut.needed_ordinary:,} are needed (--calibration-prompts), or a higher --fdr. "
        "The file holds all captions, sorted by value.",
    ]


def _interval(estimate: Any) -> str:
    return f"{estimate.value:.3f} ({estimate.low:.3f} to {estimate.high:.3f})"
