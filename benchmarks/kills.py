"""Kill a run again and again at random moments, and compare what it ends with to an undisturbed one.

    python benchmarks/kills.py --kills 30 -- --model demo --limit 3

What stands behind `--` are the options of `nemo-prune run`. Mask and weights must be the same, byte for byte.
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

FINISHED = "finished, before the process ended"
WEIGHTS, MASK = "unet/diffusion_pytorch_model.safetensors", "nemo_prune/mask.safetensors"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("run", nargs="*", default=["--model", "demo", "--limit", "3"], help="options of `run`")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(kill_often(arguments.run, arguments.kills, arguments.seed, Path(folder)), indent=2))


def kill_often(run_options: Sequence[str], num_kills: int, seed: int, folder: Path) -> dict:
    """Kill runs until there were enough kills, each run until it finishes; every result is compared.

    Returns:
        Kills per place where they hit, finished runs, and how many of them equal the undisturbed one.
    """
    began = time.monotonic()
    start(run_options, folder / "undisturbed").wait()
    seconds = time.monotonic() - began
    expected = result(folder / "undisturbed")
    moments, places, finished, equal = random.Random(seed), Counter(), 0, 0
    while sum(places.values()) < num_kills:
        out = folder / f"killed_{finished}"
        places.update(kill_until_done(run_options, out, moments, seconds, num_kills - sum(places.values())))
        finished += 1
        equal += result(out) == expected
        shutil.rmtree(out)
        shutil.rmtree(out.with_name(f"{out.name}.work"))
    return {
        "kills": dict(places),
        "finished_runs": finished,
        "equal_to_the_undisturbed": equal,
        "seconds_of_an_undisturbed_run": round(seconds, 1),
    }


def kill_until_done(
    run_options: Sequence[str], out: Path, moments: random.Random, longest: float, most_kills: int
) -> list[str]:
    """Start a run and kill it at a random moment, until it finishes in spite of that.

    Args:
        run_options: of `nemo-prune run`, without --out.
        out: its folder.
        moments: where the moments come from.
        longest: the latest moment, in seconds.
        most_kills: after so many it may finish.

    Returns:
        Where each kill hit. One after the result was in its place ends it too: that is refused from then on.
    """
    places: list[str] = []
    while True:
        process = start(run_options, out)
        try:
            process.wait(moments.uniform(0, longest) if len(places) < most_kills else None)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            places.append(place(out))
            if places[-1] == FINISHED:
                return places
        else:
            if process.returncode:
                raise RuntimeError(f"A run that was killed does not go on: exit code {process.returncode}.")
            return places


def start(run_options: Sequence[str], out: Path) -> subprocess.Popen:
    """A run as a group of processes of its own."""
    command = [sys.executable, "-m", "nemo_prune.cli", "run", *run_options, "--out", str(out)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)


def place(out: Path) -> str:
    """The stage that a run was in, by what it left; a folder of the result means that it is whole."""
    work = out.with_name(f"{out.name}.work")
    if out.exists():
        return FINISHED
    if any(work.glob("images/*_after_*.png")):
        return "images after"
    stages = {"images": "images before or export", "verified.jsonl": "score again", "localizations.jsonl": "localize",
              ".calibration.safetensors.jsonl": "calibrate"}  # fmt: skip
    return next((stage for name, stage in stages.items() if (work / name).exists()), "load")


def result(out: Path) -> tuple[bytes, bytes]:
    """Weights and mask."""
    return (out / WEIGHTS).read_bytes(), (out / MASK).read_bytes()


if __name__ == "__main__":
    main()
