"""What a mask holds: `nemo-prune inspect`."""

import json
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from nemo_prune.cli.console import app, errors_reported
from nemo_prune.files.untrusted import printable


@app.command()
def inspect(
    name: Annotated[str, typer.Argument(metavar="MASK", help="A mask file, a release, or a Hub id of either.")],
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Show a mask: layers, rows, source and settings.

    Example: [bold]nemo-prune inspect pruned/[/]
    """
    with errors_reported():
        from nemo_prune.mask import NeuronMask
        from nemo_prune.models.mask_source import find_mask

        mask, metadata = NeuronMask.load_with_metadata(find_mask(name))
    rows = {name: pruned.nonzero().flatten().tolist() for name, pruned in mask.layers.items()}
    if as_json:
        typer.echo(json.dumps({"rows": rows, "sizes": mask.sizes, "metadata": metadata}, indent=2))
        return
    console = Console()
    needed = metadata.get("prompts_per_neuron", {})
    shown = "rows (prompts whose own set has it)" if needed else "rows"
    table = Table("layer", "pruned", "of", shown, title=f"{mask.num_neurons} neurons pruned")
    for name, indices in rows.items():
        table.add_row(name, str(len(indices)), str(mask.sizes[name]), _listed(indices, needed.get(name, {})))
    console.print(table)
    base = metadata.get("base", {})
    told = [f"Base: {base.get('name') or 'unknown'}, commit {base.get('commit') or 'none'}"]
    told += [f"{name}: {value}" for name, value in metadata.get("settings", {}).items()]
    for line in told:
        console.print(printable(line), markup=False)


def _listed(rows: list[int], needed: dict[str, int]) -> str:
    return ", ".join(f"{row} ({needed[str(row)]})" if str(row) in needed else str(row) for row in rows)
