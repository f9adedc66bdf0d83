"""Noise difference and similarity that can be differentiated everywhere, for learning on them."""

from collections.abc import Sequence

from torch import Tensor

from nemo_prune.engine.similarity import similarity

# The power .33 has an endless slope at 0: below this, a scale's similarity has no gradient.
_LEAST = 1e-3
# Below this span a channel counts as flat, or its slope would be endless as well.
_FLAT = 1e-6


def soft_noise_difference(noise_pred: Tensor, latents: Tensor) -> Tensor:
    """As :func:`nemo_prune.engine.similarity.noise_difference`, with a gradient that is finite everywhere.

    Args:
        noise_pred: predicted noise [..., channels, height, width].
        latents: initial latents of a shape that broadcasts to it.

    Returns:
        [..., channels, height, width], float32, in 0..1.
    """
    delta = noise_pred.float() - latents.float()
    low = delta.amin(dim=(-2, -1), keepdim=True)
    span = delta.amax(dim=(-2, -1), keepdim=True) - low
    return (delta - low) / span.clamp_min(_FLAT)


def soft_similarity(a: Tensor, b: Tensor, betas: Sequence[float]) -> Tensor:
    """As :func:`nemo_prune.engine.similarity.similarity`, with a gradient that is finite everywhere.

    Each scale's similarity is at least .001, so that the result is at least .001 to the sum of the powers.

    Args:
        a: noise differences [batch, channels, height, width] in 0..1.
        b: as many others.
        betas: exponent per scale.

    Returns:
        [batch], at most 1.
    """
    return similarity(a, b, betas, least=_LEAST)
