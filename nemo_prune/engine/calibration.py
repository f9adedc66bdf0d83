"""What is usual for prompts that are not memorized: the threshold and the activation statistics."""

import json
from base64 import b64decode, b64encode
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from nemo_prune.engine.activations import ActivationStatistics, ActivationStatisticsFitter, neuron_activations
from nemo_prune.engine.scorer import Scorer
from nemo_prune.errors import OutputError, PromptError
from nemo_prune.files.staging import staged_file
from nemo_prune.progress import Advance, ignored
from nemo_prune.settings import MIN_CALIBRATION_PROMPTS


@dataclass(frozen=True)
class Calibration:
    """What ordinary prompts look like to a model.

    Attributes:
        similarity_mean: mean pairwise similarity of the seeds over ordinary prompts (all pairs).
        similarity_std: its standard deviation.
        num_std: number of standard deviations from the mean up to the threshold.
        statistics: usual activation of every neuron.
        origin: where the values come from, for the record.
    """

    similarity_mean: float
    similarity_std: float
    num_std: float
    statistics: ActivationStatistics
    origin: str = "measured"

    @property
    def threshold(self) -> float:
        """Tau: seeds that are more similar than this agree more than those of ordinary prompts (Sec. 3.1)."""
        return self.similarity_mean + self.num_std * self.similarity_std

    def save(self, path: Path, identity: dict) -> None:
        """Write a safetensors file in one step: at any time the old file or the whole new one is there.

        Args:
            path: the file.
            identity: what the calibration depends on, as JSON values.
        """
        tensors = {f"mean.{name}": mean for name, mean in self.statistics.mean.items()}
        tensors |= {f"std.{name}": std for name, std in self.statistics.std.items()}
        facts = {
            "similarity_mean": self.similarity_mean,
            "similarity_std": self.similarity_std,
            "num_std": self.num_std,
            "num_prompts": self.statistics.num_prompts,
            "origin": self.origin,
            "layers": list(self.statistics.mean),
        }
        described = json.dumps({"identity": identity, **facts}, sort_keys=True)
        with staged_file(path) as partial:
            save_file(tensors, partial, metadata={"calibration": described})

    @classmethod
    def load(cls, path: Path, identity: dict) -> "Calibration":
        """Read what :meth:`save` wrote.

        Args:
            path: the file.
            identity: what it must have been made with; keys that are not given are not checked.

        Raises:
            OutputError: the file is missing, damaged, or was made with something else.
        """
        try:
            with safe_open(path, framework="pt") as file:
                facts = json.loads((file.metadata() or {})["calibration"])
                mean = {name: file.get_tensor(f"mean.{name}") for name in facts["layers"]}
                std = {name: file.get_tensor(f"std.{name}") for name in facts["layers"]}
        except (SafetensorError, OSError, KeyError, json.JSONDecodeError) as error:
            raise OutputError(
                f"{path} is not a valid calibration: {error}. Make one with `nemo-prune calibrate`."
            ) from error
        expected = json.loads(json.dumps(identity))
        if changed := [key for key in expected if facts["identity"].get(key) != expected[key]]:
            raise OutputError(
                f"The calibration {path} was made with another {' and other '.join(changed)}. Make one for this with "
                "`nemo-prune calibrate`, or delete it."
            )
        return cls(
            facts["similarity_mean"],
            facts["similarity_std"],
            facts["num_std"],
            ActivationStatistics(mean, std, facts["num_prompts"]),
            facts["origin"],
        )


@dataclass(frozen=True)
class MeasuredPrompt:
    """What one ordinary prompt adds to a calibration.

    Attributes:
        prompt: its text.
        activations: dotted module name -> [1, out_features].
        similarities: of every pair of seeds once, [S (S - 1) / 2].
    """

    prompt: str
    activations: Mapping[str, Tensor]
    similarities: Tensor

    def as_record(self) -> dict:
        """As JSON values, exact to the last bit."""
        activations = {name: b64encode(values.numpy().tobytes()).decode() for name, values in self.activations.items()}
        return {"prompt": self.prompt, "activations": activations, "similarities": self.similarities.tolist()}

    @classmethod
    def from_record(cls, record: dict) -> "MeasuredPrompt":
        """The inverse of :meth:`as_record`."""
        activations = {
            name: torch.frombuffer(bytearray(b64decode(values)), dtype=torch.float32)[None]
            for name, values in record["activations"].items()
        }
        return cls(record["prompt"], activations, torch.tensor(record["similarities"]))


def calibrate(scorer: Scorer, texts: Sequence[str], advance: Advance = ignored) -> Calibration:
    """Measure threshold and activation statistics on prompts that are not memorized (Sec. 3.1, 3.2).

    Args:
        scorer: the model.
        texts: at least 50 different ordinary prompts.
        advance: called with the prompts done and their number.

    Raises:
        PromptError: there are too few prompts.
    """
    texts = enough_prompts(texts)
    measured = []
    for each in measure_prompts(scorer, texts):
        measured.append(each)
        advance(len(measured), len(texts))
    return fit_calibration(measured, scorer.predictor.settings.threshold_num_std)


def enough_prompts(texts: Sequence[str]) -> list[str]:
    """Ordinary prompts without duplicates.

    Raises:
        PromptError: there are too few.
    """
    texts = list(dict.fromkeys(texts))
    if len(texts) < MIN_CALIBRATION_PROMPTS:
        raise PromptError(
            f"Calibration needs at least {MIN_CALIBRATION_PROMPTS} different ordinary prompts, got "
            f"{len(texts)}. Give more with --calibration-prompts; hundreds are better."
        )
    return texts


def measure_prompts(scorer: Scorer, texts: Sequence[str]) -> Iterator[MeasuredPrompt]:
    """Measure prompts for a calibration, S sample passes per prompt.

    The noise is predicted exactly as the detection does: same latents, timestep and no guidance.
    """
    layers, at_once = scorer.predictor.layers, scorer.prompts_at_once
    for done in range(0, len(texts), at_once):
        for scored in scorer.score_prompts(texts[done : done + at_once]):
            activations = neuron_activations(layers, scored.prompt_embeds[None])
            yield MeasuredPrompt(scored.prompt, activations, scored.memorization.values)


def fit_calibration(measured: Iterable[MeasuredPrompt], num_std: float) -> Calibration:
    """The calibration of measured prompts; its last digits depend on their order.

    Args:
        measured: the prompts.
        num_std: number of standard deviations from the mean up to the threshold.
    """
    fitter = ActivationStatisticsFitter()
    pairs = []
    for each in measured:
        fitter.update(each.activations)
        pairs.append(each.similarities)
    similarities = torch.cat(pairs).double()
    return Calibration(
        similarity_mean=float(similarities.mean()),
        similarity_std=float(similarities.std()),
        num_std=num_std,
        statistics=fitter.statistics,
    )
