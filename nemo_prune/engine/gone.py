"""When a memorized caption is gone, and not only silent; and when an ordinary one is called up."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nemo_prune.engine.diffusion import NoisePredictor
from nemo_prune.engine.gates import all_neurons
from nemo_prune.engine.similarity import memorization_scores, noise_difference, similarity
from nemo_prune.mask import Neuron

# Seed of latents that no search for a mask has seen.
FRESH_SEED = 3001
# By how many of the seeds' standard deviations their mean must stay under tau.
SPREADS = 2.0
# By how many deviations above their mean ordinary captions' seeds resemble a memorized caption, at most.
USUAL_SPREADS = 3.0
# Memorized captions that a prediction is compared with: those that it correlates with most.
_LIKELY = 3
# Pairs of noise differences that are compared in one go.
_AT_ONCE = 512


@dataclass(frozen=True)
class Views:
    """What captions make a model predict on the same seeds, under one set of suppressed neurons.

    Attributes:
        prompts: P captions.
        prompt_embeds: their text embeddings [P, positions, width].
        seeds: the latents and timesteps, the same for all.
        differences: noise differences [P, S, channels, height, width] in 0..1.
    """

    prompts: tuple[str, ...]
    prompt_embeds: Tensor
    seeds: "Seeds"
    differences: Tensor


@dataclass(frozen=True)
class Seeds:
    """Initial latents, each with the timestep at which the noise is predicted on it.

    Attributes:
        latents: pure noise [S, channels, height, width].
        timesteps: of the model's training, [S].
    """

    latents: Tensor
    timesteps: Tensor

    def __len__(self) -> int:
        return len(self.latents)

    def __add__(self, other: "Seeds") -> "Seeds":
        return Seeds(torch.cat([self.latents, other.latents]), torch.cat([self.timesteps, other.timesteps]))

    @classmethod
    def of(cls, latents: Tensor, timestep: int) -> "Seeds":
        """Latents that share a timestep."""
        return cls(latents, torch.full((len(latents),), timestep))

    @classmethod
    def draw(
        cls,
        predictor: NoisePredictor,
        seed: int | None = None,
        num: int | None = None,
        timestep: int | None = None,
    ) -> "Seeds":
        """Draw latents on the CPU; seed, number and timestep are the predictor's own unless given."""
        timestep = predictor.timestep if timestep is None else timestep
        return cls.of(predictor.initial_latents(seed, num), timestep)


@dataclass(frozen=True)
class Measures:
    """Multi-scale SSIM of captions' noise differences.

    Attributes:
        own: to the caption's own unsuppressed prediction on the same seed, [P, S]; empty for ordinary ones.
        resemblance: to the nearest of all memorized captions' unsuppressed predictions on the same seed, [P, S].
        nearest: which one that is, [P, S].
        agreement: of the caption's seeds of one timestep with each other, the mean of all pairs, [P, S].
    """

    own: Tensor
    resemblance: Tensor
    nearest: Tensor
    agreement: Tensor


