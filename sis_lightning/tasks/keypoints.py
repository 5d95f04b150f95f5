"""Human keypoints: heatmaps from deconvolutions on our backbones (Simple Baselines, Xiao et al. 2018)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor
from torchmetrics import Metric

from sis_lightning.datasets.base import Batch
from sis_lightning.datasets.constants import COCO_FLIP_PAIRS, COCO_KEYPOINTS, COCO_SIGMAS, COCO_SKELETON
from sis_lightning.datasets.crops import Crop
from sis_lightning.datasets.meta import DatasetMeta
from sis_lightning.errors import UsageError
from sis_lightning.evaluation import COCOEvaluator
from sis_lightning.models import PoseNet
from sis_lightning.models.heatmap_codec import HeatmapCodec, flip_back, oks_nms, rescore
from sis_lightning.option_effects import Effect
from sis_lightning.tasks.arguments import BackboneLike
from sis_lightning.tasks.base import BaseTask
from sis_lightning.tasks.inference import ImageLike, Outputs
from sis_lightning.tasks.predictions import KeypointPrediction, captioned
from sis_lightning.tasks.targets import stacked_images


class KeypointTask(BaseTask):
    """Top-down keypoint detection with heatmaps of person crops, scored by COCO's 10 keypoint metrics.

    The persons may be any other objects, with any keypoints.

    The loss is the mean squared error of the heatmaps of annotated keypoints. Evaluation averages the heatmaps of a
    crop and of its horizontal flip, multiplies a person's score by that of the keypoints, and removes duplicates by
    OKS-NMS (threshold 0.9).

    Training batches are those of `BaseTask`, with `image` a crop of one person (N, C, H, W), H and W multiples of the
    backbone's stride, and the target `keypoints` (N, K, 3): x, y in px of the crop, and visibility (0: not annotated).
    Evaluation takes such batches, too, and scores each crop as an image of one person.

    To find all people of an image, batches hold whole images and, as lists over these, `crops` (P, C, H, W), uint8,
    `to_image` (P, 2, 3), the affine map from crop to image, `box_scores` (P,), `areas` (P,) in px², and optionally
    `person_boxes` (P, 4), the boxes of the crops. For evaluation there is also `truth`, a list of one mapping per
    image, of arrays over its n annotated people: `keypoints` (n, K, 3) in px of the image, `boxes` (n, 4), `labels`
    (n,), all 1; and optionally `areas` (n,), `num_keypoints` (n,), `ignored` (n,), bool, for crowds, and `image_id`.
    `predict` returns `KeypointPrediction`.

    Args:
        backbone: The backbone, given as the name of a file in `configs/backbones/` such as `"sis50"`, a mapping of
            `BackboneConfig`'s fields, or a `BackboneConfig`.
        deconv_channels: Number of output channels of each deconvolution after the backbone's last map. Each
            deconvolution halves the stride, so that three reduce a stride of 32 to heatmaps of stride 4.
        sigma: Standard deviation of the Gaussians in the target heatmaps, in px of the heatmap; above 0.
        flip_test: Whether evaluation averages the heatmaps of each crop and of its horizontal flip.
        shown_score: Minimum score, in 0…1, of the persons that are drawn and that `sis-lightning predict` lists, and of
            the keypoints that are drawn.
        num_classes: Number of classes, which must be 1, such as person.
        num_keypoints: Number of keypoints K of a person.
        training: Further arguments of `BaseTask`: `operator`, `in_channels`, `optimizer`, `lr_scheduler`,
            `lr_interval`, `lr_batch_size`, `warmup_steps`, `warmup_start`, `backbone_weights`, `weights`,
            `freeze_backbone`, `compile_mode` and `meta`.

    Raises:
        UsageError: If an argument is invalid. It is also a ValueError.
    """

    primary_metric = "AP"
    target_keys = ("keypoints",)
    option_effects: ClassVar[Mapping[str, Effect]] = {
        "deconv_channels": Effect.NETWORK,
        "sigma": Effect.RESULT,
        "flip_test": Effect.RESULT,
        "shown_score": Effect.NOTHING,
        "num_keypoints": Effect.NETWORK,
    }
    model: PoseNet

    def __init__(
        self,
        backbone: BackboneLike,
        deconv_channels: tuple[int, ...] = (256, 256, 256),
        sigma: float = 2.0,
        flip_test: bool = True,
        shown_score: float = 0.2,
        num_classes: int = 1,
        num_keypoints: int = len(COCO_KEYPOINTS),
        **training: Any,
    ) -> None:
        super().__init__(backbone, num_classes, **training)
        if sigma <= 0:
            raise UsageError(f"sigma is {sigma}, must be above 0")
        if num_classes != 1:
            raise UsageError(f"num_classes is {num_classes}, must be 1: keypoints of one kind of object")
        self.sigma, self.flip_test, self.shown_score = sigma, flip_test, shown_score
        self.num_keypoints = num_keypoints
        model = PoseNet(self.backbone_config, num_keypoints, tuple(deconv_channels), in_channels=self.in_channels)
        self.stride = model.stride
        self.finish(model)

    def _default_meta(self) -> DatasetMeta:
        meta = dataclasses.replace(super()._default_meta(), class_names=("person",), category_ids=(1,), protocol="coco")
        meta = dataclasses.replace(meta, image_size=(256, 192))
        if self.num_keypoints != len(COCO_KEYPOINTS):
            return dataclasses.replace(meta, keypoint_names=tuple(map(str, range(self.num_keypoints))))
        return dataclasses.replace(
            meta,
            keypoint_names=COCO_KEYPOINTS,
            flip_pairs=COCO_FLIP_PAIRS,
            skeleton=COCO_SKELETON,
            sigmas=COCO_SIGMAS,
        )

    def set_meta(self, meta: DatasetMeta | Mapping[str, Any]) -> None:
        """Takes what the task must know of a data set; see `BaseTask.set_meta`.

        Args:
            meta: Names, numbers and conventions. If it has no keypoints, those that the task knows already are kept.

        Raises:
            UsageError: If the number of keypoints, classes or channels is not that of the network, or the names differ
                from those of a loaded checkpoint.
        """
        meta = self._as_meta(meta)
        if meta.keypoint_names and len(meta.keypoint_names) != self.num_keypoints:
            raise UsageError(
                f"the data has {len(meta.keypoint_names)} keypoints, but the network {self.num_keypoints}: "
                f"set num_keypoints to {len(meta.keypoint_names)}"
            )
        super().set_meta(meta)

    def build_evaluator(self) -> Metric:
        """COCO's 10 keypoint metrics over a split."""
        ids = self.meta.category_ids or (1,)
        sigmas = self.meta.sigmas or None
        return COCOEvaluator("keypoints", ids, self.meta.backend, class_names=self.class_names, sigmas=sigmas)

    def codec(self, crops: Tensor) -> HeatmapCodec:
        """The conversion between keypoints in crops (N, C, H, W) and heatmaps."""
        height, width = crops.shape[-2:]
        return HeatmapCodec(height, width, self.stride, self.sigma)

    def forward(self, crops: Tensor) -> Tensor:
        """Maps normalised crops (N, C, H, W) to heatmaps (N, num_keypoints, H/stride, W/stride)."""
        heatmaps: Tensor = self.model(crops)
        return heatmaps

    def normalized(self, batch: Batch) -> Batch:
        """A batch with normalised crops; whole images of an evaluation stay as they are, since they are only drawn."""
        if "crops" not in batch:
            return super().normalized(batch)
        return {**batch, "crops": [self.normalize(crops) for crops in batch["crops"]]}

    def training_loss(self, batch: Batch) -> dict[str, Tensor]:
        """Computes half the mean squared error over all heatmaps; keypoints that are not annotated count as 0.

        Args:
            batch: `image` (N, C, H, W), normalised, and `keypoints` (N, K, 3) in px of the crop.
        """
        wanted, weights = self.codec(batch["image"]).encode(batch["keypoints"])
        heatmaps = self(batch["image"])
        heatmaps = heatmaps.to(torch.promote_types(heatmaps.dtype, torch.float32))
        error = (heatmaps - wanted) * weights[..., None, None]
        return {"heatmaps": 0.5 * error.square().mean()}

    def infer(self, batch: Batch) -> Outputs:
        """Predicts the people of each image.

        Returns:
            For each image `keypoints` (P, K, 3): x and y in its px and a score, `scores` (P,) and `boxes` (P, 4).
        """
        if "crops" not in batch:
            batch = _with_crops(batch)
        self._require(batch, "image", "crops", "to_image", "box_scores", "areas")
        counts = [len(crops) for crops in batch["crops"]]
        # Positions stay exact, on the CPU, whatever the network computes in.
        to_image, box_scores, areas = (
            [torch.as_tensor(values).cpu().double() for values in batch[key]]
            for key in ("to_image", "box_scores", "areas")
        )
        maps = torch.cat(to_image)
        crops = torch.cat(list(batch["crops"])).to(self.device)
        found = torch.zeros(0, self.num_keypoints, 3, dtype=torch.float64)
        boxes = torch.zeros(0, 4, dtype=torch.float64)
        if len(crops):
            parts = [self._heatmaps(part).float().cpu() for part in torch.split(crops, _CROPS_AT_ONCE)]
            found = self.codec(crops).decode(torch.cat(parts), maps)
            boxes = _boxes_of(maps, crops.shape[-2:])
        if "person_boxes" in batch:
            boxes = torch.cat([torch.as_tensor(values).cpu().double() for values in batch["person_boxes"]])
        # Keypoints without published deviations get the mean of COCO's.
        sigmas = self.meta.sigmas or (float(np.mean(COCO_SIGMAS)),) * self.num_keypoints
        outputs = []
        people = zip(torch.split(found, counts), torch.split(boxes, counts), box_scores, areas, strict=True)
        for keypoints, places, given, sizes in people:
            values = keypoints.detach().numpy()
            scores = np.array(
                [rescore(float(score), person[:, 2]) for score, person in zip(given, values, strict=True)]
            )
            kept = oks_nms(values, scores, sizes.numpy(), sigmas)
            outputs.append(
                {"keypoints": keypoints[kept], "scores": torch.from_numpy(scores[kept]), "boxes": places[kept]}
            )
        return outputs

    def _heatmaps(self, crops: Tensor) -> Tensor:
        crops = crops.contiguous(memory_format=torch.channels_last)
        heatmaps: Tensor = self(crops)
        if not self.flip_test:
            return heatmaps
        order = self.meta.flip_order or range(self.num_keypoints)
        return (heatmaps + flip_back(self(crops.flip(-1)), order)) / 2

    def evaluate(self, batch: Batch, metrics: Metric) -> Outputs:
        """Predicts an evaluation batch with `truth`, or a batch as for training, and updates the metrics with it."""
        self._require(batch, "image", "truth" if "crops" in batch else "keypoints")
        outputs = self.infer(batch)
        metrics.update(outputs, self._ground_truth(batch))
        return outputs

    def _ground_truth(self, batch: Batch) -> list[Mapping[str, Any]]:
        """The annotated people of each image; of a crop, its person."""
        if "truth" in batch:
            return list(batch["truth"])
        height, width = batch["image"].shape[-2:]
        return [
            {
                "keypoints": person[None],
                "num_keypoints": np.array([(person[:, 2] > 0).sum()]),
                "boxes": np.array([[0.0, 0.0, width, height]]),
                "labels": np.array([1]),
                "areas": np.array([float(height * width)]),
            }
            for person in batch["keypoints"].cpu().double().numpy()
        ]

    def predict(
        self,
        images: ImageLike | Iterable[ImageLike],
        *,
        batch_size: int = 8,
        boxes: Any = None,
    ) -> Any:
        """Predicts the keypoints of people in images, on the device of the task, without a data set.

        Args:
            images: Path of an image or of a folder of images, PIL image, or uint8 tensor (C, H, W); or a sequence of
                these, or a tensor (N, C, H, W). Files are rotated as their EXIF orientation says.
            batch_size: Number of images that are predicted at once.
            boxes: Boxes of the people in the image: (P, 4) x1, y1, x2, y2 in px, or (P, 5) with scores; for several
                images a sequence of these. None takes each whole image as one person.

        Returns:
            One `KeypointPrediction` for one image; a list of them, in order (a folder's by name), for several.

        Raises:
            DataError: If a file is missing or not an image.
            UsageError: If an image is of another type, or there are not as many boxes as images.
        """
        one, samples = self._samples(images)
        if boxes is None:
            named: Iterable[dict[str, Any]] = ({"image": image, "name": name} for name, image in samples)
        else:
            known = [boxes] if one else list(boxes)
            listed = list(samples)
            if len(known) != len(listed):
                raise UsageError(f"boxes has {len(known)} entries, but there are {len(listed)} images")
            named = (
                {"image": image, "name": name, "people": people}
                for (name, image), people in zip(listed, known, strict=True)
            )
        found = self._predict(named, batch_size)
        return found[0] if one else found

    def prepare(self, sample: dict[str, Any]) -> dict[str, Any]:
        """Cuts the crop of each person, of the size of training (`meta.image_size`)."""
        height, width = self.meta.image_size or (256, 192)
        people = sample.pop("people", None)
        if people is None:
            people = [[0, 0, sample["image"].shape[2], sample["image"].shape[1]]]
        boxes = np.asarray(torch.as_tensor(people).cpu(), dtype=np.float64)
        if boxes.ndim != 2 or boxes.shape[1] not in (4, 5):
            raise UsageError(f"boxes of an image have the shape {boxes.shape}, must be (P, 4) or (P, 5)")
        scores = boxes[:, 4] if boxes.shape[1] == 5 else np.ones(len(boxes))
        crops = [Crop.around(box[:4], (width, height)) for box in boxes]
        cut = [crop.cut(sample["image"].cpu()) for crop in crops]
        empty = torch.zeros(0, self.in_channels, height, width, dtype=torch.uint8)
        return {
            **sample,
            "crops": torch.stack(cut) if cut else empty,
            "to_image": torch.from_numpy(np.array([crop.to_image for crop in crops]).reshape(-1, 2, 3)),
            "person_boxes": torch.from_numpy(boxes[:, :4].copy()),
            "box_scores": torch.from_numpy(scores.copy()),
            "areas": torch.tensor([crop.size[0] * crop.size[1] for crop in crops], dtype=torch.float64),
        }

    def _on_device(self, batch: Batch) -> Batch:
        return {**batch, "crops": [crops.to(self.device) for crops in batch["crops"]]}

    def predictions(self, batch: Batch, outputs: Outputs) -> list[KeypointPrediction]:
        """Makes a `KeypointPrediction` of each image's people."""
        return [
            KeypointPrediction(
                self.displayable(image),
                name,
                **{key: output[key].detach().cpu() for key in ("keypoints", "scores", "boxes")},
                category=self.class_names[0],
                keypoint_names=self.meta.keypoint_names,
                skeleton=self.meta.skeleton,
                min_score=self.shown_score,
            )
            for image, name, output in zip(batch["image"], self.names_of(batch), outputs, strict=True)
        ]

    def plot(self, batch: Batch, outputs: Outputs) -> Figure:
        """Draws up to four rows of annotated and predicted skeletons, images with people first."""
        annotated = [_annotated(truth) for truth in self._ground_truth(batch)]
        predictions = self.predictions(batch, outputs)
        rows = []
        for index in sorted(range(len(outputs)), key=lambda index: not len(annotated[index]))[:4]:
            prediction, people = predictions[index], annotated[index]
            truth = dataclasses.replace(
                prediction, keypoints=people, scores=torch.ones(len(people)), boxes=torch.zeros(len(people), 4)
            )
            found = prediction.above(self.shown_score)
            rows.append(
                [
                    (f"ground truth: {len(people)}", truth.draw()),
                    (f"prediction: {len(found.scores)}", found.draw()),
                ]
            )
        return captioned(rows, height=4)


