"""Sieves: one or two predictions per caption, on pure noise, that tell which captions deserve a closer look."""

from collections.abc import Sequence

import torch
from torch import Tensor

from nemo_prune.engine.diffusion import NoisePredictor
from nemo_prune.errors import ModelError, SettingsError
from nemo_prune.screening.settings import SieveSettings


def guidance_norm(noise_pred: Tensor, unconditional: Tensor) -> Tensor:
    """How far a caption pulls the predicted noise: ||conditional - unconditional|| (Wen et al., arXiv 2407.21720).

    Args:
        noise_pred: predicted noise for captions [batch, channels, height, width].
        unconditional: the same for the empty text, of a shape that broadcasts to it.

    Returns:
        [batch], at least 0.
    """
    return torch.linalg.vector_norm((noise_pred - unconditional).flatten(1), dim=1)


def guidance_alignment(noise_pred: Tensor, unconditional: Tensor) -> Tensor:
    """Whether a caption pulls where the model goes anyway (Asthana and Belagiannis, arXiv 2601.20642).

    The cosine between conditional - unconditional and the unconditional prediction, taken over the channels of
    each position and averaged over the positions, as their released code does; its weight belongs to that.

    Args:
        noise_pred: predicted noise for captions [batch, channels, height, width].
        unconditional: the same for the empty text, of a shape that broadcasts to it.

    Returns:
        [batch], from -1 to 1.
    """
    cosines = torch.cosine_similarity(noise_pred - unconditional, unconditional.expand_as(noise_pred), dim=1)
    return cosines.mean(dim=(1, 2))


class Sieves:
    """Values of captions: the higher, the likelier a caption is memorized.

    `norm` is :func:`guidance_norm` at a step of much noise, one pass per caption and latent. `anisotropy` adds the
    weighted :func:`guidance_alignment` at a step of little noise, another pass; `norm` is computed too. All on pure
    noise, and for models that predict something else (v) on the noise that follows from it.

    Args:
        predictor: the model; its settings hold the seed and the schedule.
        settings: which sieve, at which steps.

    Attributes:
        names: the sieves that are computed.

    Raises:
        SettingsError: the schedule has no such step.
    """

    def __init__(self, predictor: NoisePredictor, settings: SieveSettings) -> None:
        self._predictor, self._settings = predictor, settings
        self.names = ("norm",) if settings.sieve == "norm" else ("norm", "anisotropy")
        for name in ("norm_step", "cosine_step"):
            step = getattr(settings, name)
            if step >= len(predictor.timesteps):
                raise SettingsError(f"`{name}` is {step}; the schedule has {len(predictor.timesteps)} steps, from 0.")
        self._latents = predictor.initial_latents(num_samples=settings.num_samples).to(predictor.pipe.unet.device)
        self._unconditional: dict[int, Tensor] = {}

    @torch.no_grad()
    def values(self, captions: Sequence[str]) -> dict[str, list[float]]:
        """The sieves' values of captions, one list per sieve; a caption's value depends on nothing but the caption.

        Args:
            captions: texts, in any number; with a multiple of the batch size no batch has to be filled up.

        Raises:
            ModelError: the model predicts NaN or infinity.
        """
        captions = list(captions)
        values: dict[str, list[float]] = {name: [] for name in self.names}
        while len(values["norm"]) < len(captions):
            done, at_once = len(values["norm"]), self.captions_at_once
            part = self._values_of_batch(captions[done : done + at_once], at_once)
            for name in self.names:
                values[name] += part[name].tolist()
        return values

    @property
    def captions_at_once(self) -> int:
        """How many captions fill a batch."""
        return max(1, self._predictor.batch_size // len(self._latents))

    def _values_of_batch(self, captions: list[str], at_once: int) -> dict[str, Tensor]:
        # The last digits of the embeddings depend on how many texts are encoded together, as the noise does.
        filled = captions + captions[-1:] * (at_once - len(captions))
        prompt_embeds = self._predictor.encode(filled)[: len(captions)]
        values = {"norm": self._mean(guidance_norm, prompt_embeds, self._settings.norm_step)}
        if "anisotropy" in self.names:
            alignment = self._mean(guidance_alignment, prompt_embeds, self._settings.cosine_step)
            values["anisotropy"] = values["norm"] + self._settings.cosine_weight * alignment
        if not all(value.isfinite().all() for value in values.values()):
            raise ModelError(
                "The model predicts noise that is not finite (NaN or infinity). Use --dtype float32; "
                "if it persists, the checkpoint is damaged."
            )
        return values

    def _mean(self, measure, prompt_embeds: Tensor, step: int) -> Tensor:
        """A measure of captions at a step of the schedule, the mean over the latents, [captions]."""
        timestep = self._predictor.timesteps[step]
        if step not in self._unconditional:
            self._unconditional[step] = self._predict(self._predictor.encode([""]), timestep)
        noise_pred = self._predict(prompt_embeds, timestep)
        unconditional = self._unconditional[step].repeat(len(prompt_embeds), 1, 1, 1)
        return measure(noise_pred, unconditional).unflatten(0, (len(prompt_embeds), -1)).mean(dim=1)

    def _predict(self, prompt_embeds: Tensor, timestep: int) -> Tensor:
        """Predicted noise [captions * latents, channels, height, width]."""
        latents = self._latents.repeat(len(prompt_embeds), 1, 1, 1)
        return self._predictor.predict_each(
            latents,
            prompt_embeds.repeat_interleave(len(self._latents), dim=0),
            [()] * len(latents),
            timestep=timestep,
        )
