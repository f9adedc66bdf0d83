"""One mask for a corpus, learned: gates on all neurons at once.

No published method learns a mask against memorization. What is minimised, over memorized captions and seeds:

    how far they are from being gone (:mod:`nemo_prune.engine.gone`): hinges that are 0 where there is nothing to do
    + what changes for ordinary captions, all along the way from noise to image
    + how many neurons are touched.

The score needs one U-Net pass, so that no trajectory has to be kept for the backward pass.

Gates are either numbers from 0 to 1 that are cut off there after each step (projected), or drawn from hard-concrete
distributions (L0, arXiv 1712.01312). Where a drawn gate is shut for certain it has no gradient, and stays shut.

Projected gates are rounded in the later steps: what is predicted is what the mask will do, and gradients go on as if
nothing was rounded (straight-through, arXiv 1308.3432).

How much a caption weighs is learned along (dual ascent): the weight grows with every step at which the caption is not
gone, so that the last captions are not lost for the sake of all the others, and falls again afterwards.
"""

from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import relu

from nemo_prune.engine.diffusion import NoisePredictor
from nemo_prune.engine.gates import (
    draw_closings,
    frozen_weights,
    predict_gated,
    settled_closings,
    touched_probabilities,
)
from nemo_prune.engine.gone import Corpus
from nemo_prune.engine.memory import with_less_at_once
from nemo_prune.engine.ordinary import OrdinaryStates, share_of_everything
from nemo_prune.engine.soft_similarity import soft_noise_difference, soft_similarity
from nemo_prune.engine.views import most_alike
from nemo_prune.errors import SettingsError
from nemo_prune.files.staging import staged_file

GATES = ("projected", "hard-concrete")
# Of the captions that a step sees, this share is the hardest; the others are drawn evenly.
_HARDEST_SHARE = 0.5
# The first steps have gradients many times those of the later ones: Adam must forget them within tens of steps.
_BETAS = (0.9, 0.95)
# How fast a caption's difficulty forgets.
_MEMORY = 0.7
# What is left of a caption's weight after a step that drew it, what it is at least and at most, and how many times the
# margin of hinges make it grow. Before so many steps nothing can be gone yet.
_KEPT_WEIGHT, _WEIGHTS, _MOST_HINGES, _FIRST_STEPS = 0.98, (1.0, 400.0), 4.0, 30


@dataclass(frozen=True)
class LearningSettings:
    """The numbers of the learning; the defaults are those of a trial (docs/masks.md).

    Attributes:
        steps: of Adam.
        gates: ``projected`` or ``hard-concrete``.
        learning_rate: of Adam, on the gates or their logits.
        captions: memorized captions a step.
        seeds: initial latents of each of them; at least 2, which are compared with each other.
        ordinary: points on ordinary captions' ways a step.
        rounded_from: share of the steps after which projected gates are rounded.
        gone_weight: of a caption's hinges at first.
        weight_growth: by how much that grows at a step at which the hinges are as large as the margin.
        change_weight: of the change on ordinary captions, as a share of what everything suppressed changes.
        touched_weight: of the mean closing, or of the share of neurons that are touched.
        decided_weight: of what is neither shut nor open, growing from 0 to this until gates are rounded.
        most_closed: up to what projected gates are closed; at 1.5 a neuron's output may become -.5 of what it was.
        margin: how far under their limits the similarities are to come.
        start: how far all gates are closed at first. Open gates have no gradient: a similarity of 1 is flat.
        seed: of everything that is drawn.
    """

    steps: int = 200
    gates: str = "projected"
    learning_rate: float = 0.05
    captions: int = 6
    seeds: int = 3
    ordinary: int = 8
    rounded_from: float = 0.5
    gone_weight: float = 10.0
    weight_growth: float = 4.0
    change_weight: float = 6.0
    touched_weight: float = 1.0
    decided_weight: float = 2.0
    most_closed: float = 1.0
    margin: float = 0.05
    start: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        if self.gates not in GATES:
            raise SettingsError(f"`gates` is {self.gates}, expected: {' or '.join(GATES)}.")


@dataclass(frozen=True)
class LearningStep:
    """What a step of the learning saw, means over its samples.

    Attributes:
        similarity: hinge of the similarity to the caption's own unsuppressed prediction.
        resemblance: hinge of the resemblance to any memorized caption.
        agreement: hinge of the agreement between seeds.
        change: on ordinary captions, as a share of what everything suppressed changes.
        touched: sum of the closings, or the expected number of neurons that are touched.
    """

    similarity: float
    resemblance: float
    agreement: float
    change: float
    touched: float


