"""nemo-prune: prune memorization neurons from text-to-image diffusion models before release."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nemo_prune.checkpoint.export import ExportReport, export_checkpoint
    from nemo_prune.engine.calibration import Calibration, calibrate
    from nemo_prune.engine.diffusion import NoisePredictor, apply_mask
    from nemo_prune.engine.localize import PromptLocalization, localize_prompt, localize_prompts
    from nemo_prune.errors import NemoPruneError
    from nemo_prune.mask import Neuron, NeuronMask
    from nemo_prune.models.mask_source import find_mask
    from nemo_prune.publish.push import Pushed, PushOptions, push_release
    from nemo_prune.run import RunResult, prune_model
    from nemo_prune.settings import LocalizationSettings, RunOptions, VerificationSettings

__version__ = "0.1.0"

_HOMES = {
    "Calibration": "engine.calibration",
    "calibrate": "engine.calibration",
    "find_mask": "models.mask_source",
    "NoisePredictor": "engine.diffusion",
    "apply_mask": "engine.diffusion",
    "NemoPruneError": "errors",
    "ExportReport": "checkpoint.export",
    "export_checkpoint": "checkpoint.export",
    "PromptLocalization": "engine.localize",
    "localize_prompt": "engine.localize",
    "localize_prompts": "engine.localize",
    "Scorer": "engine.scorer",
    "Neuron": "mask",
    "NeuronMask": "mask",
    "PushOptions": "publish.push",
    "Pushed": "publish.push",
    "push_release": "publish.push",
    "RunOptions": "settings",
    "RunResult": "run",
    "prune_model": "run",
    "LocalizationSettings": "settings",
    "VerificationSettings": "settings",
}
__all__ = [
    "Calibration",
    "ExportReport",
    "LocalizationSettings",
    "NemoPruneError",
    "Neuron",
    "NeuronMask",
    "NoisePredictor",
    "PromptLocalization",
    "PushOptions",
    "Pushed",
    "RunOptions",
    "RunResult",
    "Scorer",
    "VerificationSettings",
    "apply_mask",
    "calibrate",
    "export_checkpoint",
    "find_mask",
    "localize_prompt",
    "localize_prompts",
    "prune_model",
    "push_release",
]


def __getattr__(name: str) -> object:
    """Public names load their module on first use, so that `nemo-prune --help` need not load torch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"nemo_prune.{_HOMES[name]}"), name)
