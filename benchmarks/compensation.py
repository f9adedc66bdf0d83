"""A yardstick for masks: pruned neurons whose part the kept ones of their layer take over.

A kept mean replaces what a pruned neuron gives by a constant. Here what the other neurons of its layer tell of it
replaces it, by least squares on what attention takes from them (as layers are reconstructed in compression, arXiv
1707.06168). On memorized captions they shall tell no more than the mean: else the pictures come back that way. In the
weights, the rows are zeroed, and the projection behind the attention is changed, weight and bias.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nemo_prune.engine.diffusion import NoisePredictor
from nemo_prune.engine.means import POINTS, SEED, seeing_attended
from nemo_prune.engine.ordinary import points_of_ways
from nemo_prune.mask import NeuronMask, bias_behind

# Weight of the memorized captions against ordinary ones, and of the ridge as a share of the neurons' mean variance.
MEMORIZED, RIDGE = 10.0, 0.01


@dataclass(frozen=True)
class Moments:
    """What attention takes from the value neurons of a layer, over places, captions and their ways from noise to image.

    Attributes:
        mean: [out_features].
        products: mean of the products of all pairs, [out_features, out_features].
    """

    mean: Tensor
    products: Tensor

    def around(self, centre: Tensor) -> Tensor:
        """Mean of the products of the distances from a centre, [out_features, out_features]."""
        crossed = torch.outer(self.mean, centre)
        return self.products - crossed - crossed.T + torch.outer(centre, centre)


@torch.no_grad()
def attended_moments(predictor: NoisePredictor, texts: Sequence[str]) -> dict[str, Moments]:
    """Moments of what attention takes, dotted module name of the value projection -> moments; 8 passes a caption."""
    sums = {
        name: [torch.zeros(size).double(), torch.zeros(size, size).double(), 0]
        for name, size in predictor.sizes.items()
    }

    def add(name: str, attended: Tensor) -> None:
        values, total = attended.double().flatten(0, 1).cpu(), sums[name]
        total[0] += values.sum(dim=0)
        total[1] += values.T @ values
        total[2] += len(values)

    first = predictor.initial_latents(SEED, len(texts))
    with seeing_attended(predictor, add):
        for _ in points_of_ways(predictor, predictor.encode(texts), first, POINTS):
            pass
    return {name: Moments(mean / count, products / count) for name, (mean, products, count) in sums.items()}


def compensated_weights(
    predictor: NoisePredictor, mask: NeuronMask, memorized: Sequence[str], ordinary: Sequence[str]
) -> dict[str, Tensor]:
    """The weights of a pruned model whose kept neurons take over.

    For pruned neurons J and kept ones K of a layer, C minimises |z_J - mean - C (z_K - mean)|^2 over ordinary captions
    plus a weight times |C (z_K - mean)|^2 over memorized ones; z is what attention takes from the neurons.

    Args:
        predictor: the model.
        mask: what is pruned.
        memorized: captions whose pictures must not come back.
        ordinary: captions that are to stay as they are.

    Returns:
        Name of a parameter -> its new values, float32.
    """
    usual, theirs = attended_moments(predictor, ordinary), attended_moments(predictor, memorized)
    parameters, found = dict(predictor.pipe.unet.named_parameters()), {}
    for name, pruned in mask.layers.items():
        if not pruned.any():
            continue
        mean, kept = usual[name].mean, ~pruned
        spread = usual[name].around(mean)
        given = spread[kept][:, kept] + MEMORIZED * theirs[name].around(mean)[kept][:, kept]
        given += RIDGE * spread.diagonal().mean() * torch.eye(int(kept.sum())).double()
        taken_over = torch.linalg.solve(given, spread[kept][:, pruned]).T
        bias = bias_behind(name)
        weight = bias.removesuffix("bias") + "weight"
        rows, behind = parameters[f"{name}.weight"].detach().clone(), parameters[weight].detach().cpu().double()
        rows[pruned] = 0
        found[f"{name}.weight"] = rows
        changed = behind.clone()
        changed[:, kept] += behind[:, pruned] @ taken_over
        found[weight] = changed.float()
        shift = behind[:, pruned] @ (mean[pruned] - taken_over @ mean[kept])
        found[bias] = (parameters[bias].detach().cpu().double() + shift).float()
    return found
