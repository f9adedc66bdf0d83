"""Which captions are memorized: `nemo-prune screen`."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from nemo_prune.cli.console import app, errors_reported, progress_bar, quieten_libraries
from nemo_prune.cli.options import (
    MODEL_DEFAULTS,
    BatchSizeOption,
    ColumnOption,
    ConfigOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    LimitOption,
    ModelOption,
    OrdinaryOption,
    PromptsOption,
    RayOption,
    RayWorkersOption,
    RevisionOption,
    SeedOption,
    VariantOption,
    image_guidance,
    ordinary_texts,
    own_prompts,
)
from nemo_prune.settings import LocalizationSettings, ModelOptions, ScreenOptions, SieveSettings, VerificationSettings

SIEVE_DEFAULTS = SieveSettings()
_LAST_STEP = LocalizationSettings().num_inference_steps - 1


@app.command()
def screen(
    model: ModelOption,
    out: Annotated[Path, typer.Option(help="The file to write: .parquet or .jsonl, the likeliest captions first.")],
    work: Annotated[
        Path | None, typer.Option(help="Folder of what the screening knows; not for publication. (default: OUT.work)")
    ] = None,
    prompts: PromptsOption = None,
    prompt_column: ColumnOption = None,
    limit: LimitOption = None,
    calibration_prompts: OrdinaryOption = None,
    label_column: Annotated[
        str | None,
        typer.Option("--label-column", help="Column that says which are memorized (VM, TM, 1, 0, ordinary ...)."),
    ] = None,
    sieve: Annotated[
        str, typer.Option(help="`anisotropy`: two passes a caption, the better one; or `norm`: one.")
    ] = SIEVE_DEFAULTS.sieve,
    sieve_samples: Annotated[
        int, typer.Option("--sieve-samples", min=1, help="Initial latents that the sieve takes the mean over.")
    ] = SIEVE_DEFAULTS.num_samples,
    norm_step: Annotated[
        int | None,
        typer.Option(
            "--norm-step",
            min=0,
            max=_LAST_STEP,
            help="Step of 50 at which the norm is taken, 0 the noisiest. "
            f"(default: {SIEVE_DEFAULTS.norm_step}, demo 25)",
        ),
    ] = None,
    cosine_weight: Annotated[
        float, typer.Option("--cosine-weight", help="Weight of anisotropy's cosine: 2 for SD v1-4, 0.1 for SD 2.")
    ] = SIEVE_DEFAULTS.cosine_weight,
    fdr: Annotated[float, typer.Option(help="Share of false alarms among what passes that is accepted.")] = 0.1,
    confirm: Annotated[
        bool, typer.Option("--confirm", help="Draw four images of what passes and measure whether they agree.")
    ] = False,
    guidance_scale: Annotated[
        float | None,
        typer.Option(help=f"Guidance of these images. (default: {VerificationSettings().guidance_scale:g}, demo 3)"),
    ] = None,
    seed: SeedOption = None,
    config: ConfigOption = None,
    revision: RevisionOption = None,
    variant: VariantOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "float32",
    batch_size: BatchSizeOption = None,
    ray: RayOption = None,
    ray_workers: RayWorkersOption = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace OUT, and discard another screening's work folder.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Find out which captions of a large corpus are memorized; `run --from-screen` goes on from there.

    Example: [bold]nemo-prune screen --model demo --label-column type --out screened.parquet[/]
    """
    with errors_reported(), progress_bar(quiet=as_json, show_speed=True) as progress:
        settings = LocalizationSettings.preset("released-code", seed=seed)
        out = out.absolute()
        options = ScreenOptions(
            out=out,
            work=work or out.with_name(f"{out.name}.work"),
            model=ModelOptions(device, dtype, batch_size, MODEL_DEFAULTS.margin),
            fdr=fdr,
            confirm=confirm,
            overwrite=overwrite,
        )
        from nemo_prune.models.demo import DEMO_MODEL, DEMO_NORM_STEP

        if norm_step is None:
            norm_step = DEMO_NORM_STEP if model == DEMO_MODEL else SIEVE_DEFAULTS.norm_step
        sieve_settings = SieveSettings(sieve, sieve_samples, norm_step, cosine_weight=cosine_weight)
        quieten_libraries()
        from nemo_prune.compute.session import open_session
        from nemo_prune.corpus.stream import CaptionStream
        from nemo_prune.models.source import resolve_model
        from nemo_prune.screening.screen import screen_captions

        captions = CaptionStream(lambda: _captions(model, prompts, prompt_column), limit, label_column)
        ordinary = ordinary_texts(model, calibration_prompts)
        with open_session(
            resolve_model(model, revision, variant, config), options.model, settings, ray, ray_workers
        ) as session:
            result = screen_captions(
                session, captions, ordinary, options, sieve_settings,
                VerificationSettings(guidance_scale=image_guidance(model, guidance_scale)), progress,
            )  # fmt: skip
    if as_json:
        typer.echo(json.dumps({**result.facts, "out": str(out), "distributions": str(result.picture)}, indent=2))
    else:
        _show_result(result, out)


def _captions(model: str, prompts: str | None, column: str | None) -> Iterator[Any]:
    """The captions to screen; the demo's own are those that it memorized and its ordinary ones, labelled."""
    from dataclasses import replace

    from nemo_prune.corpus.prompts import iter_prompts
    from nemo_prune.corpus.stream import ORDINARY
    from nemo_prune.models.demo import DEMO_MODEL, TEST_FILE, demo_folder

    yield from iter_prompts(prompts or own_prompts(model, "memorized"), column)
    if prompts is None and model == DEMO_MODEL:
        yield from (replace(prompt, kind=ORDINARY) for prompt in iter_prompts(demo_folder() / TEST_FILE))


def _show_result(result: Any, out: Path) -> None:
    """What passed, with what certainty, and where to look."""
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
        console.print(f"{result.facts['confirmed']} of them confirmed: their images of four seeds copy each other.")
    speed, passes = result.facts["prompts_per_second"], result.facts["sample_passes_per_prompt"]
    console.print(f"{passes:.2f} sample passes a caption" + (f", {speed:.1f} captions a second." if speed else "."))
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
        return [f"{asked}: no caption is above all {cut.num_ordinary:,} ordinary ones, so that none stands out."]
    return [
        f"{asked}: among {cut.num_prompts:,} captions, {cut.num_ordinary:,} ordinary ones are too few to tell.",
        f"As the captions lie it takes about {cut.needed_ordinary:,} (--calibration-prompts), or a higher --fdr. "
        "All captions are in the file by their value.",
    ]


def _interval(estimate: Any) -> str:
    return f"{estimate.value:.3f} ({estimate.low:.3f} to {estimate.high:.3f})"
