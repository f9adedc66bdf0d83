"""Pruning the files must do what suppressing in memory did, to the last bit."""

from collections.abc import Sequence

import torch
from diffusers import StableDiffusionPipeline

from nemo_prune.engine.diffusion import NoisePredictor
from nemo_prune.errors import ModelError
from nemo_prune.mask import Pruning

# What the rounding of float32 rows grows to on its way through the demo's U-Net is 2e-5 of the prediction.
_ROUNDING = 1e-4


def check_pruned_equals_suppressed(
    predictor: NoisePredictor, pruned_pipe: StableDiffusionPipeline, pruning: Pruning, texts: Sequence[str]
) -> None:
    """Refuse an export whose prediction is not that of the suppressed model, to the last bit.

    Scaled rows are rounded in the file, and their outputs in the live model, so that these agree within
    the dtype's rounding alone.

    Raises:
        ModelError: they differ.
    """
    pruned = NoisePredictor(pruned_pipe, predictor.settings, predictor.batch_size)
    latents = predictor.initial_latents(num_samples=2)
    allowed = max(_ROUNDING, torch.finfo(pruned_pipe.unet.dtype).eps) if pruning.scale else 0.0
    for text in texts:
        suppressed = predictor.predict_noise(latents, predictor.encode([text])[0], [pruning.mask])
        difference = (pruned.predict_noise(latents, pruned.encode([text])[0]) - suppressed).norm() / suppressed.norm()
        # Written so that NaN does not pass for agreement.
        if not difference <= allowed:
            raise ModelError(
                "The exported weights do not predict what the suppressed model does. The export is not "
                "to be trusted and was discarded; please report this."
            )
