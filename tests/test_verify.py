import numpy as np
from PIL import Image

from nemo_prune.proof.images import copy_similarities, image_similarities


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
