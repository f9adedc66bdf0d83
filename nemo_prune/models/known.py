"""Models that the NeMo authors published prompts and statistics for: fetched when needed, pinned, kept in a cache."""

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

from nemo_prune.engine.activations import ActivationStatistics, ActivationStatisticsFitter, neuron_activations
from nemo_prune.engine.calibration import Calibration
from nemo_prune.engine.diffusion import NoisePredictor
from nemo_prune.engine.results import SD_V1_LAYERS
from nemo_prune.errors import DownloadError, OutputError
from nemo_prune.files.cache import cache_folder
from nemo_prune.files.staging import staged_file

# The repository of the paper's authors (MIT licence), at one commit.
REFERENCE_URL = (
    "https://raw.githubusercontent.com/ml-research/localizing_memorization_in_diffusion_models/"
    "f952eded64fca0bcf42e0bb3be9a01d64653cfdb/"
)
URL_VARIABLE = "NEMO_PRUNE_REFERENCE_URL"
_TIMEOUT_S = 30
_TEXTS_AT_ONCE = 50

# Ordinary prompts of 500 leave a distance of 1/sqrt(500) = 0.04 by chance alone; another population of
# captions moves the means more than that, another model's weights by far more.
MOST_DISTANCE = 0.5


@dataclass(frozen=True)
class ReferenceFile:
    """A published file.

    Attributes:
        path: where it lies below the reference address.
        sha256: what it must be, wherever it is fetched from.
    """

    path: str
    sha256: str


@dataclass(frozen=True)
class KnownModel:
    """What was published for a model.

    Attributes:
        name: how to call it.
        memorized: captions that it memorizes.
        ordinary: captions that it does not memorize.
        statistics: mean and deviation of its neurons' activations on ordinary captions.
        num_prompts: how many captions these were measured on.
        similarity_mean: mean pairwise similarity of the seeds on them.
        similarity_std: its standard deviation; the threshold is one of them above the mean.
        sizes: dotted module name -> number of neurons, in the order of the statistics.
    """

    name: str
    memorized: ReferenceFile
    ordinary: ReferenceFile
    statistics: ReferenceFile
    num_prompts: int
    similarity_mean: float
    similarity_std: float
    sizes: Mapping[str, int]


SD_V1_4 = KnownModel(
    name="Stable Diffusion v1-4",
    memorized=ReferenceFile(
        "prompts/memorized_laion_prompts.csv", "0b527a5965dc463e7a3e0d234ff7fd5489b1a76869c456dbb209dc753cb4af25"
    ),
    ordinary=ReferenceFile(
        "prompts/unmemorized_laion_prompts.csv", "f453b418cc157864baacbf68d97447273feac41e8066b2ead6b307bf795988e1"
    ),
    statistics=ReferenceFile(
        "statistics/statistics_additional_laion_prompts_v1_4.pt",
        "42072d31334d50ce0d981f58865ab2ab378303c51e779c39f8505b681b0d1d9b",
    ),
    num_prompts=50_000,
    similarity_mean=0.358,
    similarity_std=0.07,
    sizes=SD_V1_LAYERS,
)

# The repo of the model's authors and a copy of it.
KNOWN_MODELS = {"CompVis/stable-diffusion-v1-4": SD_V1_4, "Narsil/stable-diffusion-v1-4": SD_V1_4}


def fetch(file: ReferenceFile) -> Path:
    """A published file on this machine, downloaded unless it is there already.

    It is kept in ``nemo_prune`` under the user's cache folder (``XDG_CACHE_HOME``, else ``~/.cache``).
    The environment variable ``NEMO_PRUNE_REFERENCE_URL`` names another address that has the same files.

    Raises:
        DownloadError: it can't be downloaded, or is not what was published.
    """
    kept = cache_folder() / file.sha256[:16] / Path(file.path).name
    if kept.is_file() and sha256(kept.read_bytes()).hexdigest() == file.sha256:
        return kept
    url = (os.environ.get(URL_VARIABLE) or REFERENCE_URL).rstrip("/") + "/" + file.path
    content = _download(url)
    if sha256(content).hexdigest() != file.sha256:
        raise DownloadError(
            f"{url} is not the published file: its sha256 is {sha256(content).hexdigest()}, expected {file.sha256}. "
            f"Mend {URL_VARIABLE} if it is set, or give files of your own: {_OWN_FILES}."
        )
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        with staged_file(kept) as partial:
            partial.write_bytes(content)
    except (OSError, OutputError) as error:
        raise DownloadError(f"The cache {kept.parent} can't be written: {error}. Set XDG_CACHE_HOME.") from error
    return kept


_OWN_FILES = "captions to examine with --prompts and ordinary ones with --calibration-prompts"


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


def published_calibration(known: KnownModel) -> Calibration:
    """The published threshold and activation statistics of a model (Sec. 3.1 and 4).

    Raises:
        DownloadError: they can't be had.
    """
    path = fetch(known.statistics)
    try:
        mean, std = torch.load(path, weights_only=True)
        statistics = ActivationStatistics(
            dict(zip(known.sizes, mean, strict=True)), dict(zip(known.sizes, std, strict=True)), known.num_prompts
        )
    except (pickle.UnpicklingError, RuntimeError, ValueError, TypeError) as error:
        raise DownloadError(f"{path} holds no activation statistics: {error}") from error
    return Calibration(
        known.similarity_mean, known.similarity_std, 1.0, statistics, origin=f"as published for {known.name}"
    )


@torch.no_grad()
def why_not(published: Calibration, predictor: NoisePredictor, texts: Sequence[str]) -> str | None:
    """Why a published calibration does not fit a model; None where it does.

    Args:
        published: the calibration.
        predictor: the model.
        texts: ordinary prompts; the mean activations on them must be near the published ones. Their
            distance is the root mean square over all neurons, in the published standard deviations.
    """
    statistics = published.statistics
    if {name: len(mean) for name, mean in statistics.mean.items()} != predictor.sizes:
        return "its layers have other sizes than the published statistics"
    fitter = ActivationStatisticsFitter()
    for start in range(0, len(texts), _TEXTS_AT_ONCE):
        embeds = predictor.encode(texts[start : start + _TEXTS_AT_ONCE])
        fitter.update(neuron_activations(predictor.layers, embeds))
    z_scores = torch.cat(list(statistics.z_scores(fitter.statistics.mean).values()))
    distance = float(z_scores.square().mean().sqrt())
    if distance <= MOST_DISTANCE:
        return None
    return (
        f"its mean activations lie {distance:.2f} standard deviations from the published ones ({MOST_DISTANCE} at most)"
    )
