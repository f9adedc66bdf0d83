"""What one prompt's mask awakens: every mask alone against every caption, by the nearest training image."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from diffusers import StableDiffusionPipeline

from nemo_prune.engine.diffusion import apply_mask
from nemo_prune.engine.layers import find_text_projections, layer_sizes
from nemo_prune.mask import Neuron, NeuronMask
from nemo_prune.proof.drawing import Drawing, draw
from nemo_prune.proof.replication import ReplicationJudge


@dataclass(frozen=True)
class RecallRow:
    """One prompt's mask alone.

    Attributes:
        similarity: to the nearest training image, for each caption.
        nearest_of: position of that training image among the known ones, for each caption; -1 where it is below the
            cut.
    """

    similarity: tuple[float, ...]
    nearest_of: tuple[int, ...]


@dataclass(frozen=True)
class RecallMatrix:
    """All masks against all captions.

    Attributes:
        captions: the captions, rows and columns alike.
        rows: caption whose mask is pruned -> what all captions give back then.
        before: the same with nothing pruned.
    """

    captions: tuple[str, ...]
    rows: Mapping[str, RecallRow]
    before: RecallRow

    def awakened(self, own: Mapping[str, int]) -> int:
        """Cells where another training image comes back than the caption's own, which did not before.

        Args:
            own: caption -> position of its own training image among the known ones.
        """
        return sum(
            place not in (-1, own.get(caption), self.before.nearest_of[column])
            for row in self.rows.values()
            for column, (caption, place) in enumerate(zip(self.captions, row.nearest_of, strict=True))
        )


def recall_row(
    base: StableDiffusionPipeline,
    neurons: Sequence[Neuron],
    captions: Sequence[str],
    judge: ReplicationJudge,
    drawing: Drawing,
    seed: int,
) -> RecallRow:
    """Draw one image per caption with some neurons suppressed.

    Args:
        base: the unpruned model.
        neurons: one prompt's; none for what the base does.
        captions: what is drawn.
        judge: knows the training images.
        drawing: how.
        seed: of the images, one that localization never saw.
    """
    mask = NeuronMask.from_neurons(neurons, layer_sizes(find_text_projections(base.unet, "both")))
    images = []
    with apply_mask(base, mask):
        for text in captions:
            images += draw(base, text, drawing, [seed])
    values, places = judge.nearest(images)
    near = [place if value >= judge.cut else -1 for value, place in zip(values, places, strict=True)]
    return RecallRow(tuple(values), tuple(near))
