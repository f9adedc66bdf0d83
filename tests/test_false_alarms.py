"""The limit of false alarms holds as often as it says, although the cut is chosen on the same captions."""

import numpy as np
import pytest

from nemo_prune.screening.detection import false_alarm_limits, fdr_cut


@pytest.mark.parametrize(("num_ordinary", "num_memorized", "total"), [(320, 25, 89), (400, 60, 400)])
def test_false_alarms_exceed_their_limit_in_at_most_one_corpus_of_twenty(num_ordinary, num_memorized, total):
    generator = np.random.default_rng(7)
    exceeded = estimates_exceeded = cuts = 0
    for _ in range(200):
        ordinary = generator.normal(size=num_ordinary)
        memorized, others = generator.normal(2.5, 1, num_memorized), generator.normal(size=total - num_memorized)
        cut = fdr_cut(np.concatenate([memorized, others]), ordinary, 0.1)
        if cut.cut is not None:
            cuts += 1
            false_alarms = float((others >= cut.cut).sum()) / cut.num_passed
            exceeded += false_alarms > cut.fdr_high
            estimates_exceeded += false_alarms > cut.fdr
    assert cuts > 100
    assert exceeded <= 0.05 * cuts + 2 * np.sqrt(0.05 * 0.95 * cuts)
    # The estimate itself is no limit: it is exceeded far more often.
    assert estimates_exceeded > 0.1 * cuts


def test_limits_grow_with_what_was_seen_and_end_with_everything():
    limits = false_alarm_limits(100, 50)
    assert len(limits) == 51 and limits[-1] == 100
    assert all(np.diff(limits) >= 0) and 0 < limits[0] < 20
