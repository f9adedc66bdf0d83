"""Evidence on the demo model, which really memorizes: each effect beside its control."""

from dataclasses import replace

import pytest
import torch

from nemo_prune.corpus.prompts import read_prompts
from nemo_prune.engine.calibration import calibrate
from nemo_prune.engine.diffusion import NoisePredictor
from nemo_prune.engine.layers import find_text_projections, layer_sizes
from nemo_prune.engine.localize import Localizer, localize_prompt
from nemo_prune.engine.scorer import Scorer
from nemo_prune.mask import NeuronMask, Pruning
from nemo_prune.models.demo import CALIBRATION_FILE, PROMPTS_FILE, TEST_FILE, demo_folder
from nemo_prune.models.known import DEMO
from nemo_prune.models.source import load_pipeline
from nemo_prune.proof.attack import AttackSettings
from nemo_prune.proof.changed_rows import changed_rows
from nemo_prune.proof.drawing import Drawing
from nemo_prune.proof.evidence import EvidenceSettings
from nemo_prune.proof.hardening import harden, pruned_copy
from nemo_prune.proof.utility import random_rows
from nemo_prune.settings import LocalizationSettings
from nemo_prune.stages.verify import gather_evidence

pytestmark = pytest.mark.slow

SETTINGS = EvidenceSettings(
    budget=1500,
    parts=("replication", "attack"),
    drawing=Drawing("ddim", 20, DEMO.guidance_scale),
    most_rounds=1,
    attack=AttackSettings(images_per_look=1, drawing_steps=10),
)


@pytest.fixture(scope="module")
def demo():
    return load_pipeline(demo_folder(), "cpu", torch.float32)


@pytest.fixture(scope="module")
def memorized():
    return next(prompt for prompt in read_prompts(demo_folder() / PROMPTS_FILE) if prompt.kind == "VM")


@pytest.fixture(scope="module")
def ordinary():
    return [prompt.text for prompt in read_prompts(demo_folder() / TEST_FILE)]


@pytest.fixture(scope="module")
def mask(demo, memorized):
    """The memorized caption's own neurons."""
    scorer = Scorer(NoisePredictor(demo, LocalizationSettings()))
    calibration = calibrate(scorer, [prompt.text for prompt in read_prompts(demo_folder() / CALIBRATION_FILE)][:50])
    found = localize_prompt(Localizer(scorer, calibration, calibration.threshold), memorized.text)
    return NeuronMask.from_neurons(found.neurons, layer_sizes(find_text_projections(demo.unet, "both")))


@pytest.fixture(scope="module")
def pruned(demo, mask):
    return pruned_copy(demo, Pruning(mask))


@pytest.fixture(scope="module")
def evidence(demo, pruned, memorized, ordinary, tmp_path_factory):
    return gather_evidence(demo, pruned, [memorized], ordinary, SETTINGS, tmp_path_factory.mktemp("evidence"))


def test_what_the_base_copies_the_pruned_model_does_not(evidence):
    (caption,) = evidence.captions
    assert caption.base_copies == len(caption.seeds) and caption.candidate_copies == 0
    assert min(caption.base.own) > 0.5 > max(caption.candidate.nearest)


def test_as_many_random_neurons_stop_no_copy(demo, pruned, memorized, ordinary, tmp_path):
    random = pruned_copy(demo, Pruning(random_rows(demo, changed_rows(demo, pruned), ordinary, seed=1)))
    settings = replace(SETTINGS, parts=("replication",))
    (caption,) = gather_evidence(demo, random, [memorized], ordinary, settings, tmp_path).captions
    assert caption.candidate_copies == len(caption.seeds)


def test_the_attack_brings_the_memorized_picture_back_and_not_one_that_was_never_trained_on(evidence):
    found = {
        (each.model, each.memorized): each.came_back for each in evidence.summary.attacks if each.start == "caption"
    }
    assert found["candidate", True].count == 1
    assert found["candidate", False].count == 0 and found["candidate", False].total == 1


def test_hardening_stops_the_embedding_that_it_was_shown(demo, mask, memorized, ordinary, tmp_path):
    from nemo_prune.proof.copies import StructuralSimilarity
    from nemo_prune.proof.replication import ReplicationJudge
    from nemo_prune.proof.training_images import known_training_images

    judge = ReplicationJudge(StructuralSimilarity(), known_training_images([memorized]))
    targets = [(memorized.text, judge.training.images[memorized.text])]
    (found,) = harden(demo, mask, targets, ordinary, judge, DEMO.guidance_scale, AttackSettings(), rounds=1, seed=1)
    assert found.came_back == found.silenced == 1
    assert set(mask.neurons) < set(found.neurons)
