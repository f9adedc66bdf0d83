"""What a run says of a prompt must hold under the final mask."""

import pytest

from nemo_prune.corpus.prompts import Prompt
from nemo_prune.engine.localize import PromptLocalization
from nemo_prune.errors import EffectError
from nemo_prune.mask import Neuron
from nemo_prune.proof.scores import ScoresUnderMask
from nemo_prune.stages.examined import ExaminedPrompt, refuse_no_effect

THRESHOLD = 0.4


def examined(status, similarity):
    localization = PromptLocalization("a cat", status, 0.9, (0, 1), neurons=(Neuron("a", 1),))
    under_mask = ScoresUnderMask(similarity, 0.9, 0.3)
    return ExaminedPrompt.scored(Prompt("a cat"), "reference", localization, under_mask, THRESHOLD)


@pytest.mark.parametrize(
    ("status", "similarity", "expected"),
    [
        ("localized", 0.39, "localized"),
        ("localized", 0.4, "localized"),
        ("localized", 0.41, "unresolved"),
        ("unresolved", 0.9, "unresolved"),
        ("not_memorized", None, "not_memorized"),
    ],
)
def test_a_prompt_that_stays_awake_under_the_final_mask_is_not_localized(status, similarity, expected):
    assert examined(status, similarity).localization.status == expected


def test_a_pruning_that_changes_nothing_on_its_own_prompts_is_refused():
    unchanged, changed = examined("unresolved", 1.0), examined("unresolved", 0.97)
    with pytest.raises(EffectError, match="changes nothing"):
        refuse_no_effect([unchanged, examined("not_memorized", None)])
    refuse_no_effect([unchanged, changed])
    refuse_no_effect([examined("not_memorized", None)])
