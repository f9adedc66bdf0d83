"""What a run on SD v1-4's 500 memorized prompts asks of the U-Net and of Python, without its weights.

    python -m benchmarks.full_run --table nemo_neurons_sd_v1_4_251_prompts.csv [--json]

The real stages (detection and localization, merge, scores under the mask) are driven by a scorer that answers from a
published table of results, see benchmarks/simulated.py. The table is fetched unless it is given.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from benchmarks.oracle import refined
from benchmarks.simulated import SimulatedPrompt, SimulatedScorer, read_prompts
from nemo_prune.compute.session import Session
from nemo_prune.engine.calibration import Calibration
from nemo_prune.engine.localize import Localizer, PromptLocalization, candidate_schedule, count_statuses
from nemo_prune.engine.memo import Memo
from nemo_prune.engine.released_code import RELEASED_CODE_THRESHOLD
from nemo_prune.engine.trials import Why
from nemo_prune.files.work import LineLog
from nemo_prune.mask import Neuron, Pruning
from nemo_prune.models.known import ReferenceFile
from nemo_prune.progress import Advance, Listener, Stage, ignored
from nemo_prune.settings import MERGES, LocalizationSettings, Plan, VerificationSettings
from nemo_prune.stages.localize import localize_for_a_mask
from nemo_prune.stages.merge import merge_localizations
from nemo_prune.stages.prove import score_again

TABLE = ReferenceFile(
    "1_results.csv",
    "5698aa68592514b312e07b9aa791ddcf7d9fab51ae7a8cc91b5d09315a0f9be3",
    "https://raw.githubusercontent.com/Jimmy-di/localizing_memorization_in_diffusion_models/"
    "198fc29e4e851df796c6e4a4484da6e49c461700/",
)
SECONDS_A_PASS = 0.01


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--table", type=Path, help="the table of results; fetched unless it is given")
    parser.add_argument("--prompts", type=int, default=500)
    parser.add_argument("--batch-size", type=int, default=40, help="of the device")
    parser.add_argument("--merge", choices=MERGES, action="append", help="ways of merging; all unless given")
    parser.add_argument("--json", action="store_true", help="print one object for the first way, the others beneath")
    arguments = parser.parse_args()
    corpus = read_prompts(arguments.table or TABLE.locate(), arguments.prompts)
    ways = arguments.merge or ["thinned", "minimal", "union"]
    figures = {merge: measure(corpus, merge, arguments.batch_size) for merge in ways}
    if arguments.json:
        print(json.dumps({"merge": ways[0], **figures[ways[0]], "ways": figures}, indent=2))
    else:
        for merge, each in figures.items():
            print(_table(merge, each))


def measure(corpus: Sequence[SimulatedPrompt], merge: str, batch_size: int) -> dict:
    """One run: figures of the stages and of the whole."""
    scorer = SimulatedScorer(corpus, batch_size)
    ledger, texts = _Ledger(scorer), [each.text for each in corpus]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        memo = Memo(None, LineLog(folder / "answers.jsonl", {}))
        calibration = Calibration(0.358, 0.07, 1.0, scorer.statistics)
        # As a run does it.
        localizer = Localizer(scorer, calibration, RELEASED_CODE_THRESHOLD, check_way=merge == "union", memo=memo)
        session, plan = _SimulatedSession(scorer), Plan(out=folder / "out", merge=merge)
        found = localize_for_a_mask(session, localizer, texts, folder / "localizations.jsonl", ledger)
        mask, settled = merge_localizations(localizer, localizer, found, partial(without_hubs, found), plan, ledger)
        score_again(
            localizer, scorer, settled, Pruning(mask), VerificationSettings(), folder / "verified.jsonl", ledger
        )
    counted, computed = scorer.sample_passes, scorer.computed_passes
    python = sum(stage["seconds_python"] for stage in ledger.stages.values())
    figures = {
        "prompts": len(corpus),
        "statuses": count_statuses(settled),
        "beyond_reach": sum(each.beyond_reach for each in settled),
        "not_monotone": sum(each.fell_back for each in found),
        "neurons": mask.num_neurons,
        "silent": sum(
            max(each.similarity(frozenset(mask.neurons), seed) for seed in each.seeds) <= RELEASED_CODE_THRESHOLD
            for each in corpus
        ),
        "sample_passes_computed": computed,
        "sample_passes_counted": counted,
        "float32_passes_computed": scorer.reference.computed_passes,
        "share_counted": round(counted / computed, 3),
        "calls": sum(scorer.predictor.calls.values()),
        "mean_batch": round(counted / sum(scorer.predictor.calls.values()), 1),
        "seconds_python": round(python, 1),
        "seconds_at_10_ms": round(computed * SECONDS_A_PASS + python, 1),
        "share_python": round(python / (computed * SECONDS_A_PASS + python), 3),
        "passes_for": {why.value: scorer.passes[why] for why in Why if scorer.passes[why]},
        "stages": ledger.stages,
    }
    if merge == "union":
        figures["as_the_released_code"] = agreement(corpus, found, scorer)
    return figures


def without_hubs(found: Sequence[PromptLocalization], neurons: Collection[Neuron]) -> list[Neuron]:
    """A mask without the tenth of its neurons that most prompts have: they stand for those that are most costly.

    A real run finds these by some 2,000 passes on ordinary captions, which a simulation of memorized ones can't ask.
    """
    having = Counter(neuron for each in found for neuron in each.neurons)
    return sorted(neurons, key=lambda neuron: (-having[neuron], neuron))[len(neurons) // 10 :]


def agreement(
    corpus: Sequence[SimulatedPrompt], found: Sequence[PromptLocalization], scorer: SimulatedScorer
) -> dict[str, int]:
    """How many prompts ended with the status, and the neurons if resolved, of the released code's procedure."""
    agreeing = 0
    for prompt, each in zip(corpus, found, strict=True):
        resolved, neurons = plainly(prompt, scorer)
        agreeing += resolved == (each.status == "localized") and (not resolved or neurons == set(each.neurons))
    return {"agreeing": agreeing, "of": len(corpus)}


