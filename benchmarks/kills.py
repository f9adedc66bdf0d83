"""Kill a run or an export again and again at random moments, and compare what it ends with to an undisturbed one.

    python -m benchmarks.kills --kills 30 -- --model demo --limit 3
    python -m benchmarks.kills --kills 30 --command export -- --model demo --mask mask.safetensors

What stands behind `--` are the options of the command. Of a run mask and weights must be the same, byte for byte; of
an export everything. Sample passes of all processes together are counted where they are computed, in the U-Net: what is
more than the undisturbed run made was done again.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from nemo_prune.files.hashing import file_hash

FINISHED = "finished, before the process ended"
WEIGHTS, MASK = "unet/diffusion_pytorch_model.safetensors", "nemo_prune/mask.safetensors"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--latest", type=float, help="seconds after each start; as long as an undisturbed one takes")
    parser.add_argument("--command", choices=["run", "export"], default="run")
    parser.add_argument("--folder", type=Path, help="where the releases find room")
    parser.add_argument("options", nargs="*", default=["--model", "demo", "--limit", "3"], help="of the command")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        figures = kill_often(
            arguments.options, arguments.kills, arguments.seed, Path(name), arguments.command, arguments.latest
        )
    print(json.dumps(figures, indent=2))


def kill_often(
    options: Sequence[str], num_kills: int, seed: int, folder: Path, command: str, latest: float | None = None
) -> dict:
    """Kill a command until there were enough kills, each time until it finishes; every result is compared.

    Args:
        options: of the command, without --out.
        num_kills: how many.
        seed: of the moments.
        folder: where the results find room.
        command: `run` or `export`.
        latest: the latest moment of a kill, in seconds after a start: the less, the more often one result's processes
            are killed. None is as long as the undisturbed one takes.

    Returns:
        Kills per place where they hit, finished runs, and how many of them equal the undisturbed one.
    """
    began = time.monotonic()
    undisturbed = folder / "undisturbed"
    if start(options, undisturbed, command).wait():
        raise RuntimeError("The undisturbed one fails.")
    seconds, passes = time.monotonic() - began, passes_of(undisturbed)
    compared = result if command == "run" else files_of
    expected = compared(undisturbed)
    moments, places, finished, equal, again = random.Random(seed), Counter(), 0, 0, 0
    while sum(places.values()) < num_kills:
        out = folder / f"killed_{finished}"
        left = num_kills - sum(places.values())
        places.update(kill_until_done(options, out, moments, latest or seconds, left, command))
        finished += 1
        equal += compared(out) == expected
        again += passes_of(out) - passes
        shutil.rmtree(out)
        shutil.rmtree(out.with_name(f"{out.name}.work"), ignore_errors=True)
        told = f"{sum(places.values())} kills, {finished} results, {equal} equal, {again} passes again"
        print(told, file=sys.stderr, flush=True)
    return {
        "kills": dict(places),
        "finished": finished,
        "equal_to_the_undisturbed": equal,
        "seconds_undisturbed": round(seconds, 1),
        "passes_undisturbed": passes,
        "passes_again_a_kill": round(again / max(1, sum(places.values())), 1),
        "seconds_again_a_kill": round(again / max(1, sum(places.values())) * seconds / max(1, passes), 1),
    }


def kill_until_done(
    options: Sequence[str],
    out: Path,
    moments: random.Random,
    longest: float,
    most_kills: int,
    command: str = "run",
) -> list[str]:
    """Start a command and kill it at a random moment, until it finishes in spite of that.

    Args:
        options: of the command, without --out.
        out: the folder of the pruned model.
        moments: where the moments come from.
        longest: the latest moment, in seconds.
        most_kills: after so many it may finish.
        command: `run` or `export`.

    Returns:
        Where each kill hit. One after the result was in its place ends it too: that is refused from then on.
    """
    places: list[str] = []
    while True:
        began = time.time()
        process = start(options, out, command)
        try:
            process.wait(moments.uniform(0, longest) if len(places) < most_kills else None)
        except subprocess.TimeoutExpired:
            _kill(process)
            places.append(place(out, began))
            if places[-1] == FINISHED:
                return places
        else:
            if process.returncode:
                raise RuntimeError(f"A command that was killed does not go on: exit code {process.returncode}.")
            return places


def kill_when(there_is: str, options: Sequence[str], out: Path, command: str = "run") -> None:
    """Start a command and kill it as soon as its work folder holds something.

    Args:
        there_is: pattern of the file's name.
        options: of the command, without --out.
        out: the folder of the pruned model.
        command: `run` or `export`.

    Raises:
        RuntimeError: the command ended before.
    """
    process, work = start(options, out, command), out.with_name(f"{out.name}.work")
    while not any(work.glob(there_is)):
        if process.poll() is not None:
            raise RuntimeError(f"The command ended with {process.returncode}, without {there_is}.")
        time.sleep(0.01)
    _kill(process)


def start(options: Sequence[str], out: Path, command: str) -> subprocess.Popen:
    """A command as a group of processes of its own."""
    program = f"from benchmarks.kills import run_counted; run_counted({str(_tally(out))!r})"
    typed = [sys.executable, "-c", program, command, *options, "--out", str(out)]
    return subprocess.Popen(typed, stdout=subprocess.DEVNULL, start_new_session=True)


def _kill(process: subprocess.Popen) -> None:
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def run_counted(tally: str) -> None:
    """The program, with a byte written to a file for every sample that goes through a U-Net; a kill loses none."""
    from nemo_prune.cli import app

    file = os.open(tally, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    with counting_samples(lambda number: os.write(file, b"." * number)):
        app()


@contextmanager
def counting_samples(count: Callable[[int], object]) -> Iterator[None]:
    """Tell how many samples go through any U-Net, at every call while the context lasts."""
    from diffusers import UNet2DConditionModel

    def hook(unet: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        if isinstance(unet, UNet2DConditionModel):
            count(len(inputs[0]))

    handle = torch.nn.modules.module.register_module_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def passes_of(out: Path) -> int:
    """Samples that went through the U-Net in all processes that made a result."""
    tally = _tally(out)
    return tally.stat().st_size if tally.exists() else 0


def _tally(out: Path) -> Path:
    return out.with_name(f"{out.name}.passes")


def place(out: Path, began: float) -> str:
    """The stage that a command was in, by what it left; a folder of the result means that it is whole."""
    work, staging = (out.with_name(name) for name in (f"{out.name}.work", f".{out.name}.partial"))
    # What an earlier one left is older.
    exporting = staging.exists() and staging.stat().st_ctime >= began
    if out.exists():
        return FINISHED
    stages = {
        "run_evidence": "evidence", "images/*_after_*.png": "images after", "images": "images before or export",
        "judged.jsonl": "judge", "verified.jsonl": "score again", "localizations.jsonl": "localize, merge or look",
        ".calibration.safetensors.jsonl": "calibrate",
    }  # fmt: skip
    found = next((stage for name, stage in stages.items() if any(work.glob(name))), None)
    return found or ("export" if exporting else "load")


def result(out: Path) -> tuple[bytes, bytes]:
    """Weights and mask."""
    return (out / WEIGHTS).read_bytes(), (out / MASK).read_bytes()


def files_of(out: Path) -> dict[str, str]:
    """sha256 of every file."""
    return {path.relative_to(out).as_posix(): file_hash(path) for path in out.rglob("*") if path.is_file()}


if __name__ == "__main__":
    main()
