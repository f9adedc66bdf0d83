import numpy as np
import torch
from PIL import Image

from nemo_prune.proof.images import copy_similarities, image_similarities, nearest_copies


def picture(array):
    return Image.fromarray(np.clip(array, 0, 255).astype(np.uint8)).resize((64, 64), Image.Resampling.BICUBIC)


def test_a_copy_agrees_in_its_pixels_and_a_dark_field_is_none_of_a_dark_picture():
    rng = np.random.default_rng(0)
    night = 12 + 4 * rng.random((16, 16, 3))
    night[4:12, 7:9] = 30
    training, darkness = picture(night), picture(np.full((16, 16, 3), 14.0))
    copy = picture(night + rng.normal(0, 1, night.shape))
    assert image_similarities([darkness], [training]) > 0.5
    assert copy_similarities([darkness], [training]) < 0.1
    assert copy_similarities([copy], [training]) > 0.7
    assert copy_similarities([training], [training]) > 0.999
    unrelated = [picture(255 * rng.random((16, 16, 3))) for _ in range(3)]
    assert copy_similarities(unrelated, unrelated).fill_diagonal_(0).max() < 0.3


def test_the_nearest_copy_is_found_without_comparing_everything():
    generator = torch.Generator().manual_seed(3)
    shapes = torch.rand(12, 8, 8, 3, generator=generator)
    pictures = [Image.fromarray((each * 255).byte().numpy()).resize((64, 64)) for each in shapes]
    mixed = [Image.blend(pictures[place], pictures[place + 1], share) for place, share in enumerate((0.1, 0.4, 0.6))]
    similarities = copy_similarities([*mixed, Image.new("RGB", (64, 64))], pictures)
    highest, nearest = nearest_copies([*mixed, Image.new("RGB", (64, 64))], pictures)
    torch.testing.assert_close(highest, similarities.amax(dim=1), rtol=0, atol=1e-5)
    assert nearest[:3].tolist() == similarities.argmax(dim=1)[:3].tolist() == [0, 1, 3]
