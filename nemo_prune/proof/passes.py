"""What measuring costs: passes through U-Nets, counted as they happen and remembered with the results."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from nemo_prune.files.json_values import from_json, to_json
from nemo_prune.files.work import LineLog

Found = TypeVar("Found")


class PassCounter:
    """Counts the samples that go through U-Nets.

    Attributes:
        passes: samples so far; a backward pass counts as another one where its caller adds it.
    """

    def __init__(self) -> None:
        self.passes = 0

    @contextmanager
    def counting(self, *unets: nn.Module) -> Iterator[None]:
        """Count what goes through these while the context lasts."""

        def hook(module: nn.Module, inputs: tuple, output: object) -> None:
            # diffusers gives the latents by position, or by name.
            self.passes += len(inputs[0])

        handles = []
        try:
            handles += [unet.register_forward_hook(hook) for unet in {id(unet): unet for unet in unets}.values()]
            yield
        finally:
            for handle in handles:
                handle.remove()


class Ledger:
    """Results that were paid for in passes: each is measured once, also where the work is stopped in between.

    Args:
        path: the log, one line per result.
        depends_on: what the results depend on, as JSON values.
        counter: counts the passes.

    Attributes:
        spent: passes of all results in the log.
    """

    def __init__(self, path: Path, depends_on: dict, counter: PassCounter) -> None:
        self._log, self._counter = LineLog(path, depends_on), counter
        self._known: dict[str, Any] = {}
        self.spent = 0
        for line in self._log:
            self._known[line["key"]] = line["found"]
            self.spent += line["passes"]

    def knows(self, key: str) -> bool:
        """Whether a result is in the log."""
        return key in self._known

    def once(self, key: str, kind: type[Found], work: Callable[[], Found]) -> Found:
        """A result: the one in the log, or a new one, which is kept.

        Args:
            key: what the result is called, such as a caption.
            kind: its type, see :func:`nemo_prune.files.json_values.from_json`.
            work: measures it.
        """
        if key not in self._known:
            before = self._counter.passes
            values = to_json(work())
            passes = self._counter.passes - before
            self._log.append({"key": key, "passes": passes, "found": values})
            self._known[key] = values
            self.spent += passes
        return from_json(kind, self._known[key], key)
