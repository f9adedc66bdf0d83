"""The numbers of the method, in one place; the command line takes its defaults from here."""

import re
from dataclasses import dataclass, field, replace
from math import isfinite
from pathlib import Path

from nemo_prune.errors import SettingsError

MIN_CALIBRATION_PROMPTS = 50
MERGES = ("union", "incremental")
PROJECTIONS = ("value", "key", "both")
SIEVES = ("norm", "anisotropy")
SCREENED_SUFFIXES = (".parquet", ".jsonl")


@dataclass(frozen=True)
class LocalizationSettings:
    """The values of the paper's four algorithms (arXiv 2406.02366, Sec. 3 and App. A).

    Attributes:
        num_samples: initial latents S that a prompt is scored on.
        seed: seed of the CPU generator that draws them.
        num_inference_steps: DDIM steps of the schedule that the timestep is taken from.
        timestep_index: position in that schedule, 0 being the noisiest. The paper predicts at the
            first timestep; the released code returns in the second turn of its loop, so at 1.
        theta: first cut on |z| of the activations (Alg. 3).
        theta_step: how much the cut falls per turn, while k grows by one.
        theta_min: the last cut that is tried; a prompt that needs a lower one is unresolved.
        threshold: tau, the similarity above which a prompt counts as memorized; None calibrates
            it as mean + ``threshold_num_std`` standard deviations over ordinary prompts.
        threshold_num_std: standard deviations above the mean in that calibration.
        ssim_betas: exponents of the multi-scale SSIM, one per scale.
        projections: whose neurons are searched: ``value``, ``key`` or ``both``. The paper prunes values; keys
            damage alignment or quality, because the softmax couples them (App. C.8).
        layers_backwards: whether the refinement tests the layers from the mid block back to the
            first down block, as the released code does, or in the order of execution.
    """

    num_samples: int = 10
    seed: int = 1
    num_inference_steps: int = 50
    timestep_index: int = 1
    theta: float = 5.0
    theta_step: float = 0.25
    theta_min: float = 1.25
    threshold: float | None = None
    threshold_num_std: float = 1.0
    ssim_betas: tuple[float, ...] = (0.33, 0.33, 0.33)
    projections: str = "value"
    layers_backwards: bool = True

    def __post_init__(self) -> None:
        _require(self.projections in PROJECTIONS, "projections", self.projections, " or ".join(PROJECTIONS))
        _require(self.num_samples >= 2, "num_samples", self.num_samples, "at least 2 (pairs)")
        _require(self.num_inference_steps >= 1, "num_inference_steps", self.num_inference_steps, "at least 1")
        in_schedule = 0 <= self.timestep_index < self.num_inference_steps
        _require(in_schedule, "timestep_index", self.timestep_index, "below num_inference_steps")
        _require(self.theta_step > 0, "theta_step", self.theta_step, "above 0")
        _require(self.theta >= self.theta_min > 0, "theta_min", self.theta_min, "above 0, up to theta")
        in_range = self.threshold is None or 0 < self.threshold < 1
        _require(in_range, "threshold", self.threshold, "between 0 and 1 (it is a similarity)")

    @classmethod
    def preset(cls, name: str, **changes: object) -> "LocalizationSettings":
        """Settings of a preset, with some values changed.

        Args:
            name: ``released-code`` (the published numbers come from it) or ``paper`` (the text).
            changes: values to set; those that are None are left as the preset has them.

        Raises:
            SettingsError: there is no such preset, or a value makes no sense.
        """
        if name not in PRESETS:
            raise SettingsError(f"There is no preset `{name}`. Use one of: {', '.join(PRESETS)}.")
        given = {key: value for key, value in changes.items() if value is not None}
        return replace(PRESETS[name], **given)


@dataclass(frozen=True)
class VerificationSettings:
    """What is measured on images and fresh latents, before and after pruning.

    Attributes:
        seed: seed of the latents that images are drawn from; the released code uses 2.
        score_seed: seed of fresh latents for the memorization score, other than those of detection.
        images_per_prompt: images drawn for a prompt.
        max_prompts: memorized prompts that images are drawn for, the first of the corpus.
        num_inference_steps: DDIM steps per image.
        guidance_scale: classifier-free guidance of the images.
        replication_cut: similarity (the lower of SSIM and correlation at 64 pixels) from which an image
            counts as a copy.
    """

    seed: int = 2
    score_seed: int = 1001
    images_per_prompt: int = 4
    max_prompts: int = 32
    num_inference_steps: int = 25
    guidance_scale: float = 7.0
    replication_cut: float = 0.5


@dataclass(frozen=True)
class ModelOptions:
    """How a model is computed.

    Attributes:
        device: torch device, or ``auto``.
        dtype: weights' dtype: ``float32``, ``float16`` or ``bfloat16``.
        batch_size: latents that go through the U-Net at once; None: those of one prompt, on a GPU of four.
        margin: distance from tau within which float32 decides, where the dtype is a lower one.
    """

    device: str = "auto"
    dtype: str = "float32"
    batch_size: int | None = None
    margin: float = 1e-3

    def __post_init__(self) -> None:
        in_range = self.batch_size is None or self.batch_size >= 1
        _require(in_range, "batch_size", self.batch_size, "at least 1")
        _require(0 <= self.margin < 1, "margin", self.margin, "at least 0 and below 1")


