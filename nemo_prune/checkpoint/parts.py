"""The parts of a Stable Diffusion 1.x pipeline, and the files that stock loaders take for each: an allowlist."""

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path, PurePath

# Part -> what the names of its weights begin with; parts without weights have none.
WEIGHT_STEMS = {
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
    "safety_checker": "model",
    "image_encoder": "model",
}
REQUIRED_PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
PARTS = (*REQUIRED_PARTS, "safety_checker", "feature_extractor", "image_encoder")
_CONFIGS = {
    "tokenizer": (
        "vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
        "added_tokens.json",
    ),
    "scheduler": ("scheduler_config.json",),
    "feature_extractor": ("preprocessor_config.json",),
    "image_encoder": ("config.json", "preprocessor_config.json"),
}  # fmt: skip
# Weights in formats that can't be patched by offset, or that repeat what safetensors hold.
_OTHER_FORMATS = (".bin", ".ckpt", ".msgpack", ".onnx", ".pb", ".h5", ".pt", ".pth")
_VARIANT = r"(\.[A-Za-z0-9_]{1,16})?(-\d{5}-of-\d{5})?"
# As programs name weights, of whatever format; nobody puts a caption there.
_WEIGHTS = re.compile(
    r"(diffusion_)?(pytorch_|flax_|tf_|openvino_)?model(\.[A-Za-z0-9_]{1,16})?(-\d{5}-of-\d{5})?"
    r"\.(safetensors|bin|msgpack|onnx|pb|h5|pt|pth|ckpt|onnx_data)|model\.(bin|onnx)"
)
_PLAIN_SUFFIX = re.compile(r"\.[A-Za-z0-9_]{1,11}~?|~")

NOT_A_PART = "not a part of a Stable Diffusion 1.x pipeline"
_NOT_LOADED = "not a file that stock loaders take"


def why_left_out(path: Path) -> str | None:
    """Why an export leaves a file of a part out; None for what it copies.

    Args:
        path: relative to the model's folder, such as ``unet/config.json``.
    """
    part, name = path.parts[0], path.name
    if name.startswith("."):
        return "a hidden file"
    if part not in PARTS:
        return NOT_A_PART
    if "non_ema" in name:
        return "weights of another average (non_ema)"
    if is_loaded(path):
        return None
    if name.lower().endswith(_OTHER_FORMATS) or ".bin.index." in name:
        return "not safetensors; the weights are there as safetensors too"
    return _NOT_LOADED


def is_loaded(path: Path) -> bool:
    """Whether a stock loader takes a file, for any variant of the weights."""
    if len(path.parts) != 2 or path.parts[0] not in PARTS:
        return False
    part, name = path.parts
    if name in _CONFIGS.get(part, ("config.json",)):
        return True
    stem = WEIGHT_STEMS.get(part)
    weights, index = rf"{stem}{_VARIANT}\.safetensors", rf"{stem}\.safetensors\.index(\.[A-Za-z0-9_]{{1,16}})?\.json"
    return stem is not None and re.fullmatch(f"{weights}|{index}", name, re.ASCII) is not None


def publicly_named(left_out: Mapping[Path, str]) -> dict[str, str]:
    """What is left out for a record: a file is named only where its name can't tell anything.

    Names of pictures are often captions, so that other files are counted by their ending.

    Args:
        left_out: file relative to the model's folder -> why.
    """
    named, counted = {}, Counter()
    for path, reason in left_out.items():
        if path.parts[0] in WEIGHT_STEMS and _WEIGHTS.fullmatch(path.name):
            named[path.as_posix()] = reason
        else:
            counted[_place(path), reason] += 1
    for (place, reason), number in counted.items():
        named[place] = reason if number == 1 else f"{reason} ({number} files)"
    return named


def _place(path: Path) -> str:
    """A part's folder, if it is one, and the ending."""
    suffix = path.suffix or ("~" if path.name.endswith("~") else "")
    shown = f"*{suffix}" if _PLAIN_SUFFIX.fullmatch(suffix) else "*"
    part = path.parts[0] if len(path.parts) > 1 else None
    if part is None:
        return shown
    return (PurePath(part) / shown).as_posix() if part in PARTS else f"another folder/{shown}"
