"""What is recorded of a base, of prompts and of a mask; no caption and no path of the machine is among it."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields

from nemo_prune.files.json_values import from_json, to_json

Digests = Mapping[str, tuple[str, ...]]


@dataclass(frozen=True)
class BaseFacts:
    """The unpruned model of a release.

    Attributes:
        name: what to call it.
        repo_id: its Hub id; None for a local one.
        commit: the commit on the Hub.
        variant: weights variant, such as ``fp16``.
        converted: what was converted, in words; None where nothing was.
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
        duplicates: captions that were exactly the same as another one.
        groups: the counts with near-duplicates counted once; None where there are too many to compare.
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
        prompts_per_neuron: layer -> row -> how many prompts' own sets have the neuron.
        base_tensors: tensor -> digests of its bytes in the base, see :mod:`nemo_prune.checkpoint.fingerprint`.
        others: what else the file says; it is shown and not understood.
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
        """JSON values, without what is not known."""
        known = {each.name: getattr(self, each.name) for each in fields(self)[:-1]}
        return {**self.others, **{name: to_json(value) for name, value in known.items() if value is not None}}

    @classmethod
    def from_json(cls, values: Mapping[str, object]) -> "MaskFacts":
        """What :meth:`to_json` made, or a newer version.

        Raises:
            ValueError: something that others rely on is of another type.
        """
        names = {each.name for each in fields(cls)} - {"others"}
        known = {name: value for name, value in values.items() if name in names}
        others = {name: value for name, value in values.items() if name not in names}
        return from_json(cls, {**known, "others": others}, only_known=False)
