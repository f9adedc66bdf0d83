"""What is recorded of base, prompts, mask and export; no caption and no path of the machine is among it."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Literal

from nemo_prune.files.json_values import from_json, to_json

Digests = Mapping[str, tuple[str, ...]]
Status = Literal["localized", "not_memorized", "unresolved"]


@dataclass(frozen=True)
class BaseFacts:
    """The unpruned model of a release.

    Attributes:
        name: what to call it.
        repo_id: its Hub id; None for a local one.
        commit: the commit on the Hub.
        variant: weights variant, such as ``fp16``.
        converted: what was converted, in words; None if nothing was.
        config: where a single file took its configs from.
        model: what ``--model`` takes; None for a local model.
        stated_by_publisher: whether the publisher named the repo and nobody checked it.
    """

    name: str | None = None
    repo_id: str | None = None
    commit: str | None = None
    variant: str | None = None
    converted: str | None = None
    config: str | None = None
    model: str | None = None
    stated_by_publisher: bool = False


@dataclass(frozen=True)
class StatusCounts:
    """How many prompts have each status.

    Attributes:
        total: prompts that were examined.
        localized: prompts whose neurons were found.
        not_memorized: prompts of which no seed was kept.
        unresolved: prompts whose selection ran out.
        unresolved_included: whether the sets of unresolved prompts are in the mask.
    """

    total: int
    localized: int
    not_memorized: int
    unresolved: int
    unresolved_included: bool


@dataclass(frozen=True)
class PromptFacts(StatusCounts):
    """What a run found out about its prompts.

    Attributes:
        memorized: prompts that are localized or unresolved.
        duplicates: captions that are exact duplicates of another one.
        groups: the counts with near-duplicates counted once; None if there are too many to compare.
        silenced_by_others: prompts that other prompts' neurons silence.
        not_monotone: prompts that were searched set by set.
        smallest_margin: the smallest distance of a deciding similarity from its threshold, to one digit.
        sample_passes: latents that went through the U-Net for the prompts.
        beyond_reach: unresolved prompts that even everything suppressed does not silence.
        with_spare: localized prompts of which a neuron could be spared alone; all others' sets are proven minimal.
    """

    memorized: int
    duplicates: int
    groups: Mapping[str, int] | None
    silenced_by_others: int
    not_monotone: int
    smallest_margin: float | None
    sample_passes: int
    beyond_reach: int = 0
    with_spare: int = 0


@dataclass(frozen=True)
class MaskFacts:
    """What a mask's file says beside its rows: what it was made of, and for.

    Attributes:
        base: the model that it was made for.
        settings: the numbers of the method.
        prompts: what was examined.
        versions: package -> version.
        scale: what its rows are multiplied by in the release that it came with.
        merge: how the prompts' neurons became one mask.
        threshold: tau.
        model: digest of the files of the model that the result files name.
        prompts_per_neuron: layer -> row -> number of prompts whose own sets have the neuron.
        base_tensors: tensor -> digests of its bytes in the base, see :mod:`nemo_prune.checkpoint.fingerprint`.
        others: further facts in the file, shown but not used.
    """

    base: BaseFacts | None = None
    settings: Mapping[str, object] | None = None
    prompts: PromptFacts | StatusCounts | None = None
    versions: Mapping[str, str] | None = None
    scale: float | None = None
    merge: str | None = None
    threshold: float | None = None
    model: str | None = None
    prompts_per_neuron: Mapping[str, Mapping[int, int]] | None = None
    base_tensors: Digests | None = None
    others: Mapping[str, object] = field(default_factory=dict)

    def to_json(self) -> dict:
        """As JSON values, without unknown facts."""
        known = {each.name: getattr(self, each.name) for each in fields(self)[:-1]}
        return {**self.others, **{name: to_json(value) for name, value in known.items() if value is not None}}

    @classmethod
    def from_json(cls, values: Mapping[str, object]) -> "MaskFacts":
        """The inverse of :meth:`to_json`, also for files of newer versions.

        Raises:
            ValueError: a fact that other code relies on is of another type.
        """
        names = {each.name for each in fields(cls)} - {"others"}
        known = {name: value for name, value in values.items() if name in names}
        others = {name: value for name, value in values.items() if name not in names}
        return from_json(cls, {**known, "others": others}, only_known=False)


@dataclass(frozen=True)
class Rechecks:
    """Similarities near the threshold that float32 decided.

    Attributes:
        made: how many.
        overturned: how many of them the lower precision had on the other side of the threshold.
    """

    made: int = 0
    overturned: int = 0


@dataclass(frozen=True)
class ExportReport:
    """What an export wrote.

    Attributes:
        sha256: file relative to the release -> sha256 of its content, for every file of the base's.
        base_sha256: the same of the base, for the files that were changed.
        rows_changed: changed file -> number of rows that were set to zero or scaled in it.
        left_out: what of the base is not in the release -> why.
        dropped: file -> the keys that it does not have any more, because they told of a path, data or captions.
        notes: what a publisher should say of the form of the weights, in sentences.
    """

    sha256: Mapping[str, str] = field(default_factory=dict)
    base_sha256: Mapping[str, str] = field(default_factory=dict)
    rows_changed: Mapping[str, int] = field(default_factory=dict)
    left_out: Mapping[str, str] = field(default_factory=dict)
    dropped: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class GoneFacts:
    """What is gone under the final mask, and not only silent, see :mod:`nemo_prune.engine.gone`.

    Attributes:
        memorized: memorized prompts that were judged.
        silent: those whose suppressed similarity is at most tau on every seed of the detection and on fresh ones.
        gone: those of which nothing shows in the noise predictions, and no image that was drawn copies anything.
        ordinary: ordinary prompts that were watched.
        called_up: those that resemble a memorized one more than before, or of which an image copies a training image.
    """

    memorized: int
    silent: int
    gone: int
    ordinary: int
    called_up: int


@dataclass(frozen=True)
class SparedPoint:
    """A mask on the way from the whole one to none: what ordinary prompts are spared, and what that gives up.

    Attributes:
        neurons: pruned neurons.
        change: of the noise prediction on ordinary prompts, as a share of what everything suppressed changes.
        gone: memorized prompts that are gone.
        hold: how much memorized prompts are held near means, as a share of how much they are under the whole one.
    """

    neurons: int
    change: float
    gone: int
    hold: float = 1.0


@dataclass(frozen=True)
class Cost:
    """Relative change of the noise prediction on ordinary prompts, see :func:`nemo_prune.proof.cost.noise_change`.

    Attributes:
        mask: under the mask.
        random: under as many random neurons, see :func:`nemo_prune.proof.cost.matched_random_mask`.
        everything: with everything suppressed.
    """

    mask: float
    random: float
    everything: float


# What facts of all captions together are called beside those of a type.
ALL_KINDS = "all"
# Why a part of the evidence was left out that nobody wanted.
NOT_ASKED = "it was not asked for"


@dataclass(frozen=True)
class Counted:
    """A count out of a total, with its exact interval at 95%.

    Attributes:
        count: how often it happened.
        total: out of how many.
        low: lower end of the interval.
        high: its upper end.
    """

    count: int
    total: int
    low: float
    high: float


@dataclass(frozen=True)
class CopyFacts:
    """What one model gives back of memorized captions.

    Attributes:
        share: of its images that are copies.
        low: lower end of its interval over groups of near-duplicate captions, at 95%.
        high: its upper end.
        parts: share of its images in which a part is copied; None where that was not measured.
    """

    share: float
    low: float
    high: float
    parts: float | None


@dataclass(frozen=True)
class ReplicationFacts:
    """What comes back of captions of one type, or of all.

    Attributes:
        captions: how many were measured.
        of: how many there are.
        by_training_image: how many were judged by a training image, the others by the base's own images.
        images: per model.
        base: what the base gives back.
        candidate: what the candidate gives back.
    """

    captions: int
    of: int
    by_training_image: int
    images: int
    base: CopyFacts
    candidate: CopyFacts


@dataclass(frozen=True)
class AttackFacts:
    """Attacks on the text embeddings of one model, see :mod:`nemo_prune.proof.attack`.

    Attributes:
        model: which model.
        memorized: whether the targets are memorized pictures, or ones that it was never trained on.
        start: where the embeddings began.
        steps: that each attack had.
        came_back: how many pictures came back.
        median_steps: median steps to a copy; None where fewer than half came back.
    """

    model: str
    memorized: bool
    start: str
    steps: int
    came_back: Counted
    median_steps: float | None


@dataclass(frozen=True)
class UtilityFacts:
    """Mean relative change of the noise prediction.

    Attributes:
        captions: held-out captions.
        held_out: compared model -> change on them.
        neighbours: the candidate's change on ordinary captions that share words with memorized ones; None without any.
        is_equivalent: whether the denoising error is the same within the margin; None where that can't be told.
        margin: of that test, as a share of the base's error.
    """

    captions: int
    held_out: Mapping[str, float]
    neighbours: float | None
    is_equivalent: bool | None
    margin: float


@dataclass(frozen=True)
class EvidenceFacts:
    """What evidence says that can be published: no number belongs to one caption, or to few.

    Attributes:
        yardstick: what images were compared by.
        cut: similarity from which an image counts as a copy.
        yardstick_sha256: of the copy detector's file; None for what the package brings.
        drawing: scheduler, steps and guidance of the images.
        seed: of the first image.
        replication: type of the captions, or ``all`` -> what comes back.
        not_available: captions whose training image is named but could not be used.
        attacks: by model, sort of target and start.
        membership: model -> area under the curve of membership inference; empty where it was not measured.
        utility: what the candidate still can do; None where it was not measured.
        left_out: part -> why it was not measured.
        budget: passes that were allowed.
        passes: part -> passes that it took.
    """

    yardstick: str
    cut: float
    yardstick_sha256: str | None
    drawing: Mapping[str, str | int | float]
    seed: int
    replication: Mapping[str, ReplicationFacts]
    not_available: int
    attacks: tuple[AttackFacts, ...]
    membership: Mapping[str, float]
    utility: UtilityFacts | None
    left_out: Mapping[str, str]
    budget: int
    passes: Mapping[str, int]
