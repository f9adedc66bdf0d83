"""A yardstick for masks: the dense edit of the value projections that sends memorized captions to ordinary ones.

Values are linear in the text embedding, so that the edit needs no U-Net pass. It shows what zeroing rows gives away.
It is not a product: it moves every weight of the layers, and what a mask does can no longer be read off it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from nemo_prune.engine.diffusion import NoisePredictor

# Weight of ordinary captions' values against memorized ones', and of the old weights (share of the embeddings' power).
HELD, RIDGE = 1.0, 1e-3


@torch.no_grad()
def edited_weights(predictor: NoisePredictor, memorized: Sequence[str], ordinary: Sequence[str]) -> dict[str, Tensor]:
    """Solve for the value weights of every layer (least squares with a ridge towards the old ones).

    W' minimises |W' M - W T|^2 / m + held |W' O - W O|^2 / o + ridge |W' - W|^2: M are the memorized captions' token
    embeddings, T those of the mean ordinary caption at the same position, O those of ordinary captions.

    Args:
        predictor: the model.
        memorized: captions.
        ordinary: captions that are held.

    Returns:
        Name of a parameter -> weight [out_features, width], float32.
    """
    sent, held = predictor.encode(memorized).double(), predictor.encode(ordinary).double()
    target = held.mean(dim=0).expand_as(sent)
    sent, target, kept = (each.flatten(0, 1) for each in (sent, target, held))
    power = HELD * kept.T @ kept / len(kept)
    ridge = RIDGE * power.diagonal().mean() * torch.eye(kept.shape[1], dtype=torch.double)
    wanted = target.T @ sent / len(sent) + power + ridge
    given = sent.T @ sent / len(sent) + power + ridge
    # W' given = W wanted, and `given` is symmetric.
    move = torch.linalg.solve(given, wanted.T).T
    return {f"{name}.weight": (layer.weight.double() @ move).float() for name, layer in predictor.layers.items()}


@contextmanager
def replaced_weights(predictor: NoisePredictor, weights: dict[str, Tensor]) -> Iterator[None]:
    """Use other values of the U-Net's parameters, by their names, while the context lasts."""
    parameters = dict(predictor.pipe.unet.named_parameters())
    before = {name: parameters[name].data for name in weights}
    try:
        for name, values in weights.items():
            parameters[name].data = values.to(before[name])
        yield
    finally:
        for name, values in before.items():
            parameters[name].data = values
