"""All evidence on a candidate: a tree of frozen values, and the settings that it was measured with."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nemo_prune.errors import SettingsError
from nemo_prune.facts import ALL_KINDS, AttackFacts, CopyFacts, Counted, EvidenceFacts, ReplicationFacts, UtilityFacts
from nemo_prune.files.json_values import from_json, to_json
from nemo_prune.proof.attack import AttackResult, AttackRun, AttackSettings
from nemo_prune.proof.copies import Yardstick
from nemo_prune.proof.drawing import Drawing
from nemo_prune.proof.intervals import Rate
from nemo_prune.proof.recall_matrix import RecallMatrix
from nemo_prune.proof.regrowth import FineTuning, Regrown
from nemo_prune.proof.replication import CaptionReplication, KindReplication, Replication
from nemo_prune.proof.roots import FoundRows
from nemo_prune.proof.tokens import TokenActivations
from nemo_prune.proof.utility import Utility
from nemo_prune.proof.variants import VariantResult
from nemo_prune.settings import VerificationSettings

# How a budget is divided among the parts; what a part does not need goes to those after it.
SHARES = {
    "replication": 0.38,
    "utility": 0.14,
    "attack": 0.20,
    "membership": 0.02,
    "variants": 0.10,
    "roots": 0.04,
    "regrowth": 0.12,
    "recall": 0.08,
}
PARTS = tuple(SHARES)
# What a run gathers for its card.
RUN_PARTS = ("replication", "utility", "attack")
_RUN_UTILITY_CAPTIONS, _RUN_LOOK_STEPS = 4, 10
_FEWEST_CAPTIONS = 5
_DECIMALS = 3


@dataclass(frozen=True)
class EvidenceSettings:
    """What is measured, and how much it may cost.

    Attributes:
        budget: passes through a U-Net of one sample each, of all parts together.
        minutes: a budget in minutes instead; the speed of a pass is measured first.
        parts: which parts are measured, see :data:`PARTS`.
        drawing: how images are drawn.
        quick_steps: steps of the images of variants, attacks, regrowth, roots and recall.
        seed: of the first image; localization never saw it.
        images_per_round: images per caption and model that are drawn at once.
        most_rounds: rounds per caption at most.
        bound: rate of copies that the drawing tries to exclude for each caption.
        margin: of the equivalence test: share of the base's denoising error.
        utility_captions: held-out captions, and as many neighbours, at most.
        attack: of the embeddings.
        fine_tuning: the benign one.
        thorough: also what costs most: copied parts of images, attacks on pictures never trained on, neighbours of
            memorized captions, and images under as many random neurons.
        sscd: file of a copy detector, TorchScript or ONNX. (default: multi-scale SSIM and correlation)
        cut: similarity from which an image counts as a copy. (default: what suits the yardstick: .5, a detector .7)
        clip: folder of a CLIP model, for the alignment of captions and images.
        features: TorchScript network that describes images, such as Inception's, for FID and KID.
    """

    budget: int = 30_000
    minutes: float | None = None
    parts: tuple[str, ...] = PARTS
    drawing: Drawing = field(default_factory=Drawing)
    quick_steps: int = 20
    seed: int = 3001
    images_per_round: int = 2
    most_rounds: int = 8
    bound: float = 0.1
    margin: float = 0.05
    utility_captions: int = 16
    attack: AttackSettings = field(default_factory=AttackSettings)
    fine_tuning: FineTuning = field(default_factory=FineTuning)
    thorough: bool = True
    sscd: Path | None = None
    cut: float | None = None
    clip: Path | None = None
    features: Path | None = None

    def __post_init__(self) -> None:
        if unknown := [part for part in self.parts if part not in PARTS]:
            raise SettingsError(f"There is no part `{unknown[0]}`. Use some of: {', '.join(PARTS)}.")
        if self.budget < 1 or (self.minutes is not None and self.minutes <= 0):
            raise SettingsError("The budget must be above 0: a number of passes, or of minutes such as 10m.")
        if self.images_per_round < 2:
            raise SettingsError(f"`images_per_round` is {self.images_per_round}, expected: at least 2 (pairs).")
        # Known before the models are loaded.
        if self.sscd is not None and not Path(self.sscd).is_file():
            raise SettingsError(f"There is no copy detector at {self.sscd}. Give a TorchScript or ONNX file of SSCD.")

    @classmethod
    def of_a_run(cls, verification: VerificationSettings) -> "EvidenceSettings":
        """What a run gathers: the images that it draws anyway, judged by this yardstick too, and little beside them."""
        return cls(
            budget=verification.evidence_budget,
            parts=RUN_PARTS,
            drawing=Drawing.of(verification),
            seed=verification.seed,
            images_per_round=max(2, verification.images_per_prompt),
            most_rounds=1,
            utility_captions=_RUN_UTILITY_CAPTIONS,
            attack=AttackSettings(images_per_look=1, drawing_steps=_RUN_LOOK_STEPS),
            thorough=False,
        )

    def identity(self) -> dict:
        """What results depend on, as JSON values: everything but the budget and places of files."""
        values = {key: value for key, value in vars(self).items() if key not in
                  ("budget", "minutes", "parts", "sscd", "clip", "features")}  # fmt: skip
        return {**to_json(values), "files": [name for name in ("sscd", "clip", "features") if getattr(self, name)]}


@dataclass(frozen=True)
class ModelFacts:
    """One of the two models.

    Attributes:
        name: what to call it; never a path of the machine.
        weights: sha256 over the weights of U-Net and text encoder as they were computed.
    """

    name: str
    weights: str


@dataclass(frozen=True)
class Changes:
    """Where the candidate differs from the base.

    Attributes:
        rows: layer -> rows of text projections that differ, where any do.
        others: whether other weights differ too.
    """

    rows: Mapping[str, int]
    others: bool


@dataclass(frozen=True)
class OrdinaryControl:
    """The base's images of ordinary captions, which should not copy anything: the floor of the yardstick.

    Attributes:
        copies: images that are near a training image.
        parts_cut: highest similarity of a part of any of them to a part of a training image, or the yardstick's cut
            where that is higher: above it a part counts as copied.
    """

    copies: Rate
    parts_cut: float


@dataclass(frozen=True)
class WorkRatio:
    """How much less work an attack has with memorized pictures than with others.

    Attributes:
        model: which model.
        ratio: median steps to a memorized picture over median steps to a picture that was never trained on.
        at_most: whether the true ratio may be lower, because the controls did not come back within the steps.
    """

    model: str
    ratio: float
    at_most: bool


@dataclass(frozen=True)
class RecallSummary:
    """The recall matrix in numbers.

    Attributes:
        masks: single masks that were tried.
        cells: captions under single masks.
        awakened: those where a training image came back that is not the caption's own and did not come back before.
    """

    masks: int
    cells: int
    awakened: int


@dataclass(frozen=True)
class EvidenceSummary:
    """What can be published: no number belongs to one caption alone.

    Attributes:
        base: the base.
        candidate: the candidate.
        changes: where they differ.
        yardstick: what images were compared by.
        drawing: how they were drawn.
        seed: of the first image.
        images_per_round: images per caption and model that were drawn at once.
        replication: what comes back.
        control: what ordinary captions seem to copy; None where no training image is known or it was not measured.
        utility: what the candidate still can do; None where it was not measured.
        attacks: by model, sort of target and start.
        work_ratios: by model, where one can be told.
        membership: model -> area under the curve of membership inference; empty where no training image is known.
        variants: other ways to ask.
        roots: what the weights tell of the cut; None where it was not looked at.
        refilled: what comes back after filling these rows.
        regrown: what comes back after fine-tuning, merging and rounding.
        tokens: what drives the changed neurons; None where more than rows differ.
        recall: what single masks awaken; None where they are not known.
        left_out: part -> why it was not measured.
        budget: passes that were allowed.
        passes: part -> passes that it took.
        seconds: part -> wall time.
    """

    base: ModelFacts
    candidate: ModelFacts
    changes: Changes
    yardstick: Yardstick
    drawing: Drawing
    seed: int
    images_per_round: int
    replication: Replication
    control: OrdinaryControl | None
    utility: Utility | None
    attacks: tuple[AttackResult, ...]
    work_ratios: tuple[WorkRatio, ...]
    membership: Mapping[str, float]
    variants: tuple[VariantResult, ...]
    roots: FoundRows | None
    refilled: tuple[Regrown, ...]
    regrown: tuple[Regrown, ...]
    tokens: TokenActivations | None
    recall: RecallSummary | None
    left_out: Mapping[str, str]
    budget: int
    passes: Mapping[str, int]
    seconds: Mapping[str, float]

    @property
    def replication_rate(self) -> float:
        """Share of the candidate's images of memorized captions that are copies."""
        return self.replication.everything.candidate.copies.share

    @property
    def utility_loss(self) -> float | None:
        """Mean relative change of the noise prediction on held-out captions."""
        return self.utility.loss if self.utility else None


