"""A model with the settings of the localization: the state that all commands start from."""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import TypeVar

import torch

from nemo_prune.checkpoint.export import files_to_export
from nemo_prune.engine.calibration import Calibration, MeasuredPrompt, enough_prompts, fit_calibration, measure_prompts
from nemo_prune.engine.diffusion import NoisePredictor
from nemo_prune.engine.results import ResultsHeader
from nemo_prune.engine.scorer import Scorer
from nemo_prune.errors import SettingsError
from nemo_prune.files.hashing import file_hash
from nemo_prune.files.work import LineLog
from nemo_prune.models.known import KnownModel, published_calibration, why_not
from nemo_prune.models.source import ModelSource, load_pipeline
from nemo_prune.settings import LocalizationSettings, ModelOptions

Progress = Callable[[int, int], None]
Chunk = TypeVar("Chunk")
Result = TypeVar("Result")
_RELEVANT_COMPONENTS = {"unet", "text_encoder", "tokenizer", "scheduler"}


class BaseSession(ABC):
    """A model with the settings of the localization, wherever it is computed.

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
    def map(self, task: Callable[["Session", Chunk], Iterable[Result]], chunks: Iterable[Chunk]) -> Iterator[Result]:
        """Do a task on chunks of the work.

        Args:
            task: computes the results of a chunk with a loaded model; it can be pickled. What it gives
                for a prompt must not depend on the rest of the chunk.
            chunks: parts of the work, such as lists of captions.

        Yields:
            The results, in the order in which they are finished.
        """

    @abstractmethod
    def chunks_of(self, texts: Sequence[str]) -> list[Sequence[str]]:
        """Texts in as many parts as suit those who compute."""

    def calibrate(
        self,
        texts: Sequence[str],
        file: Path,
        known: KnownModel | None = None,
        progress: Progress = lambda done, total: None,
    ) -> Calibration:
        """The calibration in a file, or what was published for the model, or measured on ordinary prompts.

        Args:
            texts: ordinary prompts.
            file: where the calibration is, or will be.
            known: what was published for the model; it is used where it fits.
            progress: called with the prompts done and their number.

        Raises:
            OutputError: the file holds a calibration of another model, other settings or other prompts.
            DownloadError: what was published can't be had.
        """
        if file.exists():
            return Calibration.load(file, self._identity_with(texts))
        if known is None:
            return self.measure_calibration(texts, file, progress)
        published = published_calibration(known)
        (reason,) = self.map(partial(_reason_against, published=published), [texts])
        if reason is not None:
            return self.measure_calibration(texts, file, progress, f"measured afresh, because {reason}")
        published.save(file, self._identity_with(texts))
        return published

    def measure_calibration(
        self,
        texts: Sequence[str],
        file: Path,
        progress: Progress = lambda done, total: None,
        origin: str = Calibration.origin,
    ) -> Calibration:
        """Calibrate on ordinary prompts and keep it in a file, in the place of any other.

        What is measured is kept beside the file as it comes, until the file is complete.
        """
        different = enough_prompts(texts)
        log_file = file.with_name(f".{file.name}.jsonl")
        log = LineLog(log_file, self._identity_with(texts))
        measured = {record["prompt"]: MeasuredPrompt.from_record(record) for record in log}
        waiting = [text for text in different if text not in measured]
        for each in self.map(_measure_chunk, self.chunks_of(waiting)):
            log.append(each.as_record())
            measured[each.prompt] = each
            progress(len(measured), len(different))
        # In the order of the prompts: it decides about the last digits.
        in_order = (measured[text] for text in different)
        calibration = fit_calibration(in_order, self.settings.threshold_num_std)
        calibration = dataclasses.replace(calibration, origin=origin)
        calibration.save(file, self._identity_with(texts))
        log_file.unlink()
        return calibration

    def _identity_with(self, texts: Sequence[str]) -> dict:
        return self.calibration_identity | {"prompts": digest(texts)}

    @property
    def calibration_identity(self) -> dict:
        """What a calibration depends on, apart from its prompts."""
        of_selection = {"theta", "theta_step", "theta_min", "threshold", "layers_backwards"}
        settings = {key: value for key, value in dataclasses.asdict(self.settings).items() if key not in of_selection}
        return {"model": self.model_digest, "settings": settings}

    def results_header(self, threshold: float) -> ResultsHeader:
        """What the results of this session depend on."""
        return ResultsHeader(self.model_digest, dict(self.sizes), threshold, dataclasses.asdict(self.settings))


class Session(BaseSession):
    """A model that is loaded in this process.

    Args:
        source: the model's files.
        options: device, precision and batch size.
        settings: the numbers of the method.

    Attributes:
        scorer: scores prompts.
        predictor: predicts noise.
    """

    def __init__(self, source: ModelSource, options: ModelOptions, settings: LocalizationSettings) -> None:
        self.source, self.options, self.settings = source, options, settings
        self.device = choose_device(options.device)
        self.pipe = load_pipeline(source, self.device, choose_dtype(options.dtype))
        self.predictor = NoisePredictor(self.pipe, settings, options.batch_size)
        self.scorer = Scorer(self.predictor, self._reference(), options.margin)
        self.model_digest = model_digest(source)
        self.sizes = self.predictor.sizes

    def _reference(self) -> NoisePredictor | None:
        """The same model in float32, which decides what is too close for the lower precision."""
        if self.options.dtype == "float32":
            return None
        pipe = load_pipeline(self.source, self.device, torch.float32)
        return NoisePredictor(pipe, self.settings, self.options.batch_size)

    def map(self, task: Callable[["Session", Chunk], Iterable[Result]], chunks: Iterable[Chunk]) -> Iterator[Result]:
        """Do a task on chunks of the work, here and one after the other; see :meth:`BaseSession.map`."""
        for chunk in chunks:
            yield from task(self, chunk)

    def chunks_of(self, texts: Sequence[str]) -> list[Sequence[str]]:
        """All texts at once: here results come as they are found."""
        return [texts]


@contextmanager
def open_session(
    source: ModelSource,
    options: ModelOptions,
    settings: LocalizationSettings,
    ray: str | None = None,
    num_workers: int | None = None,
) -> Iterator[BaseSession]:
    """A session in this process or on the workers of a Ray cluster, which end with the context.

    Args:
        source: the model's files.
        options: device, precision and batch size.
        settings: the numbers of the method.
        ray: None computes here; ``auto`` on workers of this machine, else the address of a cluster.
        num_workers: how many workers; None takes what the cluster has free.

    Raises:
        SettingsError: workers are asked for without Ray, or Ray is not installed.
        WorkerError: the cluster can't be reached or has not what is asked for.
    """
    if ray is None:
        if num_workers is not None:
            raise SettingsError(f"--ray-workers {num_workers} has a meaning with --ray only. Add `--ray auto`.")
        yield Session(source, options, settings)
    else:
        from nemo_prune.compute.ray_workers import RaySession

        with RaySession(source, options, settings, ray, num_workers) as session:
            yield session


def _measure_chunk(session: Session, texts: Sequence[str]) -> Iterator[MeasuredPrompt]:
    return measure_prompts(session.scorer, texts)


def _reason_against(session: Session, texts: Sequence[str], published: Calibration) -> list[str | None]:
    return [why_not(published, session.predictor, texts)]


def choose_device(device: str) -> str:
    """The device to compute on; ``auto`` takes a GPU where there is one.

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
        SettingsError: it is none for weights.
    """
    if name not in ("float32", "float16", "bfloat16"):
        raise SettingsError(f"`{name}` is no dtype for the weights. Use float32, float16 or bfloat16.")
    return getattr(torch, name)


def digest(texts: Sequence[str]) -> str:
    """A digest of texts in their order."""
    return sha256("\0".join(texts).encode()).hexdigest()


def model_digest(source: ModelSource) -> str:
    """sha256 over the names and contents of the files that results depend on."""
    files = [path for path in files_to_export(source.folder)[0] if path.parts[0] in _RELEVANT_COMPONENTS]
    return digest([source.variant or "", *(path.as_posix() + file_hash(source.folder / path) for path in files)])
