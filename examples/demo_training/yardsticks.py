"""Other people's ways against memorization, on the demo model: what hardening by rows is to be held against."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from PIL import Image
from torch import Tensor, nn

from nemo_prune.proof.attack import training_target
from nemo_prune.proof.drawing import encode, image_latents, quick_latents

_QUICK_STEPS = 10


def with_unet(pipe: StableDiffusionPipeline, unet: nn.Module) -> StableDiffusionPipeline:
    """The same pipeline with another U-Net."""
    other = StableDiffusionPipeline(**{**pipe.components, "unet": unet}, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    return other


# --- Wanda pruning, as Chavhan et al. (arXiv 2406.18566) use it against memorization ---


def wanda_pruned(pipe: StableDiffusionPipeline, memorized: Sequence[str], share: float = 0.01) -> nn.Module:
    """A U-Net whose feed-forward weights that memorized captions use more than the empty caption are zeroed.

    A weight's score is its size times the norm of its input. Zeroed is what is among a row's highest scores for the
    memorized captions, and higher than for the empty caption.

    Args:
        pipe: stays as it is.
        memorized: captions.
        share: of each row's weights that may be zeroed.
    """
    theirs, usual = _input_norms(pipe, memorized), _input_norms(pipe, [""])
    unet = copy.deepcopy(pipe.unet)
    with torch.no_grad():
        for name, layer in _feed_forward(unet).items():
            score = layer.weight.abs() * theirs[name]
            cut = score.quantile(1 - share, dim=1, keepdim=True)
            layer.weight[(score >= cut) & (score > layer.weight.abs() * usual[name])] = 0
    return unet


def _feed_forward(unet: nn.Module) -> dict[str, nn.Linear]:
    return {name: module for name, module in unet.named_modules() if name.endswith("ff.net.2")}


def _input_norms(pipe: StableDiffusionPipeline, texts: Sequence[str]) -> dict[str, Tensor]:
    """Feed-forward layer -> root mean square of each of its inputs [in_features], over captions, steps and places."""
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    with _inputs_heard(_feed_forward(pipe.unet), sums, counts):
        for text in texts:
            quick_latents(pipe, text, [0], _QUICK_STEPS)
    return {name: (total / counts[name]).sqrt() for name, total in sums.items()}


@contextmanager
def _inputs_heard(layers: dict[str, nn.Linear], sums: dict[str, Tensor], counts: dict[str, int]) -> Iterator[None]:
    handles = []
    try:
        for name, layer in layers.items():

            def hook(module: nn.Module, inputs: tuple[Tensor, ...], name: str = name) -> None:
                values = inputs[0].detach().flatten(0, -2).float()
                sums[name] = sums.get(name, 0) + values.square().sum(dim=0)
                counts[name] = counts.get(name, 0) + len(values)

            handles.append(layer.register_forward_pre_hook(hook))
        yield
    finally:
        for handle in handles:
            handle.remove()


# --- adversarial fine-tuning, in the manner of DoRI (arXiv 2507.16880) ---


def adversarially_tuned(
    pipe: StableDiffusionPipeline,
    targets: Sequence[tuple[str, Image.Image]],
    surrogates: Sequence[Sequence[Image.Image]],
    ordinary: Sequence[str],
    steps: int,
    seed: int,
    learning_rate: float = 1e-4,
    attack_steps: int = 3,
    attack_rate: float = 0.1,
    batch_size: int = 4,
    restart_every: int = 10,
) -> nn.Module:
    """A U-Net that learns to draw something else under embeddings that are optimised for a memorized picture.

    Each step attacks the present weights a little further for one picture, and then teaches them a surrogate under the
    embedding found and under the caption, and the base's own images under ordinary captions.

    Args:
        pipe: stays as it is; the tuning begins with its U-Net.
        targets: captions and their pictures.
        surrogates: for each of them images that may be drawn instead.
        ordinary: captions, whose images by the pipeline are to stay.
        steps: of the tuning.
        seed: of everything random.
        learning_rate: of AdamW on all weights.
        attack_steps: Adam steps on the embedding before each step of the tuning.
        attack_rate: of that Adam.
        batch_size: surrogates, and as many ordinary images, per step.
        restart_every: visits of a target after which its embedding begins anew from the caption.
    """
    generator = torch.Generator().manual_seed(seed)
    scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    unet = copy.deepcopy(pipe.unet).train()
    optimiser = torch.optim.AdamW(unet.parameters(), lr=learning_rate)
    pictures = [image_latents(pipe, [picture]) for _, picture in targets]
    instead = [image_latents(pipe, images) for images in surrogates]
    captions = [encode(pipe, text) for text, _ in targets]
    kept = torch.cat([quick_latents(pipe, text, [seed + place]) for place, text in enumerate(ordinary)])
    kept_embeds = torch.stack([encode(pipe, text) for text in ordinary])
    attacks: list[tuple[Tensor, torch.optim.Adam]] = []
    for step in range(steps):
        place, visit = step % len(targets), step // len(targets)
        if visit % restart_every == 0:
            embeds = captions[place].clone().requires_grad_(True)
            attacks[place : place + 1] = [(embeds, torch.optim.Adam([embeds], lr=attack_rate))]
        embeds, attacker = attacks[place]
        for _ in range(attack_steps):
            attacker.zero_grad()
            _loss(unet, scheduler, pictures[place].expand(batch_size, -1, -1, -1), embeds, generator).backward()
            attacker.step()
        chosen = torch.randint(len(instead[place]), (batch_size,), generator=generator)
        usual = torch.randint(len(kept), (batch_size,), generator=generator)
        learned = torch.stack([embeds.detach(), captions[place]]).repeat(batch_size // 2, 1, 1)
        optimiser.zero_grad()
        latents, asked = torch.cat([instead[place][chosen], kept[usual]]), torch.cat([learned, kept_embeds[usual]])
        _loss(unet, scheduler, latents, asked, generator).backward()
        optimiser.step()
    return unet.eval()


def _loss(
    unet: nn.Module, scheduler: DDIMScheduler, latents: Tensor, embeds: Tensor, generator: torch.Generator
) -> Tensor:
    """The diffusion loss of latents [n, ...] under embeddings [positions, width] or [n, positions, width]."""
    noise = torch.randn(latents.shape, generator=generator)
    timesteps = torch.randint(scheduler.config.num_train_timesteps, (len(latents),), generator=generator)
    asked = embeds.expand(len(latents), -1, -1)
    predicted = unet(scheduler.add_noise(latents, noise, timesteps), timesteps, encoder_hidden_states=asked).sample
    return nn.functional.mse_loss(predicted, training_target(scheduler, latents, noise, timesteps))
