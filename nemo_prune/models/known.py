"""Models of which more is known than their weights: captions, statistics and settings that suit them."""

import os
import pickle
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import torch
from huggingface_hub.constants import is_offline_mode

from nemo_prune.corpus.prompts import read_prompts
from nemo_prune.engine.activations import ActivationStatistics
from nemo_prune.engine.calibration import Calibration
from nemo_prune.engine.released_code import SD_V1_LAYERS
from nemo_prune.errors import DownloadError, OutputError, PromptError
from nemo_prune.files.cache import cache_folder
from nemo_prune.files.staging import staged_file
from nemo_prune.models.demo import CALIBRATION_FILE, DEMO_MODEL, PROMPTS_FILE, TEST_FILE, PackagedFile
from nemo_prune.settings import MIN_CALIBRATION_PROMPTS, LocalizationSettings

# The repository of the paper's authors (MIT licence), at one commit.
REFERENCE_URL = (
    "https://raw.githubusercontent.com/ml-research/localizing_memorization_in_diffusion_models/"
    "f952eded64fca0bcf42e0bb3be9a01d64653cfdb/"
)
URL_VARIABLE = "NEMO_PRUNE_REFERENCE_URL"
_TIMEOUT_S = 30
_MOST_HELD_OUT = 32
_OWN_FILES = "captions to examine with --prompts and ordinary ones with --calibration-prompts"


@dataclass(frozen=True)
class ReferenceFile:
    """A published file.

    Attributes:
        path: where it is below the reference address.
        sha256: what it must be, wherever it is fetched from.
        address: where it is, if not among the files of the paper's authors.
    """

    path: str
    sha256: str
    address: str | None = None

    def locate(self) -> Path:
        """The file on this machine, downloaded unless it is there already.

        It is kept in ``nemo_prune`` under the user's cache folder (``XDG_CACHE_HOME``, else ``~/.cache``).
        The environment variable ``NEMO_PRUNE_REFERENCE_URL`` names another address that has the same files.

        Raises:
            DownloadError: it can't be downloaded, or is not what was published.
        """
        kept = cache_folder() / self.sha256[:16] / Path(self.path).name
        if kept.is_file() and sha256(kept.read_bytes()).hexdigest() == self.sha256:
            return kept
        url = (os.environ.get(URL_VARIABLE) or self.address or REFERENCE_URL).rstrip("/") + "/" + self.path
        content = _download(url)
        if sha256(content).hexdigest() != self.sha256:
            raise DownloadError(
                f"{url} is not the published file: its sha256 is {sha256(content).hexdigest()}, expected "
                f"{self.sha256}. Correct {URL_VARIABLE} if it is set, or give files of your own: {_OWN_FILES}."
            )
        try:
            kept.parent.mkdir(parents=True, exist_ok=True)
            with staged_file(kept) as partial:
                partial.write_bytes(content)
        except (OSError, OutputError) as error:
            raise DownloadError(f"The cache {kept.parent} can't be written: {error}. Set XDG_CACHE_HOME.") from error
        return kept


@dataclass(frozen=True)
class PublishedCalibration:
    """Threshold and activation statistics that were published for a model (Sec. 3.1 and 4).

    Attributes:
        model: how to call the model.
        statistics: mean and deviation of its neurons' activations on ordinary captions.
        num_prompts: how many captions these were measured on.
        similarity_mean: mean pairwise similarity of the seeds on them.
        similarity_std: its standard deviation; the threshold is one of them above the mean.
        sizes: dotted module name -> number of neurons, in the order of the statistics.
        timestep: of the model's training, at which the similarities were taken.
        settings: the other numbers that they were taken with.
        how: how they were measured, for the record.
    """

    model: str
    statistics: ReferenceFile
    num_prompts: int
    similarity_mean: float
    similarity_std: float
    sizes: Mapping[str, int]
    timestep: int
    settings: LocalizationSettings
    how: str

    def load(self) -> Calibration:
        """The calibration, fetched if it is not there yet.

        Raises:
            DownloadError: it can't be downloaded, or is damaged.
        """
        path = self.statistics.locate()
        try:
            mean, std = torch.load(path, weights_only=True)
            statistics = ActivationStatistics(
                dict(zip(self.sizes, mean, strict=True)), dict(zip(self.sizes, std, strict=True)), self.num_prompts
            )
        except (pickle.UnpicklingError, RuntimeError, ValueError, TypeError) as error:
            raise DownloadError(f"{path} holds no activation statistics: {error}") from error
        return Calibration(
            self.similarity_mean,
            self.similarity_std,
            1.0,
            statistics,
            origin=f"as published for {self.model} ({self.how})",
        )


