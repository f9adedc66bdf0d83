"""A model that is loaded in this process."""

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch

from nemo_prune.compute.session import Chunk, Result, Session
from nemo_prune.engine.diffusion import NoisePredictor
from nemo_prune.engine.scorer import Scorer
from nemo_prune.errors import SettingsError
from nemo_prune.models.source import ModelSource, load_pipeline
from nemo_prune.settings import LocalizationSettings, ModelOptions


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
        predictor: predicts noise.
        scorer: scores prompts.
    """

    def __init__(self, source: ModelSource, options: ModelOptions, settings: LocalizationSettings) -> None:
        self.source, self.options, self.settings = source, options, settings
        self.device, self.dtype = choose_device(options.device), choose_dtype(options.dtype)
        self.pipe = load_pipeline(source.folder, self.device, self.dtype, source.variant)
        self.predictor = NoisePredictor(self.pipe, settings, options.batch_size)
        self.scorer = Scorer(self.predictor, self._reference(), options.margin)
        self.model_digest = source.digest
        self.sizes = self.predictor.sizes

    def _reference(self) -> NoisePredictor | None:
        """The same model in float32, which decides what is too close to call in the lower precision."""
        if self.dtype == torch.float32:
            return None
        pipe = load_pipeline(self.source.folder, self.device, torch.float32, self.source.variant)
        return NoisePredictor(pipe, self.settings, self.options.batch_size)

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


def choose_dtype(name: str) -> torch.dtype:
    """The dtype of a name.

    Raises:
        SettingsError: it is not one for weights.
    """
    if name not in ("float32", "float16", "bfloat16"):
        raise SettingsError(f"`{name}` is not a dtype for the weights. Use float32, float16 or bfloat16.")
    return getattr(torch, name)
