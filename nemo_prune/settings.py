"""The numbers of the method, in one place; the command line takes its defaults from here."""

import inspect
import re
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from math import isfinite
from pathlib import Path

from nemo_prune.errors import SettingsError
from nemo_prune.files.layout import ReleaseLayout
from nemo_prune.files.licence_ids import LICENCE_IDS, OTHER, known_licence

MIN_CALIBRATION_PROMPTS = 50
MERGES = ("union", "minimal", "thinned")
ABLATIONS = ("zero", "mean", "compensated")
SEARCHES = ("greedy", "gradient", "learned")
PROJECTIONS = ("value", "key", "both")
DATA_RANGES = ("joint", "one")
DTYPES = ("auto", "float32", "float16", "bfloat16")


@dataclass(frozen=True)
class LocalizationSettings:
    """The values of the paper's four algorithms (arXiv 2406.02366, Sec. 3 and App. A).

    Attributes:
        num_samples: number of initial latents S that a prompt is scored on.
        seed: seed of the CPU generator that draws the initial latents.
        num_inference_steps: DDIM steps of the schedule that the timestep is taken from.
        timestep_index: position in that schedule, 0 being the noisiest. The paper predicts at the
            first timestep; the released code returns in the second turn of its loop, so at 1.
        theta: first cut on |z| of the activations (Alg. 3).
        theta_step: how much the cut falls per turn, while k grows by one.
        theta_min: the last cut that is tried; a prompt that needs a lower one is unresolved.
        threshold: tau, the similarity above which a prompt counts as memorized. (default: measured on ordinary prompts,
            mean plus one standard deviation)
        threshold_num_std: standard deviations above the mean in that calibration.
        ssim_betas: exponents of the multi-scale SSIM, one per scale.
        data_range: what the multi-scale SSIM takes for the range of the data: ``joint``: anew at every scale, over all
            seeds of a prompt that are compared, as the released code lets torchmetrics do; ``one``: 1.
        projections: projections to search: ``value`` (the paper's), ``key`` or ``both``. Key rows cost more elsewhere,
            because the softmax couples them (App. C.8).
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
    data_range: str = "joint"
    projections: str = "value"
    layers_backwards: bool = True

    def __post_init__(self) -> None:
        require(self.projections in PROJECTIONS, "projections", self.projections, " or ".join(PROJECTIONS))
        require(self.data_range in DATA_RANGES, "data_range", self.data_range, " or ".join(DATA_RANGES))
        require(self.num_samples >= 2, "num_samples", self.num_samples, "at least 2 (pairs)")
        require(self.num_inference_steps >= 1, "num_inference_steps", self.num_inference_steps, "at least 1")
        in_schedule = 0 <= self.timestep_index < self.num_inference_steps
        require(in_schedule, "timestep_index", self.timestep_index, "below num_inference_steps")
        require(self.theta_step > 0, "theta_step", self.theta_step, "above 0")
        require(self.theta >= self.theta_min > 0, "theta_min", self.theta_min, "above 0, up to theta")
        in_range = self.threshold is None or 0 < self.threshold < 1
        require(in_range, "threshold", self.threshold, "between 0 and 1 (it is a similarity)")

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
        seed: seed of the first image's latents; the others follow. The released code uses 2.
        score_seed: seed of fresh latents for the memorization score, different from those of detection.
        images_per_prompt: images drawn for a prompt.
        max_prompts: memorized prompts that images are drawn for, the first of the corpus.
        ordinary_images: ordinary prompts that images are drawn for.
        cost_prompts: ordinary prompts that the change of the noise prediction is measured on.
        num_inference_steps: DDIM steps per image.
        guidance_scale: classifier-free guidance of the images that are compared; detection uses none. (default: what
            suits the model: 7, the demo 3)
        replication_cut: similarity (the lower of SSIM at equal contrast and correlation, at 64 pixels) from which an
            image counts as a copy.
        evidence_budget: passes for the evidence beyond these images: utility beside its baselines, and attacks; 0
            gathers none.
    """

    seed: int = 2
    score_seed: int = 1001
    images_per_prompt: int = 2
    max_prompts: int = 32
    ordinary_images: int = 4
    cost_prompts: int = 16
    num_inference_steps: int = 25
    guidance_scale: float | None = None
    replication_cut: float = 0.5
    evidence_budget: int = 1300

    def fitted_to(self, guidance_scale: float) -> "VerificationSettings":
        """The same settings, with the model's own guidance if none is given."""
        return self if self.guidance_scale is not None else replace(self, guidance_scale=guidance_scale)


