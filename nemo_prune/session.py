"""A model that is loaded for localization: the state that all commands start from."""

import dataclasses
from collections.abc import Callable, Sequence
from hashlib import sha256
from pathlib import Path

import torch

from nemo_prune.calibration import Calibration, calibrate
from nemo_prune.diffusion import NoisePredictor
from nemo_prune.errors import SettingsError
from nemo_prune.export import file_hash, files_to_export
from nemo_prune.results import ResultsHeader
from nemo_prune.scorer import Scorer
from nemo_prune.settings import LocalizationSettings, ModelOptions
from nemo_prune.source import ModelSource, load_pipeline

Progress = Callable[[int, int], None]
_RELEVANT_COMPONENTS = {"unet", "text_encoder", "tokenizer", "scheduler"}


class Session:
    """A loaded model with the settings of the localization.

    Args:
        source: the model's files.
        options: device, precision and batch size.
        settings: the numbers of the method.

    Attributes:
        scorer: scores prompts.
        predictor: predicts noise.
        model_digest: sha256 over the files that the results depend on.
    """

    def __init__(self, source: ModelSource, options: ModelOptions, settings: LocalizationSettings) -> None:
        self.source, self.options, self.settings = source, options, settings
        self.device = choose_device(options.device)
        self.pipe = load_pipeline(source, self.device, choose_dtype(options.dtype))
        self.predictor = NoisePredictor(self.pipe, settings, options.batch_size)
        self.scorer = Scorer(self.predictor, self._reference(), options.margin)
        self.model_digest = _digest_of_files(source)

    def _reference(self) -> NoisePredictor | None:
        """The same model in float32, which decides what is too close for the lower precision."""
        if self.options.dtype == "float32":
            return None
        pipe = load_pipeline(self.source, self.device, torch.float32)
        return NoisePredictor(pipe, self.settings, self.options.batch_size)

    def calibrate(self, texts: Sequence[str], file: Path, progress: Progress = lambda done, total: None) -> Calibration:
        """The calibration in a file, or measured on ordinary prompts and kept there.

        Args:
            texts: ordinary prompts.
            file: where the calibration is, or will be.
            progress: called with the prompts done and their number.

        Raises:
            OutputError: the file holds a calibration of another model, other settings or other prompts.
        """
        if file.exists():
            return Calibration.load(file, self._identity_with(texts))
        return self.measure_calibration(texts, file, progress)

    def measure_calibration(
        self, texts: Sequence[str], file: Path, progress: Progress = lambda done, total: None
    ) -> Calibration:
        """Calibrate on ordinary prompts and keep it in a file, in the place of any other."""
        calibration = calibrate(self.scorer, texts, progress)
        calibration.save(file, self._identity_with(texts))
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
        return ResultsHeader(self.model_digest, self.predictor.sizes, threshold, dataclasses.asdict(self.settings))


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


def _digest_of_files(source: ModelSource) -> str:
    files = [path for path in files_to_export(source.folder)[0] if path.parts[0] in _RELEVANT_COMPONENTS]
    return digest([source.variant or "", *(path.as_posix() + file_hash(source.folder / path) for path in files)])
