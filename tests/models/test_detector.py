"""Faster R-CNN against mmdetection's own code, whose values are in mmdetection_values.json, and against torchvision's.

`mmdetection_values.py` says how the values were computed.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given as vary
from hypothesis import settings
from hypothesis import strategies as st
from torch import nn
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import fastrcnn_loss
from torchvision.models.detection.rpn import AnchorGenerator, RegionProposalNetwork
from torchvision.ops import MultiScaleRoIAlign

from sis_lightning import Detector
from sis_lightning.backbones import backbone_config

THEIRS = json.loads(Path(__file__).with_name("mmdetection_values.json").read_text())
TORCHVISION = yaml.safe_load((Path(__file__).parents[2] / "configs" / "torchvision_detector.yaml").read_text())
SMALL = backbone_config("sis_demo", channels=8, width=4)
SIZES = {"fpn_channels": 8, "head_channels": 16}
ALL = {"rpn_batch_size_per_image": 100_000, "box_batch_size_per_image": 1000, "box_positive_fraction": 0.5}


def detector(**options) -> Detector:
    torch.manual_seed(0)
    given = {**ALL, **options.pop("detector", {})}
    return Detector(SMALL, 3, **{**SIZES, **options}, detector=given)


def torchvisions(**options) -> Detector:
    theirs = dict(TORCHVISION["model"]["init_args"])
    del theirs["norm_weight_decay"]  # the task's
    return detector(**{**theirs, **options})


def sines(*shape: int, scale: float) -> torch.Tensor:
    """The values that mmdetection's code was given."""
    count = math.prod(shape)
    return (torch.arange(1, count + 1, dtype=torch.float64) * 12.9898).sin().reshape(shape).float() * scale


class Fixed(nn.Module):
    """Returns what it was given, whatever it is called with."""

    def __init__(self, *outputs) -> None:
        super().__init__()
        self.outputs = outputs if len(outputs) > 1 else outputs[0]

    def forward(self, *_):
        return self.outputs


@pytest.fixture
def images() -> ImageList:
    return ImageList(torch.zeros(2, 3, *THEIRS["batch"]), [tuple(size) for size in THEIRS["sizes"]])


@pytest.fixture
def maps() -> dict[str, torch.Tensor]:
    names = ("c2", "c3", "c4", "c5", "pool")
    return {name: torch.zeros(2, 8, *shape) for name, shape in zip(names, THEIRS["rpn"]["maps"], strict=True)}


@pytest.fixture
def targets() -> list[dict[str, torch.Tensor]]:
    return [
        {"boxes": torch.tensor(boxes), "labels": torch.tensor(labels) + 1}
        for boxes, labels in zip(THEIRS["boxes"], THEIRS["labels"], strict=True)
    ]


def close(got: torch.Tensor, want: list[float], **options) -> None:
    torch.testing.assert_close(got.flatten(), torch.tensor(want), **{"rtol": 1e-4, "atol": 1e-4, **options})


def test_anchors_are_mmdetections(images, maps):
    anchors = detector().rpn.anchor_generator(images, list(maps.values()))
    assert len(anchors) == 2
    for boxes in anchors:
        close(boxes[::37], THEIRS["rpn"]["anchors"])


def test_targets_and_losses_of_proposals_are_mmdetections(images, maps, targets):
    limits = {"rpn_pre_nms_top_n_train": 60, "rpn_post_nms_top_n_train": 20}
    rpn, want = detector(detector=limits).rpn.train(), THEIRS["rpn"]
    shapes = want["maps"]
    rpn.head = Fixed(
        [sines(2, 3, *shape, scale=2.0 + level) for level, shape in enumerate(shapes)],
        [sines(2, 12, *shape, scale=0.3 + 0.1 * level) for level, shape in enumerate(shapes)],
    )
    seen = {}
    rpn.compute_loss, compute = (
        lambda *given: seen.update(labels=given[2], targets=given[3]) or compute(*given),
        rpn.compute_loss,
    )
    proposals, losses = rpn(images, maps, targets)
    for index in range(2):
        label = seen["labels"][index]
        positive, ignored = torch.where(label == 1)[0], torch.where(label == -1)[0]
        assert positive.tolist() == want["positive"][index]
        assert (len(ignored), int(ignored.sum())) == (want["ignored"][index], want["ignored_sum"][index])
        close(seen["targets"][index][positive], want["targets"][index])
        close(proposals[index], want["proposals"][index], atol=1e-3)
    assert float(losses["loss_objectness"]) == pytest.approx(want["loss_objectness"], rel=1e-4)
    assert float(losses["loss_rpn_box_reg"]) == pytest.approx(want["loss_boxes"], rel=1e-4)


