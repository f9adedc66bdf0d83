"""The parts of the evidence on tiny real pipelines: what each does, and that it does nothing else."""

import copy

import pytest
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

from conftest import tiny_pipeline, tiny_tokenizer
from nemo_prune.engine.layers import find_text_projections, layer_sizes
from nemo_prune.errors import ModelError, SettingsError
from nemo_prune.files.images import ImageFolder
from nemo_prune.mask import Neuron, NeuronMask
from nemo_prune.proof.attack import AttackRun, AttackSettings, attack, summarize_attacks, work_ratio
from nemo_prune.proof.changed_rows import changed_rows
from nemo_prune.proof.copies import StructuralSimilarity
from nemo_prune.proof.drawing import Drawing, Gallery, draw, drawn_images, image_latents, quick_latents, seeded_latents
from nemo_prune.proof.image_networks import Alignment, distances, image_features
from nemo_prune.proof.membership import PictureLoss, area_under_curve, picture_loss
from nemo_prune.proof.passes import Ledger, PassCounter
from nemo_prune.proof.recall_matrix import RecallMatrix, RecallRow, recall_row
from nemo_prune.proof.regrowth import FineTuning, Tuner, merge_base, round_weights, treated
from nemo_prune.proof.replication import ReplicationJudge
from nemo_prune.proof.roots import FILLINGS, STRETCHED, fill_rows, found_rows, rows_that_stand_out
from nemo_prune.proof.tokens import token_activations
from nemo_prune.proof.training_images import TrainingImages
from nemo_prune.proof.utility import (
    PRECISION,
    RANDOM,
    NoiseJudge,
    denoising_equivalence,
    neighbours,
    random_rows,
)
from nemo_prune.proof.variants import paraphrases, ways_to_ask
from test_copies import picture

ORDINARY = [f"a thing {number} of {number * number}" for number in range(8)]
FAST = Drawing("ddim", 2, 3.0)


def pruned(pipe, folder, scale=0.0):
    """A copy of a pipeline with three rows multiplied, and which ones."""
    other = tiny_pipeline(folder)
    other.unet.load_state_dict(pipe.unet.state_dict())
    other.text_encoder.load_state_dict(pipe.text_encoder.state_dict())
    other.vae.load_state_dict(pipe.vae.state_dict())
    layers = find_text_projections(other.unet, "value")
    chosen = [Neuron(name, index) for index, name in enumerate(list(layers)[:3])]
    with torch.no_grad():
        for name, index in chosen:
            layers[name].weight[index] *= scale
    return other, set(chosen)


@pytest.fixture(scope="module")
def candidate(pipe, tmp_path_factory):
    return pruned(pipe, tmp_path_factory.mktemp("candidate"))


@pytest.fixture
def judge():
    return ReplicationJudge(StructuralSimilarity(), TrainingImages({"a cat": picture(1), "a dog": picture(2)}))


def weights(pipe):
    return {name: value.clone() for name, value in pipe.unet.state_dict().items()}


def same(a, b):
    return all(torch.equal(value, b[name]) for name, value in a.items())


# --- drawing ---


def test_an_image_depends_on_its_seed_alone_and_the_scheduler_comes_back(pipe):
    own = pipe.scheduler
    together, alone = draw(pipe, "a cat", FAST, [5, 6]), draw(pipe, "a cat", FAST, [6])
    difference = torch.tensor(list(together[1].tobytes())).sub(torch.tensor(list(alone[0].tobytes()))).abs()
    assert difference.max() <= 1 and together[0].tobytes() != together[1].tobytes()
    assert pipe.scheduler is own
    assert torch.equal(seeded_latents(pipe, [5, 6])[1:], seeded_latents(pipe, [6]))
    for scheduler in ("euler", "dpm", "pndm"):
        assert draw(pipe, "a cat", Drawing(scheduler, 2, 1.0), [5])[0].size == together[0].size
    with pytest.raises(SettingsError, match="`scheduler` is heun"):
        Drawing("heun")