#: Crops of an evaluation that go through the network at once.
_CROPS_AT_ONCE = 64


def _annotated(truth: Mapping[str, Any]) -> Tensor:
    """Keypoints (P, K, 3) of the people that have any."""
    keypoints = torch.as_tensor(np.asarray(truth["keypoints"], dtype=np.float64))
    ignored = torch.as_tensor(np.asarray(truth.get("ignored", np.zeros(len(keypoints), dtype=bool))))
    people: Tensor = keypoints[(keypoints[..., 2] > 0).any(dim=1) & ~ignored]
    return people


def _with_crops(batch: Batch) -> Batch:
    """A batch whose images (N, C, H, W) are crops of one person each, in the form of whole images with crops."""
    crops = stacked_images(batch)
    count, (height, width) = len(crops), crops.shape[-2:]
    return {
        **batch,
        "crops": list(crops[:, None]),
        "to_image": [torch.eye(2, 3, dtype=torch.float64)[None]] * count,
        "box_scores": [torch.ones(1, dtype=torch.float64)] * count,
        "areas": [torch.tensor([float(height * width)], dtype=torch.float64)] * count,
        "person_boxes": [torch.tensor([[0.0, 0.0, width, height]], dtype=torch.float64)] * count,
    }


def _boxes_of(to_image: Tensor, size: Sequence[int], margin: float = 1.25) -> Tensor:
    """The boxes (P, 4) around which crops of a size (H, W) were cut."""
    height, width = size
    corners = torch.tensor([[0.0, 0.0, 1.0], [width, height, 1.0]], dtype=to_image.dtype)
    ends = corners @ to_image.transpose(1, 2)  # (P, 2, 2)
    centre, half = ends.mean(dim=1), (ends[:, 1] - ends[:, 0]).abs() / 2 / margin
    return torch.cat([centre - half, centre + half], dim=1)
