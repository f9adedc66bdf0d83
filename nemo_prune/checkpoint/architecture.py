"""Which tensors a pipeline's components have, by their configs alone: no weight is read or made."""

from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from nemo_prune.errors import ModelError
from nemo_prune.files.untrusted import read_json

_CONFIG_FILE = "config.json"


def expected_shapes(folder: Path, component: str) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the tensors of a component, as published diffusers folders name them.

    Args:
        folder: a diffusers folder; its weights may be missing.
        component: ``unet``, ``vae`` or ``text_encoder``.

    Raises:
        ModelError: the config is missing or not of Stable Diffusion 1.x.
    """
    path = folder / component / _CONFIG_FILE
    try:
        config = read_json(path)
        with torch.device("meta"):
            if component == "text_encoder":
                model = CLIPTextModel(CLIPTextConfig.from_dict(config))
            else:
                model = {"unet": UNet2DConditionModel, "vae": AutoencoderKL}[component].from_config(config)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        raise ModelError(
            f"{component}/{_CONFIG_FILE} of the config folder {folder} describes no {component} of Stable Diffusion "
            f"1.x: {error}. Give a diffusers folder of the same architecture with --config."
        ) from error
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if component == "text_encoder":
        # transformers 5 drops the prefix and reads both forms; transformers 4 needs it.
        shapes = {f"text_model.{name.removeprefix('text_model.')}": shape for name, shape in shapes.items()}
    return shapes