def test_a_gallery_draws_each_image_once_and_counts_its_passes(pipe, tmp_path):
    counter = PassCounter()
    with counter.counting(pipe.unet, pipe.unet):
        gallery = Gallery(tmp_path / "images", {"base": pipe}, FAST, {"weights": "x"}, 2, seed=7)
        first = gallery.images("base", "a cat", turns=2)
        assert counter.passes == 2 * gallery.passes_per_round == 2 * 2 * FAST.passes
        again = Gallery(tmp_path / "images", {}, FAST, {"weights": "x"}, 2, seed=7).images("base", "a cat", turns=2)
    assert counter.passes == 2 * gallery.passes_per_round
    assert [image.tobytes() for image in first] == [image.tobytes() for image in again]
    assert gallery.seeds(1) == [9, 10]
    kept = drawn_images(tmp_path / "images", "base", "a cat")
    assert [image.tobytes() for image in kept] == [image.tobytes() for image in first]
    assert not drawn_images(tmp_path / "images", "base", "a dog")
    assert not list((tmp_path / "images").glob("*cat*")) and isinstance(gallery._folder, ImageFolder)


def test_a_gallery_draws_what_is_expected_together_and_no_image_twice(pipe, tmp_path):
    texts, batches = [f"picture {number}" for number in range(12)], []
    elsewhere = {"base": {texts[1]: draw(pipe, texts[1], FAST, [7, 8])}}
    gallery = Gallery(tmp_path / "images", {"base": pipe}, FAST, {"weights": "x"}, 2, 7, elsewhere)
    alone = gallery.images("base", texts[3])
    hook = pipe.unet.register_forward_pre_hook(lambda module, inputs: batches.append(len(inputs[0])))
    try:
        gallery.expect(texts)
        # Ten captions fill a batch of 20 images, by guidance one of 40; two of them are there already.
        images = {text: gallery.images("base", text) for text in texts}
        gallery.images("base", "not expected")
    finally:
        hook.remove()
    assert batches == [2 * 2 * 8, 2 * 2 * 8, 2 * 2 * 2, 2 * 2 * 2, 4, 4]
    assert [image.tobytes() for image in images[texts[3]]] == [image.tobytes() for image in alone]
    assert [image.tobytes() for image in images[texts[1]]] == [each.tobytes() for each in elsewhere["base"][texts[1]]]
    difference = torch.tensor(list(images[texts[11]][1].tobytes())) - torch.tensor(
        list(draw(pipe, texts[11], FAST, [8])[0].tobytes())
    )
    assert difference.abs().max() <= 1


def test_a_ledger_measures_once_and_remembers_what_was_paid(pipe, tmp_path):
    counter, asked = PassCounter(), []

    def work():
        asked.append(1)
        counter.passes += 7
        return PictureLoss(0.5, 1.0)

    for turn in range(2):
        ledger = Ledger(tmp_path / "log.jsonl", {"weights": "x"}, counter)
        assert ledger.spent == 7 * turn and ledger.knows("a") == bool(turn)
        assert ledger.once("a", PictureLoss, work) == PictureLoss(0.5, 1.0)
        assert ledger.spent == 7
    assert len(asked) == 1
    assert Ledger(tmp_path / "log.jsonl", {"weights": "y"}, counter).spent == 0


def test_counting_leaves_no_hook_behind(pipe):
    with pytest.raises(RuntimeError, match="stop"), PassCounter().counting(pipe.unet):
        raise RuntimeError("stop")
    assert not pipe.unet._forward_hooks


# --- the attack ---


def test_the_attack_lowers_its_loss_leaves_the_weights_and_says_when_it_succeeded(pipe, judge):
    before, counter = weights(pipe), PassCounter()
    settings = AttackSettings(steps=4, batch_size=2, looks=(0, 2, 4), images_per_look=1, drawing_steps=1)
    with counter.counting(pipe.unet):
        for start in ("caption", "noise", "ordinary caption"):
            found = attack(pipe, picture(1), "a cat", start, ORDINARY[0], judge, 1.0, settings, counter, seed=3)
            assert found.steps is None and len(found.curve) == 3
    assert counter.passes == 3 * settings.passes(1.0)
    assert same(before, pipe.unet.state_dict())
    assert all(parameter.requires_grad for parameter in pipe.unet.parameters())
    assert all(parameter.grad is None for parameter in pipe.unet.parameters())
    easy = ReplicationJudge(StructuralSimilarity(cut=-1.0), judge.training)
    assert attack(pipe, picture(1), "a cat", "caption", "b", easy, 1.0, settings, counter, seed=3).steps == 0


