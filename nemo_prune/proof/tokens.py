"""Which tokens drive the changed neurons: start, words, end or padding."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from diffusers import StableDiffusionPipeline

from nemo_prune.engine.layers import find_text_projections
from nemo_prune.mask import NeuronMask
from nemo_prune.proof.drawing import encode

TOKENS = ("start", "words", "end", "padding")


@dataclass(frozen=True)
class TokenActivations:
    """Mean absolute activation of the changed neurons by kind of token, in the base.

    End and padding tokens are reported to carry memorization (arXiv 2605.02908).

    Attributes:
        memorized: kind of token -> mean over memorized captions, tokens of that kind and changed neurons.
        ordinary: the same over ordinary captions.
    """

    memorized: Mapping[str, float]
    ordinary: Mapping[str, float]


def token_activations(
    base: StableDiffusionPipeline, rows: NeuronMask, memorized: Sequence[str], ordinary: Sequence[str]
) -> TokenActivations:
    """Measure the activations; one matrix product per layer and caption, no pass.

    Args:
        base: the unpruned model.
        rows: the changed neurons.
        memorized: captions.
        ordinary: captions.
    """
    return TokenActivations(_by_token(base, rows, memorized), _by_token(base, rows, ordinary))


@torch.no_grad()
def _by_token(base: StableDiffusionPipeline, rows: NeuronMask, texts: Sequence[str]) -> dict[str, float]:
    layers = find_text_projections(base.unet, "both")
    values: dict[str, list[float]] = {name: [] for name in TOKENS}
    for text in texts:
        embeds = encode(base, text)
        activations = torch.cat(
            [
                layers[name](embeds.to(layers[name].weight)).abs().float()[:, chosen.to(embeds.device)]
                for name, chosen in rows.layers.items()
                if chosen.any()
            ],
            dim=1,
        ).mean(dim=1)
        used = min(len(base.tokenizer(text, truncation=True).input_ids), len(embeds))
        # Where a caption fills the encoder, its last token is the end and there is no padding.
        parts = {"start": slice(0, 1), "words": slice(1, used - 1), "end": slice(used - 1, used),
                 "padding": slice(used, None)}  # fmt: skip
        for name, part in parts.items():
            values[name] += activations[part].tolist()
    return {name: sum(each) / len(each) for name, each in values.items() if each}