@dataclass(frozen=True)
class Corpus:
    """What a mask is judged against; it is predicted once for all masks.

    Attributes:
        memorized: the memorized captions, nothing suppressed.
        ordinary: ordinary captions, nothing suppressed.
        emptied: how the memorized ones measure with everything suppressed.
        usual: how the ordinary ones measure with nothing suppressed.
        usual_emptied: how the ordinary ones measure with everything suppressed.
        thresholds: tau of every seed's timestep, [S].
        strictness: how far under its limits each memorized caption must stay, [P].
        betas: exponents of the multi-scale SSIM.
    """

    memorized: Views
    ordinary: Views
    emptied: Measures
    usual: Measures
    usual_emptied: Measures
    thresholds: Tensor
    strictness: Tensor
    betas: tuple[float, ...]

    @property
    def seeds(self) -> Seeds:
        """The seeds on which captions are judged."""
        return self.memorized.seeds

    @property
    def own_limits(self) -> Tensor:
        """Up to what a memorized caption may be similar to itself before, [P, S]: tau, less its strictness."""
        return self.thresholds[None] - self.strictness[:, None]

    @property
    def usual_resemblance(self) -> Tensor:
        """What ordinary captions may resemble a memorized one by before anything is suppressed, [1, S].

        Their mean plus three deviations: with hundreds of captions and seeds, the highest of a few ordinary ones is
        exceeded by chance.
        """
        found, timesteps = self.usual.resemblance, self.seeds.timesteps
        groups = [found[:, timesteps == each] for each in timesteps]
        return torch.stack([group.mean() + USUAL_SPREADS * group.std() for group in groups])[None]

    @property
    def resemblance_limits(self) -> Tensor:
        """Up to what a memorized caption may resemble one, [P, S]: as with everything suppressed, or as is usual.

        By a standard deviation over seeds more, so that a mask that is as good as everything suppressed passes.
        """
        emptied = self.emptied.resemblance
        floor = emptied + emptied.std(dim=1, keepdim=True)
        return torch.maximum(floor, self.usual_resemblance) - self.strictness[:, None]

    @property
    def spread_limits(self) -> Tensor:
        """Up to what the mean of a caption's seeds plus deviations may be similar to itself before, [P, S].

        Tau, or what everything suppressed leaves where that is higher: no mask can be asked for more. That, too, by a
        standard deviation more.
        """
        timesteps, emptied = self.seeds.timesteps, self.emptied.own
        floor = torch.stack([spread(emptied[:, timesteps == each]) for each in timesteps], dim=1)
        return torch.maximum(self.own_limits, floor + emptied.std(dim=1, keepdim=True))

    @property
    def ordinary_limits(self) -> Tensor:
        """Up to what an ordinary caption may do so, [N, S]: also as before anything was suppressed."""
        before = torch.maximum(self.usual_emptied.resemblance, self.usual.resemblance)
        return torch.maximum(before, self.usual_resemblance)

    @property
    def agreement_limits(self) -> Tensor:
        """Up to what a caption's seeds may agree, [P, S]: as with everything suppressed, or as ordinary captions do."""
        return torch.maximum(self.emptied.agreement, self.thresholds[None]) - self.strictness[:, None]


