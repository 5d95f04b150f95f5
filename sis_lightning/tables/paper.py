"""The paper's tables as the paper prints them, typed a second time, against which table specs are compared.

Zhou, Fu, Liu, "SIS: A new multi-scale convolutional operator", JUSTC 2022, 52(4):7, section 4. A table spec can be
edited; if what it calls the paper's differs from this file, `sis-lightning tables check` fails and the page says so.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from sis_lightning.tables.data_sets import OFFICIAL
from sis_lightning.tables.spec import Column, Row, Table, TableSpec

#: The backbone and the operator of each row that has reported values, by table, group (of Table 4, in its order) and
#: label, with these values: 195 in all.
REPORTED: dict[str, dict[tuple[int, str], tuple[str, str | None, str]]] = {
    "1": {
        (0, "ResNet-29"): ("resnet29", None, "36.5 4.2 20.50"),
        (0, "ResNeXt-29"): ("resnext29_8x64d", None, "34.4 4.2 17.90"),
        (0, "Res2NeXt-29"): ("res2next29_8c25w4s", None, "33.8 4.2 16.93"),
        (0, "Interactive SIS-I"): ("sis29", "interactive1", "26.3 4.36 16.82"),
        (0, "Interactive SIS-II"): ("sis29", "interactive2", "26.5 4.36 16.79"),
        (0, "Recurrent SIS-I"): ("sis29", "recurrent1", "25.7 4.52 16.87"),
        (0, "Recurrent SIS-II"): ("sis29", "recurrent2", "25.9 4.52 16.85"),
        (0, "Basic SIS"): ("sis29", "basic", "28.3 4.2 16.74"),
    },
    "1-1": {
        (0, "ResNet-29"): ("resnet29", "recurrent1", "20.50 20.45 20.38"),
        (1, "ResNeXt-29"): ("resnext29_8x64d", "recurrent1", "17.90 17.74 17.68"),
    },
    "2": {
        (0, "ResNet"): ("resnet50", None, "29.8 49.7 71.5"),
        (0, "Res2Net"): ("res2net50", None, "31.2 51.4 73.3"),
        (0, "Recurrent SIS-II"): ("sis50", "recurrent2", "31.2 51.4 73.3"),
        (0, "Recurrent SIS-I"): ("sis50", "recurrent1", "31.2 51.4 73.4"),
        (0, "Interactive SIS-II"): ("sis50", "interactive2", "31.4 51.6 73.6"),
        (0, "Interactive SIS-I"): ("sis50", "interactive1", "31.5 51.7 73.7"),
        (0, "Basic SIS"): ("sis50", "basic", "32.4 52.7 74.1"),
    },
    "3": {
        (0, "ResNet"): ("resnet50", None, "0.751 0.770"),
        (0, "Res2Net"): ("res2net50", None, "0.767 0.781"),
        (0, "Recurrent SIS-I"): ("sis50", "recurrent1", "0.769 0.773"),
        (0, "Recurrent SIS-II"): ("sis50", "recurrent2", "0.770 0.775"),
        (0, "Interactive SIS-I"): ("sis50", "interactive1", "0.772 0.785"),
        (0, "Interactive SIS-II"): ("sis50", "interactive2", "0.773 0.786"),
        (0, "Basic SIS"): ("sis50", "basic", "0.775 0.791"),
    },
    "4": {
        (0, "ResNet"): ("resnet50", None, ".711 .915 .784 .685 .753 .743 .923 .806 .711 .792"),
        (0, "Res2Net"): ("res2net50", None, ".721 .916 .802 .696 .761 .752 .929 .821 .723 .797"),
        (0, "Recurrent SIS-I"): ("sis50", "recurrent1", ".723 .916 .803 .697 .765 .754 .929 .823 .725 .800"),
        (0, "Recurrent SIS-II"): ("sis50", "recurrent2", ".724 .917 .804 .698 .767 .756 .929 .824 .726 .801"),
        (0, "Interactive SIS-I"): ("sis50", "interactive1", ".726 .916 .805 .701 .767 .757 .929 .827 .727 .803"),
        (0, "Interactive SIS-II"): ("sis50", "interactive2", ".727 .925 .804 .700 .767 .758 .931 .825 .726 .805"),
        (0, "Basic SIS"): ("sis50", "basic", ".731 .925 .814 .706 .772 .761 .932 .831 .731 .808"),
        (1, "Res2Net"): ("res2net101", None, ".722 .919 .794 .700 .754 .760 .931 .828 .733 .803"),
        (1, "Recurrent SIS-I"): ("sis101", "recurrent1", ".733 .923 .815 .709 .776 .764 .932 .834 .735 .811"),
        (1, "Recurrent SIS-II"): ("sis101", "recurrent2", ".735 .924 .817 .715 .779 .767 .933 .836 .736 .813"),
        (1, "Interactive SIS-I"): ("sis101", "interactive1", ".737 .924 .818 .715 .785 .769 .934 .838 .738 .815"),
        (1, "Interactive SIS-II"): ("sis101", "interactive2", ".738 .925 .819 .715 .785 .770 .935 .840 .739 .816"),
        (1, "Basic SIS"): ("sis101", "basic", ".742 .925 .825 .715 .785 .773 .935 .843 .743 .819"),
    },
}

#: The rows with which the groups of each table are compared.
BASELINES = {
    "1": ("Res2NeXt-29", "ResNeXt-29"),
    "1-1": (None, None),
    "2": ("Res2Net",),
    "3": ("Res2Net",),
    "4": ("Res2Net", "Res2Net"),
}
_COCO_KEYPOINTS = ("AP", "AP50", "AP75", "APm", "APl", "AR", "AR50", "AR75", "ARm", "ARl")
#: What the columns with reported values measure, by table: task, metric, factor to the table's unit, changed fields of
#: the backbone.
MEASURED: dict[str, list[tuple[str, str, float, dict[str, int]]]] = {
    "1": [
        ("cls_cifar100", "parameters", 1e-6, {}),
        ("cls_cifar100", "macs", 1e-9, {}),
        ("cls_cifar100", "test/top1_error_percent", 1, {}),
    ],
    "1-1": [("cls_cifar100", "test/top1_error_percent", 1, fields) for fields in ({}, {"steps": 3}, {"steps": 4})],
    "2": [
        ("det_coco", "test/AP", 100, {}),
        ("det_coco", "test/AP50", 100, {}),
        ("det_voc", "test/AP50_voc07", 100, {}),
    ],
    "3": [("seg_voc", "test/miou", 1, {}), ("seg_voc", "test/miou", 1, {"depth": 101})],
    "4": [("kpt_coco", f"test/{name}", 1, {}) for name in _COCO_KEYPOINTS],
}

#: The seeds of each run.
SEEDS = (0, 1, 2)
#: The published weights from which networks of the variants start.
PUBLISHED = {
    "resnet50": "torchvision:ResNet50_Weights.IMAGENET1K_V1",
    "resnet50 depth=101": "torchvision:ResNet101_Weights.IMAGENET1K_V1",
    "resnet101": "torchvision:ResNet101_Weights.IMAGENET1K_V1",
    "res2net50": "timm:res2net50_26w_4s.in1k",
    "res2net50 depth=101": "timm:res2net101_26w_4s.in1k",
    "res2net101": "timm:res2net101_26w_4s.in1k",
}
#: The published data that each task is measured on.
_DATA = {
    "cls_cifar100": "cifar100",
    "det_coco": "coco_boxes",
    "det_voc": "voc07_boxes",
    "seg_voc": "voc12_masks",
    "kpt_coco": "coco_keypoints",
}
_VARIANT = "-imagenet"


def deviations(spec: TableSpec) -> dict[str, list[str]]:
    """Where tables of the paper in a table spec differ from the paper, by the ids of the tables.

    The tables of the paper are those with its ids, or with values reported by it. Rows without reported values are not
    compared. In the variants from ImageNet weights the runs have another configuration.

    Args:
        spec: All tables.
    """
    found = {}
    for table in spec.tables:
        if table.id.removesuffix(_VARIANT) in REPORTED or re.search("the paper|justc|sis:", table.reported_by.lower()):
            found[table.id] = list(_deviations(table))
    return {name: texts for name, texts in found.items() if texts}


def _deviations(table: Table) -> Iterator[str]:
    plain = table.id.removesuffix(_VARIANT)
    if plain not in REPORTED:
        yield "the paper has no such table"
        return
    if len(table.columns) < len(MEASURED[plain]):
        yield f"it has {len(table.columns)} columns, the paper's has {len(MEASURED[plain])}"
        return
    baselines = tuple(group.baseline for group in table.groups)
    if baselines != BASELINES[plain]:
        yield f"its rows are compared with {baselines}, not with {BASELINES[plain]}"
    rows = {
        (number, row.label): row
        for number, group in enumerate(table.groups)
        for row in group.rows
        if any(value is not None for value in row.reported)
    }
    for (number, label), (backbone, operator, text) in REPORTED[plain].items():
        if (row := rows.pop((number, label), None)) is None:
            yield f"{label} of group {number + 1} is missing"
        else:
            yield from _of_row(row, table, backbone, operator, [float(value) for value in text.split()])
    yield from (f"the paper reports no values for {label} of group {number + 1}" for number, label in rows)
    for place, wanted in enumerate(MEASURED[plain]):
        # Columns of complexity come before the table's own.
        yield from _of_column(_reported_columns(table)[place], *wanted, variant=table.id != plain)


def _reported_columns(table: Table) -> list[Column]:
    plain = table.id.removesuffix(_VARIANT)
    return list(table.columns[len(table.columns) - len(MEASURED[plain]) :])


def _of_row(row: Row, table: Table, backbone: str, operator: str | None, values: list[float]) -> Iterator[str]:
    if (row.backbone, row.operator, dict(row.fields)) != (backbone, operator, {}):
        here = f"{row.backbone} with {row.operator} {dict(row.fields) or ''}".strip()
        yield f"{row.label} is {backbone} with operator {operator}, here {here}"
    columns = [None] * (len(table.columns) - len(values)) + values
    for column, wanted, given in zip(table.columns, columns, row.reported, strict=True):
        if wanted != given:
            yield f"{row.label}, {column.label}: the paper reports {wanted}, here {given}"


def _of_column(
    column: Column, task: str, metric: str, scale: float, fields: dict[str, int], *, variant: bool
) -> Iterator[str]:
    run = column.run
    config = (f"tasks/{task}.yaml", *(["configs/from_imagenet.yaml"] if variant else []))
    start = run.pretrained
    weights = (start.run.name, dict(start.published)) if start else None
    known = (run.config, dict(run.options), run.data, run.seeds, weights)
    if known != (config, {}, OFFICIAL[_DATA[task]], SEEDS, ("cls_imagenet", PUBLISHED) if variant else None):
        yield f"{column.label} is of {' '.join(config)} on {OFFICIAL[_DATA[task]].title}, here of another run"
    better = "lower" if metric in ("parameters", "macs", "test/top1_error_percent") else "higher"
    if (column.metric, dict(column.backbone), column.better) != (metric, fields, better) or abs(
        column.scale / scale - 1
    ) > 1e-9:
        here = f"{column.metric} × {column.scale:g} {dict(column.backbone) or ''}".strip()
        yield f"{column.label} is {f'{metric} × {scale:g} {fields or str()}'.strip()}, here {here}"
