"""A mask completed until nothing copies, as far as further neurons can do that; images decide.

Looking at images is not done here: a function draws them and says what copied.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from nemo_prune.engine.diffusion import NoisePredictor
from nemo_prune.engine.gone import Verdict
from nemo_prune.engine.ordinary import OrdinaryStates, mean_change
from nemo_prune.engine.settling import costs_of_completing, first_enough, most_worth, without_costly
from nemo_prune.engine.views import Seeds, observe
from nemo_prune.files.json_values import to_json
from nemo_prune.files.work import LineLog
from nemo_prune.mask import Neuron, NeuronMask


@dataclass(frozen=True)
class Copy:
    """Images of a caption that copy a training image under a mask.

    Attributes:
        prompt: the caption, memorized or ordinary.
        source: the memorized caption whose training image it is.
        share: of its images.
        is_close: whether they only come so close to one that others may copy.
    """

    prompt: str
    source: str
    share: float
    is_close: bool = False


class Looks(Protocol):
    """Draws images under a mask and says what copied."""

    def __call__(self, mask: NeuronMask, prompts: Sequence[str] | None = None) -> Sequence[Copy]:
        """What copied.

        Args:
            mask: the neurons to prune.
            prompts: captions that are looked at closely, on further seeds; a look at all captions unless given.
        """


@dataclass(frozen=True)
class Limits:
    """What ordinary captions may change by, as shares of what everything suppressed changes.

    Attributes:
        left: by what is done for captions that are not gone, or whose images only come close to copying.
        copying: by what is done where images really copy.
    """

    left: float = math.inf
    copying: float = math.inf


def no_looks(mask: NeuronMask, prompts: Sequence[str] | None = None) -> Sequence[Copy]:
    """Where no images are drawn, nothing is seen to copy."""
    return ()


# Rounds are told apart by what they are: tensors can't be compared at once.
@dataclass(frozen=True, eq=False)
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

    @property
    def real_copies(self) -> list[Copy]:
        """What copied in images, without what only comes close."""
        return [copy for copy in self.copies if not copy.is_close]

    def to_mend(self, limits: Limits) -> Sequence[Copy]:
        """What copied, or came close to that, as far as ordinary captions may change for it."""
        if self.change > limits.copying:
            return ()
        return self.copies if self.change <= limits.left else self.real_copies


def completed_rounds(
    predictor: NoisePredictor,
    states: Callable[[], OrdinaryStates],
    seeds: Seeds,
    first: NeuronMask,
    copied: Sequence[Copy],
    looks: Looks,
    most: int,
    limits: Limits,
    log: LineLog | None = None,
) -> list[Round]:
    """A mask that is completed until nothing copies, or further neurons help no more.

    Images decide; what is gone by its noise predictions is not asked.

    Args:
        predictor: the model.
        states: gives points on ordinary captions' ways.
        seeds: on which it is asked what neurons do.
        first: the mask.
        copied: what copied under it.
        looks: draws images under a mask and says what copied.
        most: how often it is completed at most.
        limits: of the change on ordinary captions; a mask that changes more is completed no further.
        log: where the rounds are kept as they end.
    """
    rounds = [_kept_round(record, predictor.sizes) for record in log or ()]

    def end(mask: NeuronMask, copied: Sequence[Copy], passes_before: int) -> None:
        change = mean_change(predictor, states(), mask.neurons)
        rounds.append(Round(mask, change, (), (), tuple(copied), predictor.sample_passes - passes_before))
        if log is not None:
            log.append(_as_record(rounds[-1]))

    if not rounds:
        end(first, copied, predictor.sample_passes)
    while len(rounds) <= most and (waiting := rounds[-1].to_mend(limits)):
        passes_before, last = predictor.sample_passes, rounds[-1]
        neurons = complete_for(predictor, states(), seeds, last.mask.neurons, waiting, looks)
        if len(neurons) == last.mask.num_neurons:
            break
        mask = NeuronMask.from_neurons(neurons, predictor.sizes)
        end(mask, looks(mask), passes_before)
    return rounds


def complete_for(
    predictor: NoisePredictor,
    states: OrdinaryStates,
    seeds: Seeds,
    neurons: Sequence[Neuron],
    copied: Sequence[Copy],
    looks: Looks,
) -> list[Neuron]:
    """A mask with further neurons under which captions copy no more; their images decide, looked at closely.

    Those are added that do most for what they cost, as many as are enough, less the most costly that can be spared;
    none for a caption that all together do not help.

    Args:
        predictor: the model.
        states: points on ordinary captions' ways.
        seeds: on which it is asked what neurons do.
        neurons: of the mask, which all stay.
        copied: what copied under it: memorized captions, and ordinary ones that call a picture up.
        looks: draws images under a mask and says what copied.
    """
    suppressed, cost = list(neurons), costs_of_completing(predictor, states)
    names = named(copied)
    views = observe(predictor, names, seeds)
    for copy in copied:

        def are_enough(more: Sequence[Neuron], copy: Copy = copy, suppressed: Sequence[Neuron] = suppressed) -> bool:
            return not looks(NeuronMask.from_neurons([*suppressed, *more], predictor.sizes), [copy.prompt])

        # Under the mask itself it copied.
        if len(suppressed) > len(neurons) and are_enough(()):
            continue
        position, source = names.index(copy.prompt), names.index(copy.source)
        waiting = most_worth(predictor, views, position, source, suppressed, cost)
        needed = first_enough(waiting, are_enough)
        if len(needed) < len(waiting) or are_enough(needed):
            suppressed = [*suppressed, *without_costly(needed, cost, predictor, are_enough)]
    return suppressed


def named(copies: Sequence[Copy]) -> list[str]:
    """The captions that copy, and those whose pictures they copy, each once."""
    return list(dict.fromkeys(name for copy in copies for name in (copy.prompt, copy.source)))


def _as_record(ended: Round) -> dict:
    """A round of completing as JSON values."""
    neurons = [[neuron.layer, neuron.index] for neuron in ended.mask.neurons]
    known = {"change": ended.change, "copies": to_json(ended.copies), "sample_passes": ended.sample_passes}
    return {"neurons": neurons, **known}


def _kept_round(record: dict, sizes: Mapping[str, int]) -> Round:
    """The inverse of :func:`_as_record`."""
    mask = NeuronMask.from_neurons([Neuron(*each) for each in record["neurons"]], sizes)
    copies = tuple(Copy(**each) for each in record["copies"])
    return Round(mask, record["change"], (), (), copies, record["sample_passes"])
