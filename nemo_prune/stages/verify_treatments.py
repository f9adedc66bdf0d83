"""What comes back from a candidate that is treated: rows filled, the base merged in, weights rounded or tuned."""

from collections.abc import Callable, Sequence

import torch

from nemo_prune.corpus.prompts import Prompt
from nemo_prune.mask import NeuronMask
from nemo_prune.proof.passes import Ledger
from nemo_prune.proof.regrowth import Regrown, Tuner, merge_base, round_weights, treated
from nemo_prune.proof.roots import FILLINGS, STRETCHED, Filling, FoundRows, fill_rows, found_rows, rows_that_stand_out
from nemo_prune.stages.verify_bench import TOO_LITTLE, Bench


def measure_roots(bench: Bench) -> tuple[FoundRows | None, list[Regrown]]:
    """What the weights tell of the cut, and what comes back if the rows that stand out are filled again."""
    with bench.part("roots") as given:
        if given is None:
            return None, []
        allowance, ledger, advance = given
        changed = None if bench.rows.others else bench.rows.mask
        found = found_rows(bench.candidate.unet, bench.base.unet, changed)
        zeroed, small = rows_that_stand_out(bench.candidate.unet)
        tries = [(filling, zeroed) for filling in FILLINGS] if zeroed.num_neurons else []
        tries += [(STRETCHED, small)] if small.num_neurons else []
        prompts = bench.treated_prompts(allowance // max(1, len(tries)))
        refilled = []
        for filling, rows in tries:

            def work(filling: Filling = filling, rows: NeuronMask = rows) -> Regrown:
                with treated(bench.candidate):
                    fill_rows(bench.candidate.unet, rows, filling, bench.settings.seed)
                    return bench.given_back(f"filled with {filling}", prompts)

            refilled.append(ledger.once(f"{filling} {len(prompts)}", Regrown, work))
            advance(len(refilled), len(tries))
        return found, refilled


def measure_regrowth(bench: Bench) -> list[Regrown]:
    """What comes back after merging, rounding and fine-tuning; fewer steps of it where the budget is small."""
    with bench.part("regrowth") as given:
        if given is None:
            return []
        allowance, ledger, advance = given
        tuning = bench.settings.fine_tuning
        steps = list(tuning.steps)
        while steps and tuning.passes(steps[-1]) > allowance / 2:
            steps.pop()
        if len(steps) < len(tuning.steps):
            bench.left_out[f"fine-tuning of {tuning.steps[-1]} steps"] = TOO_LITTLE
        rest = allowance - (tuning.passes(steps[-1]) if steps else 0)
        treatments = {
            f"{share:.0%} of the base merged in": lambda unet, share=share: merge_base(unet, bench.base.unet, share)
            for share in (0.25, 0.5, 0.75)
        } | {f"rounded to {each}": lambda unet, each=each: round_weights(unet, each) for each in ("float16", "int8")}
        total = len(treatments) + len(steps)
        prompts = bench.treated_prompts(rest // total)
        found = []
        for name, treat in treatments.items():

            def work(name: str = name, treat: Callable = treat) -> Regrown:
                with treated(bench.candidate):
                    treat(bench.candidate.unet)
                    return bench.given_back(name, prompts)

            found.append(ledger.once(f"{name} {len(prompts)}", Regrown, work))
            advance(len(found), total)
        return found + _fine_tuned(bench, steps, prompts, ledger)


def _fine_tuned(bench: Bench, steps: Sequence[int], prompts: Sequence[Prompt], ledger: Ledger) -> list[Regrown]:
    """The candidate after each of these numbers of steps; all of them are one result, for they build on each other."""
    if not steps:
        return []

    def work() -> list[Regrown]:
        found = []
        with treated(bench.candidate):
            tuner = Tuner(
                bench.candidate,
                bench.base,
                bench.ordinary,
                bench.settings.fine_tuning,
                bench.counter,
                bench.settings.seed,
            )
            for step in range(1, steps[-1] + 1):
                tuner.step()
                if step in steps:
                    tuner.copy_weights_to(bench.candidate.unet)
                    found.append(bench.given_back(f"{step} steps of fine-tuning", prompts))
        return found

    try:
        return ledger.once(f"fine-tuning {list(steps)} {len(prompts)}", list[Regrown], work)
    except torch.OutOfMemoryError:
        bench.left_out["fine-tuning"] = "the device's memory does not take the gradients of all weights"
        return []