def published_facts(summary: EvidenceSummary) -> EvidenceFacts:
    """A summary for a record: coarse, and without figures that few captions made.

    Whoever guesses a caption and has the models can compute its figures, and would find the caption by them. So types
    with few captions are left out, and all numbers have three decimals.
    """
    kinds = {name: kind for name, kind in summary.replication.by_kind.items() if kind.captions >= _FEWEST_CAPTIONS}
    facts = EvidenceFacts(
        yardstick=summary.yardstick.name,
        cut=summary.yardstick.cut,
        yardstick_sha256=summary.yardstick.sha256,
        drawing=to_json(summary.drawing),
        seed=summary.seed,
        replication={name: _replication_facts(kind) for name, kind in
                     {**kinds, ALL_KINDS: summary.replication.everything}.items()},
        not_available=summary.replication.not_available,
        attacks=tuple(
            AttackFacts(each.model, each.memorized, each.start, each.steps, _counted(each.came_back), each.median_steps)
            for each in summary.attacks
        ),
        membership=summary.membership,
        utility=_utility_facts(summary.utility) if summary.utility else None,
        left_out=summary.left_out,
        budget=summary.budget,
        passes=summary.passes,
    )  # fmt: skip
    return from_json(EvidenceFacts, _rounded(to_json(facts)))


