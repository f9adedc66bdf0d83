"""How what captions make a model predict compares with the memorized captions' predictions, and with itself."""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from nemo_prune.engine.diffusion import NoisePredictor
from nemo_prune.engine.memory import in_parts, named_shortage
from nemo_prune.engine.similarity import memorization_scores, similarity
from nemo_prune.engine.views import Views, differences_of, most_alike
from nemo_prune.files.work import LineLog
from nemo_prune.mask import Neuron, NeuronMask

# Memorized captions that a prediction is compared with: those whose sketches are most alike. On a model of 100 captions
# the nearest of all is among them in .9 of the cases, and always where it is nearer than .6 (benchmarks/RESULTS.md).
_LIKELY = 16
# Pairs of noise differences that are compared in one go.
_AT_ONCE = 64
_COMPARING = "comparing the predictions of a caption"


@dataclass(frozen=True)
class Measures:
    """Multi-scale SSIM of captions' noise differences.

    Attributes:
        own: to the caption's own unsuppressed prediction on the same seed, [P, S]; [0, S] for ordinary ones.
        resemblance: to the nearest of all memorized captions' unsuppressed predictions on the same seed, [P, S].
        nearest: which one that is, [P, S].
        agreement: of the caption's seeds of one timestep with each other, the mean of all pairs, [P, S].
    """

    own: Tensor
    resemblance: Tensor
    nearest: Tensor
    agreement: Tensor


def measure(views: Views, memorized: Views, betas: Sequence[float]) -> Measures:
    """Compare captions' predictions with those of all memorized captions, and the seeds with each other.

    Args:
        views: under a mask.
        memorized: the memorized captions on the same seeds, nothing suppressed.
        betas: exponents of the multi-scale SSIM.
    """
    places = {prompt: place for place, prompt in enumerate(memorized.prompts)}
    return _joined(
        measure_one(places.get(prompt), differences.to(views.device), memorized, betas)
        for prompt, differences in zip(views.prompts, views.differences, strict=True)
    )


@named_shortage(_COMPARING)
def measure_one(position: int | None, differences: Tensor, memorized: Views, betas: Sequence[float]) -> Measures:
    """How one caption measures under a mask; the first dimension of all is 1.

    Args:
        position: of the caption in the memorized ones; None for an ordinary one.
        differences: its noise differences under the mask [S, channels, height, width].
        memorized: the memorized captions on the same seeds, nothing suppressed.
        betas: exponents of the multi-scale SSIM.
    """
    own = torch.zeros(0, len(differences))
    if position is not None:
        own = _compare(differences, memorized.differences[position].to(differences.device), betas)[None]
    resemblance, nearest = _nearest(differences, memorized, betas)
    agreement = _agreement(differences, memorized.seeds.timesteps, betas)
    return Measures(own, resemblance[None], nearest[None], agreement[None])


def measure_under(
    predictor: NoisePredictor,
    prompts: Sequence[str],
    memorized: Views,
    neurons: Collection[Neuron],
    log: LineLog | None = None,
) -> Measures:
    """How captions measure with neurons suppressed; one sample pass a caption and seed.

    Some captions are predicted at a time. What a log holds is not predicted again.

    Args:
        predictor: the model.
        prompts: texts, memorized or ordinary ones.
        memorized: the memorized captions, nothing suppressed.
        neurons: what is suppressed.
        log: where the measures are kept as they come.
    """
    betas = predictor.settings.ssim_betas
    name = None
    if log is not None:
        # What is taken in the neurons' place depends on the captions that are held, too.
        mask = predictor.in_weights(NeuronMask.from_neurons(neurons, predictor.sizes))
        name = f"{mask.digest} {predictor.scale}"
    known = {record["prompt"]: record for record in log or () if record["mask"] == name}
    places = {prompt: place for place, prompt in enumerate(memorized.prompts)}
    waiting = [prompt for prompt in prompts if prompt not in known]
    for start in range(0, len(waiting), predictor.batch_size):
        group = waiting[start : start + predictor.batch_size]
        predicted = differences_of(predictor, predictor.encode(group), memorized.seeds, neurons)
        for prompt, differences in zip(group, predicted, strict=True):
            found = measure_one(places.get(prompt), differences, memorized, betas)
            known[prompt] = {"mask": name, "prompt": prompt}
            known[prompt] |= {each.name: getattr(found, each.name).tolist() for each in fields(found)}
            if log is not None:
                log.append(known[prompt])
    return _joined(
        Measures(**{each.name: torch.tensor(known[prompt][each.name]) for each in fields(Measures)})
        for prompt in prompts
    )


def _joined(rows: Iterable[Measures]) -> Measures:
    rows = list(rows)
    return Measures(**{each.name: torch.cat([getattr(row, each.name) for row in rows]) for each in fields(Measures)})


def _agreement(differences: Tensor, timesteps: Tensor, betas: Sequence[float]) -> Tensor:
    """Mean similarity of a caption's seeds of the same timestep, [S]; -1 where a seed is alone."""
    found = torch.full((len(timesteps),), -1.0)
    for timestep in timesteps.unique():
        there = timesteps == timestep
        if int(there.sum()) > 1:
            found[there] = memorization_scores(differences[None, there], betas)[0].values.mean()
    return found


def _nearest(differences: Tensor, memorized: Views, betas: Sequence[float]) -> tuple[Tensor, Tensor]:
    """The highest similarity to any memorized caption on the same seed, and which one that is, both [S].

    Similarities are taken with those alone whose sketches are most alike: a corpus of 500 would else cost 500 of them
    a seed.
    """
    columns = torch.arange(len(differences))
    likely = most_alike(differences, memorized, columns, _LIKELY)
    others = memorized.differences[likely, columns].to(differences.device)
    compared = _compare(differences.expand_as(others).flatten(0, 1), others.flatten(0, 1), betas)
    highest = compared.unflatten(0, likely.shape).max(dim=0)
    return highest.values, likely[highest.indices, columns]


def _compare(a: Tensor, b: Tensor, betas: Sequence[float]) -> Tensor:
    """Similarity of noise differences [batch, ...] with as many others, [batch], on the CPU."""

    def compare(part: slice) -> Tensor:
        return similarity(a[part], b[part], betas).cpu()

    return torch.cat(list(in_parts(compare, len(a), _AT_ONCE, _COMPARING)))
