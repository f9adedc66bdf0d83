"""The authors' released code: its layers, its threshold and its tables of results."""

import ast
import csv
import math
from pathlib import Path

from nemo_prune.engine.localize import PromptLocalization
from nemo_prune.mask import Neuron

# The seven lists of a prompt: the value layers of SD v1-4, in the order of execution.
SD_V1_LAYERS = {
    **{
        f"down_blocks.{block}.attentions.{attention}.transformer_blocks.0.attn2.to_v": 320 * 2**block
        for block in range(3)
        for attention in range(2)
    },
    "mid_block.attentions.0.transformer_blocks.0.attn2.to_v": 1280,
}
RELEASED_CODE_THRESHOLD = 0.428


def read_table(path: Path) -> tuple[PromptLocalization, ...]:
    """A table with seven lists of neurons per prompt; resolved if the initial score reached the threshold.

    Raises:
        ValueError, KeyError, SyntaxError, csv.Error: it is not such a table.
    """
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file, delimiter=";"))
    return tuple(
        PromptLocalization(
            prompt=row["Caption"],
            status="localized" if float(row["Initial SSIM"]) <= RELEASED_CODE_THRESHOLD else "unresolved",
            # The tables do not have it.
            score=math.nan,
            candidates=_neurons_of_lists(row["Initial Neurons"]),
            neurons=_neurons_of_lists(row["Refined Neurons"]),
            candidates_score=float(row["Initial SSIM"]),
            neurons_score=float(row["Refined SSIM"]),
        )
        for row in rows
    )


def _neurons_of_lists(text: str) -> tuple[Neuron, ...]:
    by_layer = zip(SD_V1_LAYERS, ast.literal_eval(text), strict=True)
    return tuple(_neuron(layer, index) for layer, indices in by_layer for index in dict.fromkeys(indices))


def _neuron(layer: str, index: object) -> Neuron:
    if type(index) is not int:
        raise ValueError(f"{index!r} of {layer!r} is not a neuron")
    return Neuron(layer, index)
