"""The procedure of the released code, written plainly: the yardstick for results and cost.

One set of neurons at a time, all ten seeds, two passes a score (one with nothing suppressed, one
with the set), compared by one call of torchmetrics, which takes the range of the data from all that it is given
unless the settings pin it. It differs from the released code where that is wrong: a neuron that is a candidate
twice keeps its last place alone, and a channel without variation becomes 0 instead of NaN.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from torch import Tensor
from torchmetrics.functional.image import multiscale_structural_similarity_index_measure as multiscale_ssim

from nemo_prune.engine.activations import ActivationStatistics, neuron_activations
from nemo_prune.engine.diffusion import NoisePredictor
from nemo_prune.engine.localize import PromptLocalization
from nemo_prune.engine.similarity import MemorizationScore, noise_difference, ssim_window
from nemo_prune.mask import Neuron, NeuronMask


class Oracle:
    """The procedure on one model.

    Args:
        predictor: the model, with the settings of the localization.
        statistics: usual activations.
        threshold: tau.
    """

    def __init__(self, predictor: NoisePredictor, statistics: ActivationStatistics, threshold: float) -> None:
        self.predictor, self.statistics, self.threshold = predictor, statistics, threshold
        self.latents = predictor.initial_latents()

    def localize(self, prompt: str) -> PromptLocalization:
        """Detect (Alg. 1), select (Alg. 3) and refine (Alg. 4)."""
        began, passes_before = time.perf_counter(), self.predictor.sample_passes
        embeds = self.predictor.encode([prompt])[0]
        memorization = self.detect(embeds)
        kept = memorization.kept_seeds(self.threshold).nonzero().flatten().tolist()
        found = self.find(embeds, kept) if kept else {"status": "not_memorized"}
        return PromptLocalization(
            prompt=prompt,
            score=memorization.score,
            kept_seeds=tuple(kept),
            sample_passes=self.predictor.sample_passes - passes_before,
            seconds=time.perf_counter() - began,
            **found,
        )

    def detect(self, embeds: Tensor) -> MemorizationScore:
        """How much the seeds agree."""
        differences = self.noise_differences(embeds, ())
        rows, columns = torch.triu_indices(len(differences), len(differences), offset=1)
        pairs = torch.full((len(differences), len(differences)), -1.0)
        pairs[rows, columns] = pairs[columns, rows] = self.compare(differences[rows], differences[columns]).cpu()
        return MemorizationScore(pairs)

    def find(self, embeds: Tensor, kept: list[int]) -> dict:
        """The initial set and the refined set."""
        activations = {
            name: values[0] for name, values in neuron_activations(self.predictor.layers, embeds[None]).items()
        }
        settings = self.predictor.settings
        theta, k = settings.theta, 0
        while True:
            initial = self.candidates(activations, theta, k)
            reached = self.score(embeds, initial, kept)
            if reached <= self.threshold or theta - settings.theta_step < settings.theta_min:
                break
            theta, k = theta - settings.theta_step, k + 1
        resolved = reached <= self.threshold
        neurons = self.refine(embeds, initial, kept, self.threshold if resolved else reached)
        return {
            "status": "localized" if resolved else "unresolved",
            "candidates": tuple(initial),
            "neurons": tuple(neurons),
            "candidates_score": reached,
            "neurons_score": self.score(embeds, neurons, kept),
            "theta": theta,
            "k": k,
        }

    def candidates(self, activations: Mapping[str, Tensor], theta: float, k: int) -> list[Neuron]:
        """Unusual neurons by index, then the most active; of a duplicate the last place counts."""
        z_scores = self.statistics.z_scores(activations)
        chosen: list[Neuron] = []
        for layer, activation in activations.items():
            unusual = [index for index, z in enumerate(z_scores[layer].tolist()) if abs(z) > theta]
            for index in unusual + activation.topk(min(k, len(activation))).indices.tolist():
                neuron = Neuron(layer, index)
                if neuron in chosen:
                    chosen.remove(neuron)
                chosen.append(neuron)
        return chosen

    def refine(self, embeds: Tensor, initial: list[Neuron], kept: list[int], limit: float) -> list[Neuron]:
        """Let go of layers, mid block first, then of neurons, as long as the score stays below the limit."""
        layers = list(self.predictor.layers)[::-1]
        return refined(initial, layers, limit, lambda neurons: self.score(embeds, neurons, kept))

    def score(self, embeds: Tensor, neurons: Collection[Neuron], kept: list[int]) -> float:
        """The highest similarity with and without the neurons over the kept seeds: 2 S passes."""
        unsuppressed = self.noise_differences(embeds, ())
        suppressed = self.noise_differences(embeds, neurons)
        return float(self.compare(suppressed[kept], unsuppressed[kept]).max())

    def compare(self, a: Tensor, b: Tensor) -> Tensor:
        """Similarity of noise differences, [batch]."""
        settings = self.predictor.settings
        sigma, kernel_size = ssim_window(*a.shape[-2:])
        return multiscale_ssim(
            a, b, sigma=sigma, kernel_size=kernel_size, betas=settings.ssim_betas, normalize="relu", reduction="none",
            data_range=1.0 if settings.data_range == "one" else None,
        )  # fmt: skip

    def noise_differences(self, embeds: Tensor, neurons: Collection[Neuron]) -> Tensor:
        """Of all seeds, [S, channels, height, width]."""
        mask = NeuronMask.from_neurons(neurons, self.predictor.sizes)
        noise_pred = self.predictor.predict_noise(self.latents, embeds, [mask])[0]
        return noise_difference(noise_pred, self.latents.to(noise_pred.device))


def refined(
    initial: Collection[Neuron], layers: Sequence[str], limit: float, score: Callable[[list[Neuron]], float]
) -> list[Neuron]:
    """What remains when layers, then neurons, are let go of as long as the score stays below the limit (Alg. 4).

    Args:
        initial: the initial set.
        layers: in the order of the tests.
        limit: what scores must stay below.
        score: of a set that is not empty.
    """
    remaining = sorted(initial, key=lambda neuron: layers.index(neuron.layer))
    for layer in layers:
        others = [neuron for neuron in remaining if neuron.layer != layer]
        if others and len(others) < len(remaining) and score(others) < limit:
            remaining = others
    for neuron in list(remaining):
        others = [other for other in remaining if other != neuron]
        if others and score(others) < limit:
            remaining = others
    return remaining


def lower_bound(num_samples: int, num_kept: int, num_neurons: int) -> int:
    """The sample passes that any method must make for a prompt.

    All seeds once, the kept ones to show that the set is enough, one for each neuron to show that
    it can't be spared.
    """
    return num_samples + num_kept + num_neurons


def agrees(oracle: PromptLocalization, found: PromptLocalization) -> bool:
    """Whether an engine's result for a prompt is the oracle's: seeds, initial set and refined set."""
    same = ("status", "kept_seeds")
    return all(getattr(oracle, name) == getattr(found, name) for name in same) and all(
        set(getattr(oracle, name)) == set(getattr(found, name)) for name in ("candidates", "neurons")
    )


def largest_difference(a: PromptLocalization, b: PromptLocalization) -> float:
    """The largest difference of the scores that both report in full."""
    pairs = [(getattr(a, name), getattr(b, name)) for name in ("score", "neurons_score")]
    return max(abs(x - y) for x, y in pairs if x is not None and y is not None)
