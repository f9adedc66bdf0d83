"""Result files into one mask: `nemo-prune merge`."""

from pathlib import Path
from typing import Annotated

import typer

from nemo_prune.cli.console import app, errors_reported, print_json
from nemo_prune.cli.options import RELEASE, JsonOption, option, setting
from nemo_prune.settings import Plan


@app.command()
def merge(
    results: Annotated[
        list[Path],
        typer.Argument(help="localizations.jsonl of work folders, or .csv tables of the NeMo authors' released code."),
    ],
    out: Annotated[Path, option(RELEASE, "The mask to write, such as mask.safetensors.")],
    include_unresolved: Annotated[bool, setting(RELEASE, Plan, "include_unresolved", "--include-unresolved")] = False,
    overwrite: Annotated[bool, option(RELEASE, "Replace the file.", "--overwrite")] = False,
    as_json: JsonOption = False,
) -> None:
    """Merge result files of `localize` into one mask: the union, as in the paper.

    Tables of the released code are separated by semicolons and have seven lists of neurons per prompt.

    Example: `nemo-prune merge found/localizations.jsonl --out mask.safetensors`
    """
    with errors_reported():
        from nemo_prune.engine.localize import count_statuses
        from nemo_prune.engine.merge import prompts_per_neuron, union_mask
        from nemo_prune.engine.results import merge_results
        from nemo_prune.facts import MaskFacts, StatusCounts
        from nemo_prune.files.staging import check_new_file

        check_new_file(out, overwrite)
        found = merge_results(results)
        mask = union_mask(found.localizations, found.header.layers, include_unresolved)
        total, statuses = len(found.localizations), count_statuses(found.localizations)
        facts = MaskFacts(
            settings=found.header.settings,
            threshold=found.header.threshold,
            model=found.header.model,
            prompts=StatusCounts(total=total, **statuses, unresolved_included=include_unresolved),
            prompts_per_neuron=prompts_per_neuron(found.localizations, mask, include_unresolved),
        )
        mask.save(out, facts)
    num_neurons, size = mask.num_neurons, sum(mask.sizes.values())
    if as_json:
        counts = {"num_neurons": num_neurons, "of": size, "counts": mask.counts}
        print_json({"prompts": total, **statuses, **counts, "out": str(out)})
    else:
        typer.echo(
            f"{num_neurons} of {size} neurons, {statuses['localized']} of {total} prompts localized. Mask: {out}"
        )
