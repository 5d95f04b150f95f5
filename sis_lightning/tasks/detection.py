"""Object detection: torchvision's Faster R-CNN with a feature pyramid on our backbones."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib import colormaps, get_data_path
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor
from torchmetrics import Metric, MetricCollection
from torchvision.utils import draw_bounding_boxes

from sis_lightning.backbones import BackboneConfig
from sis_lightning.datamodules import Batch
from sis_lightning.errors import UsageError
from sis_lightning.evaluation.gathered import GatheredScores, Row
from sis_lightning.models import Detector
from sis_lightning.models.detector import Norm
from sis_lightning.tasks.base import BaseTask, Outputs, enlarge


class DetectionTask(BaseTask):
    """Finds boxes: images (3, H, W) of any size → boxes in px of the image, classes, scores; Faster R-CNN's losses.

    Scored as the data set is: COCO's twelve figures, or VOC's average precision, over the whole split at once.

    Args:
        backbone: A file in `configs/backbones/` by its name (`sis50`), or its fields; four stages.
        num_classes: Without background.
        min_size: Images are resized so that the shorter side has this many px …
        max_size: … but the longer side at most this.
        levels: The backbone's maps that the feature pyramid stands on.
        fpn_channels: Of the feature pyramid.
        fpn_norm: `bn`, `syncbn`, `gn` or `none`, after each convolution of the pyramid.
        head_channels: Of the box head.
        head_norm: `none`: two fully connected layers; else four convolutions with this norm and one such layer.
        anchor_sizes: Sides of the anchors in px: one for each level, and one for the level above them.
        canonical_scale: Side in px of a box that is pooled at stride 16.
        detector: Further arguments of torchvision's `FasterRCNN`, such as `box_batch_size_per_image: 512`.
        freeze_norm: Keeps the statistics and scales of the backbone's batch norm as `backbone_weights` have them.
        shown_score: Least score of what is drawn and of what `predict` lists, 0…1.
        training: How to train: `optimizer` and what else `BaseTask` takes.

    Raises:
        UsageError: For settings that do not fit each other, or frozen norms on random weights.
    """

    monitor = "val/AP"
    free_settings = BaseTask.free_settings | {
        *("min_size", "max_size", "shown_score", "freeze_norm", "box_score_thresh", "box_nms_thresh"),
        *("box_detections_per_img", "rpn_pre_nms_top_n_test", "rpn_post_nms_top_n_test", "rpn_score_thresh"),
    }

    def __init__(
        self,
        backbone: BackboneConfig,
        num_classes: int,
        min_size: int = 800,
        max_size: int = 1333,
        levels: Sequence[str] = ("c2", "c3", "c4", "c5"),
        fpn_channels: int = 256,
        fpn_norm: Norm = "bn",
        head_channels: int = 1024,
        head_norm: Norm = "none",
        anchor_sizes: Sequence[int] = (32, 64, 128, 256, 512),
        canonical_scale: int = 224,
        detector: dict[str, Any] | None = None,
        freeze_norm: bool = False,
        shown_score: float = 0.5,
        **training: Any,
    ) -> None:
        super().__init__(backbone, num_classes, **training)
        if freeze_norm and not self.backbone_weights:
            raise UsageError(
                "model.freeze_norm keeps the statistics of model.backbone_weights, but none are given:\n"
                "  on weights drawn at random it would leave the backbone without any norm."
            )
        self.shown_score = shown_score
        model = Detector(
            self.backbone_config,
            num_classes,
            min_size=min_size,
            max_size=max_size,
            levels=levels,
            fpn_channels=fpn_channels,
            fpn_norm=fpn_norm,
            head_channels=head_channels,
            head_norm=head_norm,
            anchor_sizes=anchor_sizes,
            canonical_scale=canonical_scale,
            freeze_norm=freeze_norm,
            detector=detector,
        )
        self.finish(model, GatheredScores())

    def forward(self, images: Sequence[Tensor]) -> list[dict[str, Tensor]]:
        """Detects objects in normalised images (3, H, W), as `Detector.forward` in evaluation mode."""
        found: list[dict[str, Tensor]] = self.model(images)
        return found

    def training_loss(self, batch: Batch) -> dict[str, Tensor]:
        """Region proposals' objectness and boxes, heads' classes and boxes."""
        targets = [
            {"boxes": boxes, "labels": labels} for boxes, labels in zip(batch["boxes"], batch["labels"], strict=True)
        ]
        losses: dict[str, Tensor] = self.model(batch["image"], targets)
        return losses

    def evaluate(self, batch: Batch, metrics: Metric | MetricCollection) -> Outputs:
        """Collects the boxes of each image."""
        outputs = self.predict_step(batch)
        numbers = self.data.category_ids
        rows: list[Row] = []
        ids = [item.item() if isinstance(item, Tensor) else item for item in batch["image_id"]]
        for image_id, output in zip(ids, outputs, strict=True):
            boxes = output["boxes"].cpu().double()
            boxes[:, 2:] -= boxes[:, :2]
            rows += [
                {"image_id": image_id, "category_id": numbers[label - 1], "bbox": box, "score": score}
                for box, label, score in zip(
                    boxes.tolist(), output["labels"].tolist(), output["scores"].tolist(), strict=True
                )
            ]
        metrics.update(rows, ids)
        return outputs

    def predict_step(self, batch: Batch, batch_idx: int = 0) -> Outputs:
        """`boxes`, `labels` and `scores` of each image, as `forward`."""
        return [
            {key: value.float() if value.is_floating_point() else value for key, value in output.items()}
            for output in self(batch["image"])
        ]

    def write_prediction(self, image: Tensor, name: str, output: dict[str, Any], folder: Path) -> dict[str, Any]:
        """`pictures/NAME.jpg` with boxes, classes and scores; the row lists them as `objects`."""
        shown = {key: value.cpu() for key, value in self._shown(output).items()}
        path = folder / "pictures" / f"{name}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(self._drawn(image, shown).permute(1, 2, 0).numpy()).save(path, quality=90)
        objects = [
            {"class": self.class_names[label - 1], "score": round(score, 4), "box": [round(side, 2) for side in box]}
            for label, score, box in zip(
                shown["labels"].tolist(), shown["scores"].tolist(), shown["boxes"].tolist(), strict=True
            )
        ]
        return {"name": name, "picture": str(path.relative_to(folder)), "found": len(objects), "objects": objects}

    def plot(self, batch: Batch, outputs: Outputs) -> Figure:
        """Up to four rows of true and found boxes, with classes and scores."""
        count = min(4, len(outputs))
        figure = Figure(figsize=(9, 4 * count), layout="constrained")
        for index, row in enumerate(figure.subplots(count, 2, squeeze=False)):
            image = self.displayable(batch["image"][index])
            truth = {"boxes": batch["boxes"][index].cpu(), "labels": batch["labels"][index].cpu()}
            found = {key: value.cpu() for key, value in self._shown(outputs[index]).items()}
            for axis, kind, objects in zip(row, ("truth", "prediction"), (truth, found), strict=True):
                axis.imshow(self._drawn(image, objects).permute(1, 2, 0).numpy())
                axis.set_title(f"{kind}: {len(objects['boxes'])}", fontsize=8)
                axis.set_axis_off()
        return figure

    def _shown(self, output: dict[str, Tensor]) -> dict[str, Tensor]:
        keep = output["scores"] >= self.shown_score
        return {key: value[keep] for key, value in output.items()}

    def _drawn(self, image: Tensor, objects: dict[str, Tensor]) -> Tensor:
        """Boxes on an image (3, H, W) of 0…1, as uint8; small images are enlarged so that names can be read."""
        picture, enlarged, scale = enlarge(image)
        if "scores" in objects:  # the surest on top
            order = objects["scores"].argsort()
            objects = {key: value[order] for key, value in objects.items()}
        labels = objects["labels"].tolist()
        if not labels:
            return picture
        names = [self.class_names[label - 1] for label in labels]
        if "scores" in objects:
            names = [f"{name} {score:.2f}" for name, score in zip(names, objects["scores"].tolist(), strict=True)]
        palette = colormaps["tab10"]
        colours = [tuple(int(255 * part) for part in palette(label % 10)[:3]) for label in labels]
        drawn: Tensor = draw_bounding_boxes(
            picture,
            objects["boxes"] * enlarged,
            names,
            colours,
            width=round(3 * scale),
            font=str(Path(get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"),
            font_size=round(20 * scale),
            label_colors="white",
            label_background_colors=colours,
            fill_labels=True,
        )
        return drawn
