"""The interface of a session: a model with the settings of the localization, wherever it is computed."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from nemo_prune.engine.results import ResultsHeader
from nemo_prune.files.json_values import to_json
from nemo_prune.models.source import ModelSource
from nemo_prune.settings import LocalizationSettings, ModelOptions

Chunk = TypeVar("Chunk")
Result = TypeVar("Result")
# The calibration does not depend on these settings of the selection.
_OF_THE_SELECTION = {"theta", "theta_step", "theta_min", "threshold", "layers_backwards"}


class Session(ABC):
    """A model with the settings of the localization.

    Attributes:
        source: the model's files.
        options: device, precision and batch size.
        settings: the numbers of the method.
        model_digest: sha256 over the files that the results depend on.
        sizes: dotted module name -> number of neurons.
    """

    source: ModelSource
    options: ModelOptions
    settings: LocalizationSettings
    model_digest: str
    sizes: Mapping[str, int]

    @abstractmethod
    def map(self, task: Callable[[Any, Chunk], Iterable[Result]], chunks: Iterable[Chunk]) -> Iterator[Result]:
        """Do a task on chunks of the work.

        Args:
            task: computes the results of a chunk with a loaded model, which it is given as a
                :class:`~nemo_prune.compute.local.LocalSession`; it can be pickled. Its result for a prompt
                must not depend on the rest of the chunk.
            chunks: parts of the work, such as lists of captions.

        Yields:
            The results, in the order in which they are finished.
        """

    @abstractmethod
    def chunks_of(self, texts: Sequence[str]) -> list[Sequence[str]]:
        """Texts in as many parts as suit the workers."""

    @property
    def calibration_identity(self) -> dict:
        """What a calibration depends on, apart from its prompts."""
        settings = {name: value for name, value in to_json(self.settings).items() if name not in _OF_THE_SELECTION}
        return {"model": self.model_digest, "settings": settings}

    def results_header(self, threshold: float) -> ResultsHeader:
        """What localizations depend on."""
        return ResultsHeader(self.model_digest, dict(self.sizes), threshold, to_json(self.settings))