@dataclass(frozen=True)
class ModelOptions:
    """How a model is computed.

    Attributes:
        device: torch device; ``auto`` takes a GPU if there is one.
        dtype: precision of the weights in memory; ``auto``: float16 on an NVIDIA GPU, else float32. Below float32,
            float32 decides close calls. What is written keeps the precision of the files.
        batch_size: latents that go through the U-Net at once. (default: those of two prompts, on a GPU of four)
        margin: below float32: within this distance of the threshold, float32 decides again. (default: float16 0.002,
            bfloat16 0.01)
    """

    device: str = "auto"
    dtype: str = "auto"
    batch_size: int | None = None
    margin: float | None = None

    def __post_init__(self) -> None:
        require(self.dtype in DTYPES, "dtype", self.dtype, " or ".join(DTYPES))
        in_range = self.batch_size is None or self.batch_size >= 1
        require(in_range, "batch_size", self.batch_size, "at least 1")
        in_range = self.margin is None or 0 <= self.margin < 1
        require(in_range, "margin", self.margin, "at least 0 and below 1")

    def on(self, device: str) -> "ModelOptions":
        """The same options on a device that was found: nothing is left open.

        Args:
            device: torch device.
        """
        suits = "float16" if device.split(":")[0] == "cuda" else "float32"
        return replace(self, device=device, dtype=suits if self.dtype == "auto" else self.dtype)

    @property
    def margin_of_dtype(self) -> float:
        """The margin that is given, or the one that suits the precision."""
        return _MARGINS[self.dtype] if self.margin is None else self.margin


# Several times what similarities above .2 were seen to move, see benchmarks/RESULTS.md.
_MARGINS = {"float32": 0.0, "float16": 2e-3, "bfloat16": 1e-2}


@dataclass(frozen=True)
class Statement:
    """What a publisher states in the card because the files of the base do not say it.

    Attributes:
        base_model: Hub id of a base that is given as a local folder.
        license: identifier as the Hub lists them, in any case; ``other`` for one that it does not list.
        license_name: its name, where it is ``other``.
        license_link: an address where its text stands.
    """

    base_model: str | None = None
    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None

    def __post_init__(self) -> None:
        if self.license is not None:
            object.__setattr__(self, "license", _stated_licence(self.license))
        stated = {name: value for name, value in vars(self).items() if value is not None}
        for name, value in stated.items():
            if name in _STATED:
                pattern, expected = _STATED[name]
                require(re.fullmatch(pattern, value, re.ASCII) is not None, name, repr(value), expected)
        for name in ("license_name", "license_link"):
            require(name not in stated or "license" in stated, name, stated.get(name), "none without --license")
        named = self.license != OTHER or self.license_name is not None
        require(named, "license_name", None, "the licence's name, because --license is `other`")


def _stated_licence(stated: str) -> str:
    """The Hub's identifier of a licence that a publisher states.

    Raises:
        SettingsError: it has none.
    """
    known = known_licence(stated)
    if known is None:
        alike = get_close_matches(stated.lower(), LICENCE_IDS, n=3)
        meant = f" Is it {' or '.join(alike)}?" if alike else ""
        raise SettingsError(
            f"--license {stated!r} is not a licence that the Hub knows.{meant} Expected is an identifier from "
            f"https://huggingface.co/docs/hub/repositories-licenses; for any other licence give --license {OTHER} "
            "--license-name NAME."
        )
    return known


_STATED = {
    "base_model": (r"\w[\w.-]*(/\w[\w.-]*)?", "a Hub id such as CompVis/stable-diffusion-v1-4"),
    "license_name": (r"[\w][\w .+()-]{0,99}", "a name of letters, digits and -_.+()"),
    "license_link": (r"https?://[!-~]{1,500}", "an address that begins with https://"),
}


