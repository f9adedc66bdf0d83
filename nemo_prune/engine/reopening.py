"""From everything suppressed to what is needed: gates are opened in the order of what that gives over what it harms.

With everything suppressed all captions are gone that can be. What is opened first is what ordinary captions miss most
and memorized ones least, so that neurons that all captions use (hubs) act again before those of a memorized caption do.
Gradients give the order, one backward pass a caption; whether captions stay gone is always asked, never reckoned.
"""

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from nemo_prune.engine.diffusion import NoisePredictor
from nemo_prune.engine.gates import all_neurons, closed_gates, frozen_weights, predict_gated
from nemo_prune.engine.gone import Corpus
from nemo_prune.engine.memory import in_parts
from nemo_prune.engine.ordinary import OrdinaryStates, share_of_everything
from nemo_prune.engine.settling import Jury
from nemo_prune.engine.soft_similarity import soft_noise_difference, soft_similarity
from nemo_prune.files.work import LineLog, Replay
from nemo_prune.mask import Neuron
from nemo_prune.progress import Advance, ignored

# How sharply the captions nearest to their limits outweigh the others.
_SHARPNESS = 10.0


@dataclass(frozen=True)
class ReopeningSettings:
    """The numbers of the reopening.

    Attributes:
        share: of the neurons that are still closed, tried at once; halved where a caption would come back.
        seeds: of each caption whose gradients are taken.
        ordinary: points on ordinary captions' ways whose gradients are taken.
        margin: by how much captions must stay gone.
        ajar: how far the closed gates are opened, 0 to 1, where the harm's gradients are taken.
        outdated: gradients are taken anew when more than this share of what is closed was opened since.
        least_harm: a harm below this share of the largest is not told from none.
        tries: masks that are judged at most; all that it takes unless given.
        seed: of everything that is drawn.
    """

    share: float = 0.1
    seeds: int = 2
    ordinary: int = 32
    margin: float = 0.02
    ajar: float = 0.35
    outdated: float = 0.05
    least_harm: float = 0.01
    tries: int | None = None
    seed: int = 0


def reopen(
    predictor: NoisePredictor,
    corpus: Corpus,
    states: OrdinaryStates,
    jury: Jury,
    neurons: Collection[Neuron],
    settings: ReopeningSettings,
    advance: Advance = ignored,
    log: LineLog | None = None,
) -> list[Neuron]:
    """Open gates as long as all captions stay gone; what remains was tried one by one, unless tries are limited.

    Args:
        predictor: the model.
        corpus: what captions are judged against.
        states: points on ordinary captions' ways.
        jury: judges the captions.
        neurons: what is suppressed at first; all captions that the jury asks about are gone under it.
        settings: the numbers.
        advance: called with the neurons that were decided and their number.
        log: where orders and tries are kept.
    """
    decided = Replay(log)
    kept, needed, turn, share, tried = set(neurons), set(), 0, settings.share, 0
    order: list[Neuron] = []
    opened = 0

    def are_gone(neurons: Collection[Neuron]) -> list[bool]:
        return [jury.all_gone(neurons, settings.margin)]

    while (waiting := kept - needed) and (settings.tries is None or tried < settings.tries):
        if not order or opened > settings.outdated * len(kept):
            seed = settings.seed * 100_003 + turn
            best = decided(_best_first, predictor, corpus, states, jury, kept, waiting, settings, seed)
            order = [Neuron(*each) for each in best]
            turn, opened = turn + 1, 0
        order = [neuron for neuron in order if neuron in waiting]
        number = max(1, round(share * len(order)))
        tried += 1
        while not all(decided(are_gone, kept.difference(order[:number]))):
            tried += 1
            if number == 1:
                needed.add(order[0])
                break
            number = max(1, number // 3)
        else:
            kept.difference_update(order[:number])
            opened += number
        # What failed is not likely to pass with the next ones; what passed may go on faster.
        share = min(settings.share, 2 * number / len(order))
        advance(len(neurons) - len(kept) + len(needed), len(neurons))
    return [neuron for neuron in all_neurons(predictor.sizes) if neuron in kept]


def _best_first(
    predictor: NoisePredictor,
    corpus: Corpus,
    states: OrdinaryStates,
    jury: Jury,
    kept: Collection[Neuron],
    waiting: Collection[Neuron],
    settings: ReopeningSettings,
    seed: int,
) -> list[Neuron]:
    """The waiting neurons, those first that ordinary captions miss most and memorized ones least."""
    generator = torch.Generator().manual_seed(seed)
    factors = closed_gates(list(kept), predictor.sizes).to(predictor.device)
    with frozen_weights(predictor):
        harm = _harm(predictor, corpus, jury, factors, settings, generator)
        missed = _missed(predictor, states, factors, settings, generator)
    least = settings.least_harm * harm.abs().max()
    # Where opening a gate does no good it is worth only its place in a shorter list.
    values = (missed.clamp_min(1e-3 * missed.abs().max()) / harm.clamp_min(least)).tolist()
    valued = dict(zip(all_neurons(predictor.sizes), values, strict=True))
    return sorted(waiting, key=lambda neuron: (-valued[neuron], neuron))


def _harm(
    predictor: NoisePredictor,
    corpus: Corpus,
    jury: Jury,
    factors: Tensor,
    settings: ReopeningSettings,
    generator: torch.Generator,
) -> Tensor:
    """How much each gate's opening brings the captions nearest to their limits nearer, [neurons]."""
    limits, views, total = corpus.own_limits.to(factors.device), corpus.memorized, torch.zeros_like(factors)
    seeds = torch.randperm(len(corpus.seeds), generator=generator)[: settings.seeds]
    gradients, excesses = [], []
    for position in jury.positions:
        # Where all gates are shut a single one tells little: what matters is where captions begin to come back.
        opened = torch.lerp(factors, torch.ones_like(factors), settings.ajar)[None].requires_grad_(True)
        latents = corpus.seeds.latents[seeds].to(factors.device)
        embeds = views.prompt_embeds[position].expand(len(seeds), -1, -1)
        noise_pred = predict_gated(predictor, latents, embeds, opened, corpus.seeds.timesteps[seeds])
        differences = soft_noise_difference(noise_pred, latents)
        before = views.differences[position, seeds].to(factors.device)
        own = soft_similarity(differences, before, corpus.betas)
        excess = (own - limits[position, seeds]).mean()
        gradients.append(torch.autograd.grad(excess, opened)[0][0])
        excesses.append(float(excess.detach()))
    weights = torch.softmax(_SHARPNESS * torch.tensor(excesses), dim=0).to(factors.device)
    for weight, gradient in zip(weights, gradients, strict=True):
        total += weight * gradient.clamp_min(0)
    return total


def _missed(
    predictor: NoisePredictor,
    states: OrdinaryStates,
    factors: Tensor,
    settings: ReopeningSettings,
    generator: torch.Generator,
) -> Tensor:
    """By how much each gate's opening lowers the change on ordinary captions, [neurons]."""
    chosen = torch.randperm(len(states), generator=generator)[: settings.ordinary]

    def gradient(part: slice) -> Tensor:
        opened, here = factors[None].clone().requires_grad_(True), chosen[part]
        noise_pred = predict_gated(
            predictor, states.latents[here], states.prompt_embeds[here], opened, states.timesteps[here]
        )
        # The square has a gradient where nothing is changed yet.
        change = share_of_everything(noise_pred, states, here).square().sum()
        return -torch.autograd.grad(change, opened)[0][0]

    return sum(in_parts(gradient, len(chosen), len(chosen), "a backward pass of one sample")) / len(chosen)
