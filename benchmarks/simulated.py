"""A model of SD v1-4 that answers a search's questions without a U-Net, from a published table of results.

The table (nemo_neurons_sd_v1_4_251_prompts.csv, a public rerun of the released code) has the candidates and the refined
set of 251 prompts, and the similarities under both. What it does not have is assumed, and said here:

- **More prompts** are drawn from its rows. Neurons that at least three prompts need stay the same, the others move.
- **Kept seeds**: all ten where the refined set has at most five neurons, as verbatim prompts have, else three to ten.
- **The way to the candidates**: the latest step of the schedule that the table's counts per layer allow; in the steps
  before it some of them are missing.
- **Similarities**: under the refined set as in the table, more for every neuron of it that acts: each is needed. The
  hardest seed is the table's, others are up to .05 lower and weigh the neurons otherwise.
- **Not monotone**: one or two candidates of a prompt raise its similarity by .04 to .16 when they are suppressed and
  another one is not, as was measured on a memorizing model (RESULTS.md), and every set and seed has an error of .001.
- **Unresolved prompts** do not reach tau with their last set; everything suppressed takes up to .1 more off, which
  brings some of them under tau.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property, lru_cache
from hashlib import blake2b
from pathlib import Path
from random import Random

import torch
from torch import Tensor

from nemo_prune.compute.local import CLOSE_CALLS_AT_ONCE
from nemo_prune.engine.activations import ActivationStatistics
from nemo_prune.engine.localize import PromptLocalization
from nemo_prune.engine.released_code import RELEASED_CODE_THRESHOLD, SD_V1_LAYERS, read_table
from nemo_prune.engine.scorer import Rechecks, ScoredPrompt
from nemo_prune.engine.similarity import MemorizationScore
from nemo_prune.engine.trials import Trial, Why
from nemo_prune.mask import Neuron
from nemo_prune.settings import LocalizationSettings, ModelOptions

HUB_PROMPTS = 3
ERROR = 0.001
VIOLATIONS = (0.04, 0.16)
MOST_OF_EVERYTHING = 0.1
FEW_NEURONS = 5
_MARGIN = ModelOptions(dtype="float16").margin_of_dtype


@dataclass(frozen=True)
class SimulatedPrompt:
    """One prompt of the model.

    Attributes:
        text: its name.
        resolved: whether its candidates bring it under tau.
        candidates: its initial set.
        needed: its refined set.
        seeds: positions of its kept seeds.
        weights: seed -> needed neuron -> how much its similarity rises when the neuron acts.
        lowest: seed -> its similarity under the refined set.
        disturbing: candidates that raise the similarity when they are suppressed -> by how much, and unless which.
        of_everything: how much less it is with everything suppressed.
        step: of the schedule at which the candidates are complete.
    """

    text: str
    resolved: bool
    candidates: tuple[Neuron, ...]
    needed: tuple[Neuron, ...]
    seeds: tuple[int, ...]
    weights: Mapping[int, Mapping[Neuron, float]]
    lowest: Mapping[int, float]
    disturbing: Mapping[Neuron, tuple[float, Neuron]]
    of_everything: float
    step: int

    def similarity(self, neurons: frozenset[Neuron], seed: int) -> float:
        """The similarity of a seed with neurons suppressed."""
        value = self.lowest[seed] + sum(
            weight for neuron, weight in self.weights[seed].items() if neuron not in neurons
        )
        value += sum(by for each, (by, unless) in self.disturbing.items() if each in neurons and unless not in neurons)
        outside = len(neurons) - len(self.candidates)
        if outside > 0:
            value -= self.of_everything * outside / sum(SD_V1_LAYERS.values())
        return min(1.0, value + ERROR * (2 * _fraction(self.text, seed, neurons) - 1))


def read_prompts(table: Path, number: int, seed: int = 0) -> list[SimulatedPrompt]:
    """A corpus from the table's rows, drawn again with other neurons where it has too few."""
    rows, random = read_table(table), Random(seed)
    needed = Counter(neuron for row in rows if row.status == "localized" for neuron in set(row.neurons))
    hubs = {neuron for neuron, count in needed.items() if count >= HUB_PROMPTS}
    corpus = []
    for position in range(number):
        row = rows[position] if position < len(rows) else _moved(random.choice(rows), hubs, random)
        corpus.append(_simulated(f"prompt {position}", row, random))
    random.shuffle(corpus)
    return corpus