def test_attacks_are_summed_up_with_the_work_they_took():
    settings = AttackSettings(steps=50, looks=(0, 25, 50))
    runs = [AttackRun("candidate", True, "caption", steps, 0.6, (0.1, 0.6)) for steps in (25, 25, 50)]
    runs += [AttackRun("candidate", False, "caption", None, 0.2, (0.2, 0.1, 0.1)) for _ in range(3)]
    memorized, control = summarize_attacks(runs, settings)
    assert (memorized.came_back.count, memorized.median_steps) == (3, 25)
    assert (control.came_back.count, control.median_steps) == (0, None)
    assert control.curve == pytest.approx((0.2, 0.2, 0.2)) and memorized.curve == pytest.approx((0.1, 0.6, 0.6))
    assert work_ratio([memorized, control], "candidate") == (0.5, True)
    assert work_ratio([memorized], "candidate") is None and work_ratio([memorized, control], "base") is None


# --- other ways to ask ---


def test_paraphrases_change_the_words_and_are_the_same_each_time():
    text = "a red ring, morning at the house"
    found = paraphrases(text, ORDINARY, seed=1)
    assert found == paraphrases(text, ORDINARY, seed=1) and text not in found.values()
    words = text.split()
    assert len(found["a word dropped"].split()) == len(words) - 1
    assert len(found["a word doubled"].split()) == len(words) + 1
    assert sorted(found["words in another order"].split()) == sorted(words)
    assert found["something appended"].startswith(text) and found["capitals"].lower() == text
    assert paraphrases("cat", ["x"])["a word dropped"] == "cat"


def test_every_way_to_ask_draws_and_the_control_starts_from_another_picture(pipe):
    ways = ways_to_ask(Drawing("ddim", 3, 3.0), ORDINARY, lambda image: Image.new("RGB", image.size, "red"))
    own = pipe.scheduler
    images = {way.name: way.draw(pipe, "a cat", picture(1), [5]) for way in ways}
    assert len(images) == 13 and all(len(drawn) == 1 for drawn in images.values())
    assert pipe.scheduler is own and sum(way.of_control for way in ways) == 1
    from_image, control = list(images.values())[-2:]
    assert from_image[0].tobytes() != control[0].tobytes()
    usual = draw(pipe, "a cat", Drawing("ddim", 3, 3.0), [5])[0]
    assert images["padding replaced"][0].tobytes() != usual.tobytes()


# --- where two models differ ---


def test_changed_rows_are_found_and_nothing_else_is_claimed(pipe, candidate):
    other, chosen = candidate
    rows = changed_rows(pipe, other)
    assert set(rows.mask.neurons) == chosen and rows.are_a_mask
    unchanged = changed_rows(pipe, pipe)
    assert not unchanged.mask.num_neurons and not unchanged.others and not unchanged.are_a_mask
    with treated(other):
        merge_base(other.unet, pipe.unet, 0.0)
        with torch.no_grad():
            other.unet.conv_in.bias += 1
        assert changed_rows(pipe, other).others and not changed_rows(pipe, other).are_a_mask
    assert changed_rows(pipe, other).are_a_mask


def test_models_of_other_architectures_are_refused(pipe, tmp_path):
    other = tiny_pipeline(tmp_path / "other")
    other.unet = type(other.unet).from_config({**other.unet.config, "block_out_channels": (4, 8, 8, 8)})
    with pytest.raises(ModelError, match="different U-Nets"):
        changed_rows(pipe, other)


def test_random_rows_are_as_many_in_the_same_layers_and_other_ones(pipe, candidate):
    rows = changed_rows(pipe, candidate[0])
    random = random_rows(pipe, rows, ORDINARY, seed=1)
    assert random.counts == rows.mask.counts and not set(random.neurons) & set(rows.mask.neurons)


# --- utility ---


@pytest.mark.slow
def test_a_model_beside_itself_has_lost_nothing_and_a_pruned_one_has(pipe, candidate):
    rows = changed_rows(pipe, candidate[0])
    itself = NoiseJudge(pipe, pipe, changed_rows(pipe, pipe), ORDINARY, seed=1).change("a thing")
    assert set(itself.relative_error) == {"candidate", PRECISION}
    assert max(itself.relative_error["candidate"]) == 0 < min(itself.relative_error[PRECISION])
    judged = NoiseJudge(pipe, candidate[0], rows, ORDINARY, seed=1)
    change = judged.change("a thing")
    assert set(change.relative_error) == {"candidate", PRECISION, RANDOM}
    assert min(change.relative_error["candidate"]) > 0 and max(change.cosine["candidate"]) <= 1 + 1e-6
    assert len(judged.timesteps) == 5 and judged.timesteps[0] > judged.timesteps[-1]
    assert denoising_equivalence([itself] * 3, 0.01).holds


