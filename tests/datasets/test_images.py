"""Decoding of image files."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sis_lightning.datasets import images
from sis_lightning.errors import DataError


def noise(mode: str) -> Image.Image:
    """An image of odd sides whose neighbouring pixels differ, so that every rounding shows."""
    bands = len(Image.new(mode, (1, 1)).getbands())
    values = np.random.default_rng(0).integers(0, 256, (37, 53, bands), dtype=np.uint8)
    return (
        Image.fromarray(values.squeeze(), mode="L" if bands == 1 else None).convert(mode)
        if bands < 4
        else (Image.frombytes(mode, (53, 37), values.tobytes()))
    )


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}, {"subsampling": 2, "quality": 40}])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_a_jpeg_has_the_pixels_that_pillow_decodes(tmp_path, mode, options):
    path = tmp_path / "a.jpg"
    noise(mode).save(path, **options)
    expected = np.asarray(Image.open(path).convert("RGB")).transpose(2, 0, 1)
    assert np.array_equal(images.read_image(path).numpy(), expected)


def test_a_torn_jpeg_is_refused_with_its_reason(tmp_path):
    buffer = io.BytesIO()
    noise("RGB").save(buffer, "JPEG")
    path = tmp_path / "torn.jpg"
    for length in (len(buffer.getvalue()) // 2, len(buffer.getvalue()) - 9):
        path.write_bytes(buffer.getvalue()[:length])
        with pytest.raises(DataError, match=r"torn\.jpg: unreadable or truncated image"):
            images.read_image(path)


def test_photographs_have_the_pixels_that_pillow_decodes(shared):
    paths = sorted(Path(shared, "coco_mini").rglob("*.jpg"))[:20]
    assert paths
    for path in paths:
        expected = torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1)
        assert torch.equal(images.read_image(path).as_subclass(torch.Tensor), expected)
