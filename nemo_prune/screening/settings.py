"""The numbers of a screening; the command line takes its defaults from here."""

from dataclasses import dataclass, field, replace
from pathlib import Path

from nemo_prune.files.layout import has_ending
from nemo_prune.settings import ModelOptions, require

SIEVES = ("norm", "anisotropy")
SCREENED_SUFFIXES = (".parquet", ".jsonl")


@dataclass(frozen=True)
class SieveSettings:
    """The values of the sieves; the defaults are those published for SD v1-4.

    Attributes:
        sieve: ``anisotropy`` (arXiv 2601.20642), two passes per caption, computes ``norm`` too; ``norm`` (arXiv
            2407.21720), one pass.
        num_samples: number of initial latents whose mean is a caption's value; each costs its passes.
        norm_step: step of 50 at which the norm is taken, 0 being the noisiest. (default: what suits the model: 0, as
            published for SD v1-4; the demo 25)
        cosine_step: place at which anisotropy's cosine is taken; the authors' third last of 50.
        cosine_weight: weight of the cosine that ``anisotropy`` adds at little noise: 2 is published for SD v1-4, 0.1
            for SD 2.
    """

    sieve: str = "anisotropy"
    num_samples: int = 1
    norm_step: int | None = None
    cosine_step: int = 47
    cosine_weight: float = 2.0

    def __post_init__(self) -> None:
        require(self.sieve in SIEVES, "sieve", self.sieve, " or ".join(SIEVES))
        require(self.num_samples >= 1, "sieve_samples", self.num_samples, "at least 1")
        for name in ("norm_step", "cosine_step"):
            step = getattr(self, name)
            require(step is None or step >= 0, name, step, "at least 0")

    def fitted_to(self, norm_step: int) -> "SieveSettings":
        """The same settings, with the step that suits the model if none is given."""
        return self if self.norm_step is not None else replace(self, norm_step=norm_step)


@dataclass(frozen=True)
class ScreenOptions:
    """What to do in a screening, apart from the numbers of the sieves.

    Attributes:
        out: the file to write, .parquet or .jsonl, the likeliest captions first.
        work: folder of all that the screening finds out, not for publication. (default: OUT.work)
        model: how the model is computed.
        fdr: accepted share of false alarms among what passes.
        confirm: draw four images of what passes and measure whether they agree.
        overwrite: replace OUT, and discard a work folder of other settings.
        captions_at_once: captions per record of the log, filled up to whole batches: what a kill may lose.
    """

    out: Path
    work: Path | None = None
    model: ModelOptions = field(default_factory=ModelOptions)
    fdr: float = 0.1
    confirm: bool = False
    overwrite: bool = False
    captions_at_once: int = 80

    def __post_init__(self) -> None:
        object.__setattr__(self, "out", Path(self.out).absolute())
        object.__setattr__(self, "work", Path(self.work or self.out.with_name(f"{self.out.name}.work")).absolute())
        require(
            has_ending(self.out, *SCREENED_SUFFIXES), "out", self.out, f"a name in {' or '.join(SCREENED_SUFFIXES)}"
        )
        require(0 < self.fdr < 1, "fdr", self.fdr, "between 0 and 1")
