"""A yardstick for masks: neurons that keep their mean when they are suppressed.

Attention weights sum to 1, so that a constant on a value neuron may move into the bias of the output projection. With
every neuron centred in this way on what ordinary captions have, the model predicts what it did before; a neuron that is
suppressed now still gives the constant. In weights: its row is zeroed, and the bias of `to_out` changes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nemo_prune.engine.diffusion import NoisePredictor
from nemo_prune.engine.gates import predict_gated
from nemo_prune.engine.ordinary import OrdinaryStates

AT_ONCE = 32


@torch.no_grad()
def centre(predictor: NoisePredictor, states: OrdinaryStates) -> None:
    """Move every value neuron's mean over ordinary captions into the output projection's bias, in place.

    Args:
        predictor: the model; only its value projections are searched.
        states: points on the ways of ordinary captions, one sample pass each.
    """
    outputs = {name: predictor.pipe.unet.get_submodule(name.replace(".to_v", ".to_out.0")) for name in predictor.layers}
    for name, mean in attended_means(predictor, states, outputs).items():
        predictor.layers[name].bias = nn.Parameter(-mean)
        outputs[name].bias += outputs[name].weight @ mean


def attended_means(
    predictor: NoisePredictor, states: OrdinaryStates, outputs: dict[str, nn.Linear]
) -> dict[str, Tensor]:
    """Dotted module name -> what attention takes from each value neuron, the mean over places and captions."""
    sums = {name: torch.zeros(size, device=states.latents.device) for name, size in predictor.sizes.items()}
    handles = [
        outputs[name].register_forward_pre_hook(
            lambda module, inputs, name=name: sums[name].add_(inputs[0].float().mean(dim=1).sum(dim=0))
        )
        for name in sums
    ]
    open_gates = torch.ones(1, sum(predictor.sizes.values()), device=states.latents.device)
    try:
        for start in range(0, len(states), AT_ONCE):
            part = slice(start, start + AT_ONCE)
            predict_gated(
                predictor, states.latents[part], states.prompt_embeds[part], open_gates, states.timesteps[part]
            )
    finally:
        for handle in handles:
            handle.remove()
    return {name: total / len(states) for name, total in sums.items()}
