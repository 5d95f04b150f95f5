"""Human joints: heatmaps from deconvolutions on our backbones (Simple Baselines, Xiao et al. 2018)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor
from torchmetrics import Metric, MetricCollection
from torchvision.utils import draw_keypoints

from sis_lightning.backbones import BackboneConfig
from sis_lightning.datamodules import Batch
from sis_lightning.datasets.constants import COCO_JOINTS, COCO_SKELETON
from sis_lightning.errors import UsageError
from sis_lightning.evaluation.gathered import GatheredScores
from sis_lightning.models import PoseNet
from sis_lightning.models.heatmap_codec import HeatmapCodec, mirror, oks_nms, rescore
from sis_lightning.tasks.base import BaseTask, Outputs, enlarge

_BONES = [(start - 1, end - 1) for start, end in COCO_SKELETON]


class KeypointTask(BaseTask):
    """Finds the 17 joints of people in given boxes: crops (N, 3, H, W) → heatmaps (N, 17, H/4, W/4).

    The loss is the mean square of the heatmaps' differences, of annotated joints. Testing averages a crop and its
    mirror image, rescores a person by its joints, and leaves out who resembles another (OKS 0.9); scored by COCO's ten
    figures over the split.

    Args:
        backbone: A file in `configs/backbones/` by its name (`sis50`), or its fields.
        deconv_channels: Of each deconvolution on the backbone's last map; the heatmaps' stride is the backbone's
            divided by two for each.
        sigma: Of the heatmaps' Gaussians, in heatmap px.
        flip_test: Averages with the mirrored crop.
        shown_score: Least score of people and of joints that are drawn and that `predict` lists, 0…1.
        num_classes: 1: people.
        training: How to train: `optimizer` and what else `BaseTask` takes.

    Raises:
        UsageError: For settings that cannot be.
    """

    monitor = "val/AP"
    free_settings = BaseTask.free_settings | {"sigma", "flip_test", "shown_score"}

    def __init__(
        self,
        backbone: BackboneConfig,
        deconv_channels: tuple[int, ...] = (256, 256, 256),
        sigma: float = 2.0,
        flip_test: bool = True,
        shown_score: float = 0.2,
        num_classes: int = 1,
        **training: Any,
    ) -> None:
        super().__init__(backbone, num_classes, **training)
        if sigma <= 0:
            raise UsageError(f"model.sigma is {sigma}, must be above 0")
        self.sigma, self.flip_test, self.shown_score = sigma, flip_test, shown_score
        model = PoseNet(self.backbone_config, len(COCO_JOINTS), tuple(deconv_channels))
        self.stride = model.stride
        self.finish(model, GatheredScores())

    def codec(self, pictures: Tensor) -> HeatmapCodec:
        """What goes between the joints in such pictures (N, 3, H, W) and heatmaps."""
        height, width = pictures.shape[-2:]
        return HeatmapCodec(height, width, self.stride, self.sigma)

    def forward(self, crops: Tensor) -> Tensor:
        """Normalised (N, 3, H, W) → heatmaps (N, 17, H/s, W/s)."""
        heatmaps: Tensor = self.model(crops)
        return heatmaps

    def training_loss(self, batch: Batch) -> dict[str, Tensor]:
        """Half the mean squared error over all heatmaps, those of joints that are not annotated counting 0."""
        wanted, weights = self.codec(batch["image"]).encode(batch["joints"])
        error = (self(batch["image"]).float() - wanted) * weights[..., None, None]
        return {"heatmaps": 0.5 * error.square().mean()}

    def evaluate(self, batch: Batch, metrics: Metric | MetricCollection) -> Outputs:
        """Collects the people of each image."""
        outputs = self.predict_step(batch)
        rows, category = [], self.data.category_ids[0]
        ids = [item.item() if isinstance(item, Tensor) else item for item in batch["image_id"]]
        for image_id, output in zip(ids, outputs, strict=True):
            for person, score in zip(output["keypoints"].flatten(1).tolist(), output["scores"].tolist(), strict=True):
                rows.append({"image_id": image_id, "category_id": category, "keypoints": person, "score": score})
        metrics.update(rows, ids)
        return outputs

    def predict_step(self, batch: Batch, batch_idx: int = 0) -> Outputs:
        """For each image `keypoints` (P, 17, 3) x, y in its px and score, and `scores` (P,) of the people."""
        counts = [len(crops) for crops in batch["crops"]]
        to_image = torch.cat(list(batch["to_image"])).cpu()
        crops = torch.cat(list(batch["crops"]))
        found = torch.zeros(0, len(COCO_JOINTS), 3, dtype=torch.float64)
        if len(crops):
            parts = [self._heatmaps(part).float().cpu() for part in torch.split(crops, self.data.batch_size)]
            found = self.codec(crops).decode(torch.cat(parts), to_image)
        outputs = []
        for people, boxes, areas in zip(torch.split(found, counts), batch["box_scores"], batch["areas"], strict=True):
            joints = people.detach().numpy()
            scores = np.array(
                [rescore(float(box), person[:, 2]) for box, person in zip(boxes.cpu(), joints, strict=True)]
            )
            kept = oks_nms(joints, scores, areas.cpu().numpy())
            outputs.append({"keypoints": people[kept], "scores": torch.from_numpy(scores[kept])})
        return outputs

    def _heatmaps(self, crops: Tensor) -> Tensor:
        crops = crops.contiguous(memory_format=torch.channels_last)
        heatmaps: Tensor = self(crops)
        return (heatmaps + mirror(self(crops.flip(-1)))) / 2 if self.flip_test else heatmaps

    def write_prediction(self, image: Tensor, name: str, output: dict[str, Any], folder: Path) -> dict[str, Any]:
        """`pictures/NAME.jpg` with skeletons; the row lists `people` with their joints by name."""
        path = folder / "pictures" / f"{name}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(self._drawn(image, self._shown(output)).permute(1, 2, 0).numpy()).save(path, quality=90)
        people = [
            {
                "score": round(score, 4),
                "joints": {
                    joint: [round(x, 2), round(y, 2), round(seen, 4)]
                    for joint, (x, y, seen) in zip(COCO_JOINTS, person, strict=True)
                },
            }
            for person, score in zip(output["keypoints"].tolist(), output["scores"].tolist(), strict=True)
            if score >= self.shown_score
        ]
        boxes = self.data.notes.get("person boxes", "")
        picture = str(path.relative_to(folder))
        return {"name": name, "picture": picture, "found": len(people), "person boxes": boxes, "people": people}

    def plot(self, batch: Batch, outputs: Outputs) -> Figure:
        """Up to four rows of true and found skeletons, images with people first."""
        order = sorted(range(len(outputs)), key=lambda index: not len(batch["true_joints"][index]))[:4]
        figure = Figure(figsize=(9, 4 * len(order)), layout="constrained")
        for row, index in zip(figure.subplots(len(order), 2, squeeze=False), order, strict=True):
            image = self.displayable(batch["image"][index])
            truth, found = batch["true_joints"][index].cpu(), self._shown(outputs[index])
            for axis, kind, people in zip(row, ("truth", "prediction"), (truth, found), strict=True):
                axis.imshow(self._drawn(image, people).permute(1, 2, 0).numpy())
                axis.set_title(f"{kind}: {len(people)}", fontsize=8)
                axis.set_axis_off()
        return figure

    def _shown(self, output: dict[str, Tensor]) -> Tensor:
        people: Tensor = output["keypoints"][output["scores"] >= self.shown_score]
        return people

    def _drawn(self, image: Tensor, people: Tensor) -> Tensor:
        """Skeletons on an image (3, H, W) of 0…1, as uint8, each in a colour of its own, the first on top.

        Joints below `shown_score` are left out.
        """
        picture, enlarged, scale = enlarge(image)
        palette = colormaps["tab10"]
        for index in reversed(range(len(people))):
            person = people[index : index + 1]
            picture = draw_keypoints(
                picture,
                person[..., :2] * enlarged,
                connectivity=_BONES,
                colors=tuple(int(255 * part) for part in palette(index % 10)[:3]),
                radius=round(4 * scale),
                width=round(3 * scale),
                visibility=person[..., 2] > self.shown_score,
            )
        return picture
