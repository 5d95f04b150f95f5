"""Names of classes and keypoints, which must be the same in data and weights."""

from __future__ import annotations

import itertools
from collections.abc import Collection

from sis_lightning.datasets.meta import DatasetMeta
from sis_lightning.errors import UsageError

#: Fields of a `DatasetMeta` that go together, by the names that they belong to.
NAMED_FIELDS = {
    "class_names": ("class_names", "category_ids"),
    "keypoint_names": ("keypoint_names", "flip_pairs", "skeleton", "sigmas"),
}


def require_same_names(trained: DatasetMeta, data: DatasetMeta, given: Collection[str]) -> None:
    """Compares the names of data with those on which weights were trained, as far as both have them.

    Raises:
        UsageError: Names the first difference.
    """
    remedy = (
        "\n  Its outputs would be taken for others. To train on other names: sis_lightning.load(path, num_classes=…), "
        "or the option weights."
    )
    for key, what in (("class_names", "class"), ("keypoint_names", "keypoint")):
        old, new = getattr(trained, key), getattr(data, key)
        if not old or key not in given:
            continue
        for index, (before, now) in enumerate(itertools.zip_longest(old, new, fillvalue="missing")):
            if before != now:
                raise UsageError(f"{what} {index} is '{now}' in the data, but '{before}' in the checkpoint{remedy}")
        if key == "keypoint_names":
            pairs = [{tuple(sorted(pair)) for pair in meta.flip_pairs} for meta in (trained, data)]
            if different := sorted(pairs[0] ^ pairs[1]):
                where = "checkpoint" if different[0] in pairs[0] else "data"
                names = " and ".join(f"'{new[index]}'" for index in different[0])
                raise UsageError(f"a flip exchanges the keypoints {names} only in the {where}{remedy}")
