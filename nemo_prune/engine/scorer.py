"""Score prompts: whether their seeds agree, and what remains of it with neurons suppressed."""

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nemo_prune.engine.activations import neuron_activations
from nemo_prune.engine.diffusion import NoisePredictor
from nemo_prune.engine.memory import named_shortage
from nemo_prune.engine.similarity import (
    MemorizationScore,
    extremes,
    joint_ranges,
    memorization_scores,
    noise_difference,
    similarity,
)
from nemo_prune.engine.trials import Trial, Why
from nemo_prune.facts import Rechecks
from nemo_prune.mask import Neuron

_MOST_REMEMBERED = 64
_COMPARING = "comparing the predictions of a batch"


@dataclass(frozen=True)
class ScoredPrompt:
    """A prompt's seeds with nothing suppressed.

    Attributes:
        prompt: its text.
        prompt_embeds: its text embeddings [positions, width].
        latents: initial latents [S, channels, height, width].
        noise_differences: their noise differences [S, channels, height, width] in 0..1.
        memorization: how much the seeds agree.
        extremes: lowest and highest value of their noise differences at every scale [S, scales, 2].
    """

    prompt: str
    prompt_embeds: Tensor
    latents: Tensor
    noise_differences: Tensor
    memorization: MemorizationScore
    extremes: Tensor


