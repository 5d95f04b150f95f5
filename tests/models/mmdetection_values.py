"""Writes mmdetection_values.json: what mmdetection's own code computes from given inputs, for test_detector.py.

It is not a test. It was run once, in an environment of its own, with mmdetection's released code:

    pip install torch torchvision pycocotools shapely mmdet==3.3.0 mmengine==0.10.7 mmcv-lite==2.1.0
    python tests/models/mmdetection_values.py

mmcv-lite has no compiled operators. Only the suppression of overlapping boxes is needed of them, which torchvision has.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import types
from pathlib import Path

import torch
import torchvision


def batched_nms(boxes, scores, groups, nms_cfg):
    keep = torchvision.ops.batched_nms(boxes, scores, groups, nms_cfg["iou_threshold"])
    return torch.cat([boxes[keep], scores[keep, None]], dim=1), keep


class Absent(types.ModuleType):
    """A module in which every name is an empty class."""

    __path__ = ()

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (torch.nn.Module,), {})


class Operators:
    """Finds mmcv.ops and its parts."""

    def find_spec(self, name, path=None, target=None):
        return importlib.util.spec_from_loader(name, self) if name.startswith("mmcv.ops") else None

    def create_module(self, spec):
        return Absent(spec.name)

    def exec_module(self, module):
        module.batched_nms = batched_nms


sys.meta_path.insert(0, Operators())

import mmcv.cnn.bricks.transformer

mmcv.cnn.bricks.transformer.MultiScaleDeformableAttention = torch.nn.Module

import mmdet
from mmdet.models.dense_heads import RPNHead
from mmdet.models.necks import FPN
from mmdet.models.roi_heads.bbox_heads import Shared2FCBBoxHead
from mmdet.models.roi_heads.roi_extractors import SingleRoIExtractor
from mmdet.models.task_modules import MaxIoUAssigner, RandomSampler
from mmdet.utils import register_all_modules
from mmengine.config import Config, ConfigDict
from mmengine.structures import InstanceData

register_all_modules(init_default_scope=True)
CONFIG = Path(mmdet.__file__).parent / ".mim" / "configs" / "_base_" / "models" / "faster-rcnn_r50_fpn.py"
MODEL = Config.fromfile(str(CONFIG)).model
# Two images in a batch of 160 × 224 px; their own padded sizes, and their objects: one overlaps with no anchor by 0.3,
# two share their best anchor, and one is in the corner.
PADDED, BATCH = [(160, 224), (96, 160)], (160, 224)
SIZES = [(150, 221), (90, 131)]
BOXES = [
    [[3.0, 5.0, 40.0, 60.5], [90.0, 20.0, 214.5, 140.0], [100.0, 26.0, 200.0, 130.0], [30.2, 100.1, 36.4, 104.9]],
    [[100.0, 40.0, 131.0, 90.0], [12.0, 8.0, 76.0, 72.0]],
]
LABELS = [[0, 2, 1, 0], [2, 2]]
STRIDES = [4, 8, 16, 32, 64]


def rounded(x):
    return [round(value, 6) for value in x.flatten().tolist()]


def given(*shape: int, scale: float) -> torch.Tensor:
    """Values that anyone can compute again: sines of whole numbers."""
    count = int(torch.tensor(shape).prod())
    return (torch.arange(1, count + 1, dtype=torch.float64) * 12.9898).sin().reshape(shape).float() * scale


def rpn(values: dict) -> None:
    train = ConfigDict(MODEL.train_cfg.rpn)
    train.sampler = ConfigDict(train.sampler, num=100_000)  # all, so that nothing depends on chance
    test = ConfigDict(MODEL.test_cfg.rpn)
    test.max_per_img, test.nms_pre = 20, 60
    head = RPNHead(**{k: v for k, v in MODEL.rpn_head.items() if k != "type"}, train_cfg=train, test_cfg=test)
    maps = [(BATCH[0] // stride + (BATCH[0] % stride > 0), -(-BATCH[1] // stride)) for stride in STRIDES]
    metas = [
        {"pad_shape": padded, "img_shape": size, "batch_input_shape": BATCH, "scale_factor": (1.0, 1.0)}
        for padded, size in zip(PADDED, SIZES, strict=True)
    ]
    objects = [
        InstanceData(bboxes=torch.tensor(boxes), labels=torch.tensor(labels))
        for boxes, labels in zip(BOXES, LABELS, strict=True)
    ]
    for item in objects:
        item.labels = torch.zeros_like(item.labels)
    scores = [given(2, 3, *shape, scale=2.0 + level) for level, shape in enumerate(maps)]
    deltas = [given(2, 12, *shape, scale=0.3 + 0.1 * level) for level, shape in enumerate(maps)]
    anchors, valid = head.get_anchors(maps, metas, device="cpu")
    labels, weights, targets, *_ = head.get_targets(anchors, valid, objects, metas)
    state = torch.cat(
        [torch.where(w > 0, (label == 0).float(), -1.0) for label, w in zip(labels, weights, strict=True)], dim=1
    )
    positive = state == 1
    target = torch.cat(targets, dim=1)
    losses = head.loss_by_feat(scores, deltas, objects, metas)
    found = head.predict_by_feat(scores, deltas, batch_img_metas=metas, rescale=False)
    values["rpn"] = {
        "maps": maps,
        "anchors": rounded(torch.cat(anchors[0])[::37]),
        "positive": [torch.where(row)[0].tolist() for row in positive],
        "ignored": [int((row == -1).sum()) for row in state],
        "ignored_sum": [int(torch.where(row == -1)[0].sum()) for row in state],
        "targets": [rounded(target[image][positive[image]]) for image in range(2)],
        "loss_objectness": float(sum(losses["loss_rpn_cls"])),
        "loss_boxes": float(sum(losses["loss_rpn_bbox"])),
        "proposals": [rounded(item.bboxes) for item in found],
    }
    torch.manual_seed(0)
    head.init_weights()
    values["initial"] |= {"rpn.head.cls_logits": spread(head.rpn_cls), "rpn.head.bbox_pred": spread(head.rpn_reg)}
    values["initial"]["rpn.head.conv.0.0"] = spread(head.rpn_conv)


def box_head(values: dict) -> None:
    head = Shared2FCBBoxHead(
        **{k: v for k, v in MODEL.roi_head.bbox_head.items() if k not in ("type", "num_classes")}, num_classes=3
    )
    train = ConfigDict(MODEL.train_cfg.rcnn)
    assigner = MaxIoUAssigner(**{k: v for k, v in train.assigner.items() if k != "type"})
    options = {k: v for k, v in train.sampler.items() if k not in ("type", "num", "pos_fraction")}
    sampler = RandomSampler(num=1000, pos_fraction=0.5, **options)
    proposals = [[], []]
    for image, boxes in enumerate(BOXES):
        for index, box in enumerate(boxes * 4):
            shift = given(4, scale=4.0 + 5.0 * index) * (1 if index % 2 else -1)
            x1, y1, x2, y2 = (torch.tensor(box) + shift).tolist()
            proposals[image].append(
                [round(max(x1, 0), 2), round(max(y1, 0), 2), round(max(x2, x1 + 4, 4), 2), round(max(y2, y1 + 4, 4), 2)]
            )
    results = []
    for boxes, labels, found in zip(BOXES, LABELS, proposals, strict=True):
        truth = InstanceData(bboxes=torch.tensor(boxes), labels=torch.tensor(labels))
        candidates = InstanceData(priors=torch.tensor(found))
        assigned = assigner.assign(candidates, truth)
        results.append(sampler.sample(assigned, candidates, truth))
    regions = torch.cat([item.priors for item in results])
    # Scores and shifts are functions of the box, as the order in which samples are drawn differs.
    waves = (regions.double() @ torch.tensor([[0.11], [0.07], [0.05], [0.13]], dtype=torch.float64)).flatten()
    scores = torch.stack([(waves * (1 + k)).sin() * 2 for k in range(4)], dim=1).float()  # the background is the last
    deltas = torch.stack([(waves * (2 + k)).cos() for k in range(12)], dim=1).float()
    rois = torch.cat([torch.zeros(len(regions), 1), regions], dim=1)
    losses = head.loss_and_target(scores, deltas, rois, results, train)["loss_bbox"]
    labels, _, targets, _ = head.get_targets(results, train)
    chosen = labels < 3
    values["box_head"] = {
        "proposals": proposals,
        "samples": [len(item.priors) for item in results],
        "positive": [[*rounded(box), int(label)] for box, label in zip(regions[chosen], labels[chosen], strict=True)],
        "targets": rounded(targets[chosen]),
        "loss_classes": float(losses["loss_cls"]),
        "loss_boxes": float(losses["loss_bbox"]),
    }
    torch.manual_seed(0)
    head.init_weights()
    values["initial"] |= {
        "roi_heads.box_head.fc6": spread(head.shared_fcs[0]),
        "roi_heads.box_head.fc7": spread(head.shared_fcs[1]),
        "roi_heads.box_predictor.bbox_pred": spread(head.fc_reg),
        "roi_heads.box_predictor.cls_score": spread(head.fc_cls),
    }


def pyramid(values: dict) -> None:
    torch.manual_seed(0)
    neck = FPN(**{k: v for k, v in MODEL.neck.items() if k != "type"})
    neck.init_weights()
    values["initial"] |= {
        "backbone.fpn.inner_blocks.0.0": spread(neck.lateral_convs[0].conv),
        "backbone.fpn.inner_blocks.3.0": spread(neck.lateral_convs[3].conv),
        "backbone.fpn.layer_blocks.0.0": spread(neck.fpn_convs[0].conv),
    }


def spread(layer) -> dict[str, float]:
    weight = layer.weight.detach()
    largest = float(weight.abs().max())
    return {"std": float(weight.std()), "max": largest, "bias": float(layer.bias.detach().abs().max())}


def levels(values: dict) -> None:
    sides = [10.0, 55.9, 56.0, 111.0, 112.5, 223.9, 224.5, 447.0, 448.5, 900.0, 5000.0]
    regions = torch.tensor([[0, 7.0, 9.0, 7.0 + side * 2, 9.0 + side / 2] for side in sides])
    mapped = SingleRoIExtractor.map_roi_levels(types.SimpleNamespace(finest_scale=56), regions, 4)
    values["levels"] = {"sides": sides, "levels": mapped.tolist()}


values: dict = {
    "source": f"mmdet {mmdet.__version__}, {CONFIG.name}",
    "sizes": SIZES,
    "batch": BATCH,
    "boxes": BOXES,
    "labels": LABELS,
    "initial": {},
}
rpn(values)
box_head(values)
pyramid(values)
levels(values)
Path(__file__).with_suffix(".json").write_text(json.dumps(values, indent=1) + "\n")
print(json.dumps({k: v for k, v in values["rpn"].items() if k not in ("anchors", "proposals")}))
print(values["initial"], values["box_head"]["samples"], len(values["box_head"]["positive"]))
