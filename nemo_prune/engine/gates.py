"""Gates on neurons that can be differentiated: what the learned and the gradient-ordered search have in common."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import log

import torch
from torch import Tensor, nn

from nemo_prune.engine.diffusion import NoisePredictor
from nemo_prune.engine.precision import full_float32
from nemo_prune.mask import Neuron, NeuronMask

# A backward pass costs about as much as two forward passes, and is counted so.
BACKWARD_PASSES = 2
# Temperature and stretch of the hard-concrete distribution (Louizos et al., arXiv 1712.01312, Sec. 4).
_TEMPERATURE, _LOW, _HIGH = 2 / 3, -0.1, 1.1


@contextmanager
def scaled(
    layers: Mapping[str, nn.Linear], factors: Mapping[str, Tensor], means: Mapping[str, Tensor] | None = None
) -> Iterator[None]:
    """Multiply the outputs of neurons while the context lasts; gradients flow into the factors.

    Args:
        layers: dotted module name -> projection.
        factors: dotted module name -> [batch or 1, out_features]; 1 leaves a neuron as it is, 0 suppresses it.
        means: dotted module name -> what suppressed neurons output instead of 0, [out_features].
    """

    def hook(factor: Tensor, mean: Tensor | None):
        if mean is None:
            return lambda module, inputs, output: output * factor[:, None, :].to(output)
        return lambda module, inputs, output: torch.lerp(
            mean.to(output).expand_as(output), output, factor[:, None, :].to(output).expand_as(output)
        )

    handles = []
    try:
        for name, factor in factors.items():
            handles.append(layers[name].register_forward_hook(hook(factor, means and means[name])))
        yield
    finally:
        for handle in handles:
            handle.remove()


def predict_gated(
    predictor: NoisePredictor,
    latents: Tensor,
    prompt_embeds: Tensor,
    factors: Tensor,
    timesteps: Tensor | None = None,
) -> Tensor:
    """Predict the noise with gates on all neurons that are searched, in one batch that is not filled up.

    Args:
        predictor: the model; its passes are counted, a backward as two.
        latents: [batch, channels, height, width].
        prompt_embeds: text embeddings [batch, positions, width].
        factors: what each neuron's output is multiplied by, [batch or 1, neurons], all layers joined.
        timesteps: of the model's training, [batch]; the predictor's own unless given.

    Returns:
        Predicted noise [batch, channels, height, width], float32.
    """
    unet, count = predictor.pipe.unet, len(latents)
    if timesteps is None:
        timesteps = torch.full((count,), predictor.timestep)
    with full_float32(), scaled(predictor.layers, split_by_layer(factors, predictor.sizes), predictor.means):
        output = unet(
            latents.to(predictor.device, predictor.dtype),
            timesteps.to(predictor.device),
            encoder_hidden_states=prompt_embeds.to(predictor.device, predictor.dtype),
        ).sample
    predictor.sample_passes += count * (1 + BACKWARD_PASSES * output.requires_grad)
    return predictor.to_noise(output.float(), latents.to(predictor.device), timesteps)


def split_by_layer(values: Tensor, sizes: Mapping[str, int]) -> dict[str, Tensor]:
    """Cut values of all neurons, [..., neurons], into dotted module name -> [..., out_features]."""
    return dict(zip(sizes, values.split(list(sizes.values()), dim=-1), strict=True))


def all_neurons(sizes: Mapping[str, int]) -> list[Neuron]:
    """Every neuron, layer by layer, in the order in which their values are joined."""
    return [Neuron(name, index) for name, size in sizes.items() for index in range(size)]


def closed_gates(neurons: Sequence[Neuron], sizes: Mapping[str, int]) -> Tensor:
    """Factors [neurons] that are 0 for some neurons and 1 for all others."""
    mask = NeuronMask.from_neurons(neurons, sizes)
    return 1.0 - torch.cat(list(mask.layers.values())).float()


@contextmanager
def frozen_weights(predictor: NoisePredictor) -> Iterator[None]:
    """Let no gradient flow into the weights while the context lasts: only the gates are learned."""
    parameters = list(predictor.pipe.unet.parameters())
    before = [parameter.requires_grad for parameter in parameters]
    try:
        for parameter in parameters:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter, required in zip(parameters, before, strict=True):
            parameter.requires_grad_(required)


def draw_closings(logits: Tensor, generator: torch.Generator) -> Tensor:
    """How far gates are closed, drawn from the hard-concrete distribution; 0 and 1 have mass of their own.

    Args:
        logits: the higher, the more likely a gate is closed, [..., gates].
        generator: on the CPU.

    Returns:
        [..., gates] in 0..1, differentiable in the logits where it is neither 0 nor 1.
    """
    uniform = torch.rand(logits.shape, generator=generator).clamp(1e-6, 1 - 1e-6).to(logits.device)
    drawn = torch.sigmoid((uniform.log() - (1 - uniform).log() + logits) / _TEMPERATURE)
    return (drawn * (_HIGH - _LOW) + _LOW).clamp(0, 1)


def settled_closings(logits: Tensor) -> Tensor:
    """How far gates are closed when nothing is drawn any more (arXiv 1712.01312, Eq. 13)."""
    return (torch.sigmoid(logits) * (_HIGH - _LOW) + _LOW).clamp(0, 1)


def touched_probabilities(logits: Tensor) -> Tensor:
    """How likely each gate is not fully open: their sum is the expected L0 norm (arXiv 1712.01312, Eq. 12)."""
    return torch.sigmoid(logits - _TEMPERATURE * log(-_LOW / _HIGH))
