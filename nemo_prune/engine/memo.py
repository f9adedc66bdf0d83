"""What a run found out already: detected prompts and answers, in memory or in the work folder.

A run that was stopped asks the same questions again, in the same order; what is kept is answered from here.
"""

import os
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from hashlib import blake2b
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from nemo_prune.engine.scorer import ScoredPrompt
from nemo_prune.engine.similarity import MemorizationScore
from nemo_prune.engine.trials import Trial
from nemo_prune.files.work import LineLog
from nemo_prune.mask import Neuron

# Detected prompts in memory; those of SD v1-4 take a megabyte each.
_MOST_IN_MEMORY = 256
_TENSORS = ("prompt_embeds", "noise_differences", "extremes")


@dataclass(frozen=True)
class Detected:
    """A prompt whose seeds were compared (Alg. 1).

    Attributes:
        scored: its seeds with nothing suppressed.
        kept_seeds: positions of those that agree with another one; without any it is not memorized.
        sample_passes: latents that went through the U-Net for it.
        seconds: its share of the wall time.
    """

    scored: ScoredPrompt
    kept_seeds: tuple[int, ...]
    sample_passes: int
    seconds: float


class Memo:
    """What is known of a corpus: nothing is kept beyond the process here.

    Args:
        folder: where memorized prompts are kept as they were detected; None keeps them in memory alone.
        answers: where answers are kept; None keeps none.
    """

    def __init__(self, folder: Path | None = None, answers: LineLog | None = None) -> None:
        self._folder, self._log = folder, answers
        self._detected: OrderedDict[str, Detected] = OrderedDict()
        self._answers: dict[str, float] = {}
        for batch in answers or ():
            self._answers.update(batch)
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)

    def keep(self, detected: Detected) -> None:
        """Keep a memorized prompt."""
        prompt = detected.scored.prompt
        self._put(prompt, detected)
        file = self._file(prompt)
        if file is not None and not file.exists():
            _save(file, detected)

    def recall(self, prompt: str, latents: torch.Tensor) -> Detected | None:
        """A prompt as it was detected; None where it is not kept.

        Args:
            prompt: its text.
            latents: the initial latents that it was detected on, which all prompts share.
        """
        if prompt in self._detected:
            self._detected.move_to_end(prompt)
            return self._detected[prompt]
        file = self._file(prompt)
        if file is None or not file.exists():
            return None
        detected = _load(file, prompt, latents)
        if detected is None:
            file.unlink()
            return None
        self._put(prompt, detected)
        return detected

    def known(self, asked: Sequence[tuple[ScoredPrompt, Trial]]) -> list[float | None]:
        """The answers that are known; those that must be given at once are known all or not at all."""
        if not self._answers:
            return [None] * len(asked)
        return [self._answers.get(_key(scored, trial)) for scored, trial in asked]

    def learn(self, asked: Sequence[tuple[ScoredPrompt, Trial]], answers: Sequence[float]) -> None:
        """Keep answers; they survive a kill of the process when this returns."""
        if self._log is not None and asked:
            batch = {_key(scored, trial): answer for (scored, trial), answer in zip(asked, answers, strict=True)}
            self._log.append(batch, synced=False)

    def _put(self, prompt: str, detected: Detected) -> None:
        self._detected[prompt] = detected
        if self._folder is not None and len(self._detected) > _MOST_IN_MEMORY:
            self._detected.popitem(last=False)

    def _file(self, prompt: str) -> Path | None:
        return self._folder / f"{_digest(prompt)}.safetensors" if self._folder is not None else None


def _key(scored: ScoredPrompt, trial: Trial) -> str:
    """A name for a question: prompt, seed, set, threshold, and whether all seeds are asked."""
    at_once = "*" if trial.at_once else ""
    return f"{_digest(scored.prompt)} {trial.seed}{at_once} {_number_of_set(trial.neurons):x} {trial.threshold!r}"


@lru_cache(maxsize=64)
def _number_of_set(neurons: frozenset[Neuron]) -> int:
    return sum(map(_number, neurons)) % 2**64


@cache
def _number(neuron: Neuron) -> int:
    return int.from_bytes(blake2b(f"{neuron.layer} {neuron.index}".encode(), digest_size=8).digest())


@cache
def _digest(prompt: str) -> str:
    return blake2b(prompt.encode(), digest_size=8).hexdigest()


def _save(file: Path, detected: Detected) -> None:
    scored = detected.scored
    tensors = {name: getattr(scored, name).contiguous() for name in _TENSORS} | {"pairs": scored.memorization.pairs}
    tensors["kept_seeds"] = torch.tensor(detected.kept_seeds)
    partial = file.with_suffix(".partial")
    save_file(tensors, partial, metadata={"sample_passes": str(detected.sample_passes)})
    os.replace(partial, file)


def _load(file: Path, prompt: str, latents: torch.Tensor) -> Detected | None:
    """What :func:`_save` wrote; None where the file is damaged, as a machine that lost its power leaves one."""
    try:
        with safe_open(file, framework="pt") as stored:
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
            passes = int((stored.metadata() or {})["sample_passes"])
        pairs, kept = tensors.pop("pairs"), tuple(tensors.pop("kept_seeds").tolist())
        scored = ScoredPrompt(prompt=prompt, latents=latents, memorization=MemorizationScore(pairs), **tensors)
    except (SafetensorError, OSError, KeyError, TypeError, ValueError):
        return None
    return replace(Detected(scored, kept, 0, 0.0), sample_passes=passes)
