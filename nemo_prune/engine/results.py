"""Result files: what was found for each prompt, one line per prompt, and for which model with which settings."""

import codecs
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from nemo_prune.engine.localize import PromptLocalization
from nemo_prune.engine.released_code import RELEASED_CODE_THRESHOLD, SD_V1_LAYERS, read_table
from nemo_prune.errors import OutputError, PromptError
from nemo_prune.files.json_values import from_json, to_json
from nemo_prune.files.layout import has_ending
from nemo_prune.files.untrusted import parse_json
from nemo_prune.files.work import LineLog
from nemo_prune.progress import Advance, ignored

FORMAT_VERSION = 1
# What parsers of text that is no result file raise.
_DAMAGE = (ValueError, KeyError, TypeError, AttributeError, SyntaxError, RecursionError, MemoryError)
_MOST_NEURONS = 1 << 20

Find = Callable[[Sequence[str], Sequence[PromptLocalization]], Iterable[PromptLocalization]]


@dataclass(frozen=True)
class ResultsHeader:
    """What results depend on: the first line of their file.

    Attributes:
        model: digest of the model's files; None if unknown.
        layers: dotted module name -> number of neurons, in the order of execution.
        threshold: tau.
        settings: the numbers of the method, as JSON values.
        ablation: what suppressed neurons gave: ``zero``, or their ``mean``.
    """

    model: str | None
    layers: Mapping[str, int]
    threshold: float
    settings: Mapping[str, object]
    ablation: str = "zero"


@dataclass(frozen=True)
class Results:
    """What a result file holds."""

    header: ResultsHeader
    localizations: tuple[PromptLocalization, ...]


class ResultsFile:
    """A result file that grows; every line that was appended survives a kill.

    Args:
        path: the file; created if missing.
        header: what the results depend on.

    Raises:
        OutputError: the file holds results of another model, threshold or settings.
    """

    def __init__(self, path: Path, header: ResultsHeader) -> None:
        self._path = path
        self._log = LineLog(path)
        if path.exists() and path.stat().st_size:
            known, wanted = to_json(read_results(path).header), to_json(header)
            changed = [name for name in wanted if known[name] != wanted[name]]
            if changed:
                raise OutputError(
                    f"{path} holds results of another run; changed since: {', '.join(changed)}. Use another --work, "
                    "or --overwrite to start afresh."
                )
        else:
            self._log.append({"nemo_prune_results": FORMAT_VERSION, **to_json(header)})

    def read(self) -> tuple[PromptLocalization, ...]:
        """What was found so far."""
        return read_results(self._path).localizations

    def append(self, localization: PromptLocalization) -> None:
        """Keep one prompt's result; it is on disk when this returns."""
        self._log.append(to_json(localization))

    def completed(self, texts: Sequence[str], find: Find, advance: Advance = ignored) -> list[PromptLocalization]:
        """The results of all prompts, in their order: those in the file, and those that are found now.

        Args:
            texts: the prompts.
            find: localizes the missing prompts, given them and the results in the file.
            advance: called with the prompts done and their number.
        """
        known = {each.prompt: each for each in self.read()}
        waiting = [text for text in texts if text not in known]
        advance(len(known), len(texts))
        for localization in find(waiting, tuple(known.values())):
            self.append(localization)
            known[localization.prompt] = localization
            advance(len(known), len(texts))
        return [known[text] for text in texts]


def read_results(path: Path) -> Results:
    """Read a result file of nemo-prune (.jsonl) or of the NeMo authors' released code (.csv).

    Raises:
        PromptError: the file is missing or is neither.
    """
    path = Path(path)
    if not path.is_file():
        raise PromptError(f"There is no result file at {path}.")
    try:
        return _read_table(path) if has_ending(path, ".csv") else _read_lines(path)
    except _DAMAGE as error:
        raise PromptError(
            f"{path} is not a result file: {error}. Expected are the localizations.jsonl of a work folder, or a .csv "
            "of the NeMo authors' released code."
        ) from error


def merge_results(paths: Sequence[Path]) -> Results:
    """Read result files of one model as one; if several have the same prompt, the last counts.

    Raises:
        PromptError: a file can't be read, was searched with means, which a merged mask does not keep, or the files are
            of different models, thresholds or settings.
    """
    results = [read_results(path) for path in paths]
    for path, each in zip(paths, results, strict=True):
        if each.header.ablation != "zero":
            raise PromptError(
                f"{path} is of a run whose pruned neurons keep their means, and a merged mask does not keep them. Give "
                "results of `nemo-prune localize`, or of `nemo-prune run --ablation zero`."
            )
    first = results[0].header
    for path, each in zip(paths[1:], results[1:], strict=True):
        for name in ("model", "layers", "threshold", "settings"):
            here, there = getattr(first, name), getattr(each.header, name)
            if here != there:
                what = f"{name.removesuffix('s')}s" + (f" ({here:g} and {there:g})" if name == "threshold" else "")
                raise PromptError(
                    f"{paths[0]} and {path} are results of different {what} and can't be merged. Localize all prompts "
                    "of a mask with one model, the same settings and one --calibration."
                )
    localizations = {found.prompt: found for each in results for found in each.localizations}
    return Results(first, tuple(localizations.values()))


def _read_lines(path: Path) -> Results:
    # Lines of bytes: a caption may hold what ends a line of text.
    content = path.read_bytes().removeprefix(codecs.BOM_UTF8)
    encoded = content.splitlines()
    if content and not content.endswith(b"\n") and not _is_json(encoded[-1]):
        raise ValueError(
            "its last line is cut off, and not all of its prompts are there; the command that made it completes it"
        )
    lines = [parse_json(line) for line in encoded]
    if not lines or lines[0].pop("nemo_prune_results", None) != FORMAT_VERSION:
        raise ValueError(f"its first line does not say that it holds results of format {FORMAT_VERSION}")
    header = from_json(ResultsHeader, lines[0])
    if not all(0 < size < _MOST_NEURONS for size in header.layers.values()):
        raise ValueError("a layer has no valid number of neurons")
    return Results(header, tuple(from_json(PromptLocalization, line) for line in lines[1:]))


def _is_json(line: bytes) -> bool:
    try:
        parse_json(line)
    except ValueError:
        return False
    return True


def _read_table(path: Path) -> Results:
    return Results(ResultsHeader(None, SD_V1_LAYERS, RELEASED_CODE_THRESHOLD, {}), read_table(path))
