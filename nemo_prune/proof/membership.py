"""Membership inference: whether a model denoises a memorized picture better than one that it was not trained on."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from PIL import Image

from nemo_prune.proof.attack import training_target
from nemo_prune.proof.drawing import encode, image_latents

_TIMESTEPS = (0.1, 0.25, 0.4, 0.6)


@dataclass(frozen=True)
class PictureLoss:
    """One picture's denoising loss under its caption.

    Attributes:
        memorized: of the memorized picture.
        control: of the picture that no model was trained on.
    """

    memorized: float
    control: float


@torch.no_grad()
def picture_loss(pipe: StableDiffusionPipeline, text: str, picture: Image.Image, seed: int) -> float:
    """Mean loss of the training's own target, over a few timesteps and the same noise for every picture.

    Args:
        pipe: the model.
        text: the caption.
        picture: any size.
        seed: of the noise.
    """
    scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    last = scheduler.config.num_train_timesteps - 1
    timesteps = torch.tensor([round(last * share) for share in _TIMESTEPS]).to(pipe.unet.device)
    latents = image_latents(pipe, [picture]).expand(len(timesteps), -1, -1, -1)
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(seed)).to(latents.device)
    predicted = pipe.unet(
        scheduler.add_noise(latents, noise, timesteps).to(pipe.unet.dtype),
        timesteps,
        encoder_hidden_states=encode(pipe, text).to(pipe.unet.dtype).expand(len(timesteps), -1, -1),
    ).sample.float()
    return float(torch.nn.functional.mse_loss(predicted, training_target(scheduler, latents, noise, timesteps)))


def passes_per_picture() -> int:
    """Passes that one picture costs."""
    return len(_TIMESTEPS)


def area_under_curve(losses: Sequence[PictureLoss]) -> float | None:
    """Probability that a memorized picture has a lower loss than a control; ties count half. None without pictures."""
    if not losses:
        return None
    memorized = torch.tensor([each.memorized for each in losses])[:, None]
    control = torch.tensor([each.control for each in losses])[None, :]
    return float(((memorized < control).float() + 0.5 * (memorized == control).float()).mean())
