"""Pruning the files must do what suppressing in memory did, to the last bit."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from nemo_prune.engine.diffusion import NoisePredictor, apply_mask
from nemo_prune.errors import ModelError
from nemo_prune.mask import Pruning
from nemo_prune.settings import LocalizationSettings

# What the rounding of scaled rows grows to on its way through the demo's U-Net is 8e-6 of the prediction where the file
# holds float16, 7e-5 where it holds bfloat16.
_ROUNDING = 1e-4
# The last digits depend on the batch. One that memory can't halve is the same before and after.
_BATCH_SIZE = 1
_NUM_SAMPLES = 2


@dataclass(frozen=True)
class SuppressedPredictions:
    """What the unpruned model predicts with a mask's neurons suppressed.

    Attributes:
        texts: captions.
        noise_preds: one per caption [samples, channels, height, width], float32, on the CPU.
        settings: the numbers that they were predicted with.
        is_rounded: whether the files agree with them within rounding alone: rows are scaled.
    """

    texts: tuple[str, ...]
    noise_preds: tuple[Tensor, ...]
    settings: LocalizationSettings
    is_rounded: bool

    @classmethod
    def of(
        cls,
        pipe: StableDiffusionPipeline,
        settings: LocalizationSettings,
        pruning: Pruning,
        texts: Sequence[str],
        stored: Mapping[str, torch.dtype] = MappingProxyType({}),
    ) -> "SuppressedPredictions":
        """Predict with the unpruned model, which need not be there any more when the pruned one is loaded.

        Args:
            pipe: the unpruned model in float32: a bias that is shifted there and rounded afterwards is not what a
                rounded one is when it is shifted.
            settings: the numbers of the method.
            pruning: the mask and its scale.
            texts: captions.
            stored: name of a parameter -> its dtype in the files.
        """
        predictor = NoisePredictor(pipe, settings, _BATCH_SIZE)
        with apply_mask(pipe, pruning.mask, pruning.scale, stored):
            noise_preds = _predictions(predictor, texts)
        return cls(tuple(texts), noise_preds, settings, is_rounded=bool(pruning.scale))


def check_pruned_equals_suppressed(expected: SuppressedPredictions, pruned_pipe: StableDiffusionPipeline) -> None:
    """Refuse an export whose prediction is not that of the suppressed model, to the last bit.

    Scaled rows are rounded in the file, and their outputs in the live model, so that these agree within rounding alone.

    Args:
        expected: what the suppressed model predicts.
        pruned_pipe: the exported model, in float32.

    Raises:
        ModelError: they differ.
    """
    pruned = NoisePredictor(pruned_pipe, expected.settings, _BATCH_SIZE)
    allowed = _ROUNDING if expected.is_rounded else 0.0
    found = _predictions(pruned, expected.texts)
    for suppressed, prediction in zip(expected.noise_preds, found, strict=True):
        # Written so that NaN does not pass for agreement.
        if not (prediction - suppressed).norm() / suppressed.norm() <= allowed:
            raise ModelError(
                "The exported weights do not predict what the suppressed model does. The export is not "
                "to be trusted and was discarded; please report this."
            )


def _predictions(predictor: NoisePredictor, texts: Sequence[str]) -> tuple[Tensor, ...]:
    latents = predictor.initial_latents(num_samples=_NUM_SAMPLES)
    return tuple(predictor.predict_noise(latents, predictor.encode([text])[0])[0].cpu() for text in texts)
