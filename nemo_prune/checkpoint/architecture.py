"""Which tensors a pipeline's parts have, by their configs alone: no weight is read or made."""

import json
from functools import lru_cache
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from transformers import (
    CLIPConfig,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    PreTrainedConfig,
)

from nemo_prune.errors import ModelError
from nemo_prune.files.untrusted import read_json

_CONFIG_FILE = "config.json"
_OF_DIFFUSERS = {"unet": UNet2DConditionModel, "vae": AutoencoderKL}
_OF_TRANSFORMERS: dict[str, tuple[type, type[PreTrainedConfig]]] = {
    "text_encoder": (CLIPTextModel, CLIPTextConfig),
    "safety_checker": (StableDiffusionSafetyChecker, CLIPConfig),
    "image_encoder": (CLIPVisionModelWithProjection, CLIPVisionConfig),
}
# Without them a model of other sizes is built, silently.
_REQUIRED = {
    "unet": ("block_out_channels", "cross_attention_dim", "in_channels", "down_block_types"),
    "vae": ("block_out_channels", "latent_channels"),
    "text_encoder": ("hidden_size", "num_hidden_layers", "vocab_size"),
}


def expected_shapes(folder: Path, component: str) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the tensors of a part, as published diffusers folders name them.

    Args:
        folder: a diffusers folder; its weights may be missing.
        component: a part with weights, such as ``unet``.

    Raises:
        ModelError: the config is missing, damaged or incomplete, or not of SD 1.x's kind.
    """
    model = built_on_meta(folder, component)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if component == "text_encoder":
        # transformers 5 drops the prefix and reads both forms; transformers 4 needs it.
        shapes = {f"text_model.{name.removeprefix('text_model.')}": shape for name, shape in shapes.items()}
    return shapes


def built_on_meta(folder: Path, component: str) -> torch.nn.Module:
    """A part as its config describes it, without values; not to be changed. Raises as :func:`expected_shapes`."""
    try:
        config = read_json(folder / component / _CONFIG_FILE)
        if not isinstance(config, dict):
            raise ValueError("it is not a JSON object")
        if missing := [name for name in _REQUIRED.get(component, ()) if name not in config]:
            raise ValueError(f"it lacks {', '.join(missing)}")
        return _built(component, json.dumps(config))
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError, ArithmeticError) as error:
        raise ModelError(
            f"{component}/{_CONFIG_FILE} of the folder {folder} does not describe a {component} of Stable Diffusion "
            f"1.x: {error}. Fetch it anew; for a single file give a diffusers folder of the same architecture with "
            "--config."
        ) from error


# A base and its release have the same parts, and each is asked for several times.
@lru_cache(maxsize=8)
def _built(component: str, encoded: str) -> torch.nn.Module:
    config = json.loads(encoded)
    with torch.device("meta"):
        if component in _OF_DIFFUSERS:
            return _OF_DIFFUSERS[component].from_config(config)
        model_class, config_class = _OF_TRANSFORMERS[component]
        return model_class(config_class.from_dict(config))