@dataclass(frozen=True)
class Verdict:
    """One caption under a mask. A margin is the distance to what is allowed; below 0 it is exceeded.

    Attributes:
        prompt: its text.
        similarity: the suppressed similarity, the highest of all seeds; None for an ordinary caption.
        is_silent: whether every seed is at most at tau, which is all that the paper asks for.
        similarity_margin: how far the seeds, and their mean plus two standard deviations, are under tau at least.
        resemblance: to the nearest memorized caption, on the seed where it exceeds its limit most.
        nearest: that caption.
        resemblance_margin: its limit minus that.
        agreement: of the seeds with each other, the highest of all timesteps.
        agreement_margin: how far that is under its limit; None for an ordinary caption.
    """

    prompt: str
    similarity: float | None
    is_silent: bool
    similarity_margin: float | None
    resemblance: float
    nearest: str
    resemblance_margin: float
    agreement: float
    agreement_margin: float | None

    @property
    def margins(self) -> dict[str, float]:
        """Why it would not be gone -> how far it is from that."""
        margins = {
            "similar to its own unsuppressed prediction": self.similarity_margin,
            "resembles a memorized caption": self.resemblance_margin,
            "its seeds agree": self.agreement_margin,
        }
        return {reason: margin for reason, margin in margins.items() if margin is not None}

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why it is not gone; empty where it is, or where an ordinary caption is as before."""
        # Written so that NaN does not pass.
        return tuple(reason for reason, margin in self.margins.items() if not margin >= 0)

    @property
    def is_gone(self) -> bool:
        """Whether nothing of it shows in its noise predictions; images are judged apart."""
        return not self.reasons


def observe(predictor: NoisePredictor, prompts: Sequence[str], seeds: Seeds, neurons: Collection[Neuron] = ()) -> Views:
    """Predict captions' noise differences on the same seeds; one sample pass a caption and seed.

    Args:
        predictor: the model.
        prompts: texts.
        seeds: initial latents and timesteps.
        neurons: what is suppressed.
    """
    prompt_embeds = predictor.encode(prompts)
    differences = torch.stack([differences_of(predictor, each, seeds, neurons) for each in prompt_embeds])
    return Views(tuple(prompts), prompt_embeds, seeds, differences)


def differences_of(
    predictor: NoisePredictor, prompt_embeds: Tensor, seeds: Seeds, neurons: Collection[Neuron] = ()
) -> Tensor:
    """Noise differences of one caption, [S, channels, height, width]; one sample pass a seed.

    Args:
        predictor: the model.
        prompt_embeds: its text embeddings [positions, width].
        seeds: initial latents and timesteps.
        neurons: what is suppressed.
    """
    latents = seeds.latents.to(predictor.pipe.unet.device)
    found = torch.empty_like(latents)
    for timestep in seeds.timesteps.unique().tolist():
        there = (seeds.timesteps == timestep).nonzero().flatten()
        noise_pred = predictor.predict_each(
            latents[there],
            prompt_embeds.expand(len(there), -1, -1),
            [neurons] * len(there),
            timestep=timestep,
        )
        found[there] = noise_difference(noise_pred, latents[there])
    return found


def gather_corpus(
    predictor: NoisePredictor,
    prompts: Sequence[str],
    ordinary: Sequence[str],
    seeds: Seeds,
    threshold: float,
    strictness: Mapping[str, float] | None = None,
) -> Corpus:
    """Predict what masks are judged against: two sample passes a caption and seed.

    Args:
        predictor: the model.
        prompts: memorized captions.
        ordinary: ordinary captions; at other timesteps than the predictor's they give tau as well.
        seeds: initial latents and timesteps; those of the detection, and fresh ones.
        threshold: tau at the predictor's own timestep.
        strictness: memorized caption -> how far under its limits it must stay; 0 unless given.
    """
    everything, betas = all_neurons(predictor.sizes), predictor.settings.ssim_betas
    memorized, usual = observe(predictor, prompts, seeds), observe(predictor, ordinary, seeds)
    thresholds = torch.full((len(seeds),), threshold)
    for timestep in set(seeds.timesteps.tolist()) - {predictor.timestep}:
        there = seeds.timesteps == timestep
        pairs = torch.cat([each.values for each in memorization_scores(usual.differences[:, there], betas)])
        thresholds[there] = float(pairs.mean() + predictor.settings.threshold_num_std * pairs.std())
    return Corpus(
        memorized=memorized,
        ordinary=usual,
        emptied=measure(observe(predictor, prompts, seeds, everything), memorized, betas),
        usual=measure(usual, memorized, betas),
        usual_emptied=measure(observe(predictor, ordinary, seeds, everything), memorized, betas),
        thresholds=thresholds,
        strictness=torch.tensor([(strictness or {}).get(prompt, 0.0) for prompt in prompts]),
        betas=betas,
    )


def measure(views: Views, memorized: Views, betas: Sequence[float]) -> Measures:
    """Compare captions' predictions with those of all memorized captions, and the seeds with each other.

    Args:
        views: under a mask.
        memorized: the memorized captions on the same seeds, nothing suppressed.
        betas: exponents of the multi-scale SSIM.
    """
    nearest = [_nearest(differences, memorized, betas) for differences in views.differences]
    own = views.differences.new_zeros(0, len(views.seeds))
    if views.prompts == memorized.prompts:
        own = _compare(views.differences.flatten(0, 1), memorized.differences.flatten(0, 1), betas)
        own = own.unflatten(0, views.differences.shape[:2])
    return Measures(
        own=own,
        resemblance=torch.stack([each[0] for each in nearest]),
        nearest=torch.stack([each[1] for each in nearest]),
        agreement=_agreement(views, betas),
    )


def measure_one(position: int, differences: Tensor, corpus: Corpus) -> Measures:
    """How one memorized caption measures under a mask; the first dimension of all is 1.

    Args:
        position: of the caption in the corpus.
        differences: its noise differences under the mask [S, channels, height, width].
        corpus: what it is judged against.
    """
    memorized, here = corpus.memorized, slice(position, position + 1)
    part = Views(memorized.prompts[here], memorized.prompt_embeds[here], memorized.seeds, memorized.differences[here])
    own = _compare(differences, part.differences[0], corpus.betas)
    resemblance, nearest = _nearest(differences, memorized, corpus.betas)
    agreement = _agreement(replace(part, differences=differences[None]), corpus.betas)
    return Measures(own[None], resemblance[None], nearest[None], agreement)


def judge(predictor: NoisePredictor, corpus: Corpus, neurons: Collection[Neuron]) -> list[Verdict]:
    """Judge the memorized captions under a mask, one sample pass a caption and seed."""
    views = observe(predictor, corpus.memorized.prompts, corpus.seeds, neurons)
    measures = measure(views, corpus.memorized, corpus.betas)
    return [verdict(position, measures, corpus, position) for position in range(len(views.prompts))]


def judge_ordinary(predictor: NoisePredictor, corpus: Corpus, neurons: Collection[Neuron]) -> list[Verdict]:
    """Judge whether a mask calls up memorized pictures for ordinary captions, one sample pass a caption and seed."""
    views = observe(predictor, corpus.ordinary.prompts, corpus.seeds, neurons)
    measures = measure(views, corpus.memorized, corpus.betas)
    found = []
    for position, prompt in enumerate(views.prompts):
        margins = corpus.ordinary_limits[position] - measures.resemblance[position]
        seed = int(margins.argmin())
        found.append(
            Verdict(
                prompt=prompt,
                similarity=None,
                is_silent=True,
                similarity_margin=None,
                resemblance=float(measures.resemblance[position, seed]),
                nearest=corpus.memorized.prompts[int(measures.nearest[position, seed])],
                resemblance_margin=float(margins[seed]),
                agreement=float(measures.agreement[position].max()),
                agreement_margin=None,
            )
        )
    return found


def verdict(position: int, measures: Measures, corpus: Corpus, row: int = 0) -> Verdict:
    """The verdict on a memorized caption.

    Args:
        position: of the caption in the corpus.
        measures: how it measures under a mask.
        corpus: what it is judged against.
        row: of the caption in the measures.
    """
    own, margins = measures.own[row], corpus.resemblance_limits[position] - measures.resemblance[row]
    seed = int(margins.argmin())
    return Verdict(
        prompt=corpus.memorized.prompts[position],
        similarity=float(own.max()),
        is_silent=bool((own <= corpus.thresholds).all()),
        similarity_margin=_similarity_margin(own, corpus, position),
        resemblance=float(measures.resemblance[row, seed]),
        nearest=corpus.memorized.prompts[int(measures.nearest[row, seed])],
        resemblance_margin=float(margins[seed]),
        agreement=float(measures.agreement[row].max()),
        agreement_margin=float((corpus.agreement_limits[position] - measures.agreement[row]).min()),
    )


def spread(own: Tensor) -> Tensor:
    """What a seed that was not looked at may reach: the seeds' mean plus two standard deviations, [P] of [P, S]."""
    if own.shape[1] < 2:
        return own.mean(dim=1)
    return own.mean(dim=1) + SPREADS * own.std(dim=1)


