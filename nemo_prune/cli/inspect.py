"""What a mask holds: `nemo-prune inspect`."""

from collections.abc import Mapping
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from nemo_prune.cli.console import app, errors_reported, print_json
from nemo_prune.cli.options import JsonOption
from nemo_prune.facts import BaseFacts
from nemo_prune.files.json_values import to_json
from nemo_prune.files.untrusted import printable


@app.command()
def inspect(
    name: Annotated[str, typer.Argument(metavar="MASK", help="A mask file, a release, or a Hub id of either.")],
    as_json: JsonOption = False,
) -> None:
    """Show a mask: layers, rows, source and settings.

    The number beside a row says for how many prompts it was found. Prompts that only other prompts' neurons silence do
    not count.

    Example: `nemo-prune inspect pruned/`
    """
    with errors_reported():
        from nemo_prune.mask import NeuronMask
        from nemo_prune.models.mask_source import find_mask

        mask, facts = NeuronMask.load_with_facts(find_mask(name))
    rows = {name: pruned.nonzero().flatten().tolist() for name, pruned in mask.layers.items()}
    if as_json:
        # Of matrices with millions of numbers their norms.
        behind = {
            "shifts": {name: shift.tolist() for name, shift in mask.shifts.items()},
            "combination_norms": {name: float(each.norm()) for name, each in mask.combinations.items()},
            "withheld": to_json(mask.withheld),
        }
        print_json({"rows": rows, **behind, "sizes": mask.sizes, "metadata": facts.to_json()})
        return
    console = Console()
    needed = facts.prompts_per_neuron or {}
    shown = "rows (prompts whose own set has it)" if needed else "rows"
    table = Table("layer", "pruned", "of", shown, title=f"{mask.num_neurons} neurons pruned")
    for name, indices in rows.items():
        table.add_row(name, str(len(indices)), str(mask.sizes[name]), _listed(indices, needed.get(name, {})))
    console.print(table)
    base = facts.base or BaseFacts()
    told = [f"Base: {base.name or 'unknown'}, commit {base.commit or 'none'}"]
    if mask.combinations:
        told.append("Kept neurons stand in for them: the weights and biases behind these layers change by that.")
    elif mask.withheld:
        told.append(
            f"The {len(mask.withheld)} weights and biases behind these layers were changed, too. The work folder of "
            "the run says how; this mask has their digests."
        )
    elif mask.shifts:
        told.append(f"The neurons keep their means: {len(mask.shifts)} biases behind these layers are shifted.")
    told += [f"{name}: {value}" for name, value in (facts.settings or {}).items()]
    for line in told:
        console.print(printable(line), markup=False)


def _listed(rows: list[int], needed: Mapping[int, int]) -> str:
    return ", ".join(f"{row} ({needed[row]})" if row in needed else str(row) for row in rows)