def test_targets_and_losses_of_the_box_head_are_mmdetections(maps, targets):
    heads, want = detector().roi_heads.train(), THEIRS["box_head"]
    seen = {}

    class Waves(nn.Module):
        """Scores and shifts as functions of the boxes: their order is not the same there and here."""

        def forward(self, boxes):
            wave = (boxes.double() @ torch.tensor([[0.11], [0.07], [0.05], [0.13]], dtype=torch.float64)).flatten()
            scores = torch.stack([(wave * (1 + k)).sin() * 2 for k in (3, 0, 1, 2)], dim=1)  # background first
            shifts = torch.stack([(wave * (2 + k)).cos() for k in range(12)], dim=1)
            return scores.float(), torch.cat([torch.zeros(len(boxes), 4), shifts.float()], dim=1)

    class Boxes(nn.Module):
        def forward(self, features, proposals, sizes):
            seen["boxes"] = proposals
            return torch.cat(proposals)

    heads.box_roi_pool, heads.box_head, heads.box_predictor = Boxes(), nn.Identity(), Waves()
    select = heads.select_training_samples
    heads.select_training_samples = lambda *given: seen.setdefault("samples", select(*given))
    _, losses = heads(maps, [torch.tensor(boxes) for boxes in want["proposals"]], THEIRS["sizes"], targets)
    boxes, _, labels, wanted = seen["samples"]
    assert [len(found) for found in boxes] == want["samples"]
    boxes, labels, wanted = torch.cat(boxes), torch.cat(labels), torch.cat(wanted)
    positive = labels > 0
    rows = torch.cat([boxes, labels[:, None] - 1, wanted], dim=1)[positive]
    theirs = torch.cat([torch.tensor(want["positive"]), torch.tensor(want["targets"]).reshape(-1, 4)], dim=1)
    by_place = [table[np.lexsort(table[:, :4].round().T.numpy())] for table in (rows, theirs)]
    torch.testing.assert_close(*by_place, rtol=1e-4, atol=1e-4)
    assert float(losses["loss_classifier"]) == pytest.approx(want["loss_classes"], rel=1e-4)
    assert float(losses["loss_box_reg"]) == pytest.approx(want["loss_boxes"], rel=1e-4)


def test_initial_weights_are_mmdetections():
    torch.manual_seed(1)
    network = Detector("resnet50", 3, fpn_norm="none")
    for name, want in THEIRS["initial"].items():
        layer = network.get_submodule(name).requires_grad_(requires_grad=False)
        assert float(layer.weight.std()) == pytest.approx(want["std"], rel=0.1), name
        assert float(layer.weight.abs().max()) == pytest.approx(want["max"], rel=0.35), name
        assert float(layer.bias.abs().max()) == want["bias"] == 0


def test_boxes_are_pooled_from_mmdetections_levels():
    boxes = [torch.tensor([[7.0, 9.0, 7 + side * 2, 9 + side / 2]]) for side in THEIRS["levels"]["sides"]]
    # Boxes reach beyond the maps, whose values are 1 and more: 0 comes from outside.
    maps = {name: torch.full((1, 1, 2000, 4000), 1.0 + level) for level, name in enumerate(("c2", "c3", "c4", "c5"))}
    pool = detector().roi_heads.box_roi_pool
    for box, level in zip(boxes, THEIRS["levels"]["levels"], strict=True):
        assert float(pool(maps, [box], [(8000, 16000)]).max()) == 1 + level


def test_a_pyramid_may_leave_out_levels():
    network = detector(levels=("c2", "c4"), anchor_sizes=(32, 128, 256))
    maps = {"c2": torch.full((1, 1, 256, 256), 2.0), "c4": torch.full((1, 1, 64, 64), 4.0)}
    boxes = torch.tensor([[500.0, 500, 500 + side, 500 + side] for side in (400, 20, 130, 250)])
    got = network.roi_heads.box_roi_pool(maps, [boxes], [(1024, 1024)])
    # 130 px belong to c3, which is not there: the next finer level has them.
    assert got.flatten(1).unique(dim=1).flatten().tolist() == [4.0, 2.0, 2.0, 4.0]


def bilinear(plane: np.ndarray, y: float, x: float) -> float:
    height, width = plane.shape
    if y < -1 or y > height or x < -1 or x > width:
        return 0.0
    y, x = min(max(y, 0), height - 1), min(max(x, 0), width - 1)
    top, left = int(y), int(x)
    low, right = min(top + 1, height - 1), min(left + 1, width - 1)
    dy, dx = y - top, x - left
    upper = plane[top, left] * (1 - dx) + plane[top, right] * dx
    return upper * (1 - dy) + (plane[low, left] * (1 - dx) + plane[low, right] * dx) * dy


def pooled(plane: np.ndarray, box: list[float], stride: int) -> np.ndarray:
    """RoIAlign of He et al. 2017 with half coordinates and as many points as pixels, one bin after the other."""
    x1, y1, x2, y2 = (side / stride - 0.5 for side in box)
    height, width = (y2 - y1) / 7, (x2 - x1) / 7
    rows, columns = math.ceil(height), math.ceil(width)
    out = np.zeros((7, 7))
    for i, j in np.ndindex(7, 7):
        points = [
            bilinear(plane, y1 + height * (i + (a + 0.5) / rows), x1 + width * (j + (b + 0.5) / columns))
            for a in range(rows)
            for b in range(columns)
        ]
        out[i, j] = np.mean(points)
    return out


