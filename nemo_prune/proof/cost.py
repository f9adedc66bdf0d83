"""What a mask costs ordinary captions, and the controls that it is compared with."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from nemo_prune.engine.diffusion import NoisePredictor
from nemo_prune.mask import Neuron, NeuronMask


def noise_change(
    predictor: NoisePredictor, texts: Sequence[str], masks: Mapping[str, NeuronMask], num_samples: int = 2
) -> dict[str, float]:
    """How much masks change the noise prediction of prompts: the norm of the change over its own.

    Args:
        predictor: the unpruned model.
        texts: ordinary prompts.
        masks: name -> mask.
        num_samples: latents per prompt.

    Returns:
        Name -> relative change, the mean over prompts and latents; 0 is no change.
    """
    for mask in masks.values():
        mask.check(predictor.sizes)
    latents = predictor.initial_latents(num_samples=num_samples)
    suppressed = [(), *(mask.neurons for mask in masks.values())]
    noise_pred = predictor.predict_each(
        latents.repeat(len(texts) * len(suppressed), 1, 1, 1),
        predictor.encode(texts).repeat_interleave(len(suppressed) * num_samples, dim=0),
        [neurons for _ in texts for neurons in suppressed for _ in range(num_samples)],
    )
    noise_pred = noise_pred.flatten(1).unflatten(0, (len(texts), len(suppressed), num_samples))
    changes = (noise_pred[:, 1:] - noise_pred[:, :1]).norm(dim=-1) / noise_pred[:, :1].norm(dim=-1)
    return dict(zip(masks, changes.mean(dim=(0, 2)).tolist(), strict=True))


def matched_random_mask(mask: NeuronMask, activation: Mapping[str, Tensor], seed: int) -> NeuronMask:
    """As many random neurons as a mask has, in the same layers, as active, and outside of it.

    For each pruned neuron one is drawn among the five most alike in activation that are neither
    pruned nor drawn yet. A layer that is pruned by more than half can't be matched in full.

    Args:
        mask: the mask to match.
        activation: dotted module name -> usual activation [out_features].
        seed: seed of the draw.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn: list[Neuron] = []
    for name, pruned in mask.layers.items():
        free = set((~pruned).nonzero().flatten().tolist())
        for index in pruned.nonzero().flatten().tolist():
            distance = (activation[name] - activation[name][index]).abs().tolist()
            alike = sorted(free, key=lambda other: distance[other])[:5]
            if alike:
                chosen = alike[int(torch.randint(len(alike), (1,), generator=generator))]
                free.remove(chosen)
                drawn.append(Neuron(name, chosen))
    return NeuronMask.from_neurons(drawn, mask.sizes)


def full_mask(sizes: Mapping[str, int]) -> NeuronMask:
    """Every neuron of every layer: the yardstick for the change that a mask makes."""
    return NeuronMask({name: torch.ones(size, dtype=torch.bool) for name, size in sizes.items()})