def plainly(prompt: SimulatedPrompt, scorer: SimulatedScorer) -> tuple[bool, set[Neuron]]:
    """The released code's procedure: every set in turn, all kept seeds of each (see benchmarks/oracle.py)."""
    tau = RELEASED_CODE_THRESHOLD

    def score(neurons: Sequence[Neuron]) -> float:
        chosen = frozenset(neurons)
        return max(prompt.similarity(chosen, seed) for seed in prompt.seeds) if chosen else float("inf")

    (scored,) = scorer.score_prompts([prompt.text])
    settings = LocalizationSettings()
    schedule = candidate_schedule(scorer.activations(scored), scorer.statistics, settings)
    step = next((step for step in schedule if score(step.neurons) <= tau), None)
    if step is None:
        return False, set()
    return True, set(refined(step.neurons, list(scorer.predictor.sizes)[::-1], tau, score))


class _SimulatedSession(Session):
    """What the stages ask of a session."""

    def __init__(self, scorer: SimulatedScorer) -> None:
        self.sizes, self.settings, self.model_digest = scorer.predictor.sizes, scorer.predictor.settings, "simulated"

    def map(self, task, chunks):
        raise NotImplementedError

    def chunks_of(self, texts):
        raise NotImplementedError


class _Ledger(Listener):
    """What each stage takes.

    Args:
        scorer: counts the passes.

    Attributes:
        stages: key of a stage -> its figures.
    """

    def __init__(self, scorer: SimulatedScorer) -> None:
        self._scorer = scorer
        self.stages: dict[str, dict] = {}

    @contextmanager
    def stage(self, stage: Stage) -> Iterator[Advance]:
        scorer, predictor = self._scorer, self._scorer.predictor
        began, simulating = time.perf_counter(), scorer.seconds
        counted, computed, calls = scorer.sample_passes, scorer.computed_passes, predictor.calls.total()
        passes = scorer.passes.copy()
        yield ignored
        counted, computed = scorer.sample_passes - counted, scorer.computed_passes - computed
        calls = predictor.calls.total() - calls
        self.stages[stage.key] = {
            "sample_passes_counted": counted,
            "sample_passes_computed": computed,
            "passes_for": {why.name.lower(): number for why, number in (scorer.passes - passes).items()},
            "calls": calls,
            "batch_size": predictor.batch_size,
            "mean_batch": round(counted / calls, 1) if calls else None,
            "seconds_python": round(time.perf_counter() - began - (scorer.seconds - simulating), 2),
        }


def _table(merge: str, figures: dict) -> str:
    lines = [f"{merge}: " + ", ".join(f"{name} {value}" for name, value in figures.items() if name != "stages")]
    for key, stage in figures["stages"].items():
        lines.append(f"  {key}: " + ", ".join(f"{name} {value}" for name, value in stage.items()))
    return "\n".join(lines)


if __name__ == "__main__":
    main()
