"""Find the neurons that make a prompt give its training image back (Alg. 2 to 4 of the paper)."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from nemo_prune.activations import ActivationStatistics, neuron_activations
from nemo_prune.calibration import Calibration
from nemo_prune.diffusion import NoisePredictor
from nemo_prune.mask import Neuron, NeuronMask
from nemo_prune.scoring import memorization_score, noise_difference, suppressed_similarity
from nemo_prune.settings import LocalizationSettings

Status = Literal["localized", "not_memorized", "unresolved"]

# Many sets of neurons in, one score each out: the highest suppressed similarity over kept seeds.
ScoreSets = Callable[[Sequence[Sequence[Neuron]]], list[float]]


@dataclass(frozen=True)
class InitialSelection:
    """Where the initial selection ended (Alg. 3).

    Attributes:
        neurons: the last set tried, in the order in which the refinement tests them.
        score: the highest suppressed similarity under that set.
        theta: its cut on |z|.
        k: how many of the most active neurons of each layer it holds.
        resolved: whether the score reached the threshold.
    """

    neurons: tuple[Neuron, ...]
    score: float
    theta: float
    k: int
    resolved: bool


@dataclass(frozen=True)
class PromptLocalization:
    """What was found for one prompt.

    Attributes:
        prompt: its text.
        status: ``localized``; ``not_memorized``: no seed was kept; ``unresolved``: the selection ran
            out before the score reached the threshold, the neurons are the best that was found.
        score: its memorization score.
        kept_seeds: positions of the seeds that agree with another one.
        candidates: the initial set.
        neurons: the refined set, a part of the candidates.
        candidates_score: the highest suppressed similarity under the initial set, None without one.
        neurons_score: the same under the refined set.
        theta: the cut on |z| that gave the candidates.
        k: how many of the most active neurons of each layer are among them.
        sample_passes: latents that went through the U-Net for it.
        seconds: wall time.
    """

    prompt: str
    status: Status
    score: float
    kept_seeds: tuple[int, ...] = ()
    candidates: tuple[Neuron, ...] = ()
    neurons: tuple[Neuron, ...] = ()
    candidates_score: float | None = None
    neurons_score: float | None = None
    theta: float | None = None
    k: int | None = None
    sample_passes: int = 0
    seconds: float = 0.0


class PromptScorer:
    """Scores one prompt: its seeds against each other, and with neurons suppressed against without.

    Args:
        predictor: the model.
        prompt_embeds: the prompt's text embeddings [positions, width].
        latents: initial latents [S, channels, height, width].
    """

    def __init__(self, predictor: NoisePredictor, prompt_embeds: Tensor, latents: Tensor) -> None:
        self._predictor = predictor
        self._prompt_embeds = prompt_embeds
        self._latents = latents.to(prompt_embeds.device)
        self._betas = predictor.settings.ssim_betas
        self._unsuppressed = self._noise_differences((None,))[0]
        self.memorization = memorization_score(self._unsuppressed, self._betas)

    def suppressed_similarities(self, masks: Sequence[NeuronMask], seeds: Sequence[int]) -> Tensor:
        """Similarity with and without suppression, [masks, seeds], for some seeds by position."""
        seeds = list(seeds)
        suppressed = self._noise_differences(masks, seeds)
        return suppressed_similarity(suppressed, self._unsuppressed[seeds], self._betas)

    def score_sets(self, seeds: Sequence[int]) -> ScoreSets:
        """The function that the search asks: sets of neurons in, highest similarity over seeds out."""

        def score(sets: Sequence[Sequence[Neuron]]) -> list[float]:
            masks = [NeuronMask.from_neurons(neurons, self._predictor.sizes) for neurons in sets]
            return self.suppressed_similarities(masks, seeds).amax(dim=1).tolist()

        return score

    def memorization_under(self, mask: NeuronMask) -> float:
        """The memorization score with a mask suppressed."""
        return memorization_score(self._noise_differences((mask,))[0], self._betas).score

    def _noise_differences(
        self, masks: Sequence[NeuronMask | None], seeds: Sequence[int] | slice = slice(None)
    ) -> Tensor:
        latents = self._latents[seeds]
        return noise_difference(self._predictor.predict_noise(latents, self._prompt_embeds, masks), latents)


def select_candidates(
    activations: Mapping[str, Tensor], z_scores: Mapping[str, Tensor], theta: float, k: int
) -> tuple[Neuron, ...]:
    """Neurons with unusual or with the highest activation (Alg. 2 and 3).

    Args:
        activations: dotted module name -> [out_features], of one prompt.
        z_scores: the same in standard deviations from the usual.
        theta: cut on |z|.
        k: how many of the most active neurons of each layer are added.

    Returns:
        Layer by layer: |z| > theta by index, then the k most active, the most active first. A neuron
        that is both stands at its last place: there the refinement's real test comes.
    """
    candidates = []
    for name, activation in activations.items():
        unusual = (z_scores[name].abs() > theta).nonzero().flatten().tolist()
        most_active = activation.topk(min(k, len(activation))).indices.tolist()
        ordered = [index for index in unusual if index not in most_active] + most_active
        candidates += [Neuron(name, index) for index in ordered]
    return tuple(candidates)


def select_initial_neurons(
    candidates: Callable[[float, int], tuple[Neuron, ...]],
    score_sets: ScoreSets,
    threshold: float,
    settings: LocalizationSettings,
) -> InitialSelection:
    """Lower the cut until suppressing the candidates breaks the memorization (Alg. 3).

    Args:
        candidates: the candidates at a theta and k.
        score_sets: the highest suppressed similarity under sets of neurons.
        threshold: tau; a set is enough when its score is not above it.
        settings: where theta starts, falls by and ends.
    """
    theta, k = settings.theta, 0
    while True:
        neurons = candidates(theta, k)
        # With nothing suppressed the prediction equals itself, so no pass is spent on it.
        score = score_sets([neurons])[0] if neurons else 1.0
        resolved = score <= threshold
        if resolved or theta - settings.theta_step < settings.theta_min:
            return InitialSelection(neurons, score, theta, k, resolved)
        theta -= settings.theta_step
        k += 1


def refine_neurons(
    candidates: Sequence[Neuron],
    layer_order: Sequence[str],
    score_sets: ScoreSets,
    threshold: float,
) -> tuple[Neuron, ...]:
    """Let go of what is not needed, first whole layers, then single neurons (Alg. 4).

    One greedy sweep: no single neuron of the result can be spared, provided that letting more
    neurons act never lowers the score, which need not hold.

    Args:
        candidates: the initial set; within a layer its order is the order of the tests.
        layer_order: dotted module names in the order of the tests.
        score_sets: the highest suppressed similarity under sets of neurons.
        threshold: a smaller set is accepted when its score is strictly below it.
    """

    def can_do_without(neurons: Sequence[Neuron]) -> bool:
        return bool(neurons) and score_sets([neurons])[0] < threshold

    kept = list(candidates)
    for layer in layer_order:
        others = [neuron for neuron in kept if neuron.layer != layer]
        if len(others) < len(kept) and can_do_without(others):
            kept = others
    for neuron in sorted(kept, key=lambda neuron: layer_order.index(neuron.layer)):
        others = [other for other in kept if other != neuron]
        if can_do_without(others):
            kept = others
    return tuple(kept)


def localize_prompt(
    predictor: NoisePredictor, prompt: str, calibration: Calibration, threshold: float
) -> PromptLocalization:
    """Find the memorization neurons of one prompt, if it is memorized at all (Sec. 3).

    Args:
        predictor: the model, with the settings of the localization.
        prompt: the text.
        calibration: usual activations.
        threshold: tau.

    Raises:
        ModelError: the model predicts NaN or infinity.
    """
    started, passes_before = time.perf_counter(), predictor.sample_passes
    settings = predictor.settings
    prompt_embeds = predictor.encode([prompt])
    scorer = PromptScorer(predictor, prompt_embeds[0], predictor.initial_latents())

    def cost() -> dict[str, float]:
        return {
            "sample_passes": predictor.sample_passes - passes_before,
            "seconds": time.perf_counter() - started,
        }

    score = scorer.memorization.score
    kept_seeds = scorer.memorization.kept_seeds(threshold).nonzero().flatten().tolist()
    if not kept_seeds:
        return PromptLocalization(prompt, "not_memorized", score, **cost())

    score_sets = scorer.score_sets(kept_seeds)
    candidates = _candidates_of(predictor, prompt_embeds, calibration.statistics)
    selection = select_initial_neurons(candidates, score_sets, threshold, settings)
    layer_order = list(predictor.layers)
    neurons = refine_neurons(
        selection.neurons,
        layer_order[::-1] if settings.layers_backwards else layer_order,
        score_sets,
        threshold if selection.resolved else selection.score,
    )
    return PromptLocalization(
        prompt=prompt,
        status="localized" if selection.resolved else "unresolved",
        score=score,
        kept_seeds=tuple(kept_seeds),
        candidates=selection.neurons,
        neurons=neurons,
        candidates_score=selection.score,
        neurons_score=score_sets([neurons])[0],
        theta=selection.theta,
        k=selection.k,
        **cost(),
    )


def _candidates_of(
    predictor: NoisePredictor, prompt_embeds: Tensor, statistics: ActivationStatistics
) -> Callable[[float, int], tuple[Neuron, ...]]:
    activations = {name: values[0] for name, values in neuron_activations(predictor.layers, prompt_embeds).items()}
    z_scores = statistics.z_scores(activations)
    return lambda theta, k: select_candidates(activations, z_scores, theta, k)
