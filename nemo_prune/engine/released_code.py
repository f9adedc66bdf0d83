"""The authors' released code: its layers, its threshold and its tables of results."""

import ast
import math
from collections.abc import Mapping
from pathlib import Path

from nemo_prune.engine.localize import PromptLocalization
from nemo_prune.files.tables import open_table, opened_text
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
    """A table with seven lists of neurons per prompt; what an initial set did decides about its prompt.

    A prompt is resolved where its initial score reached the threshold; a refined score below it does not make up for
    an initial one above it. A prompt without a set that is not above the threshold was not memorized: the released
    code writes seven empty lists and the score 0 for it.

    Raises:
        ValueError, KeyError, SyntaxError: it is not such a table.
    """
    with path.open("rb") as file:
        table = open_table(opened_text(file, newline=""), lambda name: name == "Initial Neurons")
        return tuple(_localization(dict(zip(table.columns, cells, strict=False))) for _, cells in table.rows)


def _localization(row: Mapping[str, str]) -> PromptLocalization:
    score, candidates = float(row["Initial SSIM"]), _neurons_of_lists(row["Initial Neurons"])
    status = "localized" if score <= RELEASED_CODE_THRESHOLD else "unresolved"
    if status == "localized" and not candidates:
        # The tables do not have the memorization score.
        return PromptLocalization(prompt=row["Caption"], status="not_memorized", score=math.nan)
    return PromptLocalization(
        prompt=row["Caption"],
        status=status,
        score=math.nan,
        candidates=candidates,
        neurons=_neurons_of_lists(row["Refined Neurons"]),
        candidates_score=score,
        neurons_score=float(row["Refined SSIM"]),
    )


def _neurons_of_lists(text: str) -> tuple[Neuron, ...]:
    by_layer = zip(SD_V1_LAYERS, ast.literal_eval(text), strict=True)
    return tuple(_neuron(layer, index) for layer, indices in by_layer for index in dict.fromkeys(indices))


def _neuron(layer: str, index: object) -> Neuron:
    if type(index) is not int:
        raise ValueError(f"{index!r} of {layer!r} is not a neuron")
    return Neuron(layer, index)
