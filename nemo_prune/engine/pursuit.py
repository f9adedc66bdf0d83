"""From a corpus to a mask under which nothing copies: search, look at images, take up what came back, search again.

Looking at images is not done here: a function draws them and says what copied.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

from nemo_prune.engine.completing import Copy, Limits, Looks, Round, completed_rounds, named, no_looks
from nemo_prune.engine.diffusion import NoisePredictor
from nemo_prune.engine.gates import all_neurons
from nemo_prune.engine.gone import Corpus, gather_corpus, judge, judge_ordinary, judged_by
from nemo_prune.engine.learned import GateLearner, LearningSettings
from nemo_prune.engine.ordinary import OrdinaryStates, mean_change, walk_ordinary
from nemo_prune.engine.reopening import ReopeningSettings, reopen
from nemo_prune.engine.settling import Jury, complete
from nemo_prune.engine.views import Seeds
from nemo_prune.errors import SettingsError
from nemo_prune.files.hashing import text_hash
from nemo_prune.files.json_values import to_json
from nemo_prune.files.work import LineLog, Replay, SearchFiles, WorkFiles
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
        limits: of the change on ordinary captions; beyond them a mask is neither completed nor another one searched.
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
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        if self.search not in SEARCHES:
            raise SettingsError(f"`search` is {self.search}, expected: {' or '.join(SEARCHES)}.")

    def states(self, predictor: NoisePredictor, ordinary: Sequence[str]) -> OrdinaryStates:
        """Points on the ways of the ordinary captions whose change is kept small; two sample passes each."""
        walked = ordinary[self.watched :][: self.walked] or ordinary[: self.watched]
        return walk_ordinary(predictor, walked, self.points, self.seed)


@dataclass(frozen=True)
class Pursuit:
    """The masks that a corpus was pursued with, one a round.

    Attributes:
        rounds: what each round ended with; none where the mask of another search was enough.
        limits: of the change on ordinary captions.
    """

    rounds: tuple[Round, ...]
    limits: Limits = field(default_factory=Limits)

    @property
    def best(self) -> Round:
        """The round within the limits with the fewest copies; of several that with the fewest that come close."""
        return min(
            (each for each in self.rounds if each.change <= self.limits.copying),
            key=lambda each: (len(each.real_copies), each.change > self.limits.left, len(each.copies), each.change),
            default=self.rounds[0],
        )

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
    copies: Looks = no_looks,
    advance: Advance = ignored,
    first: NeuronMask | None = None,
    work: WorkFiles | None = None,
    states: Callable[[], OrdinaryStates] | None = None,
) -> Pursuit:
    """Find a mask under which memorized captions are gone and ordinary ones change as little as may be.

    The result depends on the arguments alone, however often it is stopped and taken up again.

    Args:
        predictor: the model; masks are judged with what it puts in for suppressed neurons.
        prompts: memorized captions.
        ordinary: ordinary captions; the first are watched for what is called up, the next for what changes.
        threshold: tau.
        settings: the numbers.
        copies: draws images under a mask and says what copied.
        advance: called with what is done in this round and how much there is.
        first: the mask of another search. If nothing copies under it there is nothing to pursue, and no round is made.
            Else it is completed for what copied or came close, as long as further neurons help; another one is searched
            only if something copies then.
        work: where rounds and searches are kept as they go on.
        states: gives the points on ordinary captions' ways, where they are known already.
    """
    copied = () if first is None else copies(first)
    if first is not None and not copied:
        return Pursuit(())
    watched, states = ordinary[: settings.watched], states or cache(lambda: settings.states(predictor, ordinary))
    seeds = Seeds.draw(predictor) + Seeds.draw(predictor, settings.seed, settings.more_seeds)
    rounds: list[Round] = []
    began_with = {"settings": to_json(settings), "first": first and first.digest, "copied": to_json(copied)}
    if first is not None:
        log = work and LineLog(work.rounds, began_with)
        rounds += completed_rounds(
            predictor, states, seeds, first, copied, copies, settings.rounds, settings.limits, log
        )
    strictness = dict.fromkeys(prompts, 0.0)
    while not rounds or (
        rounds[-1].real_copies and len(rounds) <= settings.rounds and rounds[-1].change <= settings.limits.copying
    ):
        passes_before = predictor.sample_passes
        files = work and work.search(_name(began_with, rounds))
        if came_back := sorted(set(named(rounds[-1].copies if rounds else ())) & set(prompts)):
            strictness |= {prompt: strictness[prompt] + settings.strictness for prompt in came_back}
            last = rounds[-1].mask
            (timestep,) = Replay(files and LineLog(files.shown))(
                timestep_that_shows, predictor, came_back, watched, last, threshold, settings, len(rounds)
            )
            seeds += _probing_seeds(predictor, settings, len(rounds), timestep)
        judged = files and LineLog(files.judged)
        corpus = gather_corpus(
            predictor, prompts, watched, seeds, threshold, strictness, judged, folder=files and files.views
        )
        neurons = search_mask(predictor, corpus, states(), settings, advance, files)
        mask = NeuronMask.from_neurons(neurons, predictor.sizes)
        found = copies(mask)
        passes = predictor.sample_passes - passes_before
        rounds.append(_look_at(predictor, corpus, states(), mask, found, passes, judged))
    return Pursuit(tuple(rounds), settings.limits)


def _name(began_with: dict, rounds: Sequence[Round]) -> str:
    """The name of the next search: all that it depends on, beside what the work folder does."""
    copied = [repr(each.copies) for each in rounds]
    return f"{len(rounds)}-{text_hash([repr(began_with), *copied])[:16]}"


def search_mask(
    predictor: NoisePredictor,
    corpus: Corpus,
    states: OrdinaryStates,
    settings: PursuitSettings,
    advance: Advance = ignored,
    files: SearchFiles | None = None,
) -> list[Neuron]:
    """Find neurons under which all captions are gone that can be; what was tried and kept can't be spared.

    Args:
        predictor: the model.
        corpus: what captions are judged against.
        states: points on ordinary captions' ways.
        settings: the numbers.
        advance: called with what is done and how much there is.
        files: where the search is kept as it goes on.
    """
    everything, margin = all_neurons(predictor.sizes), settings.reopening.margin
    jury = Jury(predictor, corpus, _beyond_reach(corpus, margin))
    start, reopening = everything, settings.reopening
    if settings.search == "learned":
        learner = GateLearner(predictor, corpus, states, settings.learning)
        _learn(learner, advance, files and files.learning)
        closed = [neuron for neuron, each in zip(everything, learner.closings.tolist(), strict=True) if each > 0.5]
        start = complete(predictor, jury, states, closed, margin, files and LineLog(files.completed))
        reopening = replace(reopening, tries=settings.tries)
    return reopen(predictor, corpus, states, jury, start, reopening, advance, files and LineLog(files.reopened))


def timestep_that_shows(
    predictor: NoisePredictor,
    prompts: Sequence[str],
    watched: Sequence[str],
    mask: NeuronMask,
    threshold: float,
    settings: PursuitSettings,
    round_number: int,
) -> list[int]:
    """The timestep at which captions that came back in images are furthest from being gone, alone in a list.

    Args:
        predictor: the model.
        prompts: the captions that came back.
        watched: ordinary captions.
        mask: under which they came back.
        threshold: tau.
        settings: the timesteps that are tried, and how many seeds are drawn.
        round_number: other seeds are drawn in every round.
    """
    lowest: dict[int, float] = {}
    for timestep in (predictor.timestep, *settings.probed):
        seeds = _probing_seeds(predictor, settings, round_number, timestep)
        corpus = gather_corpus(predictor, prompts, watched, seeds, threshold)
        margins = [min(each.margins.values()) for each in judge(predictor, corpus, mask.neurons)]
        lowest[timestep] = min(margins)
    return [min(lowest, key=lowest.__getitem__)]


def _probing_seeds(predictor: NoisePredictor, settings: PursuitSettings, round_number: int, timestep: int) -> Seeds:
    """New seeds at a timestep, others in every round."""
    return Seeds.draw(predictor, settings.seed + round_number, settings.probe_seeds, timestep)


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
    log: LineLog | None,
) -> Round:
    memorized = judge(predictor, corpus, mask.neurons, log)
    ordinary = judge_ordinary(predictor, corpus, mask.neurons, log)
    return Round(
        mask=mask,
        change=mean_change(predictor, states, mask.neurons),
        not_gone=tuple(each for each in memorized if not each.is_gone),
        called_up=tuple(each for each in ordinary if not each.is_gone),
        copies=tuple(copies),
        sample_passes=sample_passes,
    )
