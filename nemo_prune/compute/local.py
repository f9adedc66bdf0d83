"""A model that is loaded in this process."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline

from nemo_prune.compute.session import Chunk, Result, Session
from nemo_prune.engine.compensation import Compensation, Moments
from nemo_prune.engine.diffusion import NoisePredictor
from nemo_prune.engine.memory import release_memory
from nemo_prune.engine.results import ResultsHeader
from nemo_prune.engine.scorer import Scorer
from nemo_prune.errors import SettingsError
from nemo_prune.models.source import ModelSource, load_pipeline, load_predicting
from nemo_prune.settings import LocalizationSettings, ModelOptions

# What float32 decides comes in ones and twos, and in float32 a batch of four fills a GPU.
CLOSE_CALLS_AT_ONCE = 4


class LocalSession(Session):
    """A model that is loaded in this process.

    Args:
        source: the model's files.
        options: device, precision and batch size.
        settings: the numbers of the method.

    Attributes:
        device: torch device of the model.
        dtype: of its weights.
        pipe: the model.
        float32: the model in float32, which is ``pipe`` if that is; it need not be able to draw.
        predictor: predicts noise.
        scorer: scores prompts.
    """

    def __init__(self, source: ModelSource, options: ModelOptions, settings: LocalizationSettings) -> None:
        self.source, self.options, self.settings = source, options.on(choose_device(options.device)), settings
        self.device, self.dtype = self.options.device, getattr(torch, self.options.dtype)
        self.pipe = load_pipeline(source.folder, self.device, self.dtype, source.variant)
        self.predictor = NoisePredictor(self.pipe, settings, options.batch_size)
        self.float32 = self.in_float32(self.pipe, source.folder)
        self.scorer = self.scorer_of(self.predictor)
        self.model_digest = source.digest
        self.sizes = self.predictor.sizes

    def scorer_of(self, predictor: NoisePredictor) -> Scorer:
        """A scorer whose close calls float32 decides.

        Args:
            predictor: of this session's model.
        """
        reference = None
        if self.float32 is not self.pipe:
            size = min(CLOSE_CALLS_AT_ONCE, predictor.batch_size)
            reference = NoisePredictor(self.float32, self.settings, size, predictor.scale, predictor.compensation)
        return Scorer(predictor, reference, self.options.margin_of_dtype)

    def keep_means(self, usual: Mapping[str, Moments]) -> None:
        """Let suppressed neurons output their means from now on, see :mod:`nemo_prune.engine.compensation`."""
        self.predictor.compensation = Compensation(usual)
        self.scorer = self.scorer_of(self.predictor)

    def released(self, memorized: Mapping[str, Moments] | None = None, scale: float = 0.0) -> NoisePredictor:
        """A predictor of what a release predicts.

        Args:
            memorized: moments on memorized captions, where kept neurons stand in for suppressed ones and are held;
                without them suppressed neurons give what they give in the search.
            scale: what suppressed neurons are multiplied by otherwise.
        """
        compensation = self.predictor.compensation
        if compensation is not None and memorized is not None:
            compensation = replace(compensation, memorized=memorized)
        return NoisePredictor(self.pipe, self.settings, self.predictor.batch_size, scale, compensation)

    def results_header(self, threshold: float) -> ResultsHeader:
        """What localizations depend on."""
        return replace(
            super().results_header(threshold), ablation="zero" if self.predictor.compensation is None else "mean"
        )

    def in_float32(self, pipe: StableDiffusionPipeline, folder: Path) -> StableDiffusionPipeline:
        """A model in float32 too: it decides what is too close for the lower precision, and proves to the bit.

        Args:
            pipe: the model in this session's precision; it is given back if that is float32.
            folder: its files; what is loaded from them does not draw.
        """
        if self.dtype == torch.float32:
            return pipe
        return load_predicting(folder, self.device, torch.float32, self.source.variant)

    def free(self) -> None:
        """Give the weights' memory back; nothing can be predicted any more."""
        for pipe in (self.pipe, self.float32):
            for part in (pipe.unet, pipe.text_encoder, pipe.vae):
                if part is not None:
                    part.to("meta")
        release_memory()

    def map(
        self, task: Callable[["LocalSession", Chunk], Iterable[Result]], chunks: Iterable[Chunk]
    ) -> Iterator[Result]:
        """Do a task on chunks of the work, here and one after the other; see :meth:`Session.map`."""
        for chunk in chunks:
            yield from task(self, chunk)

    def chunks_of(self, texts: Sequence[str]) -> list[Sequence[str]]:
        """All texts in one part: results come as they are found anyway."""
        return [texts]


def choose_device(device: str) -> str:
    """The device to compute on; ``auto`` takes a GPU if there is one.

    Raises:
        SettingsError: the device can't be used.
    """
    if device != "auto":
        try:
            torch.zeros(1, device=device)
        except (RuntimeError, AssertionError) as error:
            raise SettingsError(f"The device `{device}` can't be used: {error}") from error
        return device
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"
