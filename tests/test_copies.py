"""Yardsticks of images and training images, each with what must not count as a copy."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from torchmetrics.functional.image import multiscale_structural_similarity_index_measure as torchmetrics_ssim

from nemo_prune.corpus.prompts import Prompt, read_prompts
from nemo_prune.errors import PromptError, SettingsError
from nemo_prune.proof.copies import (
    CopyDetector,
    StructuralSimilarity,
    TiledSimilarity,
    correlation,
    multiscale_ssim,
    pixels,
    within_region,
)
from nemo_prune.proof.images import copy_similarities, image_similarities, nearest_copies
from nemo_prune.proof.replication import ReplicationJudge
from nemo_prune.proof.training_images import (
    TrainingImageFiles,
    TrainingImages,
    altered_pictures,
    known_training_images,
    placeholder,
)


def picture(seed, side=64):
    """Smooth colours that belong to a seed."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC)


def grey(values):
    """A picture of values in 0..1."""
    return Image.fromarray((255 * values.clip(0, 1)).astype(np.uint8)).convert("RGB")


def noisy(image, seed=0):
    pixels = np.asarray(image).astype(float) + np.random.default_rng(seed).normal(0, 8, np.asarray(image).shape)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def similar(similarity, a, b):
    return similarity.compare(similarity.describe(a), similarity.describe(b))


def test_a_noisy_copy_counts_and_another_picture_does_not():
    similarity = StructuralSimilarity()
    values = similar(similarity, [picture(1), noisy(picture(1))], [picture(1), picture(2)])
    assert values[0, 0] > 0.999 and values[1, 0] > similarity.yardstick.cut
    assert (values[:, 1] < similarity.yardstick.cut).all()
    assert similarity.compare(similarity.describe([]), similarity.describe([picture(1)])).shape == (0, 1)


