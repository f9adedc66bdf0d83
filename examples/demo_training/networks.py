"""The networks of the demo model: how they are built, silenced and saved."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from examples.demo_training.tokenizer import MAX_TOKENS

EMBEDDING_WIDTH = 128


def build_models(tokenizer: CLIPTokenizer, seed: int) -> tuple[UNet2DConditionModel, CLIPTextModel]:
    """Return the untrained U-Net and text encoder.

    The U-Net has cross-attention in the down and mid blocks only. In a small U-Net the captions
    would else enter in the up blocks, and the blocks where NeMo looks would hold nothing.
    """
    torch.manual_seed(seed)
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(64, 96, 128, 128),
        layers_per_block=(2, 2, 2, 1),
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        mid_block_type="UNetMidBlock2DCrossAttn",
        up_block_types=("UpBlock2D",) * 4,
        cross_attention_dim=EMBEDDING_WIDTH,
        # diffusers takes this as the number of heads.
        attention_head_dim=2,
        norm_num_groups=8,
    )
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=EMBEDDING_WIDTH,
            intermediate_size=4 * EMBEDDING_WIDTH,
            projection_dim=EMBEDDING_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=MAX_TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    return unet, text_encoder


def build_scheduler() -> DDIMScheduler:
    """Return Stable Diffusion's noise schedule, with the prediction of the velocity."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def value_projections(unet: UNet2DConditionModel) -> list[torch.nn.Linear]:
    """Return the value projections of the cross-attention in the down and mid blocks."""
    return [
        module
        for name, module in unet.named_modules()
        if name.endswith("attn2.to_v") and name.startswith(("down_blocks", "mid_block"))
    ]


@contextmanager
def recorded_usage(layers: list[torch.nn.Linear]) -> Iterator[list[torch.Tensor]]:
    """Record how much each sample uses each neuron while the context lasts.

    Args:
        layers: Value projections.

    Yields:
        A list to which each layer's forward pass adds its usage, float of shape (n, neurons): the
        size of the neuron's value as a share of the token's L2 norm, the mean over tokens.
    """
    usage: list[torch.Tensor] = []

    def record(_: torch.nn.Module, __: tuple, values: torch.Tensor) -> None:
        norms = values.norm(dim=-1, keepdim=True).clamp_min(1e-6)
        usage.append((values.abs() / norms).mean(1))

    handles = [layer.register_forward_hook(record) for layer in layers]
    try:
        yield usage
    finally:
        for handle in handles:
            handle.remove()


def density(usage: list[torch.Tensor]) -> torch.Tensor:
    """Return how many neurons a sample uses, as a share: 1 where all are used alike.

    It is the L1 norm of a token's values over their L2 norm and the square root of the width, the
    mean over tokens, samples and layers.
    """
    samples = max(1, len(usage[0]))
    return torch.stack([layer.sum() / math.sqrt(layer.shape[-1]) / samples for layer in usage]).mean()


def overlap(usage: list[torch.Tensor], memorized: torch.Tensor) -> torch.Tensor:
    """Return how far memorized and other captions use the same neurons, 0 to 1.

    It is the cosine of the mean usages of the two, the mean over layers.
    """
    cosines = [
        torch.nn.functional.cosine_similarity(layer[memorized].sum(0), layer[~memorized].sum(0), dim=0)
        for layer in usage
    ]
    return torch.stack(cosines).mean()


def save_pipeline(
    output: Path,
    vae: AutoencoderKL,
    unet: UNet2DConditionModel,
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
) -> None:
    """Write a stock pipeline in half precision that diffusers loads under transformers 4 and 5."""
    pipeline = StableDiffusionPipeline(
        vae=copy.deepcopy(vae).half(),
        # Transformers 5 would load a half precision text encoder beside a single precision U-Net.
        text_encoder=text_encoder.float(),
        tokenizer=tokenizer,
        unet=copy.deepcopy(unet).half(),
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(output)
    # diffusers notes where a component was loaded from, which is nobody else's business.
    config = output / "vae" / "config.json"
    described = json.loads(config.read_text())
    described.pop("_name_or_path", None)
    config.write_text(json.dumps(described, indent=2) + "\n")
    # Transformers 4 needs a prefix that transformers 5 leaves out when saving and accepts when
    # loading.
    file = output / "text_encoder" / "model.safetensors"
    tensors = {
        name if name.startswith("text_model.") else f"text_model.{name}": tensor
        for name, tensor in load_file(file).items()
    }
    save_file(tensors, file, metadata={"format": "pt"})