class Scorer:
    """Scores prompts, many of them in one batch.

    In half precision, similarities near the threshold are taken again from the float32 weights.

    Args:
        predictor: the model.
        reference: the same model in float32, where the predictor's precision is lower.
        margin: distance from the threshold within which the reference decides.

    Attributes:
        predictor: the model.
        rechecks: what the reference decided so far.
        passes: what sample passes were needed for -> how many.
    """

    def __init__(self, predictor: NoisePredictor, reference: NoisePredictor | None = None, margin: float = 0.0) -> None:
        self.predictor = predictor
        self.rechecks = Rechecks()
        self.passes: Counter[Why] = Counter()
        self._reference = None if reference is None else Scorer(reference)
        self._exactly_scored: dict[str, ScoredPrompt] = {}
        self._margin = margin
        self._betas = predictor.settings.ssim_betas
        self._joint = predictor.settings.data_range == "joint"

    @property
    def sample_passes(self) -> int:
        """Latents that went through the U-Net so far, in either precision."""
        return self.predictor.sample_passes + (self._reference.sample_passes if self._reference else 0)

    @property
    def computed_passes(self) -> int:
        """The same with those that filled up batches."""
        return self.predictor.computed_passes + (self._reference.computed_passes if self._reference else 0)

    @property
    def prompts_at_once(self) -> int:
        """How many prompts' seeds fill a batch."""
        return max(1, self.predictor.batch_size // self.predictor.settings.num_samples)

    def activations(self, scored: ScoredPrompt) -> dict[str, Tensor]:
        """Mean absolute activation of every neuron on a prompt (Alg. 2), dotted module name -> [out_features]."""
        found = neuron_activations(self.predictor.layers, scored.prompt_embeds[None])
        return {name: values[0] for name, values in found.items()}

    def score_prompts(
        self,
        prompts: Sequence[str],
        latents: Tensor | None = None,
        neurons: Collection[Neuron] = (),
        why: Why = Why.DETECTION,
    ) -> list[ScoredPrompt]:
        """The memorization score of prompts (Alg. 1), S sample passes a prompt.

        Args:
            prompts: texts.
            latents: initial latents [S, channels, height, width]; those of the settings unless given.
            neurons: what is suppressed meanwhile.
            why: what the passes are needed for.
        """
        prompts = list(prompts)
        latents = self.predictor.initial_latents() if latents is None else latents
        # The last digits depend on how much is computed together, so that it is always as much: a prompt's result
        # must not depend on the prompts beside it. Scores are taken prompt by prompt for the same reason.
        filled = prompts + prompts[-1:] * (self.prompts_at_once - len(prompts))
        prompt_embeds = self.predictor.encode(filled)[: len(prompts)]
        noise_pred = self.predictor.predict_each(
            latents.repeat(len(prompts), 1, 1, 1),
            prompt_embeds.repeat_interleave(len(latents), dim=0),
            [neurons] * (len(prompts) * len(latents)),
        ).unflatten(0, (len(prompts), len(latents)))
        self.passes[why] += len(prompts) * len(latents)
        with named_shortage(_COMPARING):
            differences = noise_difference(noise_pred, latents.to(noise_pred.device))
            return [
                # What a corpus keeps is not on the device.
                ScoredPrompt(
                    prompt,
                    embeds.cpu(),
                    latents,
                    difference.cpu(),
                    memorization_scores(difference[None], self._betas, self._joint)[0],
                    extremes(difference, len(self._betas)).cpu(),
                )
                for prompt, embeds, difference in zip(prompts, prompt_embeds, differences, strict=True)
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
        """How similar the noise differences with and without suppression are; one sample pass a trial.

        Args:
            asked: trials, each with its prompt.
            batch_size: how many go through the U-Net at once, where it is not the predictor's own.
        """
        similarities = self._similarities(asked, batch_size)
        self.passes.update(trial.why for _, trial in asked)
        if self._reference:
            near = self._near(asked, similarities)
            exact = self._exact_similarities([asked[position] for position in near])
            thresholds = [asked[position][1].threshold for position in near]
            before = [similarities[position] > tau for position, tau in zip(near, thresholds, strict=True)]
            self._note(before, [value > tau for value, tau in zip(exact, thresholds, strict=True)])
            for position, value in zip(near, exact, strict=True):
                similarities[position] = value
        return similarities

    def suppressed_similarities(
        self, scored: ScoredPrompt, seeds: Sequence[int], neurons: Collection[Neuron], threshold: float = 0.0
    ) -> list[float]:
        """How similar a prompt's noise differences on some seeds are with and without suppression.

        Args:
            scored: the prompt with nothing suppressed.
            seeds: positions of the seeds; the range of the data is taken over them.
            neurons: what is suppressed.
            threshold: what the similarities will be compared with.
        """
        seeds, neurons = tuple(seeds), frozenset(neurons)
        return self.answer([(scored, Trial(neurons, each, threshold, seeds, True, Why.SCORE_AGAIN)) for each in seeds])

    def _similarities(self, asked: Sequence[tuple[ScoredPrompt, Trial]], batch_size: int | None = None) -> list[float]:
        if not asked:
            return []
        noise_pred = self.predictor.predict_each(
            torch.stack([scored.latents[trial.seed] for scored, trial in asked]),
            torch.stack([scored.prompt_embeds for scored, _ in asked]),
            [trial.neurons for _, trial in asked],
            batch_size,
        )
        with named_shortage(_COMPARING):
            return self._compared(asked, noise_pred, batch_size or self.predictor.batch_size)

    def _compared(self, asked: Sequence[tuple[ScoredPrompt, Trial]], noise_pred: Tensor, size: int) -> list[float]:
        """Similarities of predictions with suppression and the kept ones without."""
        device = noise_pred.device
        latents = torch.stack([scored.latents[trial.seed] for scored, trial in asked]).to(device)
        unsuppressed = torch.stack([scored.noise_differences[trial.seed] for scored, trial in asked]).to(device)
        differences = noise_difference(noise_pred, latents)
        ranges, similarities = self._ranges(asked, differences), []
        for start in range(0, len(asked), size):
            # Filled up, as the batches of the predictions are.
            filled = torch.arange(start, start + size, device=device).clamp_max(len(asked) - 1)
            part = None if ranges is None else ranges[filled]
            similarities += similarity(differences[filled], unsuppressed[filled], self._betas, part).tolist()
        return similarities[: len(asked)]

    def _near(self, asked: Sequence[tuple[ScoredPrompt, Trial]], similarities: Sequence[float]) -> list[int]:
        """The places of what the reference decides; of what is asked at once all or nothing."""
        near = [
            place for place, (_, trial) in enumerate(asked) if abs(similarities[place] - trial.threshold) < self._margin
        ]
        groups = {(id(asked[place][0]), asked[place][1].neurons) for place in near if asked[place][1].at_once}
        beside = {
            place
            for place, (scored, trial) in enumerate(asked)
            if trial.at_once and (id(scored), trial.neurons) in groups
        }
        return sorted({*near, *beside})

    def _ranges(self, asked: Sequence[tuple[ScoredPrompt, Trial]], differences: Tensor) -> Tensor | None:
        """The range of the data for each trial at each scale [trials, scales]; None where it is 1.

        It is taken over all seeds that belong together where they are asked at once, else over them with nothing
        suppressed and over the trial's own with suppression: what is asked beside it must not change an answer.
        """
        if not self._joint:
            return None
        suppressed = extremes(differences, len(self._betas)).cpu()
        groups: dict[tuple[int, frozenset[Neuron]], list[int]] = {}
        for position, (scored, trial) in enumerate(asked):
            if trial.at_once:
                groups.setdefault((id(scored), trial.neurons), []).append(position)
        ranges = []
        for position, (scored, trial) in enumerate(asked):
            together = list(trial.together) or [trial.seed]
            beside = groups[id(scored), trial.neurons] if trial.at_once else [position]
            ranges.append(joint_ranges(suppressed[beside], scored.extremes[together]))
        return torch.stack(ranges).to(differences.device)

    def _exact_similarities(self, asked: Sequence[tuple[ScoredPrompt, Trial]]) -> list[float]:
        """The same by the float32 weights; the unsuppressed seeds are predicted along."""
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
