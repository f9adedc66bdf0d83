"""What suppressing a neuron costs ordinary captions, and how much the search takes it into account."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from nemo_prune.engine.diffusion import NoisePredictor
from nemo_prune.files.work import LineLog
from nemo_prune.mask import Neuron
from nemo_prune.progress import Advance, ignored


@dataclass(frozen=True)
class Preserve:
    """How far the search departs from the paper to spare ordinary captions.

    Attributes:
        costs: neuron -> relative change of the noise prediction on ordinary captions when it is suppressed.
        strength: 0 to 1: how far the candidates are widened, which lets the search spare costly ones.
    """

    costs: Mapping[Neuron, float]
    strength: float


def neuron_costs(
    predictor: NoisePredictor,
    texts: Sequence[str],
    advance: Advance = ignored,
    log: LineLog | None = None,
) -> dict[Neuron, float]:
    """The change of the noise prediction that each neuron alone makes: a small batch of passes per neuron.

    Args:
        predictor: the model.
        texts: ordinary prompts, with one latent each.
        advance: called with the neurons done and their number.
        log: keeps the costs as they are measured; those that it holds are not measured again.

    Returns:
        Neuron -> norm of the change over the norm of the prediction, the mean over the prompts.
    """
    costs = {Neuron(layer, index): cost for group in log or () for layer, index, cost in group}
    latents = predictor.initial_latents(num_samples=len(texts))
    prompt_embeds = predictor.encode(texts)
    unsuppressed = predictor.predict_each(latents, prompt_embeds, [()] * len(texts)).flatten(1)
    neurons = [Neuron(layer, index) for layer, size in predictor.sizes.items() for index in range(size)]
    waiting = [neuron for neuron in neurons if neuron not in costs]
    at_once = max(1, predictor.batch_size // len(texts))
    for start in range(0, len(waiting), at_once):
        group = waiting[start : start + at_once]
        noise_pred = predictor.predict_each(
            latents.repeat(len(group), 1, 1, 1),
            prompt_embeds.repeat(len(group), 1, 1),
            [(neuron,) for neuron in group for _ in texts],
        )
        change = noise_pred.flatten(1).unflatten(0, (len(group), len(texts))) - unsuppressed
        relative = torch.linalg.vector_norm(change, dim=-1) / torch.linalg.vector_norm(unsuppressed, dim=-1)
        found = dict(zip(group, relative.mean(dim=1).tolist(), strict=True))
        if log is not None:
            log.append([[neuron.layer, neuron.index, cost] for neuron, cost in found.items()])
        costs.update(found)
        advance(len(costs), len(neurons))
    return costs
