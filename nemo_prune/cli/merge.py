"""Result files into one mask: `nemo-prune merge`."""

import json
from pathlib import Path
from typing import Annotated

import typer

from nemo_prune.cli.console import app, errors_reported
from nemo_prune.cli.options import (
    JsonOption,
)


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
    with errors_reported():
        from nemo_prune.engine.localize import count_statuses
        from nemo_prune.engine.merge import prompts_per_neuron, union_mask
        from nemo_prune.engine.results import merge_results
        from nemo_prune.files.staging import check_new_file

        check_new_file(out, overwrite)
        found = merge_results(results)
        mask = union_mask(found.localizations, found.header.layers, include_unresolved)
        statuses = count_statuses(found.localizations)
        described = {
            "settings": found.header.settings,
            "threshold": found.header.threshold,
            "model": found.header.model,
            "prompts": {"total": len(found.localizations), **statuses, "unresolved_included": include_unresolved},
            "prompts_per_neuron": prompts_per_neuron(found.localizations, mask, include_unresolved),
        }
        mask.save(out, described)
    facts = {
        "prompts": len(found.localizations),
        **statuses,
        "num_neurons": mask.num_neurons,
        "of": sum(mask.sizes.values()),
    }
    if as_json:
        typer.echo(json.dumps({**facts, "counts": mask.counts, "out": str(out)}, indent=2))
    else:
        typer.echo(f"{facts['num_neurons']} of {facts['of']} neurons, {facts['localized']} of "
                   f"{facts['prompts']} prompts localized. Mask: {out}")  # fmt: skip