class GateLearner:
    """Learns how far to close the gates; :attr:`closings` is what it has so far.

    Args:
        predictor: the model.
        corpus: what the memorized captions are judged against, on the seeds that are learned on.
        states: points on ordinary captions' ways.
        settings: the numbers.
        closings: how far the gates are closed at first, [neurons], where they don't start alike.
    """

    def __init__(
        self,
        predictor: NoisePredictor,
        corpus: Corpus,
        states: OrdinaryStates,
        settings: LearningSettings,
        closings: Tensor | None = None,
    ) -> None:
        self.predictor, self.corpus, self.states, self.settings = predictor, corpus, states, settings
        width, device = sum(predictor.sizes.values()), predictor.device
        start = torch.full((width,), settings.start) if closings is None else closings.clone()
        if not self._is_projected:
            start = torch.logit(start, eps=1e-2)
        self.values = start.to(device).requires_grad_(True)
        self.step = 0
        # Captions whose gradients memory takes at once.
        self._at_once = settings.captions
        self._optimizer = torch.optim.Adam([self.values], lr=settings.learning_rate, betas=_BETAS)
        self._limits = torch.stack([corpus.own_limits, corpus.resemblance_limits, corpus.agreement_limits])
        # Nothing is known about any caption yet, so that all are hard.
        self._difficulty = torch.full((len(corpus.memorized.prompts),), float("inf"))
        self._weights = torch.full((len(corpus.memorized.prompts),), settings.gone_weight)

    @property
    def closings(self) -> Tensor:
        """How far each gate is closed, [neurons] in 0..1, or up to what projected gates are closed."""
        values = self.values.detach()
        return values.clone() if self._is_projected else settled_closings(values)

    @property
    def _is_projected(self) -> bool:
        return self.settings.gates == "projected"

    @property
    def _is_rounded(self) -> bool:
        return self._is_projected and self.step >= self.settings.rounded_from * self.settings.steps

    def take_step(self) -> LearningStep:
        """Draw samples and gates, and move the gates; what is drawn depends on the seed and the step alone."""
        (captions, hinges, change), self._at_once = with_less_at_once(
            self._add_gradients, self._at_once, "a backward pass of one caption"
        )
        self._optimizer.step()
        touched = self.values.detach() if self._is_projected else touched_probabilities(self.values.detach())
        if self._is_projected:
            self.values.data.clamp_(0, self.settings.most_closed)
        self.step += 1
        self._remember(captions, hinges.sum(dim=0).cpu())
        return LearningStep(*hinges.mean(dim=1).tolist(), change, float(touched.sum()))

    def _add_gradients(self, at_once: int) -> tuple[Tensor, Tensor, float]:
        """Draw what a step sees and add the loss' gradients up, some captions at a time.

        Returns:
            Rows of the captions, their hinges [3, captions], and the change on ordinary captions.
        """
        settings = self.settings
        generator = torch.Generator().manual_seed(settings.seed * 100_003 + self.step)
        captions = self._draw_captions(generator)
        seeds = torch.stack([self._draw_seeds(generator) for _ in captions])
        chosen = torch.randperm(len(self.states), generator=generator)[: settings.ordinary]
        self._optimizer.zero_grad()
        found, change = [], 0.0
        with frozen_weights(self.predictor):
            for rows, columns in zip(captions.split(at_once), seeds.split(at_once), strict=True):
                hinges = self._hinges(rows, columns, generator)
                weights = self._weights[rows].to(hinges.device)
                ((weights * hinges.sum(dim=0)).sum() / len(captions)).backward()
                found.append(hinges.detach())
            for part in chosen.split(at_once * settings.seeds):
                changes = self._changes(part, generator).sum() / len(chosen)
                (settings.change_weight * changes).backward()
                change += float(changes.detach())
            self._of_the_gates().backward()
        return captions, torch.cat(found, dim=1), change

    def _of_the_gates(self) -> Tensor:
        """What the loss has of the gates alone: how many are touched, and how undecided they are."""
        settings = self.settings
        touched = self.values if self._is_projected else touched_probabilities(self.values)
        loss = settings.touched_weight * touched.mean()
        if self._is_projected and not self._is_rounded:
            undecided = 4 * (self.values * (1 - self.values)).mean()
            grown = self.step / (settings.rounded_from * settings.steps)
            loss = loss + settings.decided_weight * grown * undecided
        return loss

    def save(self, file: Path) -> None:
        """Keep where the learning stands, with what it began with; the file is the old one or the new one."""
        state = {
            "values": self.values.detach(),
            "optimizer": self._optimizer.state_dict(),
            "step": self.step,
            "difficulty": self._difficulty,
            "weights": self._weights,
            "began_with": self._began_with(),
        }
        with staged_file(file) as partial:
            torch.save(state, partial)

    def resume(self, file: Path) -> None:
        """Go on from where a file that :meth:`save` wrote stands, if it began with the same; else begin anew."""
        if not file.is_file():
            return
        state = torch.load(file, weights_only=True, map_location=self.values.device)
        if state["began_with"] == self._began_with():
            self.values.data.copy_(state["values"])
            self._optimizer.load_state_dict(state["optimizer"])
            self.step, self._difficulty = state["step"], state["difficulty"].cpu()
            self._weights = state["weights"].cpu()

    def _began_with(self) -> str:
        """A digest of all that the learning depends on."""
        corpus = self.corpus
        parts = [*corpus.memorized.differences, self._limits, self.states.latents, self.states.noise_pred]
        digest = sha256(repr(self.settings).encode())
        for part in parts:
            digest.update(part.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def _draw_captions(self, generator: torch.Generator) -> Tensor:
        """Rows of memorized captions: the hardest, and others drawn evenly."""
        total = len(self._difficulty)
        shuffled = torch.randperm(total, generator=generator)
        hardest = shuffled[self._difficulty[shuffled].argsort(descending=True, stable=True)]
        number = min(self.settings.captions, total)
        first = hardest[: round(_HARDEST_SHARE * number)]
        others = [row for row in shuffled.tolist() if row not in first.tolist()]
        return torch.tensor(first.tolist() + others[: number - len(first)])

    def _draw_seeds(self, generator: torch.Generator) -> Tensor:
        """Columns of seeds of one timestep, which can be compared with each other."""
        timesteps = self.corpus.seeds.timesteps
        timestep = timesteps[int(torch.randint(len(timesteps), (1,), generator=generator))]
        there = (timesteps == timestep).nonzero().flatten()
        return there[torch.randperm(len(there), generator=generator)[: self.settings.seeds]]

    def _hinges(self, captions: Tensor, seeds: Tensor, generator: torch.Generator) -> Tensor:
        """How far captions are from being gone, [3, captions]: similarity, resemblance, agreement.

        Args:
            captions: rows of memorized captions.
            seeds: columns of the seeds that each is predicted on, [captions, seeds].
            generator: of gates that are drawn.
        """
        corpus, number, limits = self.corpus, self.settings.seeds, self._limits
        views = corpus.memorized
        rows, columns = captions.repeat_interleave(number), seeds.flatten()
        latents, timesteps = views.seeds.latents[columns].to(self.values.device), views.seeds.timesteps[columns]
        drawn = self._gates(len(rows), generator)
        noise_pred = predict_gated(self.predictor, latents, views.prompt_embeds[rows], 1 - drawn, timesteps)
        differences = soft_noise_difference(noise_pred, latents)
        before = views.differences[rows, columns].to(differences.device)
        own = soft_similarity(differences, before, corpus.betas)
        (nearest,) = most_alike(differences.detach(), views, columns, 1)
        others = views.differences[nearest, columns].to(differences.device)
        resemblance = soft_similarity(differences, others, corpus.betas)
        left, right = torch.triu_indices(number, number, offset=1)
        grouped = differences.unflatten(0, (len(captions), number))
        pairs = soft_similarity(grouped[:, left].flatten(0, 1), grouped[:, right].flatten(0, 1), corpus.betas)
        agreement = pairs.unflatten(0, (len(captions), len(left))).mean(dim=1)
        return torch.stack(
            [
                self._above(own, limits[0, rows, columns]).unflatten(0, (-1, number)).mean(dim=1),
                self._above(resemblance, limits[1, rows, columns]).unflatten(0, (-1, number)).mean(dim=1),
                self._above(agreement, limits[2, captions, seeds[:, 0]]),
            ]
        )

    def _gates(self, number: int, generator: torch.Generator) -> Tensor:
        """How far the gates are closed for so many samples, [1 or number, neurons]."""
        if self._is_rounded:
            rounded = (self.values.detach() > 0.5).float()
            return (rounded + self.values - self.values.detach())[None]
        if self._is_projected:
            return self.values[None]
        return draw_closings(self.values.expand(number, -1), generator)

    def _above(self, values: Tensor, limits: Tensor) -> Tensor:
        return relu(values - (limits.to(values.device) - self.settings.margin))

    def _changes(self, chosen: Tensor, generator: torch.Generator) -> Tensor:
        """Change at points on ordinary captions' ways, [points]."""
        drawn, states = self._gates(len(chosen), generator), self.states
        noise_pred = predict_gated(
            self.predictor, states.latents[chosen], states.prompt_embeds[chosen], 1 - drawn, states.timesteps[chosen]
        )
        return share_of_everything(noise_pred, states, chosen)

    def _remember(self, captions: Tensor, hinges: Tensor) -> None:
        """Take note of how hard captions were, and give those that are not gone more weight."""
        known = self._difficulty[captions]
        updated = torch.where(known.isinf(), hinges, _MEMORY * known + (1 - _MEMORY) * hinges)
        self._difficulty[captions] = updated
        if self.step > _FIRST_STEPS:
            growth = self.settings.weight_growth * (hinges / max(self.settings.margin, 0.01)).clamp_max(_MOST_HINGES)
            self._weights[captions] = (_KEPT_WEIGHT * self._weights[captions] + growth).clamp(*_WEIGHTS)
