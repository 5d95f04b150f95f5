"""Crops, heatmaps and duplicate people, against literal implementations and in round trips."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sis_lightning.datasets.constants import COCO_FLIP_PAIRS, COCO_KEYPOINTS, COCO_SIGMAS, flip_order
from sis_lightning.datasets.crops import Crop, apply, invert
from sis_lightning.models.heatmap_codec import HeatmapCodec, flip_back, oks, oks_nms, rescore

FLIP_ORDER = flip_order(17, COCO_FLIP_PAIRS)
CROPS = st.builds(
    Crop,
    centre=st.tuples(st.floats(-50, 400), st.floats(-50, 400)),
    size=st.floats(20, 600).map(lambda width: (width, width * 4 / 3)),
    output=st.just((96, 128)),
    rotation=st.floats(-80, 80),
    flipped=st.booleans(),
)


def keypoints_at(points) -> torch.Tensor:
    """Annotated keypoints (1, 17, 3) at the given points."""
    return torch.tensor([[*point, 2.0] for point in points])[None]


@settings(max_examples=100, deadline=None)
@given(
    stride=st.sampled_from([2, 4, 8]),
    sigma=st.floats(0.7, 3),
    places=st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=17, max_size=17),
)
def test_decoding_is_exact_to_half_a_heatmap_pixel(stride, sigma, places):
    codec = HeatmapCodec(64, 48, stride, sigma)
    height, width = codec.shape
    points = [(x * (width - 1) * stride, y * (height - 1) * stride) for x, y in places]
    heatmaps, weights = codec.encode(keypoints_at(points))
    assert heatmaps.shape == (1, 17, height, width)
    assert weights.eq(1).all()
    assert heatmaps.amax(dim=(2, 3)).eq(1).all()
    identity = torch.tensor([[[1.0, 0, 0], [0, 1, 0]]], dtype=torch.float64)
    found = codec.decode(heatmaps, identity)[0]
    error = (found[:, :2] - torch.tensor(points, dtype=torch.float64)).abs() / stride
    assert error.max() <= 0.5 + 1e-6
    assert found[:, 2].eq(1).all()


@settings(max_examples=100, deadline=None)
@given(crop=CROPS, places=st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=17, max_size=17))
def test_encoding_and_decoding_through_any_crop(crop, places):
    codec = HeatmapCodec(crop.output[1], crop.output[0])
    height, width = codec.shape
    inside = np.array([[x * (width - 1) * 4, y * (height - 1) * 4, 2] for x, y in places])
    person = inside.copy()
    person[:, :2] = apply(crop.to_image, inside[:, :2])  # every keypoint is inside the crop
    heatmaps, _ = codec.encode(torch.from_numpy(crop.move_keypoints(person, FLIP_ORDER)).float()[None])
    found = codec.decode(heatmaps, torch.from_numpy(crop.to_image)[None])[0].numpy()
    if crop.flipped:
        found = found[list(FLIP_ORDER)]
    half_a_pixel = 0.5 * 4 * crop.size[0] / crop.output[0]
    assert np.hypot(*(found[:, :2] - person[:, :2]).T).max() <= math.sqrt(2) * half_a_pixel + 1e-3


def test_gaussians_equal_those_of_simple_baselines():
    codec = HeatmapCodec(256, 192, 4, 2.0)
    points = [(4.0 * (3 * i), 4.0 * (i + 5) + 1.9) for i in range(16)] + [(0.0, 255.0)]
    heatmaps, _ = codec.encode(keypoints_at(points))
    for (x, y), got in zip(points, heatmaps[0].numpy(), strict=True):
        want = np.zeros((64, 48))
        mu_x, mu_y = int(x / 4 + 0.5), int(y / 4 + 0.5)
        for row in range(mu_y - 6, mu_y + 7):
            for column in range(mu_x - 6, mu_x + 7):
                if 0 <= row < 64 and 0 <= column < 48:
                    want[row, column] = math.exp(-((column - mu_x) ** 2 + (row - mu_y) ** 2) / (2 * 2.0**2))
        np.testing.assert_allclose(got, want, atol=1e-6)


def test_keypoints_that_are_not_annotated_or_far_outside_have_no_weight():
    codec = HeatmapCodec(64, 48, 4, 1.0)
    keypoints = keypoints_at([(10.0, 10.0)] * 17)
    keypoints[0, 0, 2] = 0
    keypoints[0, 1, :2] = torch.tensor([-13.9, 10])  # rounds to -3, whose Gaussian just reaches the heatmap
    keypoints[0, 2, :2] = torch.tensor([-15.0, 10])
    keypoints[0, 3, :2] = torch.tensor([10, 4 * 15 + 12.0])
    keypoints[0, 4, :2] = torch.tensor([10, 4 * 15 + 15.0])
    keypoints[0, 5, 2] = 1  # annotated, but not visible
    heatmaps, weights = codec.encode(keypoints)
    assert weights[0, :6].tolist() == [0, 1, 0, 1, 0, 1]
    assert heatmaps[0, 0].max() == 0
    assert heatmaps[0, 1].max() > 0
    assert heatmaps[0, 2].max() == 0


def test_decoding_moves_by_a_quarter_of_a_pixel_towards_the_larger_neighbour():
    heatmaps = torch.zeros(1, 17, 5, 6)
    heatmaps[..., 2, 3] = 1
    heatmaps[0, 1, 2, 4] = 0.5
    heatmaps[0, 2, 1, 3] = 0.5
    heatmaps[0, 3] = 0
    heatmaps[0, 3, 0, 5] = 1  # in a corner there is no neighbour to compare
    heatmaps[0, 3, 0, 4] = 0.9
    identity = torch.eye(3, dtype=torch.float64)[None, :2]
    found = HeatmapCodec(20, 24).decode(heatmaps, identity)[0, :4].tolist()
    assert found == [[12, 8, 1], [13, 8, 1], [12, 7, 1], [20, 0, 1]]


@settings(max_examples=50, deadline=None)
@given(crop=CROPS, points=st.lists(st.tuples(st.floats(-99, 500), st.floats(-99, 500)), min_size=17, max_size=17))
def test_to_image_is_the_inverse_of_to_crop(crop, points):
    points = np.array(points)
    np.testing.assert_allclose(apply(crop.to_image, apply(crop.to_crop, points)), points, atol=1e-6)
    np.testing.assert_allclose(invert(invert(crop.to_crop)), crop.to_crop, atol=1e-6)


@pytest.mark.parametrize("flipped", [False, True])
@pytest.mark.parametrize("rotation", [0, 35, -90])
def test_pixels_and_keypoints_move_together(flipped, rotation):
    image = torch.zeros(3, 200, 160, dtype=torch.uint8)
    spots = [(60, 80), (90, 120), (75, 100)]
    for channel, (x, y) in enumerate(spots):
        image[channel, y - 2 : y + 3, x - 2 : x + 3] = 255
    crop = Crop((75, 100), (90, 120), (96, 128), rotation, flipped)
    cut = crop.cut(image).double()
    assert cut.shape == (3, 128, 96)
    person = np.zeros((17, 3))
    person[:3, :2], person[:, 2] = spots, 2
    moved = crop.move_keypoints(person, FLIP_ORDER)
    for channel in range(3):
        name = FLIP_ORDER.index(channel) if flipped else channel
        mass = cut[channel]
        y = (mass.sum(1) * torch.arange(128)).sum() / mass.sum()
        x = (mass.sum(0) * torch.arange(96)).sum() / mass.sum()
        assert (float(x), float(y)) == pytest.approx(tuple(moved[name, :2]), abs=0.1)


def test_a_crop_extends_the_box_to_the_proportions_of_the_output():
    wide = Crop.around(np.array([10.0, 20, 130, 40]), (192, 256))
    assert (wide.centre, wide.size) == ((70, 30), (120 * 1.25, 160 * 1.25))
    tall = Crop.around(np.array([0.0, 0, 10, 200]), (192, 256))
    assert tall.size == (150 * 1.25, 200 * 1.25)
    corners = apply(tall.to_image, np.array([[0.0, 0], [192, 256]]))
    np.testing.assert_allclose(corners[1] - corners[0], tall.size)


def test_heatmaps_of_a_flipped_crop_are_flipped_back():
    for index, name in enumerate(COCO_KEYPOINTS):
        side, _, part = name.rpartition("_")
        assert COCO_KEYPOINTS[FLIP_ORDER[index]] == {"left": f"right_{part}", "right": f"left_{part}", "": name}[side]
    codec = HeatmapCodec(64, 48, 4, 1.0)
    left_wrist, right_wrist = COCO_KEYPOINTS.index("left_wrist"), COCO_KEYPOINTS.index("right_wrist")
    crop = Crop((24, 32), (48, 64), (48, 64))
    person = np.zeros((17, 3))
    person[left_wrist], person[right_wrist] = (31, 12, 2), (9, 40, 2)
    straight, _ = codec.encode(torch.from_numpy(crop.move_keypoints(person, FLIP_ORDER)).float()[None])
    flipped = Crop(crop.centre, crop.size, crop.output, flipped=True)
    turned, _ = codec.encode(torch.from_numpy(flipped.move_keypoints(person, FLIP_ORDER)).float()[None])
    back = flip_back(turned, FLIP_ORDER)
    for keypoint in (left_wrist, right_wrist):
        peaks = [divmod(int(maps[0, keypoint].argmax()), 12) for maps in (straight, back)]
        assert peaks[0][0] == peaks[1][0]
        assert abs(peaks[0][1] - peaks[1][1]) <= 1


def test_oks_equals_that_of_coco():
    from pycocotools.cocoeval import COCOeval

    evaluation = COCOeval(iouType="keypoints")
    rng = np.random.default_rng(0)
    one, others = rng.uniform(0, 100, (17, 3)), rng.uniform(0, 100, (4, 17, 3))
    one[:, 2] = 2
    truth = {"keypoints": one.reshape(-1).tolist(), "area": 900.0, "bbox": [0, 0, 9, 9], "id": 1, "ignore": 0}
    found = [{"keypoints": other.reshape(-1).tolist(), "score": 1 - i / 9} for i, other in enumerate(others)]
    evaluation._gts[1, 1], evaluation._dts[1, 1] = [truth], found
    want = evaluation.computeOks(1, 1)[:, 0]
    np.testing.assert_allclose(oks(one, others, 900.0, np.full(4, 900.0), COCO_SIGMAS), want, rtol=1e-9)


def test_duplicate_people_are_removed():
    rng = np.random.default_rng(1)
    first, second = rng.uniform(0, 200, (2, 17, 3))
    people = np.stack([first, second, first + 0.3, first + 60])
    scores, areas = np.array([0.5, 0.9, 0.7, 0.6]), np.full(4, 5000.0)
    assert oks_nms(people, scores, areas, COCO_SIGMAS) == [1, 2, 3]
    assert oks_nms(people, scores, areas, COCO_SIGMAS, limit=1.0) == [1, 2, 3, 0]
    assert oks_nms(people[:0], scores[:0], areas[:0], COCO_SIGMAS) == []


def test_the_score_of_a_person_depends_on_box_and_visible_keypoints():
    keypoints = np.array([0.9, 0.5, 0.2, 0.1])
    assert rescore(0.8, keypoints) == pytest.approx(0.8 * 0.7)
    assert rescore(0.8, np.zeros(17)) == 0
