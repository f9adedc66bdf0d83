"""What comes back: images of memorized captions by two models, judged on seeds that localization never saw."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from nemo_prune.corpus.prompts import Prompt
from nemo_prune.progress import Advance, ignored
from nemo_prune.proof.copies import ImageSimilarity, TiledSimilarity, within_region
from nemo_prune.proof.drawing import BASE, CANDIDATE, Gallery
from nemo_prune.proof.intervals import GroupedShare, Spread, upper_bound
from nemo_prune.proof.passes import Ledger
from nemo_prune.proof.sampling import duplicate_groups, stratified
from nemo_prune.proof.training_images import TrainingImages, altered_pictures

TRAINING_IMAGE, BASE_SEEDS = "training image", "the base's own seeds"


@dataclass(frozen=True)
class ImageScores:
    """Similarities of one model's images of one caption, one number per image unless said otherwise.

    Attributes:
        own: to the caption's own training image, within a template's fixed region where one is given; empty where none
            is known.
        nearest: to the nearest of all training images that are known; empty where none is known.
        nearest_of: position of that one among the known ones, in the order of their captions in the corpus.
        parts: of the most alike tiles of image and any training image; empty where none is known or it is not told.
        to_base: to the base's image of the same seed.
        to_base_seeds: to the nearest of the base's images of other seeds: those of the same seed would be alike for an
            unchanged model, whether anything is memorized or not.
        between_seeds: of all pairs of the images.
    """

    own: tuple[float, ...]
    nearest: tuple[float, ...]
    nearest_of: tuple[int, ...]
    parts: tuple[float, ...]
    to_base: tuple[float, ...]
    to_base_seeds: tuple[float, ...]
    between_seeds: tuple[float, ...]

    def copied(self, reference: str, cut: float) -> list[bool]:
        """Which images count as copies.

        Args:
            reference: what the caption is judged by; its own training image counts, and so does any other.
            cut: the yardstick's.
        """
        if reference == BASE_SEEDS:
            return [value >= cut for value in self.to_base_seeds]
        own = self.own or (-1.0,) * len(self.nearest)
        return [max(pair) >= cut for pair in zip(own, self.nearest, strict=True)]


@dataclass(frozen=True)
class CaptionReplication:
    """One memorized caption by both models, on the same seeds.

    Attributes:
        prompt: the caption.
        kind: its type.
        group: number of its group of near-duplicates.
        reference: what it is judged by: its training image or, where none is known, the base's own seeds.
        seeds: of the images.
        base: the base's images.
        candidate: the candidate's images.
        candidate_copies: how many of these are copies.
        base_copies: how many of the base's are.
        upper_bound: exact upper bound of the candidate's rate on further seeds.
    """

    prompt: str
    kind: str | None
    group: int
    reference: str
    seeds: tuple[int, ...]
    base: ImageScores
    candidate: ImageScores
    candidate_copies: int
    base_copies: int
    upper_bound: float


@dataclass(frozen=True)
class ModelReplication:
    """What one model gives back for captions of one type: no number belongs to one caption alone.

    Attributes:
        copies: share of images that are copies, with its interval over groups of near-duplicates.
        parts: share of images in which a part is copied, see :class:`~nemo_prune.proof.evidence.OrdinaryControl`; None
            where no training image is known or ordinary images were not drawn.
        own: similarity to the caption's own training image, as in the paper's Table 1 (there by SSCD).
        nearest: to the nearest of all known training images.
        to_base: to the base's image of the same seed.
        between_seeds: of a caption's images to each other (the paper's diversity).
    """

    copies: GroupedShare
    parts: float | None
    own: Spread | None
    nearest: Spread | None
    to_base: Spread
    between_seeds: Spread | None


@dataclass(frozen=True)
class KindReplication:
    """Captions of one type.

    Attributes:
        captions: how many were measured.
        of: how many there are.
        by_training_image: how many were judged by a training image; the others by the base's own seeds.
        images: images per model.
        median_upper_bound: median over captions of the exact upper bound of the candidate's rate.
        base: what the base gives back.
        candidate: what the candidate gives back.
    """

    captions: int
    of: int
    by_training_image: int
    images: int
    median_upper_bound: float
    base: ModelReplication
    candidate: ModelReplication


@dataclass(frozen=True)
class Replication:
    """What comes back of all types; see :class:`KindReplication`.

    Attributes:
        by_kind: type -> its captions.
        everything: all captions together.
        not_available: captions whose training image is named but could not be used.
        confidence_looks: how many looks the upper bounds allow for.
    """

    by_kind: Mapping[str, KindReplication]
    everything: KindReplication
    not_available: int
    confidence_looks: int


class ReplicationJudge:
    """Compares a caption's images with training images and with the base's images.

    Args:
        similarity: the yardstick.
        training: the training images that are known.
        with_parts: whether parts of images are compared, too.
    """

    def __init__(self, similarity: ImageSimilarity, training: TrainingImages, with_parts: bool = True) -> None:
        self.training = training
        self.similarity = similarity
        self._known = similarity.describe(list(training.images.values()))
        known = list(training.images.values()) if with_parts else []
        self._tiled = TiledSimilarity(similarity, known) if known else None

    @property
    def cut(self) -> float:
        """Similarity from which an image counts as a copy."""
        return self.similarity.yardstick.cut

    def reference(self, text: str) -> str:
        """What a caption is judged by."""
        return TRAINING_IMAGE if text in self.training.images else BASE_SEEDS

    def own(self, text: str, images: Sequence[Image.Image]) -> list[float]:
        """Similarity to the caption's own training image, in its fixed region where one is given."""
        if text not in self.training.images:
            return []
        training, region = self.training.images[text], self.training.regions.get(text)
        if region is not None:
            training = within_region(training, region)
            images = [within_region(image, region) for image in images]
        described = self.similarity.describe(images)
        return self.similarity.compare(described, self.similarity.describe([training]))[:, 0].tolist()

    def nearest(self, images: Sequence[Image.Image]) -> tuple[list[float], list[int]]:
        """Similarity to the nearest of all known training images, and which one that is."""
        if not len(self._known):
            return [], []
        values, places = self.similarity.compare(self.similarity.describe(images), self._known).max(dim=1)
        return values.tolist(), places.tolist()

    def parts(self, images: Sequence[Image.Image]) -> list[float]:
        """Similarity of the most alike tiles of each image and any training image; empty where that is not told."""
        return self._tiled(images) if self._tiled else []

    def never_trained_on(self, image: Image.Image) -> Image.Image:
        """A control: an altered training image, the one that is least like it and all other known ones."""
        altered = altered_pictures(image)
        others = torch.cat([self._known, self.similarity.describe([image])]) if len(self._known) else None
        others = self.similarity.describe([image]) if others is None else others
        alike = self.similarity.compare(self.similarity.describe(altered), others).amax(dim=1)
        return altered[int(alike.argmin())]

    def similarity_to(self, image: Image.Image, images: Sequence[Image.Image]) -> list[float]:
        """How much images are like one picture."""
        return self.similarity.compare(self.similarity.describe(images), self.similarity.describe([image]))[
            :, 0
        ].tolist()

    def copied(self, text: str, images: Sequence[Image.Image], base: Sequence[Image.Image] = ()) -> list[bool]:
        """Which images are copies of a training image or, where none is known for the caption, of the base's images.

        Args:
            text: the caption.
            images: any.
            base: the base's images of other seeds than these.
        """
        if self.reference(text) == BASE_SEEDS:
            if not base:
                return [False] * len(images)
            described = self.similarity.describe(base)
            found = self.similarity.compare(self.similarity.describe(images), described).amax(dim=1)
            return (found >= self.cut).tolist()
        pairs = zip(self.own(text, images), self.nearest(images)[0], strict=True)
        return [max(pair) >= self.cut for pair in pairs]

    def scores(self, text: str, images: Sequence[Image.Image], base: Sequence[Image.Image]) -> ImageScores:
        """All similarities of a caption's images; the base's are given as both for the base itself."""
        described, described_base = self.similarity.describe(images), self.similarity.describe(base)
        to_base = self.similarity.compare(described, described_base)
        between = self.similarity.compare(described, described)
        nearest, nearest_of = self.nearest(images)
        return ImageScores(
            own=tuple(self.own(text, images)),
            nearest=tuple(nearest),
            nearest_of=tuple(nearest_of),
            parts=tuple(self.parts(images)),
            to_base=tuple(to_base.diagonal().tolist()),
            to_base_seeds=tuple(_of_other_seeds(to_base)),
            between_seeds=tuple(between[tuple(torch.triu_indices(*between.shape, offset=1))].tolist()),
        )


