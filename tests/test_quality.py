import numpy as np
import pytest
from PIL import Image

from helpers.quality import difference, image_distance, video_distance

GREY = np.full((4, 6, 3), 100, dtype=np.uint8)


def test_identical_pictures():
    assert image_distance(GREY, GREY.copy()) == 0


def test_distance_is_in_levels_and_has_no_direction():
    other = GREY.copy()
    other[:2] += 10  # half of the picture
    assert image_distance(GREY, other) == image_distance(other, GREY) == 5
    # Levels above 100 must not wrap around in uint8.
    assert image_distance(GREY, np.full_like(GREY, 250)) == 150


def test_kinds_of_pictures_mix():
    as_floats = GREY.astype(np.float32) / 255
    assert image_distance(Image.fromarray(GREY), as_floats) == pytest.approx(0, abs=1e-4)
    assert image_distance(GREY, as_floats + 1 / 255) == pytest.approx(1, abs=1e-4)


def test_shapes_must_match():
    with pytest.raises(ValueError, match=r"\(4, 6, 3\) and \(2, 6, 3\)"):
        image_distance(GREY, GREY[:2])


def test_video_distance_is_the_mean_over_frames():
    assert video_distance([GREY, GREY], [GREY, GREY + 10]) == 5
    assert video_distance(np.stack([GREY, GREY]), [Image.fromarray(GREY)] * 2) == 0
    for a, b in (([GREY], [GREY, GREY]), ([], [])):
        with pytest.raises(ValueError, match="frames"):
            video_distance(a, b)


def test_a_difference_is_black_where_pictures_are_equal():
    other = GREY.copy()
    other[0, 0] = (103, 98, 250)
    picture = difference(Image.fromarray(GREY), other)
    assert picture.dtype == np.uint8 and picture[0, 0].tolist() == [24, 16, 255]  # no level wraps around
    assert picture.sum() == picture[0, 0].sum()
    assert (difference(GREY, GREY + 1, factor=2) == 2).all()
    with pytest.raises(ValueError, match="cannot be compared"):
        difference(GREY, GREY[:2])