def _replication_facts(kind: KindReplication) -> ReplicationFacts:
    base, candidate = (
        CopyFacts(each.copies.share, each.copies.low, each.copies.high, each.parts)
        for each in (kind.base, kind.candidate)
    )
    return ReplicationFacts(kind.captions, kind.of, kind.by_training_image, kind.images, base, candidate)


def _utility_facts(utility: Utility) -> UtilityFacts:
    test = utility.equivalence
    return UtilityFacts(
        captions=utility.held_out.captions,
        held_out={name: utility.held_out.loss(name) for name in utility.held_out.relative_error},
        neighbours=utility.neighbours.loss() if utility.neighbours else None,
        is_equivalent=test.holds if test else None,
        margin=test.margin if test else 0.0,
    )


def _counted(rate: Rate) -> Counted:
    return Counted(rate.count, rate.total, rate.low, rate.high)


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_rounded(each) for each in value]
    return round(value, _DECIMALS) if isinstance(value, float) else value


@dataclass(frozen=True)
class Evidence:
    """Everything that was measured; captions are in it, so it belongs into the work folder.

    Attributes:
        summary: what can be published.
        captions: memorized captions one by one.
        attack_runs: attacks one by one.
        recall: the matrix; None where single masks are not known.
        not_available: caption -> why its training image counts as unknown.
    """

    summary: EvidenceSummary
    captions: tuple[CaptionReplication, ...]
    attack_runs: tuple[AttackRun, ...] = ()
    recall: RecallMatrix | None = None
    not_available: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> dict:
        """JSON values."""
        return to_json(self)

    @classmethod
    def from_json(cls, values: Mapping[str, object]) -> "Evidence":
        """What :meth:`to_json` made.

        Raises:
            ValueError: it is something else.
        """
        return from_json(cls, dict(values))
