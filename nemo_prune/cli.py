"""The command line: a thin skin over the library. Heavy imports wait inside the commands."""

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from nemo_prune import __version__
from nemo_prune.errors import NemoPruneError, PromptError
from nemo_prune.settings import LocalizationSettings, ModelOptions, RunOptions, VerificationSettings

_DEFAULTS = LocalizationSettings()
_MODEL_DEFAULTS = ModelOptions()
_STAGE_NAMES = {
    "load": "Load the model",
    "calibrate": "Calibrate",
    "weigh neurons": "Weigh the neurons",
    "localize": "Localize",
    "merge": "Merge",
    "score again": "Score under the mask",
    "images before": "Images before",
    "export": "Export",
    "images after": "Images after",
}

app = typer.Typer(
    help="Find the neurons that make a text-to-image model give training images back, and prune them.",
    context_settings={"help_option_names": ["-h", "--help"]},
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def _quieten_libraries() -> None:
    """Stock loaders chat about optional parts that are none of the user's business here."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    from diffusers.utils.logging import disable_progress_bar as disable_diffusers_bar
    from transformers.utils.logging import disable_progress_bar as disable_transformers_bar

    disable_diffusers_bar()
    disable_transformers_bar()


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Find the neurons that make a text-to-image model give training images back, and prune them."""


@contextmanager
def _errors_reported() -> Iterator[None]:
    """The one place that catches errors: exit code 1 for a named one, 130 when interrupted."""
    console = Console(stderr=True)
    try:
        yield
    except NemoPruneError as error:
        console.print("[bold red]Error:[/]", end=" ")
        console.print(str(error), markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(1) from error
    except KeyboardInterrupt as interrupt:
        console.print("Stopped. The same command goes on from here.")
        raise typer.Exit(130) from interrupt


@contextmanager
def _progress_bar(quiet: bool) -> Iterator[Callable[[str, int, int], None]]:
    """One bar on stderr: stage, i of N, time left; off where stderr is no terminal."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=quiet or not console.is_terminal) as bar:
        task = bar.add_task("Load the model", total=None)
        stage_shown = ""

        def update(stage: str, done: int, total: int) -> None:
            nonlocal stage_shown
            if stage != stage_shown:
                stage_shown = stage
                bar.reset(task, description=_STAGE_NAMES[stage], total=total)
            bar.update(task, completed=done)

        yield update


# Options that several commands share.
ModelOption = Annotated[
    str, typer.Option("--model", help="`demo`, a diffusers folder, or a Hub id such as CompVis/stable-diffusion-v1-4.")
]
PromptsOption = Annotated[
    str | None,
    typer.Option("--prompts", help="Captions to examine: files (.txt .csv .jsonl .parquet, .gz), or a Hub data set "
                 "owner/name:split:column. The demo has its own."),
]  # fmt: skip
OrdinaryOption = Annotated[
    str | None,
    typer.Option("--calibration-prompts", help="Ordinary captions, from the same sources; the demo has its own."),
]
ColumnOption = Annotated[str | None, typer.Option("--prompt-column", help="Column of the captions. (default: found)")]
LimitOption = Annotated[int | None, typer.Option("--limit", min=1, help="Examine the first so many captions only.")]
CalibrationOption = Annotated[
    Path | None, typer.Option("--calibration", help="A calibration that `nemo-prune calibrate` made of them.")
]
PresetOption = Annotated[str, typer.Option("--preset", help="`released-code` (the published numbers) or `paper`.")]
SeedOption = Annotated[
    int | None, typer.Option("--seed", help=f"Seed of the initial latents. (default: {_DEFAULTS.seed})")
]
NumSamplesOption = Annotated[
    int | None,
    typer.Option("--num-samples", help=f"Initial latents per prompt. (default: {_DEFAULTS.num_samples})"),
]
ThresholdOption = Annotated[
    float | None,
    typer.Option("--threshold", help="Similarity above which a prompt counts as memorized. (default: calibrated)"),
]
RevisionOption = Annotated[str | None, typer.Option("--revision", help="Branch, tag or commit of the Hub repo.")]
VariantOption = Annotated[str | None, typer.Option("--variant", help="Weights variant, such as fp16.")]
DeviceOption = Annotated[str, typer.Option("--device", help="torch device; `auto` takes a GPU where there is one.")]
DtypeOption = Annotated[str, typer.Option("--dtype", help="float32, float16 or bfloat16.")]
BatchSizeOption = Annotated[
    int | None,
    typer.Option("--batch-size", help="Latents at once. (default: those of one prompt, on a GPU of four)"),
]
MarginOption = Annotated[
    float,
    typer.Option("--margin", help="Below float32: distance from the threshold within which float32 decides again."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON object on stdout, and nothing else there.")]


@app.command()
def run(
    model: ModelOption,
    out: Annotated[Path, typer.Option(help="Folder of the pruned model; what lies there can be published.")],
    work: Annotated[
        Path | None, typer.Option(help="Folder of what the run knows; not for publication. (default: OUT.work)")
    ] = None,
    prompts: PromptsOption = None,
    prompt_column: ColumnOption = None,
    limit: LimitOption = None,
    calibration_prompts: OrdinaryOption = None,
    calibration: CalibrationOption = None,
    preset: PresetOption = "released-code",
    seed: SeedOption = None,
    num_samples: NumSamplesOption = None,
    threshold: ThresholdOption = None,
    merge: Annotated[
        str, typer.Option(help="`union` of all prompts' neurons (the paper's), or `incremental`: prompt by prompt.")
    ] = "union",
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
    include_unresolved: Annotated[
        bool, typer.Option("--include-unresolved", help="Also prune the sets of unresolved prompts.")
    ] = False,
    publish_examples: Annotated[
        bool, typer.Option("--publish-examples", help="Put captions and a before/after grid into the card.")
    ] = False,
    revision: RevisionOption = None,
    variant: VariantOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "float32",
    batch_size: BatchSizeOption = None,
    margin: MarginOption = _MODEL_DEFAULTS.margin,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace OUT, and discard another run's work folder.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Find the memorization neurons, prune them and write a model that stock diffusers loads.

    Example: [bold]nemo-prune run --model demo --out pruned/[/]
    """
    with _errors_reported(), _progress_bar(quiet=as_json) as progress:
        settings = LocalizationSettings.preset(preset, seed=seed, num_samples=num_samples, threshold=threshold)
        out = out.absolute()
        options = RunOptions(
            out=out,
            work=work or out.parent / f"{out.name}.work",
            model=ModelOptions(device, dtype, batch_size, margin),
            merge=merge,
            preserve=preserve,
            calibration=calibration,
            include_unresolved=include_unresolved,
            publish_examples=publish_examples,
            overwrite=overwrite,
        )
        # torch and diffusers take seconds to import; a mistyped setting should not have to wait for them.
        _quieten_libraries()
        from nemo_prune.demo import DEMO_GUIDANCE_SCALE, DEMO_MODEL
        from nemo_prune.run import prune_model
        from nemo_prune.source import resolve_model

        examined = _examined(model, prompts, prompt_column, limit)
        ordinary = _ordinary(model, calibration_prompts)
        if guidance_scale is None and model == DEMO_MODEL:
            guidance_scale = DEMO_GUIDANCE_SCALE
        verification = VerificationSettings()
        if guidance_scale is not None:
            verification = VerificationSettings(guidance_scale=guidance_scale)
        source = resolve_model(model, revision, variant)
        result = prune_model(source, examined, ordinary, options, settings, verification, progress)
    if as_json:
        typer.echo(json.dumps({**result.facts, "out": str(result.out) if result.out else None}, indent=2))
    else:
        _show_result(result)


@app.command()
def calibrate(
    model: ModelOption,
    out: Annotated[Path, typer.Option(help="The file to write, such as calibration.safetensors.")],
    calibration_prompts: OrdinaryOption = None,
    preset: PresetOption = "released-code",
    seed: SeedOption = None,
    num_samples: NumSamplesOption = None,
    revision: RevisionOption = None,
    variant: VariantOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "float32",
    batch_size: BatchSizeOption = None,
    margin: MarginOption = _MODEL_DEFAULTS.margin,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Measure on ordinary captions what is usual for a model: the first stage of `run` alone.

    Example: [bold]nemo-prune calibrate --model demo --out calibration.safetensors[/]
    """
    with _errors_reported(), _progress_bar(quiet=as_json) as progress:
        settings = LocalizationSettings.preset(preset, seed=seed, num_samples=num_samples)
        _quieten_libraries()
        from nemo_prune.run import calibrate_model
        from nemo_prune.session import Session
        from nemo_prune.source import resolve_model

        ordinary = _ordinary(model, calibration_prompts)
        options = ModelOptions(device, dtype, batch_size, margin)
        session = Session(resolve_model(model, revision, variant), options, settings)
        found = calibrate_model(session, ordinary, out, overwrite, progress)
    facts = {"threshold": found.threshold, "similarity_mean": found.similarity_mean,
             "similarity_std": found.similarity_std, "num_prompts": found.statistics.num_prompts}  # fmt: skip
    if as_json:
        typer.echo(json.dumps({**facts, "out": str(out)}, indent=2))
    else:
        for name, value in facts.items():
            typer.echo(f"{name}: {value:.4g}")
        typer.echo(f"Calibration: {out}")


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
    seed: SeedOption = None,
    num_samples: NumSamplesOption = None,
    threshold: ThresholdOption = None,
    revision: RevisionOption = None,
    variant: VariantOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "float32",
    batch_size: BatchSizeOption = None,
    margin: MarginOption = _MODEL_DEFAULTS.margin,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Discard another run's work folder.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Find the memorization neurons of each caption and keep them for `merge`; nothing is pruned.

    Example: [bold]nemo-prune localize --model demo --calibration calibration.safetensors --work found/[/]
    """
    with _errors_reported(), _progress_bar(quiet=as_json) as progress:
        settings = LocalizationSettings.preset(preset, seed=seed, num_samples=num_samples, threshold=threshold)
        options = RunOptions(
            out=work, work=work, model=ModelOptions(device, dtype, batch_size, margin), calibration=calibration,
            overwrite=overwrite,
        )  # fmt: skip
        _quieten_libraries()
        from nemo_prune.localize import count_statuses
        from nemo_prune.run import localize_model
        from nemo_prune.session import Session
        from nemo_prune.source import resolve_model

        examined = _examined(model, prompts, prompt_column, limit)
        ordinary = [] if calibration else _ordinary(model, calibration_prompts)
        session = Session(resolve_model(model, revision, variant), options.model, settings)
        file, localizations = localize_model(session, examined, ordinary, options, progress)
        facts = count_statuses(localizations)
    if as_json:
        typer.echo(json.dumps({**facts, "results": str(file)}, indent=2))
    else:
        for status, number in facts.items():
            typer.echo(f"{status.replace('_', ' ')}: {number}")
        typer.echo(f"Results, not for publication: {file}")


@app.command()
def merge(
    results: Annotated[
        list[Path], typer.Argument(help="localizations.jsonl of work folders, or .csv of the authors' released code.")
    ],
    out: Annotated[Path, typer.Option(help="The mask to write, such as mask.safetensors.")],
    include_unresolved: Annotated[
        bool, typer.Option("--include-unresolved", help="Also the sets of unresolved prompts.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Merge what was found for captions into one mask: the union, as in the paper.

    Example: [bold]nemo-prune merge found/localizations.jsonl --out mask.safetensors[/]
    """
    with _errors_reported():
        from nemo_prune.export import check_new_file
        from nemo_prune.localize import count_statuses
        from nemo_prune.merge import union_mask
        from nemo_prune.results import merge_results

        check_new_file(out, overwrite)
        found = merge_results(results)
        mask = union_mask(found.localizations, found.header.layers, include_unresolved)
        mask.save(out, {"settings": found.header.settings, "threshold": found.header.threshold})
    facts = {
        "prompts": len(found.localizations),
        **count_statuses(found.localizations),
        "num_neurons": mask.num_neurons,
        "of": sum(mask.sizes.values()),
    }
    if as_json:
        typer.echo(json.dumps({**facts, "counts": mask.counts, "out": str(out)}, indent=2))
    else:
        typer.echo(f"{facts['num_neurons']} of {facts['of']} neurons, {facts['localized']} of "
                   f"{facts['prompts']} prompts localized. Mask: {out}")  # fmt: skip


@app.command()
def demo(folder: Annotated[Path, typer.Argument(help="A new folder.")]) -> None:
    """Write out the demo model with its captions and training images.

    Example: [bold]nemo-prune demo demo-model/[/]
    """
    from nemo_prune.demo import CALIBRATION_FILE, PROMPTS_FILE, write_demo

    with _errors_reported():
        write_demo(folder)
    typer.echo(f"The demo model lies in {folder}. The same run by path:")
    typer.echo(
        f"nemo-prune run --model {folder} --prompts {folder / PROMPTS_FILE} "
        f"--calibration-prompts {folder / CALIBRATION_FILE} --guidance-scale 3 --out pruned/"
    )


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(help="A mask file or a folder that `run` wrote.")],
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Show a mask: layers, rows, source and settings.

    Example: [bold]nemo-prune inspect pruned/[/]
    """
    with _errors_reported():
        from nemo_prune.mask import NeuronMask
        from nemo_prune.release import MASK_FILE

        file = path / MASK_FILE if path.is_dir() else path
        mask, metadata = NeuronMask.load_with_metadata(file)
    rows = {name: pruned.nonzero().flatten().tolist() for name, pruned in mask.layers.items()}
    if as_json:
        typer.echo(json.dumps({"rows": rows, "sizes": mask.sizes, "metadata": metadata}, indent=2))
        return
    console = Console()
    table = Table("layer", "pruned", "of", "rows", title=f"{mask.num_neurons} neurons pruned")
    for name, indices in rows.items():
        table.add_row(name, str(len(indices)), str(mask.sizes[name]), ", ".join(map(str, indices)))
    console.print(table)
    base = metadata.get("base", {})
    console.print(f"Base: {base.get('name', 'unknown')}, commit {base.get('commit') or 'none'}", markup=False)
    for name, value in metadata.get("settings", {}).items():
        console.print(f"{name}: {value}", markup=False)


def _examined(model: str, prompts: str | None, column: str | None, limit: int | None) -> Any:
    """The captions to examine; the demo model has its own."""
    from nemo_prune.demo import DEMO_MODEL, PROMPTS_FILE, demo_folder
    from nemo_prune.prompts import read_corpus

    if prompts is None and model != DEMO_MODEL:
        raise PromptError(
            "This model has no prompts of its own. Give the captions to examine with --prompts and ordinary ones, "
            "hundreds at best, with --calibration-prompts."
        )
    return read_corpus(prompts or demo_folder() / PROMPTS_FILE, column, limit)


def _ordinary(model: str, prompts: str | None) -> list[str]:
    """Ordinary captions; the demo model has its own."""
    from nemo_prune.demo import CALIBRATION_FILE, DEMO_MODEL, demo_folder
    from nemo_prune.prompts import read_prompts

    if prompts is None and model != DEMO_MODEL:
        raise PromptError(
            "This model has no ordinary prompts of its own. Give some, hundreds at best, with --calibration-prompts."
        )
    return [prompt.text for prompt in read_prompts(prompts or demo_folder() / CALIBRATION_FILE)]


def _show_result(result: Any) -> None:
    """Tables on the terminal: what was found, what changed and where to look."""
    # The card's rows are the terminal's rows: one wording for both.
    from nemo_prune.card import before_after_rows

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


def entry() -> None:
    """The console script."""
    sys.exit(app())


if __name__ == "__main__":
    entry()
