"""How far two images or videos are apart.

They compare pixel by pixel: they say how much a technique changed a picture that was drawn from the same seed and
prompt. They say nothing about which of the two is better, or whether a prompt was followed.
"""

from collections.abc import Sequence

import numpy as np
from PIL import Image

Picture = Image.Image | np.ndarray


def image_distance(a: Picture, b: Picture) -> float:
    """Mean absolute difference over all pixels and channels, in levels of 0 to 255. 0 means identical.

    Each is a PIL image, or an array of shape (height, width[, channels]), integers in 0..255 or floats in 0..1.
    Raises ValueError if the shapes differ.
    """
    first, second = _pair(a, b)
    return float(np.abs(first - second).mean())


def video_distance(a: Sequence[Picture], b: Sequence[Picture]) -> float:
    """Mean `image_distance` over the frames: lists of pictures, or arrays of shape (frames, height, width, channels).

    Raises ValueError if there are no frames, or their numbers or shapes differ.
    """
    if len(a) != len(b) or len(a) == 0:
        raise ValueError(f"videos of {len(a)} and {len(b)} frames cannot be compared")
    return float(np.mean([image_distance(*frames) for frames in zip(a, b, strict=True)]))


def difference(a: Picture, b: Picture, factor: float = 8) -> np.ndarray:
    """A picture of where two pictures differ: black where they are equal, their difference times `factor` elsewhere.

    Raises ValueError if the shapes differ.
    """
    first, second = _pair(a, b)
    return np.clip(factor * np.abs(first - second), 0, 255).astype(np.uint8)


def _pair(a: Picture, b: Picture) -> tuple[np.ndarray, np.ndarray]:
    """Both pictures as levels, of one shape."""
    first, second = _levels(a), _levels(b)
    if first.shape != second.shape:
        raise ValueError(f"pictures of shapes {first.shape} and {second.shape} cannot be compared")
    return first, second


def _levels(picture: Picture) -> np.ndarray:
    """The picture as floats in 0..255."""
    array = np.asarray(picture)
    scale = 255.0 if np.issubdtype(array.dtype, np.floating) else 1.0
    return array.astype(np.float64) * scale
