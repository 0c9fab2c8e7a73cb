"""Random views of a sample, drawn from a counter: the same at any world size and after any resume.

Every number is keyed by (seed, epoch, sample, modality), so it depends neither on the process that draws
it nor on what was drawn before.
"""

import math
import zlib

import numpy as np
from numpy.typing import NDArray

from mmfast.data.plan import Ints, uniform

Boxes = NDArray[np.int32]
_TRIES = 10
_RATIO = (3 / 4, 4 / 3)


def salt(name: str) -> int:
    """A number for a modality's name, so that two cameras draw independent views."""
    return zlib.crc32(name.encode())


def random_boxes(sizes: Ints, scale: tuple[float, float], *key: Ints | int) -> Boxes:
    """Boxes drawn as torchvision's ``RandomResizedCrop(scale=scale, ratio=(3/4, 4/3))`` draws them.

    The area is uniform in ``scale``, the log of the aspect uniform in its range, the place uniform; ten
    tries to fit inside the image, then the largest centred box of a permitted aspect.

    Args:
        sizes: height and width, int [n, 2].
        scale: smallest and largest share of the area.
        *key: what the draw depends on; ints or int [n].

    Returns:
        top, left, height, width, int32 [n, 4].
    """
    height, width = sizes[:, :1].astype(np.float64), sizes[:, 1:].astype(np.float64)  # [n, 1]
    draw = [
        uniform(*(k[:, None] if isinstance(k, np.ndarray) else k for k in key), i, np.arange(_TRIES))
        for i in range(4)
    ]  # 4 x [n, tries]
    area = height * width * (scale[0] + draw[0] * (scale[1] - scale[0]))
    low, high = math.log(_RATIO[0]), math.log(_RATIO[1])
    ratio = np.exp(low + draw[1] * (high - low))
    w, h = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))  # [n, tries]
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    top, left = np.floor(draw[2] * (height - h + 1)), np.floor(draw[3] * (width - w + 1))
    first = fits.argmax(axis=1)
    picked = np.stack([top, left, h, w], axis=2)[np.arange(len(sizes)), first]  # [n, 4]
    return np.where(fits.any(axis=1, keepdims=True), picked, _fallback(sizes)).astype(np.int32)


def _fallback(sizes: Ints) -> Ints:
    height, width = sizes[:, 0], sizes[:, 1]
    h = np.minimum(height, np.rint(width / _RATIO[0])).astype(np.int64)
    w = np.minimum(width, np.rint(height * _RATIO[1])).astype(np.int64)
    return np.stack([(height - h) // 2, (width - w) // 2, h, w], axis=1)


def centre_boxes(sizes: Ints) -> Boxes:
    """The largest centred square: scaled to a side of s it is "resize the short side to s, centre crop s"."""
    side = sizes.min(axis=1)
    return np.stack([(sizes[:, 0] - side) // 2, (sizes[:, 1] - side) // 2, side, side], axis=1).astype(
        np.int32
    )


def random_flips(*key: Ints | int) -> NDArray[np.bool_]:
    """True for half of the samples, [n]."""
    return uniform(*key, 4) < 0.5
