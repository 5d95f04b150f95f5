"""Files of networks, written and run."""

from __future__ import annotations

import json

import pytest
import torch

from sis_lightning.errors import DataError, UsageError
from sis_lightning.models import Classifier, Detector, PoseNet, Segmenter
from sis_lightning.models.export import TOLERANCE, Exportable, _difference, export


def test_a_file_that_puts_out_nan_is_no_verified_file():
    numbers, broken = torch.tensor([1.0, 2.0]), torch.tensor([float("nan"), 2.0])
    assert _difference([numbers, numbers], [numbers, numbers]) == 0
    assert not _difference([numbers, numbers], [broken, numbers]) <= TOLERANCE
    assert not _difference([numbers, numbers], [numbers, broken]) <= TOLERANCE
    assert _difference([numbers], [numbers[:1]]) == float("inf")
    assert _difference([numbers[:0]], [numbers[:0]]) is None


def networks():
    return {
        "classifier": (Classifier("sis_demo", 5), (32, 32)),
        "segmenter": (Segmenter("sis_demo", 5, decoder={"decoder_channels": 16}, in_channels=4), (50, 64)),
        "pose": (PoseNet("sis_demo", 17, (16, 16, 16)), (64, 32)),
        "detector": (Detector("sis_demo", 3, min_size=64, max_size=64, fpn_channels=16, head_channels=32), (64, 64)),
    }


@pytest.mark.parametrize("kind", ["onnx", "pt2"])
@pytest.mark.parametrize("name", ["classifier", "segmenter", "pose", "detector"])
def test_every_network_is_written_and_verified(tmp_path, name, kind):
    import onnxruntime

    torch.manual_seed(0)
    network, size = networks()[name]
    network.train()
    path = tmp_path / "folder" / f"model.{kind}"
    if (name, kind) == ("detector", "pt2"):
        with pytest.raises(UsageError, match=r"depends on the image\n.*Write ONNX"):
            export(network, path, size)
        return
    done = export(network, str(path), size, metadata={"classes": ["a", "b"]})
    assert network.training
    assert done.path == path
    assert len(done.shapes) == 2
    assert done.difference is not None or name == "detector"
    if kind == "onnx":
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        known = json.loads(session.get_modelmeta().custom_metadata_map["sis_lightning"])
        assert list(known["outputs"]) == [output.name for output in session.get_outputs()]
    else:
        extra = {"metadata.json": ""}
        torch.export.load(path, extra_files=extra)
        known = json.loads(extra["metadata.json"])
    assert known["classes"] == ["a", "b"]
    assert known["backbone"] == "res2net14-16w4s-basic-16ch"
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_what_export_refuses(tmp_path):
    network, _ = networks()["classifier"]
    with pytest.raises(UsageError, match=r"must end with \.onnx or \.pt2"):
        export(network, tmp_path / "model.pth", (32, 32))
    with pytest.raises(UsageError, match=r"image_size=\(height, width\)"):
        export(network, tmp_path / "model.onnx")
    with pytest.raises(UsageError, match="not Linear"):
        export(torch.nn.Linear(1, 1), tmp_path / "model.onnx", (32, 32))
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be written"):
        export(network, tmp_path / "file" / "model.pt2", (32, 32))


def test_a_file_whose_outputs_differ_is_not_kept(tmp_path):
    class Noisy(torch.nn.Module):
        def forward(self, x):
            return x + torch.rand(())

    network = Exportable(Noisy(), (2, 3), {}, "(2, 3)", "none", {"y": "noise"})
    with pytest.raises(DataError, match="differ from the network's"):
        export(network, tmp_path / "model.pt2")
    assert list(tmp_path.iterdir()) == []