@dataclass(frozen=True)
class Plan:
    """What a run is to do.

    Attributes:
        out: the pruned model, for publication: a folder, or a single file whose name ends in .safetensors.
        work: folder of all that the run finds out, not for publication. (default: OUT.work)
        settings: the numbers of the method.
        verification: what is measured on images.
        model: how the model is computed.
        merge: ``union`` of all prompts' neurons, as in the paper; ``thinned``: the union without the most costly ones
            for ordinary captions, as few as keep their change within --max-utility-loss, or .15; or ``minimal``:
            without all that no prompt needs to be silent. (default: thinned; with --include-unresolved union)
        search: ``greedy``: the paper's, prompt by prompt until it is silent; ``gradient``: from everything suppressed
            on, open what ordinary captions miss most, as long as all prompts stay gone; ``learned``: gates on all
            neurons, learned for all prompts at once. Then images are drawn, and what copies is searched again until
            nothing does: after ``greedy`` neurons are added, and if that is not enough gates learned. The union, which
            is the paper's, is left as it is.
        ablation: what a pruned neuron still gives: ``zero``: nothing, as in the paper; ``mean``: its mean on ordinary
            captions: its row is zeroed, and the bias behind the attention is shifted; ``compensated``: also what the
            kept neurons of its layer tell of it on ordinary captions; on memorized ones all neurons are held near
            their means: the weights behind the attention change, too. (default: compensated; zero with the union, with
            key rows and with --scale)
        max_utility_loss: largest change of the noise prediction on ordinary captions, as a share of what everything
            suppressed changes: the most costly neurons are spared until it is kept, or memorized captions are held
            less, and the record says what that gives up. (default: no limit)
        preserve: 0 (the paper's search) to 1: also search a set that costs ordinary captions less, among more
            candidates; the cheaper of the two is taken.
        calibration: a finished calibration, a file of `nemo-prune calibrate`. (default: calibrate on ordinary captions)
        scale: number that the masked rows are multiplied by; 0 zeroes them, the paper also tries -1 to 0.75. The search
            suppresses in any case; everything measured afterwards is measured with the scaled rows.
        include_unresolved: also prune the sets of unresolved prompts.
        publish_examples: put captions and a before/after grid into the published card.
        statement: what the publisher states about base and licence.
        overwrite: replace OUT, and discard a work folder of other settings.
    """

    out: Path
    work: Path | None = None
    settings: LocalizationSettings = field(default_factory=LocalizationSettings)
    verification: VerificationSettings = field(default_factory=VerificationSettings)
    model: ModelOptions = field(default_factory=ModelOptions)
    merge: str | None = None
    search: str = "greedy"
    ablation: str | None = None
    max_utility_loss: float | None = None
    preserve: float = 0.0
    calibration: Path | None = None
    scale: float = 0.0
    include_unresolved: bool = False
    publish_examples: bool = False
    statement: Statement = field(default_factory=Statement)
    overwrite: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "out", Path(self.out).absolute())
        object.__setattr__(self, "work", Path(self.work or ReleaseLayout.of(self.out).work).absolute())
        if self.merge is None:
            object.__setattr__(self, "merge", "union" if self.include_unresolved else "thinned")
        require(self.merge in MERGES, "merge", self.merge, " or ".join(MERGES))
        require(self.search in SEARCHES, "search", self.search, " or ".join(SEARCHES))
        holds = self.settings.projections == "value" and not self.scale
        if self.ablation is None:
            object.__setattr__(self, "ablation", "compensated" if holds and self.merge != "union" else "zero")
        require(self.ablation in ABLATIONS, "ablation", self.ablation, " or ".join(ABLATIONS))
        require(holds or self.ablation == "zero", "ablation", self.ablation, "zero with key rows or --scale")
        limit = self.max_utility_loss
        require(limit is None or 0 <= limit <= 1, "max_utility_loss", limit, "between 0 and 1")
        changes = isfinite(self.scale) and self.scale != 1
        require(changes, "scale", self.scale, "a number other than 1, such as 0 or -0.25")
        require(0 <= self.preserve <= 1, "preserve", self.preserve, "between 0 and 1")
        contradict = self.merge != "union" and self.include_unresolved
        require(not contradict, "include_unresolved", True, f"False with the {self.merge} merge, which leaves them out")

    def fitted_to(self, guidance_scale: float) -> "Plan":
        """The same plan, with the model's own guidance if none is given."""
        return replace(self, verification=self.verification.fitted_to(guidance_scale))


@dataclass(frozen=True)
class LocalizationPlan:
    """What a localization alone is to do.

    Attributes:
        work: folder of the results, not for publication.
        settings: the numbers of the method.
        model: how the model is computed.
        calibration: a finished calibration. (default: calibrate on ordinary captions)
        overwrite: discard a work folder of other settings.
        include_unresolved: also refine the sets of unresolved prompts, for a merge that includes them; it takes many
            times as long.
    """

    work: Path
    settings: LocalizationSettings = field(default_factory=LocalizationSettings)
    model: ModelOptions = field(default_factory=ModelOptions)
    calibration: Path | None = None
    overwrite: bool = False
    include_unresolved: bool = False


def description(owner: type, name: str) -> str:
    """What an attribute's docstring says, as a sentence: the help of the option that sets it."""
    section = inspect.getdoc(owner).split("Attributes:\n")[1]
    (text,) = re.findall(rf"^    {name}: (.*?)(?=^    \w+: |\Z)", section, re.MULTILINE | re.DOTALL)
    text = " ".join(text.replace("``", "`").split())
    return text[0].upper() + text[1:]


# What only the library can set; all else has an option of its name.
_WITHOUT_OPTION = ("num_inference_steps", "timestep_index", "theta_step", "theta_min", "cosine_step")


def require(holds: bool, name: str, value: object, expected: str) -> None:
    """Refuse a value that makes no sense.

    Args:
        holds: whether it makes sense.
        name: of the setting.
        value: that is given.
        expected: what would make sense.

    Raises:
        SettingsError: it does not hold.
    """
    if not holds:
        called = f"`{name}`" if name in _WITHOUT_OPTION else f"--{name.replace('_', '-')}"
        raise SettingsError(f"{called} is {'not given' if value is None else value}, expected: {expected}.")


PRESETS = {
    "released-code": LocalizationSettings(),
    "paper": LocalizationSettings(timestep_index=0, layers_backwards=False, data_range="one"),
}