@dataclass(frozen=True)
class Statement:
    """What a publisher states in a card where the files of the base do not say it.

    Attributes:
        base_model: Hub id of a base that is given as a local folder.
        license: identifier as the Hub lists them, ``other`` for one that it does not list.
        license_name: its name, where it is ``other``.
        license_link: an address where its text stands.
    """

    base_model: str | None = None
    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None

    def __post_init__(self) -> None:
        stated = {name: value for name, value in vars(self).items() if value is not None}
        for name, value in stated.items():
            pattern, expected = _STATED[name]
            _require(re.fullmatch(pattern, value, re.ASCII) is not None, name, repr(value), expected)
        for name in ("license_name", "license_link"):
            _require(name not in stated or "license" in stated, name, stated.get(name), "none without `license`")
        named = self.license != "other" or self.license_name is not None
        _require(named, "license_name", None, "the licence's name, because `license` is `other`")


_STATED = {
    "base_model": (r"\w[\w.-]*(/\w[\w.-]*)?", "a Hub id such as CompVis/stable-diffusion-v1-4"),
    "license": (
        r"[a-z0-9][a-z0-9.+-]*",
        "an identifier from https://huggingface.co/docs/hub/repositories-licenses, or `other`",
    ),
    "license_name": (r"[\w][\w .+()-]{0,99}", "a name of letters, digits and -_.+()"),
    "license_link": (r"https?://[!-~]{1,500}", "an address that begins with https://"),
}


@dataclass(frozen=True)
class RunOptions:
    """What to do, apart from the numbers of the method.

    Attributes:
        out: folder of the pruned model; it can be published.
        work: folder of what the run knows; it is not for publication.
        model: how the model is computed.
        merge: ``incremental``: each prompt's neurons on top of those before it; ``union`` of all prompts' neurons,
            the paper's; None: incremental, but a union where sets of unresolved prompts are to be in it.
        preserve: 0 to 1: how much the search departs from the paper in favour of ordinary captions.
        calibration: a finished calibration; None calibrates on ordinary prompts.
        published_calibration: whether what was published for a known model counts instead, where it fits.
        scale: what the masked rows are multiplied by; 0 prunes, the paper also tries -1 to 0.75. The search
            suppresses in any case.
        include_unresolved: whether sets of unresolved prompts enter the mask.
        publish_examples: whether captions and a before/after grid go into the card.
        statement: what the publisher states about base and licence.
        overwrite: whether ``out`` may be replaced and another run's ``work`` discarded.
    """

    out: Path
    work: Path
    model: ModelOptions = field(default_factory=ModelOptions)
    merge: str | None = None
    preserve: float = 0.0
    calibration: Path | None = None
    published_calibration: bool = False
    scale: float = 0.0
    include_unresolved: bool = False
    publish_examples: bool = False
    statement: Statement = field(default_factory=Statement)
    overwrite: bool = False

    def __post_init__(self) -> None:
        if self.merge is None:
            object.__setattr__(self, "merge", "union" if self.include_unresolved else "incremental")
        _require(self.merge in MERGES, "merge", self.merge, " or ".join(MERGES))
        changes = isfinite(self.scale) and self.scale != 1
        _require(changes, "scale", self.scale, "a number other than 1, such as 0 or -0.25")
        _require(0 <= self.preserve <= 1, "preserve", self.preserve, "between 0 and 1")
        contradict = self.merge == "incremental" and self.include_unresolved
        _require(not contradict, "include_unresolved", True, "False with the incremental merge, which leaves them out")


@dataclass(frozen=True)
class SieveSettings:
    """The values of the sieves; the defaults are those published for SD v1-4.

    Attributes:
        sieve: ``norm`` (arXiv 2407.21720) or ``anisotropy`` (arXiv 2601.20642), which computes both.
        num_samples: initial latents that a caption's value is the mean over.
        norm_step: place in the schedule, 0 being the noisiest, at which the norm is taken.
        cosine_step: place at which anisotropy's cosine is taken; the authors' third last of 50.
        cosine_weight: weight of the cosine beside the norm; published are 2 for SD v1-4 and 0.1 for SD 2.
    """

    sieve: str = "anisotropy"
    num_samples: int = 1
    norm_step: int = 0
    cosine_step: int = 47
    cosine_weight: float = 2.0

    def __post_init__(self) -> None:
        _require(self.sieve in SIEVES, "sieve", self.sieve, " or ".join(SIEVES))
        _require(self.num_samples >= 1, "num_samples", self.num_samples, "at least 1")
        for name in ("norm_step", "cosine_step"):
            _require(getattr(self, name) >= 0, name, getattr(self, name), "at least 0")


@dataclass(frozen=True)
class ScreenOptions:
    """What to do in a screening, apart from the numbers of the sieves.

    Attributes:
        out: the file that is written, .parquet or .jsonl.
        work: folder of what the screening knows; it is not for publication.
        model: how the model is computed.
        fdr: accepted share of false alarms among what passes.
        confirm: whether images are drawn for what passes.
        overwrite: whether ``out`` may be replaced and another screening's ``work`` discarded.
    """

    out: Path
    work: Path
    model: ModelOptions = field(default_factory=ModelOptions)
    fdr: float = 0.1
    confirm: bool = False
    overwrite: bool = False

    def __post_init__(self) -> None:
        _require(self.out.suffix in SCREENED_SUFFIXES, "out", self.out, f"a name in {' or '.join(SCREENED_SUFFIXES)}")
        _require(0 < self.fdr < 1, "fdr", self.fdr, "between 0 and 1")


def _require(holds: bool, name: str, value: object, expected: str) -> None:
    if not holds:
        raise SettingsError(f"`{name}` is {value}, expected: {expected}.")


PRESETS = {
    "released-code": LocalizationSettings(),
    "paper": LocalizationSettings(timestep_index=0, layers_backwards=False),
}
