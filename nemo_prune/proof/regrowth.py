"""Whether what was pruned grows back: by benign fine-tuning, by merging the base in, by rounding the weights."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from torch import Tensor, nn

from nemo_prune.proof.attack import training_target
from nemo_prune.proof.drawing import encode, quick_latents
from nemo_prune.proof.intervals import Rate
from nemo_prune.proof.passes import PassCounter


@dataclass(frozen=True)
class FineTuning:
    """A benign fine-tuning on ordinary captions and the base's images of them.

    Attributes:
        steps: after which steps images are drawn.
        learning_rate: of AdamW, all weights of the U-Net.
        batch_size: images per step.
        images: how many different images there are.
    """

    steps: tuple[int, ...] = (10, 50, 200)
    learning_rate: float = 1e-5
    batch_size: int = 4
    images: int = 16

    def passes(self, steps: int) -> int:
        """Passes that so many steps cost; the way back through the U-Net counts as two, for it makes two products."""
        return steps * self.batch_size * 3


@dataclass(frozen=True)
class Regrown:
    """What a treated candidate gives back.

    Attributes:
        treatment: what was done to it.
        copies: its images that are copies.
        nearest: highest similarity of an image to its caption's training image; None where it is not published.
    """

    treatment: str
    copies: Rate
    nearest: float | None


@contextmanager
def treated(pipe: StableDiffusionPipeline) -> Iterator[StableDiffusionPipeline]:
    """A pipeline whose U-Net may be changed: the weights are what they were when the context ends."""
    own = pipe.unet
    try:
        pipe.unet = copy.deepcopy(own)
        yield pipe
    finally:
        pipe.unet = own


@torch.no_grad()
def merge_base(unet: nn.Module, base: nn.Module, share: float) -> None:
    """Move all weights towards the base's.

    Args:
        unet: is changed.
        base: the base's U-Net.
        share: 0 changes nothing, 1 gives the base.
    """
    theirs = dict(base.named_parameters())
    for name, parameter in unet.named_parameters():
        parameter.lerp_(theirs[name].to(parameter), share)


@torch.no_grad()
def round_weights(unet: nn.Module, precision: str) -> None:
    """Round all weights, and compute as before.

    Args:
        unet: is changed.
        precision: ``float16``, or ``int8``: 255 steps per output feature, symmetric, for matrices and filters.
    """
    for parameter in unet.parameters():
        if precision == "float16":
            parameter.copy_(parameter.half())
        elif parameter.ndim > 1:
            flat = parameter.flatten(1)
            # A row of zeros stays one.
            step = flat.abs().amax(dim=1, keepdim=True).clamp_min(1e-12) / 127
            parameter.copy_(((flat / step).round() * step).view_as(parameter))


class Tuner:
    """Fine-tunes a copy of a U-Net step by step, in float32: in half precision, steps this small would be lost.

    Args:
        pipe: the model; it stays as it is.
        base: draws the images of the ordinary captions.
        ordinary: the captions.
        settings: of the fine-tuning.
        counter: is told of the way back through the U-Net.
        seed: of images, noises and timesteps.
    """

    def __init__(
        self,
        pipe: StableDiffusionPipeline,
        base: StableDiffusionPipeline,
        ordinary: Sequence[str],
        settings: FineTuning,
        counter: PassCounter,
        seed: int,
    ) -> None:
        texts = list(ordinary[: settings.images])
        self._unet, self._settings, self._counter = copy.deepcopy(pipe.unet).float(), settings, counter
        self._latents = torch.cat([quick_latents(base, text, [seed + place]) for place, text in enumerate(texts)])
        self._embeds = torch.stack([encode(pipe, text) for text in texts])
        self._generator = torch.Generator().manual_seed(seed)
        self._scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
        self._optimiser = torch.optim.AdamW(self._unet.parameters(), lr=settings.learning_rate)

    def step(self) -> float:
        """One step; returns its loss."""
        size = self._settings.batch_size
        chosen = torch.randint(len(self._latents), (size,), generator=self._generator)
        timesteps = torch.randint(self._scheduler.config.num_train_timesteps, (size,), generator=self._generator)
        latents = self._latents[chosen.to(self._latents.device)]
        noise = torch.randn(latents.shape, generator=self._generator).to(latents.device)
        timesteps = timesteps.to(latents.device)
        predicted = self._predict(self._scheduler.add_noise(latents, noise, timesteps), timesteps, self._embeds[chosen])
        loss = nn.functional.mse_loss(predicted, training_target(self._scheduler, latents, noise, timesteps))
        self._optimiser.zero_grad()
        loss.backward()
        self._counter.passes += 2 * size
        self._optimiser.step()
        return loss.detach().item()

    @torch.no_grad()
    def copy_weights_to(self, unet: nn.Module) -> None:
        """Give a U-Net the present weights, in its own precision."""
        unet.load_state_dict(self._unet.state_dict())

    def _predict(self, noisy: Tensor, timesteps: Tensor, embeds: Tensor) -> Tensor:
        return self._unet(noisy, timesteps, encoder_hidden_states=embeds).sample
