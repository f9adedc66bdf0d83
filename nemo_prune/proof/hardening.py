"""What further rows can do against an attack: those that its own embeddings use are pruned too, over rounds."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from torch import Tensor

from nemo_prune.engine.activations import ActivationStatistics, ActivationStatisticsFitter, neuron_activations
from nemo_prune.engine.layers import find_text_projections, layer_sizes
from nemo_prune.mask import Neuron, NeuronMask, Pruning
from nemo_prune.proof.attack import AttackSettings, attack
from nemo_prune.proof.drawing import Drawing, draw, encode
from nemo_prune.proof.passes import PassCounter
from nemo_prune.proof.replication import ReplicationJudge

_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


@dataclass(frozen=True)
class HardenedRound:
    """One round of hardening.

    Attributes:
        neurons: neurons after it.
        came_back: pictures that the attack brought back before it.
        silenced: those of them whose embedding no longer gives the picture under the round's neurons.
    """

    neurons: tuple[Neuron, ...]
    came_back: int
    silenced: int


def pruned_copy(pipe: StableDiffusionPipeline, pruning: Pruning) -> StableDiffusionPipeline:
    """A pipeline with a U-Net of its own whose rows are pruned; everything else is shared.

    Args:
        pipe: stays as it is.
        pruning: which rows, what they are multiplied by, and what is changed behind them.
    """
    unet = copy.deepcopy(pipe.unet)
    layers = find_text_projections(unet, "both")
    pruning.mask.check(layer_sizes(layers))
    with torch.no_grad():
        for neuron in pruning.mask.neurons:
            layers[neuron.layer].weight[neuron.index] *= pruning.scale
        for name in pruning.mask.behind:
            parameter = unet.get_parameter(name)
            parameter.copy_(pruning.mask.changed_behind(name, parameter))
    other = StableDiffusionPipeline(**{**pipe.components, "unet": unet}, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    return other


def usual_activations(
    pipe: StableDiffusionPipeline, ordinary: Sequence[str], projections: str = "value"
) -> ActivationStatistics:
    """Mean and deviation of the neurons' activations on ordinary captions (Alg. 2)."""
    layers, fitter = find_text_projections(pipe.unet, projections), ActivationStatisticsFitter()
    for text in ordinary:
        fitter.update(neuron_activations(layers, encode(pipe, text)[None]))
    return fitter.statistics


def ranked_neurons(
    pipe: StableDiffusionPipeline, prompt_embeds: Tensor, usual: ActivationStatistics, projections: str = "value"
) -> list[Neuron]:
    """Neurons by how much more active they are under an embedding than usual, the most unusual first.

    Args:
        pipe: the unpruned model.
        prompt_embeds: an embedding [positions, width], such as an attack's.
        usual: activations on ordinary captions.
        projections: as in :func:`~nemo_prune.engine.layers.find_text_projections`.
    """
    layers = find_text_projections(pipe.unet, projections)
    scores = usual.z_scores(neuron_activations(layers, prompt_embeds[None]))
    flat = [(float(value), Neuron(name, index)) for name, each in scores.items() for index, value in enumerate(each[0])]
    return [neuron for _, neuron in sorted(flat, key=lambda pair: -pair[0])]


def harden(
    pipe: StableDiffusionPipeline,
    mask: NeuronMask,
    targets: Sequence[tuple[str, Image.Image]],
    ordinary: Sequence[str],
    judge: ReplicationJudge,
    guidance_scale: float,
    settings: AttackSettings,
    rounds: int,
    seed: int,
    projections: str = "value",
) -> list[HardenedRound]:
    """Prune what the attack uses, and attack again.

    Each round attacks every target under the neurons so far. From an embedding that brings its picture back, the
    neurons are ranked by how unusual their activation is, and the smallest number of them is added that stops the
    picture under that embedding.

    Args:
        pipe: the unpruned model.
        mask: where the hardening begins.
        targets: captions with their pictures.
        ordinary: captions that usual activations are taken from.
        judge: compares images with a picture.
        guidance_scale: of the images.
        settings: the attack's.
        rounds: how many at most; it ends when nothing comes back.
        seed: of the attacks; each round has its own.
        projections: which neurons may be added.
    """
    usual = usual_activations(pipe, ordinary, projections)
    neurons, found = set(mask.neurons), []
    drawing = Drawing("ddim", settings.drawing_steps, guidance_scale)
    for turn in range(rounds):
        candidate = pruned_copy(pipe, Pruning(mask.extended(neurons)))
        added: set[Neuron] = set()
        came_back = silenced = 0
        for place, (text, picture) in enumerate(targets):
            begin = seed + 10_000 * turn + 100 * place
            outcome = attack(
                candidate, picture, text, "caption", ordinary[0], judge, guidance_scale, settings, PassCounter(), begin
            )
            if outcome.steps is None:
                continue
            came_back += 1
            seeds = [begin + 1 + each for each in range(settings.images_per_look)]
            ranked = [each for each in ranked_neurons(pipe, outcome.prompt_embeds, usual, projections)
                      if each not in neurons]  # fmt: skip
            needed = _fewest_that_silence(
                pipe, outcome.prompt_embeds, picture, mask.extended(neurons), ranked, judge, drawing, seeds
            )
            silenced += needed is not None
            added |= set(needed or ())
        neurons |= added
        found.append(HardenedRound(tuple(sorted(neurons)), came_back, silenced))
        if not added:
            break
    return found


def _fewest_that_silence(
    pipe: StableDiffusionPipeline,
    prompt_embeds: Tensor,
    picture: Image.Image,
    pruned: NeuronMask,
    ranked: Sequence[Neuron],
    judge: ReplicationJudge,
    drawing: Drawing,
    seeds: Sequence[int],
) -> Sequence[Neuron] | None:
    """The shortest beginning of the ranking, of doubled lengths, under which the embedding gives no copy."""
    for number in _SIZES:
        wider = pruned_copy(pipe, Pruning(pruned.extended(ranked[:number])))
        images = draw(wider, prompt_embeds, drawing, seeds)
        if max(judge.similarity_to(picture, images)) < judge.cut:
            return ranked[:number]
    return None