def _similarity_margin(own: Tensor, corpus: Corpus, position: int) -> float:
    """How far every seed, and what those of its timestep may reach, is under its limit."""
    timesteps = corpus.seeds.timesteps
    margins = [(corpus.own_limits[position] - own).min()]
    for timestep in timesteps.unique():
        there = timesteps == timestep
        margins.append((corpus.spread_limits[position, there] - spread(own[None, there])).min())
    return float(torch.stack(margins).min())


def _agreement(views: Views, betas: Sequence[float]) -> Tensor:
    """Mean similarity of the seeds of the same timestep, [P, S]; -1 where a seed is alone."""
    timesteps = views.seeds.timesteps
    found = torch.full((len(views.prompts), len(timesteps)), -1.0)
    for timestep in timesteps.unique():
        there = timesteps == timestep
        if int(there.sum()) > 1:
            scores = memorization_scores(views.differences[:, there], betas)
            found[:, there] = torch.stack([score.values.mean() for score in scores])[:, None]
    return found


def _nearest(differences: Tensor, memorized: Views, betas: Sequence[float]) -> tuple[Tensor, Tensor]:
    """The highest similarity to any memorized caption on the same seed, and which one that is, both [S].

    Similarities are taken with those alone whose noise differences correlate most: a corpus of 500 would else cost
    500 of them a seed.
    """
    likely = correlation(differences, memorized.differences).topk(min(_LIKELY, len(memorized.prompts)), dim=0).indices
    columns = torch.arange(len(differences), device=differences.device)
    compared = torch.stack([_compare(differences, memorized.differences[row, columns], betas) for row in likely])
    highest = compared.max(dim=0)
    return highest.values, likely.cpu()[highest.indices, torch.arange(len(differences))]


def correlation(differences: Tensor, originals: Tensor) -> Tensor:
    """Correlation of noise differences [S, ...] with those of captions on the same seeds [P, S, ...], [P, S]."""
    a, b = differences.flatten(1), originals.flatten(2)
    a, b = a - a.mean(dim=1, keepdim=True), b - b.mean(dim=2, keepdim=True)
    return (a * b).sum(dim=2) / (a.norm(dim=1) * b.norm(dim=2)).clamp_min(1e-12)


def _compare(a: Tensor, b: Tensor, betas: Sequence[float]) -> Tensor:
    """Similarity of noise differences [batch, ...] with as many others, [batch], on the CPU."""
    parts = [
        similarity(a[start : start + _AT_ONCE], b[start : start + _AT_ONCE], betas)
        for start in range(0, len(a), _AT_ONCE)
    ]
    return torch.cat(parts).cpu()