@pytest.mark.slow
def test_another_precision_leaves_the_base_as_it_is(pipe, candidate):
    before = weights(pipe)
    NoiseJudge(pipe, candidate[0], changed_rows(pipe, candidate[0]), ORDINARY, seed=1).change("a thing")
    assert same(before, pipe.unet.state_dict()) and pipe.unet.dtype == torch.float32


def test_neighbours_share_words_with_memorized_captions():
    found = neighbours(["a red ring", "a blue boat", "nothing alike"], ["a red ring by Crane"], 2)
    assert found == ["a red ring", "a blue boat"]


class Colours(torch.nn.Module):
    """Describes a picture by its mean colours."""

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return pixels.mean(dim=(2, 3))


def test_distances_are_small_for_the_same_pictures_and_larger_for_others(tmp_path):
    torch.jit.script(Colours()).save(str(tmp_path / "colours.pt"))
    ours = image_features(tmp_path / "colours.pt", [picture(seed) for seed in range(12)])
    dark = [Image.eval(picture(seed), lambda value: value // 4) for seed in range(12)]
    theirs = image_features(tmp_path / "colours.pt", dark)
    itself, other = distances(ours, ours), distances(ours, theirs)
    assert itself["FID"] == pytest.approx(0, abs=1e-6) and other["FID"] > 0.1
    assert other["KID"] > itself["KID"] and distances(ours[:3], theirs) is None
    with pytest.raises(SettingsError, match="does not describe images"):
        image_features(tmp_path / "missing.pt", [picture(1)])


def test_alignment_is_the_cosine_of_clips_towers(tmp_path):
    tokenizer = tiny_tokenizer(tmp_path / "characters")
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**shape, "vocab_size": len(tokenizer), "max_position_embeddings": 24, "bos_token_id": 0, "eos_token_id": 1}
    config = CLIPConfig(text_config=text, vision_config={**shape, "image_size": 32, "patch_size": 16}, projection_dim=8)
    CLIPModel(config).save_pretrained(tmp_path / "clip")
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    CLIPProcessor(CLIPImageProcessor(**size), tokenizer).save_pretrained(tmp_path / "clip")
    clip = Alignment(tmp_path / "clip")
    values = clip("a cat", [picture(1), picture(2), picture(1)])
    assert len(values) == 3 and all(-1 <= value <= 1 for value in values)
    assert values[0] == pytest.approx(values[2], abs=1e-6) and values[0] != values[1]
    with pytest.raises(SettingsError, match="holds no CLIP model"):
        Alignment(tmp_path)


# --- regrowth and roots ---


def test_merging_goes_from_the_candidate_to_the_base_and_ends_with_the_context(pipe, candidate):
    other, chosen = candidate
    before = weights(other)
    with treated(other):
        merge_base(other.unet, pipe.unet, 1.0)
        assert same(weights(pipe), other.unet.state_dict())
    assert same(before, other.unet.state_dict())
    with treated(other):
        merge_base(other.unet, pipe.unet, 0.25)
        name, index = next(iter(chosen))
        row = other.unet.get_submodule(name).weight[index]
        torch.testing.assert_close(row, 0.25 * pipe.unet.get_submodule(name).weight[index])


def test_rounding_keeps_zeroed_rows_and_changes_little(candidate):
    other, chosen = candidate
    for precision, most in (("float16", 1e-3), ("int8", 2e-2)):
        with treated(other):
            before = weights(other)
            round_weights(other.unet, precision)
            assert all(not other.unet.get_submodule(name).weight[index].any() for name, index in chosen)
            after = other.unet.state_dict()
            matrices = [name for name, value in before.items() if value.ndim > 1]
            change = [(after[name] - before[name]).norm() / before[name].norm() for name in matrices]
            assert 0 < max(change) < most


@pytest.mark.slow
def test_fine_tuning_lowers_its_loss_and_regrows_zeroed_rows(pipe, candidate):
    other, chosen = candidate
    before, counter = weights(other), PassCounter()
    with treated(other):
        tuner = Tuner(other, pipe, ORDINARY, FineTuning(learning_rate=1e-2, batch_size=4, images=2), counter, seed=1)
        losses = [tuner.step() for _ in range(30)]
        assert same(before, other.unet.state_dict())
        tuner.copy_weights_to(other.unet)
        name, index = next(iter(chosen))
        assert other.unet.get_submodule(name).weight[index].any()
    assert sum(losses[-8:]) < sum(losses[:8])
    assert counter.passes == 30 * 2 * 4
    assert same(before, other.unet.state_dict())


def test_cut_rows_are_found_by_looking_and_filled_from_the_rest_alone(pipe, candidate):
    other, chosen = candidate
    rows = changed_rows(pipe, other).mask
    zeroed, _ = rows_that_stand_out(other.unet)
    assert set(zeroed.neurons) == chosen
    found = found_rows(other.unet, pipe.unet, rows)
    assert (found.zeroed, found.changed, found.found) == (3, 3, 3)
    assert found.in_base == sum(mask.num_neurons for mask in rows_that_stand_out(pipe.unet))
    assert not rows_that_stand_out(pipe.unet)[0].num_neurons
    for filling in FILLINGS:
        before = weights(other)
        with treated(other):
            fill_rows(other.unet, zeroed, filling, seed=1)
            assert not rows_that_stand_out(other.unet)[0].num_neurons
            for name, layer in find_text_projections(other.unet, "both").items():
                kept = ~zeroed.layers[name]
                assert torch.equal(layer.weight[kept], before[f"{name}.weight"][kept])


def test_rows_that_are_scaled_down_stand_out_and_stretching_brings_their_direction_back(pipe, tmp_path):
    other, chosen = pruned(pipe, tmp_path / "scaled", scale=-0.001)
    zeroed, small = rows_that_stand_out(other.unet)
    assert not zeroed.num_neurons and chosen <= set(small.neurons)
    with treated(other):
        fill_rows(other.unet, small, STRETCHED, seed=1)
        for name, index in chosen:
            rows = [each.unet.get_submodule(name).weight[index] for each in (other, pipe)]
            assert torch.nn.functional.cosine_similarity(*rows, dim=0) > 0.999


# --- tokens, recall, membership ---


def test_activations_are_told_apart_by_kind_of_token(pipe, candidate):
    rows = changed_rows(pipe, candidate[0]).mask
    found = token_activations(pipe, rows, ["a cat"], ["x" * 60])
    assert list(found.memorized) == ["start", "words", "end", "padding"]
    # A caption that fills the encoder leaves no room for padding.
    assert list(found.ordinary) == ["start", "words", "end"]
    assert found.memorized["start"] == pytest.approx(found.ordinary["start"], rel=1e-4)


def test_a_mask_that_awakens_another_picture_is_counted_and_its_own_is_not():
    before = RecallRow((0.9, 0.9), (0, 1))
    rows = {"a": RecallRow((0.1, 0.9), (-1, 1)), "b": RecallRow((0.8, 0.8), (0, 0))}
    matrix = RecallMatrix(("a", "b"), rows, before)
    assert matrix.awakened({"a": 0, "b": 1}) == 1


def test_a_recall_row_suppresses_its_neurons_and_nothing_remains(pipe, judge):
    sizes = layer_sizes(find_text_projections(pipe.unet, "both"))
    everything = NeuronMask({name: torch.ones(size, dtype=torch.bool) for name, size in sizes.items()}).neurons
    before = recall_row(pipe, [], ["a cat", "a dog"], judge, FAST, seed=3)
    under = recall_row(pipe, everything, ["a cat", "a dog"], judge, FAST, seed=3)
    assert before.similarity != under.similarity and len(under.nearest_of) == 2
    assert recall_row(pipe, [], ["a cat", "a dog"], judge, FAST, seed=3) == before


def test_membership_is_told_by_lower_losses():
    sure = [PictureLoss(0.1, 0.5), PictureLoss(0.2, 0.6)]
    assert area_under_curve(sure) == 1 and area_under_curve([PictureLoss(0.5, 0.5)]) == 0.5
    assert area_under_curve([]) is None


def test_a_pictures_loss_is_the_same_each_time_and_another_pictures_is_another(pipe):
    assert picture_loss(pipe, "a cat", picture(1), 3) == picture_loss(pipe, "a cat", picture(1), 3)
    assert picture_loss(pipe, "a cat", picture(1), 3) != picture_loss(pipe, "a cat", picture(2), 3)


def test_latents_of_images_are_of_the_models_size(pipe):
    assert image_latents(pipe, [picture(1), picture(2, side=50)]).shape == (2, 4, 16, 16)
    assert quick_latents(pipe, "a cat", [1, 2]).shape == (2, 4, 16, 16)
    assert copy.deepcopy(pipe.unet).training is False