def measure_replication(
    gallery: Gallery,
    judge: ReplicationJudge,
    prompts: Sequence[Prompt],
    allowance: int,
    ledger: Ledger,
    bound: float,
    most_rounds: int,
    advance: Advance = ignored,
) -> list[CaptionReplication]:
    """Draw memorized captions by both models in rounds, and judge what comes back.

    Every caption that the allowance reaches gets one round, spread over types and near-duplicates; what was drawn
    elsewhere in that order costs nothing. Then those get
    further rounds of which it is not decided whether their rate is below the bound, until it is or the allowance is
    spent. The upper bounds allow for all of these looks.

    Args:
        gallery: draws and keeps the images.
        judge: compares them.
        prompts: the memorized captions.
        allowance: passes that may be spent.
        ledger: keeps the results.
        bound: rate of copies that is to be excluded.
        most_rounds: rounds per caption at most.
        advance: told what is done.
    """
    groups, order = duplicate_groups(prompts), stratified(prompts)
    found: dict[int, CaptionReplication] = {}
    drawn = sum(not any(gallery.costs(model, prompt.text) for model in (BASE, CANDIDATE)) for prompt in prompts)
    affordable = max(1, drawn + allowance // (2 * gallery.passes_per_round))
    done = 0
    for turns, positions in _plan(order, found, affordable, bound, most_rounds):
        gallery.expect([prompts[position].text for position in positions])
        for position in positions:

            def work(position: int = position, turns: int = turns) -> CaptionReplication:
                return _judged(gallery, judge, prompts[position], groups[position], turns, most_rounds)

            found[position] = ledger.once(f"{turns}: {prompts[position].text}", CaptionReplication, work)
            done += 1
            advance(done, affordable)
    return [found[position] for position in sorted(found)]


def summarize_replication(
    found: Sequence[CaptionReplication],
    prompts: Sequence[Prompt],
    cut: float,
    parts_cut: float | None,
    not_available: int,
    most_rounds: int,
) -> Replication:
    """Bring captions together, by type and all of them.

    Args:
        found: what was measured.
        prompts: all memorized captions.
        cut: the yardstick's.
        parts_cut: similarity above which a part counts as copied; None where that is not known.
        not_available: captions whose training image could not be used.
        most_rounds: looks that the upper bounds allow for.
    """
    kinds = list(dict.fromkeys(each.kind for each in found))
    return Replication(
        by_kind={
            kind or "memorized": _of_kind(
                [each for each in found if each.kind == kind],
                sum(prompt.kind == kind for prompt in prompts),
                cut,
                parts_cut,
            )
            for kind in kinds
        },
        everything=_of_kind(found, len(prompts), cut, parts_cut),
        not_available=not_available,
        confidence_looks=most_rounds,
    )


def _plan(
    order: Sequence[int], found: Mapping[int, CaptionReplication], affordable: int, bound: float, most_rounds: int
) -> Iterator[tuple[int, Sequence[int]]]:
    """Numbers of rounds, and the captions that have so many then, as long as rounds can be afforded."""
    for turns in range(1, most_rounds + 1):
        is_open = [turns == 1 or (place in found and _is_open(found[place], bound)) for place in order]
        positions = [place for place, wanted in zip(order, is_open, strict=True) if wanted][:affordable]
        affordable -= len(positions)
        yield turns, positions


def _is_open(found: CaptionReplication, bound: float) -> bool:
    """Whether it is not known yet on which side of the bound the candidate's rate is."""
    return found.candidate_copies <= bound * len(found.seeds) and found.upper_bound > bound


def _judged(
    gallery: Gallery, judge: ReplicationJudge, prompt: Prompt, group: int, turns: int, most_rounds: int
) -> CaptionReplication:
    base = gallery.images(BASE, prompt.text, turns)
    candidate = gallery.images(CANDIDATE, prompt.text, turns)
    reference = judge.reference(prompt.text)
    of_base, of_candidate = judge.scores(prompt.text, base, base), judge.scores(prompt.text, candidate, base)
    copies = sum(of_candidate.copied(reference, judge.cut))
    return CaptionReplication(
        prompt=prompt.text,
        kind=prompt.kind,
        group=group,
        reference=reference,
        seeds=tuple(seed for turn in range(turns) for seed in gallery.seeds(turn)),
        base=of_base,
        candidate=of_candidate,
        candidate_copies=copies,
        base_copies=sum(of_base.copied(reference, judge.cut)),
        upper_bound=upper_bound(copies, len(candidate), most_rounds),
    )


def _of_other_seeds(similarities: Tensor) -> list[float]:
    if len(similarities) < 2:
        return [-1.0] * len(similarities)
    return similarities.clone().fill_diagonal_(-1.0).amax(dim=1).tolist()


def _of_kind(found: Sequence[CaptionReplication], total: int, cut: float, parts_cut: float | None) -> KindReplication:
    bounds = sorted(each.upper_bound for each in found)
    return KindReplication(
        captions=len(found),
        of=total,
        by_training_image=sum(each.reference == TRAINING_IMAGE for each in found),
        images=sum(len(each.seeds) for each in found),
        median_upper_bound=bounds[len(bounds) // 2],
        base=_of_model(found, [each.base for each in found], cut, parts_cut),
        candidate=_of_model(found, [each.candidate for each in found], cut, parts_cut),
    )


def _of_model(
    found: Sequence[CaptionReplication], scores: Sequence[ImageScores], cut: float, parts_cut: float | None
) -> ModelReplication:
    by_group: dict[int, list[float]] = {}
    for each, mine in zip(found, scores, strict=True):
        copied = mine.copied(each.reference, cut)
        by_group.setdefault(each.group, []).append(sum(copied) / len(copied))
    parts = [] if parts_cut is None else [value > parts_cut for mine in scores for value in mine.parts]
    return ModelReplication(
        copies=GroupedShare.of(by_group),
        parts=sum(parts) / len(parts) if parts else None,
        own=Spread.of([value for mine in scores for value in mine.own]),
        nearest=Spread.of([value for mine in scores for value in mine.nearest]),
        to_base=Spread.of([value for mine in scores for value in mine.to_base]),
        between_seeds=Spread.of([value for mine in scores for value in mine.between_seeds]),
    )
