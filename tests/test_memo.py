"""What is known is not asked again: a run that was stopped goes on where it was."""

import pytest

from benchmarks.full_run import _Ledger, _SimulatedSession
from benchmarks.simulated import SimulatedScorer, read_prompts
from nemo_prune.engine.calibration import Calibration
from nemo_prune.engine.localize import Localizer
from nemo_prune.engine.memo import Memo
from nemo_prune.engine.merge import settle_mask
from nemo_prune.engine.trials import Why
from nemo_prune.files.work import LineLog
from nemo_prune.stages.localize import localize_for_a_mask

TAU = 0.428


class Stopped(Exception):
    pass


class StoppingScorer(SimulatedScorer):
    """Is killed after some calls."""

    def __init__(self, corpus, calls_left):
        super().__init__(corpus)
        self.calls_left = calls_left

    def answer(self, asked, batch_size=None):
        if not self.calls_left:
            raise Stopped
        self.calls_left -= 1
        return super().answer(asked, batch_size)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Prompts that need some of three hubs and one neuron of their own."""
    lines = ["Caption;URL;Initial Neurons;Initial SSIM;Refined Neurons;Refined SSIM"]
    for number in range(24):
        own, hub = 30 + number, number % 3
        initial = [[hub, own, *range(100, 108)], [own], [], [], [], [], [own]]
        lines.append(f"caption {number};x;{initial};0.41;{[[hub, own], [], [], [], [], [], []]};0.41")
    path = tmp_path_factory.mktemp("table") / "results.csv"
    path.write_text("\n".join(lines) + "\n")
    return read_prompts(path, 24)


def settle(scorer, corpus, folder):
    """Localize and settle with what a folder holds; the mask."""
    log = LineLog(folder / "answers.jsonl", {"threshold": TAU})
    localizer = Localizer(scorer, Calibration(0.358, 0.07, 1.0, scorer.statistics), TAU, memo=Memo(None, log))
    texts = [each.text for each in corpus]
    found = localize_for_a_mask(_SimulatedSession(scorer), localizer, texts, folder / "found.jsonl", _Ledger(scorer))
    settled = settle_mask(localizer, found)
    return settled.mask, [(each.prompt, each.neurons, each.status) for each in settled.localizations]


@pytest.mark.slow
def test_stopped_again_and_again_it_ends_the_same_and_asks_nothing_twice(corpus, tmp_path):
    whole = SimulatedScorer(corpus)
    (tmp_path / "whole").mkdir()
    expected = settle(whole, corpus, tmp_path / "whole")
    assert expected[0].num_neurons
    folder, answered, stops = tmp_path / "stopped", 0, 0
    folder.mkdir()
    while True:
        scorer = StoppingScorer(corpus, calls_left=7)
        try:
            found = settle(scorer, corpus, folder)
        except Stopped:
            stops += 1
            continue
        finally:
            answered += sum(scorer.passes.values()) - scorer.passes[Why.DETECTION]
        break
    assert stops > 5
    assert found[0].neurons == expected[0].neurons and found[1] == expected[1]
    assert answered == sum(whole.passes.values()) - whole.passes[Why.DETECTION]


def test_without_the_log_everything_is_asked_again(corpus, tmp_path):
    first, second = SimulatedScorer(corpus), SimulatedScorer(corpus)
    (tmp_path / "a").mkdir()
    settle(first, corpus, tmp_path / "a")
    settle(second, corpus, tmp_path / "a")
    assert sum(second.passes.values()) - second.passes[Why.DETECTION] == 0
    (tmp_path / "a" / "answers.jsonl").unlink()
    (tmp_path / "a" / "found.jsonl").unlink()
    third = SimulatedScorer(corpus)
    settle(third, corpus, tmp_path / "a")
    assert third.sample_passes == first.sample_passes