def test_two_dark_pictures_are_not_copies():
    dark = [Image.fromarray((np.asarray(picture(seed)) // 16).astype(np.uint8)) for seed in (1, 2)]
    assert float(similar(StructuralSimilarity(), dark[:1], dark[1:])) < 0.5


def test_a_washed_out_image_is_no_copy_of_a_plain_picture_and_a_faded_copy_is_one():
    y, x = np.mgrid[-1:1:64j, -1:1:64j]
    vignette = x * x + y * y
    spot = 0.3 * np.exp(-60 * ((x - 0.3) ** 2 + (y + 0.3) ** 2))
    clouds = Image.fromarray(np.random.default_rng(0).normal(size=(16, 16)).astype(np.float32))
    clouds = np.asarray(clouds.resize((64, 64), Image.Resampling.BICUBIC))
    plain, washed_out = grey(0.75 - 0.3 * vignette + spot), grey(0.55 - 0.04 * vignette + 0.02 * clouds)
    faded = Image.blend(Image.new("RGB", (64, 64), (120, 120, 120)), plain, 0.15)
    a, b = pixels([washed_out], 64), pixels([plain], 64)
    # What SSIM and correlation say of them as they are.
    assert min(float(correlation(a, b)), float(image_similarities([washed_out], [plain]))) > 0.5
    for values in (
        copy_similarities([washed_out, faded], [plain])[:, 0],
        nearest_copies([washed_out, faded], [plain])[0],
        similar(StructuralSimilarity(), [washed_out, faded], [plain])[:, 0],
    ):
        assert values[0] < 0.45 and values[1] > 0.9
    # It does not matter which of both is flatter.
    torch.testing.assert_close(copy_similarities([faded], [plain]), copy_similarities([plain], [faded]))


@pytest.mark.parametrize("side", [64, 48])
def test_the_structural_similarity_is_that_of_torchmetrics(side):
    pictures = [picture(seed, side) for seed in range(4)] + [noisy(picture(0, side)), Image.new("RGB", (side, side))]
    pixels = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255
    a, b = pixels.repeat_interleave(len(pixels), dim=0), pixels.repeat(len(pixels), 1, 1, 1)
    options = {"betas": (1 / 3, 1 / 3, 1 / 3), "data_range": 1.0, "normalize": "relu", "reduction": "none"}
    torch.testing.assert_close(multiscale_ssim(a, b), torchmetrics_ssim(a, b, **options).reshape(-1), rtol=0, atol=1e-5)


def test_the_highest_similarity_is_exact_above_the_least_and_a_bound_below_it():
    similarity = StructuralSimilarity()
    described = similarity.describe([picture(seed) for seed in range(6)])
    copies = similarity.describe([noisy(picture(0)), picture(9)])
    exact = similarity.compare(described, copies)
    assert similarity.highest(described, copies, 0.5) == pytest.approx(float(exact.max()), abs=1e-6)
    highest = similarity.highest(described, copies[1:], 0.9)
    assert float(exact[:, 1].max()) - 1e-6 <= highest <= 0.9


def test_a_copied_part_in_a_new_background_shows_in_tiles_alone():
    similarity, training = StructuralSimilarity(), picture(3)
    pasted = picture(4)
    pasted.paste(training.crop((16, 16, 48, 48)), (32, 0))
    tiled = TiledSimilarity(similarity, [training])
    assert float(similar(similarity, [pasted], [training])) < 0.5 < tiled([pasted])[0]
    assert tiled([picture(4)])[0] < tiled([pasted])[0] - 0.2
    assert tiled([Image.new("RGB", (64, 64), "blue")]) == [0]


def test_a_template_is_judged_in_its_fixed_region():
    frame = Image.new("L", (64, 64), 255)
    ImageDraw.Draw(frame).rectangle((20, 20, 43, 43), fill=0)
    training, other = picture(5), picture(5)
    other.paste(picture(6).crop((0, 0, 24, 24)), (20, 20))
    similarity = StructuralSimilarity()
    inside = similar(similarity, [within_region(other, frame)], [within_region(training, frame)])
    assert float(inside) > 0.999 > float(similar(similarity, [other], [training]))
    judged = ReplicationJudge(similarity, TrainingImages({"a": training}, {"a": frame}))
    assert judged.own("a", [other])[0] > 0.999 and judged.own("a", [picture(7)])[0] < 0.5


class MeanColours(torch.nn.Module):
    """A network that describes a picture by the colours of its quarters."""

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.adaptive_avg_pool2d(pixels, 2).flatten(1)


def test_a_copy_detector_from_a_file_names_its_variant(tmp_path):
    file = tmp_path / "detector.pt"
    torch.jit.script(MeanColours()).save(str(file))
    detector = CopyDetector(file, cut=0.9)
    assert detector.yardstick.file == "detector.pt" and len(detector.yardstick.sha256) == 64
    values = similar(detector, [picture(1), noisy(picture(1))], [picture(1), picture(2)])
    assert values[0, 0] > 0.999 and values[1, 0] > 0.9 and values[0, 1] < values[1, 0]


def test_what_is_no_copy_detector_is_refused_by_name(tmp_path):
    with pytest.raises(SettingsError, match="no copy detector at"):
        CopyDetector(tmp_path / "missing.pt")
    (tmp_path / "text.pt").write_text("no network")
    with pytest.raises(SettingsError, match="not a TorchScript file"):
        CopyDetector(tmp_path / "text.pt")
    torch.jit.script(torch.nn.Identity()).save(str(tmp_path / "identity.pt"))
    with pytest.raises(SettingsError, match="one vector each"):
        CopyDetector(tmp_path / "identity.pt")


def test_placeholders_are_told_from_pictures():
    assert "black" in placeholder(Image.new("RGB", (256, 256)))
    assert "one colour" in placeholder(Image.new("RGB", (256, 256), "grey"))
    assert "pixels large" in placeholder(Image.new("RGB", (1, 1), "grey"))
    error_page = Image.new("RGB", (256, 256), "white")
    ImageDraw.Draw(error_page).text((80, 120), "image not found", fill="black")
    assert "of it is one colour" in placeholder(error_page)
    on_white = Image.new("RGB", (256, 256), "white")
    on_white.paste(picture(1, 120), (68, 68))
    assert placeholder(on_white) is None and placeholder(picture(1)) is None


def test_a_dead_link_is_not_available_and_never_stands_for_a_picture(tmp_path):
    picture(1).save(tmp_path / "good.png")
    Image.new("RGB", (64, 64)).save(tmp_path / "black.png")
    (tmp_path / "page.png").write_text("<html>404</html>")
    rows = ["Caption,image,mask", "good,good.png,", "black,black.png,", "page,page.png,", "gone,gone.png,",
            "address,https://example.org/a.png,", "dead,https://example.org/dead.png,", "masked,good.png,black.png",
            "none,,"]  # fmt: skip
    (tmp_path / "prompts.csv").write_text("\n".join(rows))
    prompts = read_prompts(tmp_path / "prompts.csv")

    def fetch(address):
        if "dead" in address:
            raise OSError("HTTP 404")
        return (tmp_path / "good.png").read_bytes()

    found = known_training_images(prompts, fetch)
    assert set(found.images) == {"good", "address"}
    assert set(found.not_available) == {"black", "page", "gone", "dead", "masked"}
    assert "404" in found.not_available["dead"] and "marks nothing" in found.not_available["masked"]


def test_nothing_is_fetched_offline(monkeypatch):
    monkeypatch.setattr("nemo_prune.proof.training_images.is_offline_mode", lambda: True)
    found = known_training_images([Prompt("a", columns={"image": "https://example.org/a.png"})])
    assert not found.images and "HF_HUB_OFFLINE" in found.not_available["a"]


def test_the_control_of_an_attack_is_unlike_every_training_image():
    similarity = StructuralSimilarity()
    symmetric = Image.radial_gradient("L").resize((64, 64)).convert("RGB")
    training = TrainingImages({"a": picture(1), "b": symmetric})
    judge = ReplicationJudge(similarity, training)
    for image in training.images.values():
        control = judge.never_trained_on(image)
        assert max(judge.nearest([control])[0]) < similarity.yardstick.cut
    assert len(altered_pictures(symmetric)) == 6


def test_training_images_of_a_run_are_decoded_when_they_are_asked_for_and_refused_at_once(tmp_path):
    names = [tmp_path / f"{seed}.png" for seed in range(40)]
    for seed, name in enumerate(names):
        noisy(picture(seed, side=256)).save(name)
    prompts = [Prompt("without one"), *(Prompt(f"caption {name.stem}", image=name) for name in names)]
    images = TrainingImageFiles(prompts)
    assert list(images) == [f"caption {seed}" for seed in range(40)] and "without one" not in images
    assert sum(image.size == (256, 256) for image in images.values()) == 40
    assert images["caption 3"] is not images["caption 3"]
    assert images["caption 3"].tobytes() == Image.open(names[3]).tobytes()
    names[3].write_bytes(names[3].read_bytes()[:400])
    with pytest.raises(PromptError, match="`image` column"):
        TrainingImageFiles(prompts)