@settings(max_examples=20, deadline=None)
@vary(
    x=st.floats(0, 60), y=st.floats(0, 60), width=st.floats(3, 130), height=st.floats(3, 130), seed=st.integers(0, 99)
)
def test_pooling_takes_half_coordinates_and_a_point_for_each_pixel(x, y, width, height, seed):
    generator = np.random.default_rng(seed)
    planes = {
        name: generator.normal(size=(size, size)) for name, size in (("c2", 48), ("c3", 24), ("c4", 12), ("c5", 6))
    }
    # Boxes of 8…64 px side come from c2, those of 64…128 from c3.
    network = detector(canonical_scale=256)
    boxes = torch.tensor([[x, y, x + width, y + height], [1.0, 2.0, 20.0, 190.0]], dtype=torch.float64)
    maps = {name: torch.tensor(plane)[None, None] for name, plane in planes.items()}
    got = network.roi_heads.box_roi_pool(maps, [boxes], [(192, 192)])
    level = max(0, min(3, math.floor(math.log2(math.sqrt(width * height) / 64 + 1e-6))))
    for found, box, number in zip(got, boxes.tolist(), (level, 0), strict=True):
        want = pooled(planes[f"c{number + 2}"], box, 4 * 2**number)
        np.testing.assert_allclose(found[0].numpy(), want, rtol=1e-6, atol=1e-6)


# torchvision's setting


def test_anchors_of_torchvision(images, maps):
    sizes = ((32,), (64,), (128,), (256,), (512,))
    want = AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * 5)(images, list(maps.values()))
    got = torchvisions().rpn.anchor_generator(images, list(maps.values()))
    assert all(torch.equal(*pair) for pair in zip(got, want, strict=True))
    # The settings differ where the padded image is no multiple of the stride, and in the sides.
    ours = detector().rpn.anchor_generator(images, list(maps.values()))
    assert not torch.allclose(ours[0], want[0])


def test_targets_and_losses_of_torchvision(images, maps, targets):
    rpn = torchvisions().rpn.train()
    anchors = rpn.anchor_generator(images, list(maps.values()))
    plain = RegionProposalNetwork(rpn.anchor_generator, rpn.head, 0.7, 0.3, 100_000, 0.5, {}, {}, 0.7)
    sized = [{**target, "size": torch.tensor(size)} for target, size in zip(targets, images.image_sizes, strict=True)]
    sized.append({"boxes": torch.zeros(0, 4), "size": torch.tensor(THEIRS["batch"])})
    anchors.append(anchors[0])
    got, want = (part.assign_targets_to_anchors(anchors, sized) for part in (rpn, plain))
    for found, wanted, boxes, theirs in zip(got[0], want[0], got[1], want[1], strict=True):
        assert torch.equal(found, wanted)
        assert torch.equal(boxes[found == 1], theirs[found == 1])
    count = sum(map(len, anchors))
    scores, deltas = sines(count, 1, scale=2.0), sines(count, 4, scale=0.3)
    encoded = rpn.box_coder.encode(want[1], anchors)
    losses = (part.compute_loss(scores, deltas, want[0], list(encoded)) for part in (rpn, plain))
    torch.testing.assert_close(*losses)


def test_the_box_heads_loss_of_torchvision():
    heads = torchvisions().roi_heads.train()
    labels, wanted = [torch.tensor([0, 2, 1]), torch.tensor([3, 0])], [sines(3, 4, scale=0.5), sines(2, 4, scale=0.2)]
    scores, deltas = sines(5, 4, scale=1.0), sines(5, 16, scale=1.0)
    heads.select_training_samples = lambda *_: ([], None, labels, wanted)
    heads.box_roi_pool, heads.box_head, heads.box_predictor = Fixed(None), Fixed(None), Fixed(scores, deltas)
    _, losses = heads({}, [], [], [])
    want = fastrcnn_loss(scores, deltas, labels, wanted)
    torch.testing.assert_close((losses["loss_classifier"], losses["loss_box_reg"]), want)


def test_pooling_of_torchvision():
    network = torchvisions(canonical_scale=64)
    maps = {name: torch.randn(2, 8, size, size) for name, size in (("c2", 48), ("c3", 24), ("c4", 12), ("c5", 6))}
    corners = torch.rand(2, 12, 2) * 90
    boxes = list(torch.cat([corners, corners + 1 + torch.rand(2, 12, 2) * 100], dim=2))
    plain = MultiScaleRoIAlign(list(maps), 7, 2, canonical_scale=64)
    got, want = (pool(maps, boxes, [(192, 192)] * 2) for pool in (network.roi_heads.box_roi_pool, plain))
    torch.testing.assert_close(got, want)


def test_initial_weights_of_torchvision():
    network = torchvisions(fpn_channels=64, head_channels=256).requires_grad_(requires_grad=False)
    layer = network.backbone.fpn.layer_blocks[0][0].weight
    assert float(layer.abs().max()) == pytest.approx(math.sqrt(3 / (64 * 9)), rel=0.01)  # He's uniform, slope 1
    assert float(network.roi_heads.box_head.fc7.weight.abs().max()) == pytest.approx(1 / 16, rel=0.01)
