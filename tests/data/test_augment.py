"""Boxes and flips: torchvision's distribution, from a counter."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms import RandomResizedCrop

from mmfast.data.augment import centre_boxes, random_boxes, random_flips, salt

SIZES = st.lists(st.tuples(st.integers(1, 500), st.integers(1, 500)), min_size=1, max_size=20)


@given(sizes=SIZES, low=st.floats(0.01, 1), seed=st.integers(0, 2**31))
@settings(max_examples=60)
def test_boxes_lie_inside_their_images(sizes, low, seed):
    sizes = np.array(sizes, np.int64)
    for boxes in (random_boxes(sizes, (low, 1.0), seed, np.arange(len(sizes))), centre_boxes(sizes)):
        assert (boxes[:, :2] >= 0).all() and (boxes[:, 2:] > 0).all()
        assert (boxes[:, :2] + boxes[:, 2:] <= sizes).all()


@pytest.mark.parametrize("size", [(200, 300), (100, 640), (640, 100), (33, 33)])
def test_boxes_are_distributed_as_torchvision_draws_them(size):
    n, scale = 4000, (0.08, 1.0)
    ours = random_boxes(np.tile(size, (n, 1)), scale, 0, np.arange(n)).astype(float)
    torch.manual_seed(0)
    image = torch.empty(3, *size)
    theirs = np.array(
        [RandomResizedCrop.get_params(image, list(scale), [3 / 4, 4 / 3]) for _ in range(n)], float
    )
    for column in range(4):  # the greatest distance between the two distributions (Kolmogorov-Smirnov)
        grid = np.unique(np.concatenate([ours[:, column], theirs[:, column]]))
        distance = np.abs(
            np.searchsorted(np.sort(ours[:, column]), grid, side="right")
            - np.searchsorted(np.sort(theirs[:, column]), grid, side="right")
        ).max()
        assert distance / n < 1.95 * (2 / n) ** 0.5  # p = 0.001


def test_a_draw_depends_on_seed_epoch_and_sample_only():
    sizes = np.full((40, 2), 100)
    ids, epochs = np.arange(40), np.arange(40) % 3
    whole = random_boxes(sizes, (0.3, 1.0), 5, epochs, ids)
    part = random_boxes(sizes[7:20:3], (0.3, 1.0), 5, epochs[7:20:3], ids[7:20:3])
    assert np.array_equal(whole[7:20:3], part)
    for other in ((6, epochs, ids), (5, epochs + 1, ids), (5, epochs, ids + 1)):
        assert (random_boxes(sizes, (0.3, 1.0), *other) != whole).any(axis=1).mean() > 0.9


def test_half_of_the_samples_are_flipped_independently_of_their_boxes():
    ids = np.arange(10_000)
    flips = random_flips(1, ids)
    assert abs(flips.mean() - 0.5) < 0.02
    boxes = random_boxes(np.full((10_000, 2), 100), (0.3, 1.0), 1, ids)
    assert abs(np.corrcoef(flips, boxes[:, 0])[0, 1]) < 0.04


def test_two_cameras_draw_independent_views():
    assert salt("left") != salt("right")
    draw = [
        random_boxes(np.full((50, 2), 90), (0.3, 1.0), 0, np.arange(50), salt(n)) for n in ("left", "right")
    ]
    assert (draw[0] != draw[1]).any(axis=1).mean() > 0.9
