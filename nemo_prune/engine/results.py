"""Result files: what was found for each prompt, a line a prompt, and for which model with which settings."""

import ast
import csv
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import get_args

from nemo_prune.engine.localize import PromptLocalization, Status
from nemo_prune.errors import OutputError, PromptError
from nemo_prune.files.untrusted import parse_json
from nemo_prune.files.work import LineLog
from nemo_prune.mask import Neuron

FORMAT_VERSION = 1
# What parsers of text that is no result file raise.
_DAMAGE = (ValueError, KeyError, TypeError, AttributeError, SyntaxError, RecursionError, MemoryError, csv.Error)
_MOST_NEURONS = 1 << 20
_NUMBER = int | float
_HEADER_TYPES = {"model": str | None, "layers": dict, "threshold": _NUMBER, "settings": dict}
_RECORD_TYPES = {
    **dict.fromkeys(("prompt", "status"), str),
    **dict.fromkeys(("kept_seeds", "candidates", "neurons"), list),
    **dict.fromkeys(("score", "sample_passes", "seconds"), _NUMBER),
    **dict.fromkeys(("candidates_score", "neurons_score", "theta", "k", "margin"), _NUMBER | None),
    **dict.fromkeys(("silenced_by_others", "fell_back"), bool),
}

# The released code's seven lists of a prompt: the value layers of SD v1-4, in the order of execution.
SD_V1_LAYERS = {
    **{
        f"down_blocks.{block}.attentions.{attention}.transformer_blocks.0.attn2.to_v": 320 * 2**block
        for block in range(3)
        for attention in range(2)
    },
    "mid_block.attentions.0.transformer_blocks.0.attn2.to_v": 1280,
}
RELEASED_CODE_THRESHOLD = 0.428


@dataclass(frozen=True)
class ResultsHeader:
    """What results depend on: the first line of their file.

    Attributes:
        model: digest of the model's files; None where it is not known.
        layers: dotted module name -> number of neurons, in the order of execution.
        threshold: tau.
        settings: the numbers of the method, as JSON values.
    """

    model: str | None
    layers: dict[str, int]
    threshold: float
    settings: dict


@dataclass(frozen=True)
class Results:
    """What a result file holds."""

    header: ResultsHeader
    localizations: tuple[PromptLocalization, ...]


class ResultsFile:
    """A result file that grows; every line that was appended survives a kill.

    Args:
        path: the file; it is begun where it is missing.
        header: what the results depend on.

    Raises:
        OutputError: the file holds results of another model, threshold or settings.
    """

    def __init__(self, path: Path, header: ResultsHeader) -> None:
        self._path = path
        self._log = LineLog(path)
        if path.exists() and path.stat().st_size:
            known = read_results(path).header
            changed = [name for name in asdict(header) if _as_json(known)[name] != _as_json(header)[name]]
            if changed:
                raise OutputError(
                    f"{path} holds results of another run; changed since: {', '.join(changed)}. Use another --work, "
                    "or --overwrite to start afresh."
                )
        else:
            self._log.append({"nemo_prune_results": FORMAT_VERSION, **asdict(header)})

    def read(self) -> tuple[PromptLocalization, ...]:
        """What was found so far."""
        return read_results(self._path).localizations

    def append(self, localization: PromptLocalization) -> None:
        """Keep one prompt's result; it is on disk when this returns."""
        self._log.append(asdict(localization))


def read_results(path: Path) -> Results:
    """Read a result file of nemo-prune (.jsonl) or of the NeMo authors' released code (.csv).

    Raises:
        PromptError: the file is missing or is neither.
    """
    path = Path(path)
    if not path.is_file():
        raise PromptError(f"There is no result file at {path}.")
    try:
        return _read_released_code(path) if path.suffix == ".csv" else _read_lines(path)
    except _DAMAGE as error:
        raise PromptError(
            f"{path} is no result file: {error}. Expected are the localizations.jsonl of a work folder, or a .csv of "
            "the NeMo authors' released code."
        ) from error


def merge_results(paths: Sequence[Path]) -> Results:
    """Read result files of one model as one; of a prompt that is in several the last counts.

    Raises:
        PromptError: a file can't be read, or the files are of different models or settings.
    """
    results = [read_results(path) for path in paths]
    first = results[0].header
    for path, each in zip(paths[1:], results[1:], strict=True):
        for name in ("model", "layers", "settings"):
            if getattr(each.header, name) != getattr(first, name):
                what = name.removesuffix("s")
                raise PromptError(f"{paths[0]} and {path} are results of different {what}s and can't be merged.")
    localizations = {found.prompt: found for each in results for found in each.localizations}
    return Results(first, tuple(localizations.values()))


def _read_lines(path: Path) -> Results:
    # Lines of bytes: a caption may hold what ends a line of text.
    lines = [parse_json(line) for line in path.read_bytes().splitlines()]
    if not lines or lines[0].pop("nemo_prune_results", None) != FORMAT_VERSION:
        raise ValueError(f"its first line does not say that it holds results of format {FORMAT_VERSION}")
    _check_types(lines[0], _HEADER_TYPES)
    if not all(type(size) is int and 0 < size < _MOST_NEURONS for size in lines[0]["layers"].values()):
        raise ValueError("a layer has no valid number of neurons")
    return Results(ResultsHeader(**lines[0]), tuple(_localization(line) for line in lines[1:]))


def _localization(record: dict) -> PromptLocalization:
    _check_types(record, _RECORD_TYPES)
    if record["status"] not in get_args(Status):
        raise ValueError(f"{record['status']!r} is no status of a prompt")
    neurons = {key: tuple(_neuron(*neuron) for neuron in record[key]) for key in ("candidates", "neurons")}
    return PromptLocalization(**{**record, **neurons, "kept_seeds": tuple(record["kept_seeds"])})


def _check_types(record: dict, types: Mapping[str, object]) -> None:
    for key, value in record.items():
        if not isinstance(value, types[key]):
            raise ValueError(f"`{key}` is of type {type(value).__name__}")


def _neuron(layer: str, index: int) -> Neuron:
    if not isinstance(layer, str) or type(index) is not int:
        raise ValueError(f"{index!r} of {layer!r} is no neuron")
    return Neuron(layer, index)


def _read_released_code(path: Path) -> Results:
    """A table with seven lists of neurons a prompt; resolved where the initial score reached the threshold."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file, delimiter=";"))
    localizations = tuple(
        PromptLocalization(
            prompt=row["Caption"],
            status="localized" if float(row["Initial SSIM"]) <= RELEASED_CODE_THRESHOLD else "unresolved",
            # The tables do not have it.
            score=math.nan,
            candidates=_neurons_of_lists(row["Initial Neurons"]),
            neurons=_neurons_of_lists(row["Refined Neurons"]),
            candidates_score=float(row["Initial SSIM"]),
            neurons_score=float(row["Refined SSIM"]),
        )
        for row in rows
    )
    return Results(ResultsHeader(None, SD_V1_LAYERS, RELEASED_CODE_THRESHOLD, {}), localizations)


def _neurons_of_lists(text: str) -> tuple[Neuron, ...]:
    by_layer = zip(SD_V1_LAYERS, ast.literal_eval(text), strict=True)
    return tuple(_neuron(layer, index) for layer, indices in by_layer for index in dict.fromkeys(indices))


def _as_json(header: ResultsHeader) -> dict:
    return json.loads(json.dumps(asdict(header)))