@dataclass(frozen=True)
class OrdinaryCaptions:
    """Captions that a model does not memorize.

    Attributes:
        texts: the captions to calibrate on.
        published: what was published for the model on such captions; it replaces a calibration on ``texts``
            if it fits. None for captions that the user gave.
        held_out: further ones, which no calibration sees, for the evidence.
    """

    texts: tuple[str, ...]
    published: PublishedCalibration | None = None
    held_out: tuple[str, ...] = ()

    @classmethod
    def divided(cls, texts: Sequence[str], published: PublishedCalibration | None = None) -> "OrdinaryCaptions":
        """Captions of which the last ones are held out, as long as enough are left to calibrate on."""
        number = max(0, min(_MOST_HELD_OUT, len(texts) - MIN_CALIBRATION_PROMPTS))
        kept = len(texts) - number
        return cls(tuple(texts[:kept]), published, tuple(texts[kept:]))


@dataclass(frozen=True)
class KnownModel:
    """What is known about a model.

    Attributes:
        memorized: captions that it memorizes.
        ordinary: captions that it does not memorize.
        test: further ordinary captions, to judge a screening by; None if there are none.
        published: what was published of its calibration; None where nothing was.
        guidance_scale: guidance that its images are drawn with.
        norm_step: the step, of 50, at which a sieve takes the norm.
    """

    memorized: ReferenceFile | PackagedFile
    ordinary: ReferenceFile | PackagedFile
    test: PackagedFile | None = None
    published: PublishedCalibration | None = None
    guidance_scale: float = 7.0
    norm_step: int = 0


DEMO = KnownModel(
    memorized=PackagedFile(PROMPTS_FILE),
    ordinary=PackagedFile(CALIBRATION_FILE),
    test=PackagedFile(TEST_FILE),
    guidance_scale=3.0,
    # At the first step its ordinary captions move the prediction as much as memorized ones do: they name its colours.
    norm_step=25,
)

SD_V1_4 = KnownModel(
    memorized=ReferenceFile(
        "prompts/memorized_laion_prompts.csv", "0b527a5965dc463e7a3e0d234ff7fd5489b1a76869c456dbb209dc753cb4af25"
    ),
    ordinary=ReferenceFile(
        "prompts/unmemorized_laion_prompts.csv", "f453b418cc157864baacbf68d97447273feac41e8066b2ead6b307bf795988e1"
    ),
    published=PublishedCalibration(
        model="Stable Diffusion v1-4",
        statistics=ReferenceFile(
            "statistics/statistics_additional_laion_prompts_v1_4.pt",
            "42072d31334d50ce0d981f58865ab2ab378303c51e779c39f8505b681b0d1d9b",
        ),
        num_prompts=50_000,
        similarity_mean=0.358,
        similarity_std=0.07,
        sizes=SD_V1_LAYERS,
        # DDIM with 50 steps on the model's own schedule, the second of them.
        timestep=961,
        settings=LocalizationSettings(),
        how="measured at guidance 7, which acts as -6 there, because the released code swaps the two halves; the "
        "detection uses no guidance",
    ),
)

# By what `--model` takes: the demo, the repo of SD v1-4's authors and a copy of it.
KNOWN_MODELS = {DEMO_MODEL: DEMO, "CompVis/stable-diffusion-v1-4": SD_V1_4, "Narsil/stable-diffusion-v1-4": SD_V1_4}


def known_model(model: str) -> KnownModel | None:
    """What is known about a model, by what `--model` says; None where nothing is."""
    return KNOWN_MODELS.get(model)


def memorized_captions(model: str) -> Path:
    """The file of the captions that a known model memorizes.

    Raises:
        PromptError: none are known for the model.
        DownloadError: they can't be fetched.
    """
    return _required(model, "memorized").memorized.locate()


def ordinary_captions(model: str) -> OrdinaryCaptions:
    """A known model's own ordinary captions, with what was published of its calibration.

    Raises:
        PromptError: none are known for the model.
        DownloadError: they can't be fetched.
    """
    known = _required(model, "ordinary")
    texts = [prompt.text for prompt in read_prompts(known.ordinary.locate())]
    if known.test is None:
        return OrdinaryCaptions.divided(texts, known.published)
    held_out = (prompt.text for prompt in read_prompts(known.test.locate()))
    return OrdinaryCaptions(tuple(texts), known.published, tuple(held_out))


def _required(model: str, kind: str) -> KnownModel:
    known = known_model(model)
    if known is None:
        raise PromptError(
            f"No {kind} prompts are known for this model. Give the captions to examine with --prompts, and ordinary "
            "ones that it does not memorize, hundreds at best, with --calibration-prompts. Known are "
            f"{', '.join(KNOWN_MODELS)}."
        )
    return known


def _download(url: str) -> bytes:
    try:
        if is_offline_mode():
            raise OSError("HF_HUB_OFFLINE is set")
        with urllib.request.urlopen(url, timeout=_TIMEOUT_S) as answer:
            return answer.read()
    except (OSError, ValueError) as error:
        raise DownloadError(
            f"{url} is not in the cache and can't be downloaded: {error}. Connect, set {URL_VARIABLE} to an address "
            f"that has the same files, or give files of your own: {_OWN_FILES}."
        ) from error
