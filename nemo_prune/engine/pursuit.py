"""From a corpus to a mask under which nothing copies: search, look at images, take up what came back, search again.

Looking at images is not done here: a function draws them and says what copied.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

from nemo_prune.engine.diffusion import NoisePredictor
from nemo_prune.engine.gates import all_neurons
from nemo_prune.engine.gone import Corpus, Verdict, gather_corpus, judge, judge_ordinary, judged_by
from nemo_prune.engine.learned import GateLearner, LearningSettings
from nemo_prune.engine.ordinary import OrdinaryStates, mean_change, walk_ordinary
from nemo_prune.engine.reopening import ReopeningSettings, reopen
from nemo_prune.engine.settling import Jury, complete, costs_of_completing, first_enough, most_worth
from nemo_prune.engine.views import Seeds, observe
from nemo_prune.errors import SettingsError
from nemo_prune.mask import Neuron, NeuronMask
from nemo_prune.progress import Advance, ignored

SEARCHES = ("gradient", "learned")
# How often the learning is kept, in steps.
_KEPT_EVERY = 20


@dataclass(frozen=True)
class PursuitSettings:
    """The numbers of a search for a mask under which captions are gone.

    Attributes:
        search: ``gradient`` opens gates from everything suppressed on; ``learned`` does so from a learned mask on.
        learning: the numbers of the learning.
        reopening: the numbers of the reopening.
        tries: masks that are judged at most when a learned mask's gates are opened again: it is near to what is needed.
        more_seeds: initial latents beside those of the detection.
        seed: of these, and of the ordinary captions' ways.
        watched: ordinary captions that give what is usual, and are watched for what a mask calls up.
        walked: ordinary captions whose change is kept small.
        points: on the way of each of them.
        rounds: how often what came back in images is taken up again.
        strictness: how much further under its limits a caption must come for each round that it came back in.
        probed: timesteps at which it is looked where something that came back shows, beside the detection's.
        probe_seeds: initial latents that are judged at such a timestep from then on.
    """

    search: str = "learned"
    learning: LearningSettings = field(default_factory=LearningSettings)
    reopening: ReopeningSettings = field(default_factory=ReopeningSettings)
    tries: int = 32
    more_seeds: int = 10
    seed: int = 2001
    watched: int = 16
    walked: int = 32
    points: int = 6
    rounds: int = 4
    strictness: float = 0.1
    probed: tuple[int, ...] = (761, 561, 361)
    probe_seeds: int = 5

    def __post_init__(self) -> None:
        if self.search not in SEARCHES:
            raise SettingsError(f"`search` is {self.search}, expected: {' or '.join(SEARCHES)}.")


@dataclass(frozen=True)
class Copy:
    """Images of a caption that copy a training image under a mask.

    Attributes:
        prompt: the caption, memorized or ordinary.
        source: the memorized caption whose training image it is.
        share: of its images.
    """

    prompt: str
    source: str
    share: float


class Looks(Protocol):
    """Draws images under a mask and says what copied."""

    def __call__(self, mask: NeuronMask, prompts: Sequence[str] | None = None) -> Sequence[Copy]:
        """What copied.

        Args:
            mask: the neurons to prune.
            prompts: captions that are looked at closely, on further seeds; a look at all captions unless given.
        """


@dataclass(frozen=True)
class Round:
    """What a round ended with.

    Attributes:
        mask: the neurons to prune.
        change: on ordinary captions, as a share of what everything suppressed changes.
        not_gone: memorized captions that are not gone, by their noise predictions, under the limits of this round.
        called_up: ordinary captions that resemble a memorized one more than before.
        copies: what copied in images.
        sample_passes: latents that went through the U-Net, a backward counted as two, without those of images.
    """

    mask: NeuronMask
    change: float
    not_gone: tuple[Verdict, ...]
    called_up: tuple[Verdict, ...]
    copies: tuple[Copy, ...]
    sample_passes: int


@dataclass(frozen=True)
class Pursuit:
    """The masks that a corpus was pursued with, one a round.

    Attributes:
        rounds: what each round ended with; none where the mask of another search was enough.
    """

    rounds: tuple[Round, ...]

    @property
    def best(self) -> Round:
        """The round with the fewest copies, and of these the one that changes ordinary captions least."""
        return min(self.rounds, key=lambda each: (len(each.copies), each.change))

    @property
    def next_step_costs(self) -> float | None:
        """By how much more a later, stricter round changes ordinary captions than the best; None where none was."""
        after = self.rounds[self.rounds.index(self.best) + 1 :]
        return after[-1].change - self.best.change if after else None


def pursue(
    predictor: NoisePredictor,
    prompts: Sequence[str],
    ordinary: Sequence[str],
    threshold: float,
    settings: PursuitSettings,
    copies: Looks = lambda mask, prompts=None: (),
    advance: Advance = ignored,
    checkpoint: Path | None = None,
    first: NeuronMask | None = None,
) -> Pursuit:
    """Find a mask under which memorized captions are gone and ordinary ones change as little as may be.

    The result depends on the arguments alone, however often the learning is stopped and taken up again.

    Args:
        predictor: the model.
        prompts: memorized captions.
        ordinary: ordinary captions; the first are watched for what is called up, the next for what changes.
        threshold: tau.
        settings: the numbers.
        copies: draws images under a mask and says what copied.
        advance: called with what is done in this round and how much there is.
        checkpoint: where the learning is kept as it goes on.
        first: the mask of another search. If nothing copies under it there is nothing to pursue, and no round is made.
            Else it is completed for what copied, as long as that is other captions than it was completed for before;
            only then is another one searched.
    """
    copied = () if first is None else copies(first)
    if first is not None and not copied:
        return Pursuit(())
    watched, walked = ordinary[: settings.watched], ordinary[settings.watched :][: settings.walked]
    states = walk_ordinary(predictor, walked or watched, settings.points, settings.seed)
    seeds = Seeds.draw(predictor) + Seeds.draw(predictor, settings.seed, settings.more_seeds)
    rounds: list[Round] = []
    if first is not None:
        rounds += completed_rounds(predictor, states, seeds, first, copied, copies, settings.rounds)
    strictness = dict.fromkeys(prompts, 0.0)
    while not rounds or (rounds[-1].copies and len(rounds) <= settings.rounds):
        passes_before = predictor.sample_passes
        if came_back := sorted(set(_named(rounds[-1].copies if rounds else ())) & set(prompts)):
            strictness |= {prompt: strictness[prompt] + settings.strictness for prompt in came_back}
            last = rounds[-1].mask
            seeds += seeds_that_show(predictor, came_back, watched, last, threshold, settings, len(rounds))
        corpus = gather_corpus(predictor, prompts, watched, seeds, threshold, strictness)
        neurons = search_mask(predictor, corpus, states, settings, advance, checkpoint)
        mask = NeuronMask.from_neurons(neurons, predictor.sizes)
        passes = predictor.sample_passes - passes_before
        rounds.append(_look_at(predictor, corpus, states, mask, copies(mask), passes))
    return Pursuit(tuple(rounds))


def completed_rounds(
    predictor: NoisePredictor,
    states: OrdinaryStates,
    seeds: Seeds,
    first: NeuronMask,
    copied: Sequence[Copy],
    looks: Looks,
    most: int,
) -> list[Round]:
    """A mask that is completed until nothing copies, or nothing but what it was completed for already.

    Images decide; what is gone by its noise predictions is not asked.

    Args:
        predictor: the model.
        states: points on ordinary captions' ways.
        seeds: on which it is asked what neurons do.
        first: the mask.
        copied: what copied under it.
        looks: draws images under a mask and says what copied.
        most: how often it is completed at most.
    """
    mask, done, passes_before = first, set(), predictor.sample_passes
    rounds: list[Round] = []
    while True:
        change = mean_change(predictor, states, mask.neurons)
        rounds.append(Round(mask, change, (), (), tuple(copied), predictor.sample_passes - passes_before))
        passes_before, copying = predictor.sample_passes, {copy.prompt for copy in copied}
        if copying <= done or len(rounds) > most:
            return rounds
        done |= copying
        neurons = complete_for(predictor, states, seeds, mask.neurons, copied, looks)
        mask = NeuronMask.from_neurons(neurons, predictor.sizes)
        copied = looks(mask)


def complete_for(
    predictor: NoisePredictor,
    states: OrdinaryStates,
    seeds: Seeds,
    neurons: Sequence[Neuron],
    copied: Sequence[Copy],
    looks: Looks,
) -> list[Neuron]:
    """A mask with further neurons under which captions copy no more; their images decide, looked at closely.

    Args:
        predictor: the model.
        states: points on ordinary captions' ways.
        seeds: on which it is asked what neurons do.
        neurons: of the mask, which all stay.
        copied: what copied under it: memorized captions, and ordinary ones that call a picture up.
        looks: draws images under a mask and says what copied.
    """
    suppressed, cost = list(neurons), costs_of_completing(predictor, states)
    names = _named(copied)
    views = observe(predictor, names, seeds)
    for copy in copied:

        def are_enough(more: Sequence[Neuron], copy: Copy = copy, suppressed: Sequence[Neuron] = suppressed) -> bool:
            return not looks(NeuronMask.from_neurons([*suppressed, *more], predictor.sizes), [copy.prompt])

        # Under the mask itself it copied.
        if len(suppressed) > len(neurons) and are_enough(()):
            continue
        position, source = names.index(copy.prompt), names.index(copy.source)
        waiting = most_worth(predictor, views, position, source, suppressed, cost)
        suppressed = [*suppressed, *first_enough(waiting, are_enough)]
    return suppressed


def search_mask(
    predictor: NoisePredictor,
    corpus: Corpus,
    states: OrdinaryStates,
    settings: PursuitSettings,
    advance: Advance = ignored,
    checkpoint: Path | None = None,
) -> list[Neuron]:
    """Find neurons under which all captions are gone that can be; what was tried and kept can't be spared.

    Args:
        predictor: the model.
        corpus: what captions are judged against.
        states: points on ordinary captions' ways.
        settings: the numbers.
        advance: called with what is done and how much there is.
        checkpoint: where the learning is kept as it goes on.
    """
    everything, margin = all_neurons(predictor.sizes), settings.reopening.margin
    jury = Jury(predictor, corpus, _beyond_reach(corpus, margin))
    start, reopening = everything, settings.reopening
    if settings.search == "learned":
        learner = GateLearner(predictor, corpus, states, settings.learning)
        _learn(learner, advance, checkpoint)
        closed = [neuron for neuron, each in zip(everything, learner.closings.tolist(), strict=True) if each > 0.5]
        start = complete(predictor, jury, states, closed, margin)
        reopening = replace(reopening, tries=settings.tries)
    return reopen(predictor, corpus, states, jury, start, reopening, advance)


def seeds_that_show(
    predictor: NoisePredictor,
    prompts: Sequence[str],
    watched: Sequence[str],
    mask: NeuronMask,
    threshold: float,
    settings: PursuitSettings,
    round_number: int,
) -> Seeds:
    """New seeds, at the timestep at which captions that came back in images are furthest from being gone.

    Args:
        predictor: the model.
        prompts: the captions that came back.
        watched: ordinary captions.
        mask: under which they came back.
        threshold: tau.
        settings: the timesteps that are tried, and how many seeds are drawn.
        round_number: other seeds are drawn in every round.
    """
    found: dict[int, tuple[float, Seeds]] = {}
    for timestep in (predictor.timestep, *settings.probed):
        seeds = Seeds.draw(predictor, settings.seed + round_number, settings.probe_seeds, timestep)
        corpus = gather_corpus(predictor, prompts, watched, seeds, threshold)
        margins = [min(each.margins.values()) for each in judge(predictor, corpus, mask.neurons)]
        found[timestep] = (min(margins), seeds)
    return min(found.values(), key=lambda each: each[0])[1]


def _named(copies: Sequence[Copy]) -> list[str]:
    """The captions that copy, and those whose pictures they copy, each once."""
    return list(dict.fromkeys(name for copy in copies for name in (copy.prompt, copy.source)))


def _beyond_reach(corpus: Corpus, margin: float) -> set[str]:
    """What everything suppressed does not make go, no part of it is asked to."""
    verdicts = judged_by(corpus.emptied, corpus)
    return {each.prompt for each in verdicts if min(each.margins.values()) < margin}


def _learn(learner: GateLearner, advance: Advance, checkpoint: Path | None) -> None:
    """Take the steps of the learning, or go on with those that a checkpoint of the same beginning holds."""
    steps = learner.settings.steps
    if checkpoint is not None:
        learner.resume(checkpoint)
    while learner.step < steps:
        learner.take_step()
        advance(learner.step, steps)
        if checkpoint is not None and (learner.step % _KEPT_EVERY == 0 or learner.step == steps):
            learner.save(checkpoint)


def _look_at(
    predictor: NoisePredictor,
    corpus: Corpus,
    states: OrdinaryStates,
    mask: NeuronMask,
    copies: Sequence[Copy],
    sample_passes: int,
) -> Round:
    return Round(
        mask=mask,
        change=mean_change(predictor, states, mask.neurons),
        not_gone=tuple(each for each in judge(predictor, corpus, mask.neurons) if not each.is_gone),
        called_up=tuple(each for each in judge_ordinary(predictor, corpus, mask.neurons) if not each.is_gone),
        copies=tuple(copies),
        sample_passes=sample_passes,
    )
