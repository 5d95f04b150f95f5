"""Faster R-CNN on our backbones: the network, its data, and the files of whole runs."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch import Trainer
from PIL import Image
from torch import nn
from torchvision.models.detection import fasterrcnn_resnet50_fpn

from sis_lightning.backbones import backbone_config
from sis_lightning.backbones.weights import load_backbone_weights
from sis_lightning.datamodules import COCODetectionDataModule, VOCDetectionDataModule
from sis_lightning.datamodules.samplers import EpochSampler
from sis_lightning.errors import UsageError
from sis_lightning.tasks import DetectionTask

SMALL = backbone_config("sis_demo", channels=8, width=4)
SGD = functools.partial(torch.optim.SGD, lr=0.01)
SIZES = {"min_size": 64, "max_size": 96, "fpn_channels": 16, "head_channels": 32, "anchor_sizes": (8, 16, 32, 64, 96)}
FEW = {"rpn_batch_size_per_image": 16, "box_batch_size_per_image": 16}


def detection(**arguments) -> DetectionTask:
    usual = {"backbone": SMALL, "num_classes": 20, "optimizer": SGD, **SIZES, "detector": FEW}
    return DetectionTask(**{**usual, **arguments})


def batch(*counts: int) -> dict:
    """Images with so many boxes each."""
    generator = torch.Generator().manual_seed(0)
    boxes = []
    for count in counts:
        corner = torch.rand(count, 2, generator=generator) * 30
        boxes.append(torch.cat([corner, corner + 10 + 20 * torch.rand(count, 2, generator=generator)], dim=1))
    return {
        "image": [torch.randn(3, 64, 64 + 8 * i, generator=generator) for i in range(len(counts))],
        "name": [str(i) for i in range(len(counts))],
        "image_id": list(range(len(counts))),
        "boxes": boxes,
        "labels": [torch.randint(1, 21, (count,), generator=generator) for count in counts],
    }


def test_it_is_torchvisions_detector_with_the_same_weights():
    torch.manual_seed(0)
    theirs = fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=4, min_size=96, max_size=128)
    theirs.backbone.body.conv1.weight.data.mul_(2)  # so that it is not a default that agrees
    for module in theirs.modules():  # torchvision's frozen norms hold statistics alone
        if hasattr(module, "running_var"):
            module.running_var.uniform_(0.5, 2)
            module.running_mean.normal_()
    # Scores of fresh heads are nearly equal: rounding alone would settle their order.
    for head in (theirs.rpn.head.cls_logits, theirs.roi_heads.box_predictor.cls_score):
        head.weight.data.mul_(10)
    task = detection(
        backbone=backbone_config("resnet50"),
        num_classes=3,
        min_size=96,
        max_size=128,
        fpn_norm="none",
        fpn_channels=256,
        head_channels=1024,
        anchor_sizes=(32, 64, 128, 256, 512),
        anchor_strides="rounded",
        roi_aligned=False,
        roi_sampling_ratio=2,
        detector={"box_score_thresh": 0.0},
    ).eval()
    theirs.eval().roi_heads.score_thresh = 0.0
    state = theirs.state_dict()
    body = {key.removeprefix("backbone.body."): value for key, value in state.items() if "backbone.body." in key}
    load_backbone_weights(task.backbone, body, strict=False)
    task.model.backbone.fpn.load_state_dict(
        {key.removeprefix("backbone.fpn."): value for key, value in state.items() if "backbone.fpn." in key}
    )
    task.model.rpn.load_state_dict(theirs.rpn.state_dict())
    task.model.roi_heads.load_state_dict(theirs.roi_heads.state_dict())
    mean, std = (
        torch.tensor(values)[:, None, None] for values in (theirs.transform.image_mean, theirs.transform.image_std)
    )
    image = torch.rand(3, 80, 120)
    with torch.no_grad():
        (want,), (got,) = theirs([image]), task([(image - mean) / std])
    assert len(want["boxes"]) > 10
    want, got = (torch.cat([r["boxes"], r["labels"][:, None], r["scores"][:, None]], dim=1) for r in (want, got))
    # A pair whose overlap is the threshold's to a rounding may be kept by one and not by the other.
    nearest = torch.cdist(want, got, p=torch.inf).min(dim=1).values
    assert (nearest < 0.02).double().mean() > 0.95


def test_images_are_normalised_and_resized_once(synthetic):
    data = COCODetectionDataModule(str(synthetic), batch_size=2, num_workers=0)
    data.setup("fit")
    task = detection(num_classes=80, min_size=96, max_size=96).eval()
    seen = []
    task.backbone.stem.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    raw = data.datasets["val"][0]["image"]
    task.set_meta(data.meta)
    task(task.normalized({"image": [raw]})["image"])
    scale = 96 / max(raw.shape[1:])
    mean, std = (torch.tensor(values)[:, None, None] for values in (data.meta.mean, data.meta.std))
    want = nn.functional.interpolate(((raw / 255 - mean) / std)[None], scale_factor=scale, mode="bilinear")
    height, width = want.shape[2:]
    torch.testing.assert_close(seen[0][..., :height, :width], want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("counts", [(0, 0), (2, 0, 3)])
def test_images_without_objects_train_every_weight_that_others_do(counts):
    torch.manual_seed(0)
    task = detection()
    losses = task.training_loss(batch(*counts))
    assert set(losses) == {"loss_classifier", "loss_box_reg", "loss_objectness", "loss_rpn_box_reg"}
    sum(losses.values()).backward()
    # Two devices, of which one sees no object, must not wait for each other's gradients.
    assert [name for name, weight in task.named_parameters() if weight.grad is None] == []
    assert all(torch.isfinite(weight.grad).all() for weight in task.parameters())


@pytest.mark.parametrize("norm", ["bn", "syncbn", "gn", "none"])
def test_norms_of_pyramid_and_head(norm):
    task = detection(fpn_norm=norm, head_norm=norm)
    kinds = {"bn": nn.BatchNorm2d, "syncbn": nn.SyncBatchNorm, "gn": nn.GroupNorm}
    for part, count in ((task.model.backbone.fpn, 8), (task.model.roi_heads.box_head, 4)):
        found = [module for module in part.modules() if isinstance(module, tuple(kinds.values()))]
        assert [type(module) for module in found] == ([] if norm == "none" else [kinds[norm]] * count)
    assert len(task.eval()([torch.randn(3, 64, 64)])) == 1


def test_only_norms_of_loaded_weights_are_frozen(synthetic, tmp_path):
    with pytest.raises(UsageError, match=r"freeze_norm.*\n.*without any norm"):
        detection(freeze_norm=True)
    with pytest.raises(UsageError, match="frozen norm layers on random weights"):
        backbone_config("sis50", norm="frozen_bn")
    weights = tmp_path / "some.ckpt"
    given = detection(num_classes=80)
    torch.save({"state_dict": given.state_dict()}, weights)
    task = detection(num_classes=80, freeze_norm=True, backbone_weights=str(weights))
    data = COCODetectionDataModule(str(synthetic), batch_size=2, num_workers=0, limit=4)
    run = Trainer(
        accelerator="cpu",
        max_steps=4,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        num_sanity_val_steps=1,
        limit_val_batches=1,
    )
    run.fit(task, data)  # two epochs, each with a validation
    norms = {name: part for name, part in task.backbone.named_modules() if isinstance(part, nn.BatchNorm2d)}
    loaded = given.backbone.state_dict()
    for name, norm in norms.items():
        for key, value in norm.state_dict().items():
            assert torch.equal(value, loaded[f"{name}.{key}"]), (name, key)
    assert task.model.backbone.fpn.layer_blocks[0][1].running_mean.abs().max() > 0
    assert not torch.equal(task.backbone.stem.conv.weight, loaded["stem.conv.weight"])


@pytest.mark.parametrize(("norm", "scales_train"), [("statistics", True), (True, False)])
def test_first_stages_and_statistics_are_frozen_as_in_mmdetection(tmp_path, norm, scales_train):
    """mmdetection's "frozen_stages=1" and "norm_eval=True": the other stages' scales and shifts train."""
    weights = tmp_path / "some.ckpt"
    torch.save({"state_dict": detection().state_dict()}, weights)
    task = detection(freeze_norm=norm, frozen_stages=1, backbone_weights=str(weights)).train()
    before = {name: value.clone() for name, value in task.backbone.state_dict().items()}
    sum(task.training_loss(batch(2, 3)).values()).backward()
    torch.optim.SGD([weight for weight in task.parameters() if weight.requires_grad], lr=0.1).step()
    after = task.backbone.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert not any(name.startswith(("stem.", "stage1.")) for name in changed)
    assert not any("running" in name or "tracked" in name for name in changed)
    assert ("stage2.0.reduce_norm.weight" in changed) == scales_train
    assert "stage2.0.reduce.weight" in changed
    with pytest.raises(UsageError, match="frozen_stages"):
        detection(frozen_stages=1)
    with pytest.raises(UsageError, match="frozen_stages is 5"):
        detection(frozen_stages=5, backbone_weights=str(weights))


def test_boxes_stay_float32_in_mixed_precision():
    torch.manual_seed(0)
    task = detection(min_size=96, max_size=1400, detector={"box_score_thresh": 0.0}).eval()
    proposals = []
    task.model.roi_heads.register_forward_pre_hook(lambda module, inputs: proposals.extend(inputs[1]))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        (found,) = task([torch.randn(3, 96, 1400)])
    for boxes in (proposals[0], found["boxes"]):
        assert boxes.dtype == torch.float32
        inner = boxes[(boxes > 600) & (boxes < 1390)]
        assert len(inner) > 20
        assert (inner != inner.bfloat16().float()).float().mean() > 0.5


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"levels": ("c2", "c6"), "anchor_sizes": (8, 16, 32)}, "no feature map 'c6', but c2, c3, c4, c5"),
        ({"anchor_sizes": (8, 16)}, "has 2 entries, must have 5"),
        ({"detector": {"box_score_tresh": 0.1}}, "box_score_tresh.*did you mean 'box_score_thresh'"),
        ({"detector": {"image_mean": [0, 0, 0]}}, "image_mean"),
        ({"min_size": 900, "max_size": 800}, "min_size is 900 and max_size 800"),
        ({"backbone": backbone_config("sis29")}, "no feature map 'c5'"),
        ({"num_classes": 0}, "num_classes"),
        ({"warmup_steps": -1}, "warmup_steps"),
    ],
)
def test_invalid_arguments(arguments, words):
    with pytest.raises(UsageError, match=words):
        detection(**arguments)


@pytest.mark.parametrize("size", [(3, 900), (900, 2), (1, 1)])
def test_very_thin_images(size):
    (found,) = detection().eval()([torch.randn(3, *size)])
    assert found["boxes"].shape[1] == 4
    assert (found["boxes"][:, 2] <= size[1]).all()
    assert (found["boxes"][:, 3] <= size[0]).all()


def test_stages_above_the_last_level_are_neither_run_nor_trained():
    task = detection(levels=("c2", "c3"), anchor_sizes=(8, 16, 32))
    task.backbone.stages[2].register_forward_hook(lambda *_: pytest.fail("stage 3 was run"))
    sum(task.training_loss(batch(2, 1)).values()).backward()
    without = {name.split(".")[3] for name, weight in task.named_parameters() if weight.grad is None}
    assert without == {"stage3", "stage4"}
    assert all(not weight.requires_grad for weight in task.backbone.stages[3].parameters())


# data


@settings(max_examples=60, deadline=None)
@given(
    groups=st.lists(st.integers(0, 1), min_size=1, max_size=60),
    world=st.sampled_from([1, 2, 3]),
    per_device=st.integers(1, 4),
    epoch=st.integers(0, 3),
)
def test_batches_hold_one_group_but_for_the_last(groups, world, per_device, epoch):
    size, ranks = per_device * world, []
    for rank in range(world):
        sampler = EpochSampler(len(groups), 5, rank, world, groups, size)
        sampler.set_epoch(epoch)
        ranks.append([index for _, index in sampler])
    dealt = [index for rank in ranks for index in rank]
    assert len(set(dealt)) == len(dealt) == len(groups) // world * world
    batches = [
        {groups[index] for rank in ranks for index in rank[start : start + per_device]}
        for start in range(0, len(ranks[0]), per_device)
    ]
    whole = sum(groups.count(group) // size for group in (0, 1))
    assert all(len(batch) == 1 for batch in batches[:whole])


@pytest.mark.parametrize("kind", [COCODetectionDataModule, VOCDetectionDataModule])
def test_boxes_are_flipped_with_their_image(synthetic, kind):
    data = kind(str(synthetic), num_workers=0)
    data.setup("fit")
    source = data.datasets["train"]
    index = next(i for i in range(len(source)) if len(source[i]["boxes"]) > 1)
    sample, seen = source[index], set()
    for seed in range(8):
        torch.manual_seed(seed)
        got = data.train_transform({**sample})
        mirrored = not torch.equal(got["image"], sample["image"])
        seen.add(mirrored)
        width = sample["image"].shape[2]
        want = sample["boxes"].clone()
        if mirrored:
            assert torch.equal(got["image"], sample["image"].flip(-1))
            want[:, [0, 2]] = width - want[:, [2, 0]]
        torch.testing.assert_close(torch.as_tensor(got["boxes"]), want)
    assert seen == {False, True}


@pytest.mark.parametrize("empty", [False, True])
def test_training_leaves_out_crowds_and_perhaps_empty_images(synthetic, empty):
    data = COCODetectionDataModule(str(synthetic), batch_size=2, num_workers=0, empty_images=empty)
    data.setup("fit")
    raw = json.loads((synthetic / "coco" / "annotations" / "instances_train2017.json").read_text())
    crowds = sum(row["iscrowd"] for row in raw["annotations"])
    assert crowds
    without = len(raw["images"]) - len({row["image_id"] for row in raw["annotations"]})
    assert without
    assert f"{crowds} crowds" in data.notes["train without"]
    source = data.datasets["train"]
    assert len(source) == len(raw["images"]) - (0 if empty else without)
    counts = [len(source[index]["boxes"]) for index in range(len(source))]
    assert sum(counts) == len(raw["annotations"]) - crowds
    assert (0 in counts) == empty
    labels = torch.cat([source[index]["labels"] for index in range(len(source))])
    assert 1 <= labels.min() <= labels.max() <= 80
    names = {data.class_names[label - 1] for label in labels.tolist()}
    by_number = {item["id"]: item["name"] for item in raw["categories"]}
    assert names == {by_number[row["category_id"]] for row in raw["annotations"] if not row["iscrowd"]}


def test_voc_years_and_splits_are_joined(synthetic):
    data = VOCDetectionDataModule(str(synthetic), num_workers=0)
    data.setup("fit")
    devkit = synthetic / "VOCdevkit"
    listed = [
        name
        for year in (2007, 2012)
        for name in (devkit / f"VOC{year}" / "ImageSets" / "Main" / "trainval.txt").read_text().split()
    ]
    assert [path.stem for path in data.datasets["train"].annotations.paths] == listed
    tested = (devkit / "VOC2007" / "ImageSets" / "Main" / "test.txt").read_text().split()
    assert [path.stem for path in data.datasets["val"].annotations.paths] == tested
    assert "difficult objects" in data.notes["train without"]
    only = VOCDetectionDataModule(str(devkit), train_splits=["2012/train"], test_splits=["2012/val"], limit=3)
    only.setup("fit")
    assert (len(only.datasets["train"]), len(only.datasets["val"])) == (3, 3)
    overlapping = VOCDetectionDataModule(str(devkit), train_splits=["2012/train", "2012/trainval"])
    trainval = (devkit / "VOC2012" / "ImageSets" / "Main" / "trainval.txt").read_text().split()
    assert len(overlapping.dataset("train")) == len(trainval)
    for bad in ([], ["2012"], ["2012/"], ["trainval"]):
        with pytest.raises(UsageError, match="YEAR/SPLIT"):
            VOCDetectionDataModule(str(synthetic), train_splits=bad)


# whole runs

RUN = Path("runs/det_coco/res2net14-4w4s-basic-8ch/seed0")


def test_a_whole_run_on_coco(command, small, synthetic, tmp_path):
    options = small("det_coco")
    fit = command("fit", *options)
    assert fit.code == 0, fit.err
    assert "train without  1 crowds" in fit.out
    assert "val/AP" in fit.out
    with Image.open(next((RUN / "images").glob("*.png"))) as image:
        assert np.asarray(image).std() > 10
    test = command("test", *options, "--model.detector.box_score_thresh", 0.0)
    assert test.code == 0, test.err
    record = json.loads((RUN / "test.json").read_text())
    results = RUN / "test_results" / "detections_val2017_sis-lightning_results.json"
    rows = json.loads(results.read_text())
    assert {row["image_id"] for row in rows} <= {20, 21, 22, 23, 24}
    # The results file, scored by itself, gives the metrics of the test.
    truth = synthetic / "coco" / "annotations" / "instances_val2017.json"
    again = command("evaluate", "--type", "bbox", "--truth", truth, "--results", results, "--json")
    assert again.code == 0, again.err
    metrics = json.loads(again.out)["metrics"]
    for key in ("AP", "AP50", "AP75", "APs", "APm", "AR1", "AR10", "AR100"):
        want = record["metrics"][f"test/{key}"]
        assert metrics[key] == pytest.approx(want, abs=1e-6) if want is not None else metrics[key] is None
    predict = command("predict", *options, "--model.shown_score", 0.0)
    assert predict.code == 0, predict.err
    table = json.loads((RUN / "predictions" / "predictions.json").read_text())
    assert len(table) == 5
    for row in table:
        with Image.open(RUN / "predictions" / row["image"]) as image:
            assert max(image.size) >= 480
        assert len(row["objects"]) == row["found"]
        assert all(item["box"][0] < item["box"][2] for item in row["objects"])
    # An image without a data set: the class names come from the checkpoint.
    Image.new("L", (50, 37), 90).save(tmp_path / "photo.png")
    photo = command("predict", *options, "--data.predict_path", tmp_path / "photo.png", "--model.shown_score", 0.0)
    assert photo.code == 0, photo.err
    (row,) = json.loads((RUN / "predictions" / "predictions.json").read_text())
    assert {item["class"] for item in row["objects"]} <= {
        item["name"] for item in json.loads(truth.read_text())["categories"]
    }


def test_a_split_without_annotations_gives_results_for_the_server(command, small, synthetic, tmp_path):
    import shutil

    root = tmp_path / "own"
    shutil.copytree(synthetic / "coco", root / "coco")
    content = json.loads((root / "coco" / "annotations" / "instances_val2017.json").read_text())
    del content["annotations"]
    (root / "coco" / "annotations" / "image_info_test-dev2017.json").write_text(json.dumps(content))
    (root / "coco" / "val2017").rename(root / "coco" / "test2017")
    options = small("det_coco", steps=1)
    assert command("fit", *options).code == 0
    test = command("test", *options, "--data.root", root, "--data.test_split", "test-dev2017")
    assert test.code == 0, test.err
    assert (RUN / "test_results" / "detections_test-dev2017_sis-lightning_results.json").is_file()
    assert "no annotations" in test.out
    assert json.loads((RUN / "test.json").read_text())["metrics"] == {}


def test_a_whole_run_on_voc(command, small, synthetic):
    options = small("det_voc")
    fit = command("fit", *options, "--data.limit", 4)
    assert fit.code == 0, fit.err
    assert "validation at step 1: val/AP50_voc07" in fit.out
    run = Path("runs/det_voc/res2net14-4w4s-basic-8ch/seed0")
    test = command("test", *options, "--model.detector.box_score_thresh", 0.0)
    assert test.code == 0, test.err
    metrics = json.loads((run / "test.json").read_text())["metrics"]
    home = synthetic / "VOCdevkit" / "VOC2007"
    assert (run / "test_results" / "VOC2007" / "Main" / "comp4_det_test_person.txt").is_file()
    results = run / "test_results" / "VOC2007" / "Main"
    for kind in ("voc07", "voc12"):
        score = command("evaluate", "--type", kind, "--truth", home, "--split", "test", "--results", results, "--json")
        assert score.code == 0, score.err
        scores = json.loads(score.out)["metrics"]
        key = f"AP50_{kind}"
        assert scores[key] == pytest.approx(metrics[f"test/{key}"], abs=1e-6)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--data.train_splits", "[trainval]"], "YEAR/SPLIT"),
        (["--data.train_splits", "[2011/train]"], "VOC2011/Annotations does not exist"),
        (["--data.test_splits", "[2012/tset]"], "tset.txt does not exist; there are: train"),
        (["--data.limit", "0"], "limit is 0"),
        (["--model.num_classes", "7"], "the data has 20 classes, but the network 7"),
        (["--model.levels", "[c2,c9]", "--model.anchor_sizes", "[8,16,32]"], "no feature map 'c9'"),
        (["--model.detector.box_fg_iou_tresh", "0.5"], "box_fg_iou_tresh"),
        (["--model.freeze_norm", "true"], "freeze_norm"),
        (["--model.backbone_weights", "gone.ckpt"], "'gone.ckpt': there is no such file"),
        (["--model.warmup_steps", "5"], "OneCycleLR has a warm-up of its own"),
    ],
)
def test_invalid_options(command, small, arguments, words):
    result = command("fit", *small("det_voc"), *arguments)
    assert result.code in (1, 2)
    assert words in result.err
    assert len(result.err.splitlines()) <= 5
    assert not Path("runs").exists() or not list(Path("runs").rglob("*.ckpt"))


def test_training_draws_one_of_several_sizes_and_evaluation_takes_the_last():
    torch.manual_seed(0)
    task = detection(min_size=[32, 48, 64], max_size=128)
    assert task.image_size == (64, 128)
    images = [torch.zeros(3, 100, 100)]
    network = task.model.transform
    targets = [{"boxes": torch.tensor([[0.0, 0.0, 50.0, 100.0]]), "labels": torch.tensor([1])}]
    network.train()
    seen = {}
    for _ in range(40):
        resized, moved = network(images, targets)
        side = resized.image_sizes[0][0]
        seen[side] = moved[0]["boxes"].tolist()
    assert seen == {side: [[0, 0, side / 2, side]] for side in (32, 48, 64)}
    network.eval()
    assert {network(images)[0].image_sizes[0] for _ in range(10)} == {(64, 64)}
    with pytest.raises(UsageError, match="min_size is"):
        detection(min_size=[])
    with pytest.raises(UsageError, match="min_size is"):
        detection(min_size=[64, 200], max_size=128)
