"""Score prompts: whether their seeds agree, and how similar the predictions stay with neurons suppressed."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nemo_prune.engine.diffusion import NoisePredictor
from nemo_prune.engine.similarity import MemorizationScore, memorization_scores, noise_difference, similarity
from nemo_prune.engine.trials import Trial
from nemo_prune.facts import Rechecks
from nemo_prune.mask import Neuron
from nemo_prune.settings import ModelOptions

_MOST_REMEMBERED = 64


@dataclass(frozen=True)
class ScoredPrompt:
    """A prompt's seeds with nothing suppressed.

    Attributes:
        prompt: its text.
        prompt_embeds: its text embeddings [positions, width].
        latents: initial latents [S, channels, height, width].
        noise_differences: their noise differences [S, channels, height, width] in 0..1.
        memorization: how much the seeds agree.
    """

    prompt: str
    prompt_embeds: Tensor
    latents: Tensor
    noise_differences: Tensor
    memorization: MemorizationScore


class Scorer:
    """Scores prompts, many of them in one batch.

    In half precision, similarities near the threshold are computed again with the float32 weights.

    Args:
        predictor: the model.
        reference: the same model in float32, if the predictor's precision is lower.
        margin: distance from the threshold within which the reference decides.

    Attributes:
        predictor: the model.
        rechecks: what the reference decided so far.
    """

    def __init__(
        self, predictor: NoisePredictor, reference: NoisePredictor | None = None, margin: float = ModelOptions.margin
    ) -> None:
        self.predictor = predictor
        self.rechecks = Rechecks()
        self._reference = None if reference is None else Scorer(reference)
        self._exactly_scored: dict[str, ScoredPrompt] = {}
        self._margin = margin
        self._betas = predictor.settings.ssim_betas

    @property
    def sample_passes(self) -> int:
        """Latents that went through the U-Net so far, in either precision."""
        return self.predictor.sample_passes + (self._reference.sample_passes if self._reference else 0)

    @property
    def prompts_at_once(self) -> int:
        """How many prompts' seeds fill a batch."""
        return max(1, self.predictor.batch_size // self.predictor.settings.num_samples)

    def score_prompts(
        self, prompts: Sequence[str], latents: Tensor | None = None, neurons: Collection[Neuron] = ()
    ) -> list[ScoredPrompt]:
        """The memorization score of prompts (Alg. 1), S sample passes per prompt.

        Args:
            prompts: texts.
            latents: initial latents [S, channels, height, width]; those of the settings unless given.
            neurons: what is suppressed while scoring.
        """
        prompts = list(prompts)
        latents = self.predictor.initial_latents() if latents is None else latents
        latents = latents.to(self.predictor.pipe.unet.device)
        # The last digits depend on how much is computed together, so it is always as much: a prompt's result
        # must not depend on the prompts beside it. Scores are taken prompt by prompt for the same reason.
        filled = prompts + prompts[-1:] * (self.prompts_at_once - len(prompts))
        prompt_embeds = self.predictor.encode(filled)[: len(prompts)]
        noise_pred = self.predictor.predict_each(
            latents.repeat(len(prompts), 1, 1, 1),
            prompt_embeds.repeat_interleave(len(latents), dim=0),
            [neurons] * (len(prompts) * len(latents)),
        ).unflatten(0, (len(prompts), len(latents)))
        differences = noise_difference(noise_pred, latents)
        scores = [memorization_scores(difference[None], self._betas)[0] for difference in differences]
        return [
            ScoredPrompt(prompt, embeds, latents, difference, score)
            for prompt, embeds, difference, score in zip(prompts, prompt_embeds, differences, scores, strict=True)
        ]

    def kept_seeds(self, scored: ScoredPrompt, threshold: float) -> tuple[int, ...]:
        """Positions of the seeds that agree with another one by more than the threshold (Alg. 1)."""
        similarities = scored.memorization.pairs.amax(dim=1)
        kept = similarities > threshold
        if self._reference and bool(((similarities - threshold).abs() < self._margin).any()):
            exact = self._exact(scored).memorization.kept_seeds(threshold)
            self._note(kept.tolist(), exact.tolist())
            kept = exact
        return tuple(kept.nonzero().flatten().tolist())

    def answer(self, asked: Sequence[tuple[ScoredPrompt, Trial]], batch_size: int | None = None) -> list[float]:
        """How similar the noise differences with and without suppression are; one sample pass per trial.

        Args:
            asked: trials, each with its prompt.
            batch_size: how many go through the U-Net at once, if not the predictor's own.
        """
        similarities = self._similarities(asked, batch_size)
        if self._reference:
            near = [
                position
                for position, (_, trial) in enumerate(asked)
                if abs(similarities[position] - trial.threshold) < self._margin
            ]
            exact = self._exact_similarities([asked[position] for position in near])
            thresholds = [asked[position][1].threshold for position in near]
            before = [similarities[position] > tau for position, tau in zip(near, thresholds, strict=True)]
            self._note(before, [value > tau for value, tau in zip(exact, thresholds, strict=True)])
            for position, value in zip(near, exact, strict=True):
                similarities[position] = value
        return similarities

    def suppressed_similarities(
        self, scored: ScoredPrompt, seeds: Sequence[int], neurons: Collection[Neuron]
    ) -> list[float]:
        """How similar a prompt's noise differences on some seeds are with and without suppression."""
        return self._similarities([(scored, Trial(frozenset(neurons), seed, 0.0)) for seed in seeds])

    def _similarities(self, asked: Sequence[tuple[ScoredPrompt, Trial]], batch_size: int | None = None) -> list[float]:
        if not asked:
            return []
        latents = torch.stack([scored.latents[trial.seed] for scored, trial in asked])
        noise_pred = self.predictor.predict_each(
            latents,
            torch.stack([scored.prompt_embeds for scored, _ in asked]),
            [trial.neurons for _, trial in asked],
            batch_size,
        )
        unsuppressed = torch.stack([scored.noise_differences[trial.seed] for scored, trial in asked])
        differences = noise_difference(noise_pred, latents)
        size, similarities = batch_size or self.predictor.batch_size, []
        for start in range(0, len(asked), size):
            # Filled up, as the batches of the predictions are.
            filled = torch.arange(start, start + size).clamp_max(len(asked) - 1)
            similarities += similarity(differences[filled], unsuppressed[filled], self._betas).tolist()
        return similarities[: len(asked)]

    def _exact_similarities(self, asked: Sequence[tuple[ScoredPrompt, Trial]]) -> list[float]:
        """The same with the float32 weights, which also predict the unsuppressed seeds."""
        return self._reference.answer([(self._exact(scored), trial) for scored, trial in asked])

    def _exact(self, scored: ScoredPrompt) -> ScoredPrompt:
        if scored.prompt not in self._exactly_scored:
            if len(self._exactly_scored) == _MOST_REMEMBERED:
                self._exactly_scored.clear()
            (self._exactly_scored[scored.prompt],) = self._reference.score_prompts([scored.prompt], scored.latents)
        return self._exactly_scored[scored.prompt]

    def _note(self, before: Sequence[bool], after: Sequence[bool]) -> None:
        overturned = sum(old != new for old, new in zip(before, after, strict=True))
        self.rechecks = Rechecks(self.rechecks.made + len(before), self.rechecks.overturned + overturned)
