"""Kill a run or an export again and again at random moments, and compare what it ends with to an undisturbed one.

    python -m benchmarks.kills --kills 30 -- --model demo --limit 3
    python -m benchmarks.kills --kills 30 --command export -- --model demo --mask mask.safetensors

What stands behind `--` are the options of the command. Of a run mask and weights must be the same, byte for byte; of
an export everything.
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
from collections.abc import Sequence
from pathlib import Path

from nemo_prune.files.hashing import file_hash

FINISHED = "finished, before the process ended"
WEIGHTS, MASK = "unet/diffusion_pytorch_model.safetensors", "nemo_prune/mask.safetensors"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--command", choices=["run", "export"], default="run")
    parser.add_argument("--folder", type=Path, help="where the releases find room")
    parser.add_argument("options", nargs="*", default=["--model", "demo", "--limit", "3"], help="of the command")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        figures = kill_often(arguments.options, arguments.kills, arguments.seed, Path(name), arguments.command)
    print(json.dumps(figures, indent=2))


def kill_often(options: Sequence[str], num_kills: int, seed: int, folder: Path, command: str) -> dict:
    """Kill a command until there were enough kills, each time until it finishes; every result is compared.

    Returns:
        Kills per place where they hit, finished runs, and how many of them equal the undisturbed one.
    """
    began = time.monotonic()
    if start(options, folder / "undisturbed", command).wait():
        raise RuntimeError("The undisturbed one fails.")
    seconds = time.monotonic() - began
    compared = result if command == "run" else files_of
    expected = compared(folder / "undisturbed")
    moments, places, finished, equal = random.Random(seed), Counter(), 0, 0
    while sum(places.values()) < num_kills:
        out = folder / f"killed_{finished}"
        left = num_kills - sum(places.values())
        places.update(kill_until_done(options, out, moments, seconds, left, command))
        finished += 1
        equal += compared(out) == expected
        shutil.rmtree(out)
        shutil.rmtree(out.with_name(f"{out.name}.work"), ignore_errors=True)
    return {
        "kills": dict(places),
        "finished": finished,
        "equal_to_the_undisturbed": equal,
        "seconds_undisturbed": round(seconds, 1),
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
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            places.append(place(out, began))
            if places[-1] == FINISHED:
                return places
        else:
            if process.returncode:
                raise RuntimeError(f"A command that was killed does not go on: exit code {process.returncode}.")
            return places


def start(options: Sequence[str], out: Path, command: str) -> subprocess.Popen:
    """A command as a group of processes of its own."""
    typed = [sys.executable, "-m", "nemo_prune.cli", command, *options, "--out", str(out)]
    return subprocess.Popen(typed, stdout=subprocess.DEVNULL, start_new_session=True)


def place(out: Path, began: float) -> str:
    """The stage that a command was in, by what it left; a folder of the result means that it is whole."""
    work, staging = (out.with_name(name) for name in (f"{out.name}.work", f".{out.name}.partial"))
    # What an earlier one left is older.
    exporting = staging.exists() and staging.stat().st_ctime >= began
    if out.exists():
        return FINISHED
    if any(work.glob("images/*_after_*.png")):
        return "images after"
    stages = {"images": "images before or export", "verified.jsonl": "score again", "localizations.jsonl": "localize",
              ".calibration.safetensors.jsonl": "calibrate"}  # fmt: skip
    found = next((stage for name, stage in stages.items() if (work / name).exists()), None)
    return found or ("export" if exporting else "load")


def result(out: Path) -> tuple[bytes, bytes]:
    """Weights and mask."""
    return (out / WEIGHTS).read_bytes(), (out / MASK).read_bytes()


def files_of(out: Path) -> dict[str, str]:
    """sha256 of every file."""
    return {path.relative_to(out).as_posix(): file_hash(path) for path in out.rglob("*") if path.is_file()}


if __name__ == "__main__":
    main()