def _moved(row: PromptLocalization, hubs: Collection[Neuron], random: Random) -> PromptLocalization:
    """A row with other neurons in the place of those that few prompts need."""
    moved = {
        neuron: neuron if neuron in hubs else Neuron(neuron.layer, random.randrange(SD_V1_LAYERS[neuron.layer]))
        for neuron in row.candidates
    }
    candidates = tuple(dict.fromkeys(moved.values()))
    return PromptLocalization(
        row.prompt,
        row.status,
        row.score,
        candidates=candidates,
        neurons=tuple(dict.fromkeys(moved[neuron] for neuron in row.neurons)),
        candidates_score=row.candidates_score,
        neurons_score=row.neurons_score,
    )


def _simulated(text: str, row: PromptLocalization, random: Random) -> SimulatedPrompt:
    seeds = tuple(range(10))
    if len(row.neurons) > FEW_NEURONS:
        seeds = tuple(sorted(random.sample(seeds, random.randint(3, 10))))
    resolved, limit = row.status == "localized", RELEASED_CODE_THRESHOLD
    reached = row.neurons_score - 2 * ERROR if resolved else row.candidates_score + 2 * ERROR
    lowest = {seed: reached - random.uniform(0, 0.05) for seed in seeds}
    hardest = random.choice(seeds)
    lowest[hardest] = reached
    gap = max(0.0, limit - lowest[hardest]) + 3 * ERROR
    weights = {
        seed: {neuron: (gap if seed == hardest else 0.0) + random.uniform(0, 0.2) for neuron in row.neurons}
        for seed in seeds
    }
    others = [neuron for neuron in row.candidates if neuron not in set(row.neurons)]
    disturbing = {}
    for each in random.sample(others, min(len(others) // 2, random.randint(1, 2))):
        disturbing[each] = (random.uniform(*VIOLATIONS), random.choice([other for other in others if other != each]))
    per_layer = Counter(neuron.layer for neuron in row.candidates)
    step = min(15, *(per_layer[layer] for layer in SD_V1_LAYERS)) if resolved else 15
    return SimulatedPrompt(
        text, resolved, row.candidates, row.neurons, seeds, weights, lowest, disturbing,
        random.uniform(0, MOST_OF_EVERYTHING), step,
    )  # fmt: skip


@dataclass
class SimulatedPredictor:
    """Stands for the U-Net; counts what would go through it.

    Attributes:
        batch_size: of the device.
        settings: of the localization.
        sizes: the layers of SD v1-4.
        sample_passes: latents so far.
        computed_passes: with those that fill up batches.
        calls: size of a batch -> how many.
    """

    batch_size: int = 40
    settings: LocalizationSettings = field(default_factory=LocalizationSettings)
    sizes: Mapping[str, int] = field(default_factory=lambda: dict(SD_V1_LAYERS))
    sample_passes: int = 0
    computed_passes: int = 0
    calls: Counter[int] = field(default_factory=Counter)

    def initial_latents(self, seed: int | None = None, num_samples: int | None = None) -> Tensor:
        """Nothing but the number of seeds, and SD v1-4's size."""
        return torch.zeros(num_samples or self.settings.num_samples, 1, 64, 64)

    def count(self, samples: int) -> None:
        """Note that samples went through the U-Net together."""
        batches = -(-samples // self.batch_size)
        self.sample_passes += samples
        self.computed_passes += batches * self.batch_size
        self.calls[self.batch_size] += batches


class SimulatedScorer:
    """Answers as :class:`nemo_prune.engine.scorer.Scorer` does, from the model above.

    Args:
        corpus: the prompts.
        batch_size: of the device.

    Attributes:
        predictor: counts the passes.
        passes: what they were needed for -> how many.
        seconds: that the simulation itself took, which are none of the program's.
        reference: counts what half precision would have to ask again: samples whose similarity is nearer to the
            threshold than its margin, and each such prompt's seeds with nothing suppressed.
    """

    rechecks = Rechecks()

    def __init__(self, corpus: Sequence[SimulatedPrompt], batch_size: int = 40) -> None:
        self.predictor = SimulatedPredictor(batch_size)
        self.passes: Counter[Why] = Counter()
        self.seconds = 0.0
        self.reference = SimulatedPredictor(CLOSE_CALLS_AT_ONCE)
        self._asked_exactly: set[str] = set()
        self._prompts = {each.text: each for each in corpus}

    @property
    def sample_passes(self) -> int:
        """Latents so far."""
        return self.predictor.sample_passes

    @property
    def computed_passes(self) -> int:
        """With those that fill up batches."""
        return self.predictor.computed_passes

    @property
    def prompts_at_once(self) -> int:
        """How many prompts' seeds fill a batch."""
        return max(1, self.predictor.batch_size // self.predictor.settings.num_samples)

    @cached_property
    def statistics(self) -> ActivationStatistics:
        """Mean 0 and deviation 1: activations are their own distance from the usual."""
        zeros = {layer: torch.zeros(size) for layer, size in SD_V1_LAYERS.items()}
        ones = {layer: torch.ones(size) for layer, size in SD_V1_LAYERS.items()}
        return ActivationStatistics(zeros, ones, 1)

    def score_prompts(
        self,
        prompts: Sequence[str],
        latents: Tensor | None = None,
        neurons: Collection[Neuron] = (),
        why: Why = Why.DETECTION,
    ) -> list[ScoredPrompt]:
        """Prompts whose kept seeds agree by .9 with nothing suppressed, and by .3 with something."""
        began = time.perf_counter()
        count = self.predictor.settings.num_samples if latents is None else len(latents)
        self.predictor.count(len(prompts) * count)
        self.passes[why] += len(prompts) * count
        found = []
        for prompt in prompts:
            pairs = torch.full((count, count), 0.3)
            kept = torch.tensor(self._prompts[prompt].seeds)
            if not neurons:
                pairs[kept[:, None], kept[None]] = 0.9
            pairs.fill_diagonal_(-1)
            empty = torch.zeros(0)
            found.append(ScoredPrompt(prompt, empty, empty, empty, MemorizationScore(pairs), empty))
        self.seconds += time.perf_counter() - began
        return found

    def kept_seeds(self, scored: ScoredPrompt, threshold: float) -> tuple[int, ...]:
        """Positions of the seeds that agree."""
        return tuple((scored.memorization.pairs.amax(dim=1) > threshold).nonzero().flatten().tolist())

    def activations(self, scored: ScoredPrompt) -> dict[str, Tensor]:
        """Activations whose candidates at the prompt's step are the table's."""
        began = time.perf_counter()
        prompt, random = self._prompts[scored.prompt], Random(scored.prompt)
        generator = torch.Generator().manual_seed(random.randrange(2**31))
        found = {layer: torch.rand(size, generator=generator) for layer, size in SD_V1_LAYERS.items()}
        theta = self.predictor.settings.theta - prompt.step * self.predictor.settings.theta_step
        for neuron in prompt.candidates:
            found[neuron.layer][neuron.index] = theta + 0.01 + random.uniform(0, 6 - theta)
        self.seconds += time.perf_counter() - began
        return found

    def answer(self, asked: Sequence[tuple[ScoredPrompt, Trial]], batch_size: int | None = None) -> list[float]:
        """Similarities by the model."""
        began = time.perf_counter()
        self.predictor.count(len(asked))
        self.passes.update(trial.why for _, trial in asked)
        answers = [self._prompts[scored.prompt].similarity(trial.neurons, trial.seed) for scored, trial in asked]
        self._ask_again(asked, answers)
        self.seconds += time.perf_counter() - began
        return answers

    def _ask_again(self, asked: Sequence[tuple[ScoredPrompt, Trial]], answers: Sequence[float]) -> None:
        """Count what float32 would decide."""
        pairs = zip(asked, answers, strict=True)
        near = [scored.prompt for (scored, trial), each in pairs if abs(each - trial.threshold) < _MARGIN]
        news = set(near) - self._asked_exactly
        self._asked_exactly |= news
        for samples in [self.reference.settings.num_samples] * len(news) + [len(near)]:
            self.reference.count(samples)


def _fraction(text: str, seed: int, neurons: frozenset[Neuron]) -> float:
    """A number in 0..1 that a set and a seed always give."""
    digest = blake2b(f"{text} {seed} {len(neurons)} {_number_of_set(neurons)}".encode(), digest_size=4)
    return int.from_bytes(digest.digest()) / 2**32


@lru_cache(maxsize=64)
def _number_of_set(neurons: frozenset[Neuron]) -> int:
    return sum(map(_number, neurons))


_PLACES = {layer: place for place, layer in enumerate(SD_V1_LAYERS)}


@cache
def _number(neuron: Neuron) -> int:
    return (neuron.index + 1) * 1_000_003 ** (_PLACES[neuron.layer] + 1) % 2_147_483_647
