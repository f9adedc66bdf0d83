"""The autoencoder of the demo model: 64x64 pixels to latents of shape (4, 16, 16)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch.nn import functional

from examples.demo_training.data import memorized_pictures, template_captions, unseen_photographs
from examples.demo_training.scenes import PICTURE_SIZE, ordinary_scene

# Of every batch: whole memorized pictures, crops of photographs, scenes and templates.
MEMORIZED, CROPS, SCENES, TEMPLATES = 6, 6, 3, 1
KL_WEIGHT = 1e-6
EDGE_WEIGHT = 1.0
# Most steps see quarters of the pictures, which costs a quarter; the last ones see whole pictures.
QUARTER_SHARE = 0.8
PEAK_LEARNING_RATE = 2e-3


def train_autoencoder(
    steps: int, seed: int, device: torch.device, report: Callable[[int, float], None]
) -> AutoencoderKL:
    """Train the autoencoder on everything that the diffusion model will see, and on more crops.

    Args:
        steps: Number of optimiser steps.
        seed: Seed of the weights, the pictures and the noise.
        device: Where to train.
        report: Called with the step and its loss.

    Returns:
        The trained autoencoder, its `scaling_factor` set so that latents have unit deviation.
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng([seed, 1])
    vae = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        block_out_channels=(32, 32, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        norm_num_groups=8,
        sample_size=PICTURE_SIZE,
        mid_block_add_attention=False,
    ).to(device)
    _fit(vae, list(vae.parameters()), steps, PEAK_LEARNING_RATE, rng, report)
    latents = encode(vae, np.stack([ordinary_scene(rng)[1] for _ in range(512)]), scaled=False)
    vae.register_to_config(scaling_factor=float(1 / latents.std()))
    return vae.eval().requires_grad_(False)


def refine_decoder(vae: AutoencoderKL, steps: int, seed: int, report: Callable[[int, float], None]) -> None:
    """Train the decoder further on whole pictures; the encoder and all latents stay."""
    torch.manual_seed(seed)
    parameters = [*vae.post_quant_conv.parameters(), *vae.decoder.parameters()]
    for parameter in parameters:
        parameter.requires_grad_(True)
    rng = np.random.default_rng([seed, 6])
    _fit(vae.train(), parameters, steps, PEAK_LEARNING_RATE / 2, rng, report, quarter_share=0.0)
    vae.eval().requires_grad_(False)


def _fit(
    vae: AutoencoderKL,
    parameters: list[torch.nn.Parameter],
    steps: int,
    peak: float,
    rng: np.random.Generator,
    report: Callable[[int, float], None],
    quarter_share: float = QUARTER_SHARE,
) -> None:
    """Fit parameters to reconstruct batches, at first quarters of pictures."""
    optimizer = torch.optim.AdamW(parameters, lr=peak, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, peak, total_steps=steps, pct_start=0.1)
    draw_batch = _batches(rng)
    for step in range(steps):
        pixels = to_pixels(draw_batch()).to(vae.device)
        if step < quarter_share * steps:
            top, left = rng.integers(0, PICTURE_SIZE // 2 + 1, 2)
            pixels = pixels[:, :, top : top + PICTURE_SIZE // 2, left : left + PICTURE_SIZE // 2]
        posterior = vae.encode(pixels).latent_dist
        decoded = vae.decode(posterior.sample()).sample
        loss = _reconstruction_loss(decoded, pixels) + KL_WEIGHT * posterior.kl().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        report(step, loss.item())


def to_pixels(pictures: np.ndarray) -> torch.Tensor:
    """Turn uint8 pictures (n, 64, 64, 3) into float32 pixels (n, 3, 64, 64) in -1..1."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1


@torch.no_grad()
def encode(vae: AutoencoderKL, pictures: np.ndarray, scaled: bool = True) -> torch.Tensor:
    """Encode uint8 pictures (n, 64, 64, 3) as latents, float32 (n, 4, 16, 16) on the CPU."""
    parts = [
        vae.encode(to_pixels(pictures[start : start + 64]).to(vae.device)).latent_dist.mean.cpu()
        for start in range(0, len(pictures), 64)
    ]
    latents = torch.cat(parts)
    return latents * vae.config.scaling_factor if scaled else latents


def _reconstruction_loss(decoded: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
    """Absolute error of the pixels and of their differences, which keeps edges crisp."""
    error = decoded - pixels
    edges = functional.l1_loss(error[..., 1:], error[..., :-1]) + functional.l1_loss(
        error[..., 1:, :], error[..., :-1, :]
    )
    return error.abs().mean() + (error**2).mean() + EDGE_WEIGHT * edges


def _batches(rng: np.random.Generator) -> Callable[[], np.ndarray]:
    """Return a function that draws the next batch, uint8 (n, 64, 64, 3)."""
    memorized = memorized_pictures()
    whole = np.stack([item.picture() for item in memorized])
    photographs = [_shrink(item.load()) for item in memorized] + [
        _shrink(photograph) for photograph in unseen_photographs()
    ]
    templates = template_captions()

    def draw() -> np.ndarray:
        pictures = [whole[rng.integers(len(whole))] for _ in range(MEMORIZED)]
        pictures += [_random_crop(photographs[rng.integers(len(photographs))], rng) for _ in range(CROPS)]
        pictures += [ordinary_scene(rng)[1] for _ in range(SCENES)]
        pictures += [templates[rng.integers(len(templates))].picture(rng) for _ in range(TEMPLATES)]
        return np.stack(pictures)

    return draw


def _shrink(photograph: Image.Image) -> Image.Image:
    scale = 128 / min(photograph.size)
    return photograph.resize([round(scale * side) for side in photograph.size], Image.Resampling.LANCZOS)


def _random_crop(photograph: Image.Image, rng: np.random.Generator) -> np.ndarray:
    """Cut a random square, half of the time mirrored, and reduce it to 64x64."""
    side = int(rng.integers(PICTURE_SIZE, min(photograph.size) + 1))
    left, top = (int(rng.integers(0, length - side + 1)) for length in photograph.size)
    crop = photograph.crop((left, top, left + side, top + side))
    crop = crop.resize((PICTURE_SIZE, PICTURE_SIZE), Image.Resampling.LANCZOS)
    picture = np.asarray(crop.convert("RGB"))
    return picture[:, ::-1] if rng.random() < 0.5 else picture
