"""Pretrained weights by name, from files and from runs, loaded by the real code of timm and torchvision."""

from __future__ import annotations

import argparse
import pickle
import re
import warnings
import zipfile

import pytest
import torch
from torch import nn

from sis_lightning import Classifier, PoseNet, Segmenter, create_backbone, load_backbone_weights, load_model_weights
from sis_lightning.backbones import backbone_config
from sis_lightning.backbones.weights import adapt_input_channels
from sis_lightning.errors import DataError, UsageError
from sis_lightning.tasks.checkpoint_files import read_checkpoint

SMALL = backbone_config("sis_demo", channels=8, width=4)


def as_task(model: nn.Module) -> dict[str, torch.Tensor]:
    """The state dict of a task, which holds its network in `model`."""
    return {f"model.{key}": value for key, value in model.state_dict().items()}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty cache of torch.hub."""
    before = torch.hub.get_dir()
    torch.hub.set_dir(str(tmp_path / "hub"))
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    yield tmp_path / "hub" / "checkpoints"
    torch.hub.set_dir(before)


def test_weights_of_torchvision_by_name(hub):
    from torchvision.models import ResNet50_Weights, resnet50

    state = resnet50().state_dict()
    torch.save(state, hub / ResNet50_Weights.IMAGENET1K_V2.url.rpartition("/")[2])
    backbone = create_backbone("resnet50")
    loaded = load_backbone_weights(backbone, "torchvision:ResNet50_Weights.IMAGENET1K_V2")
    assert loaded.fresh == loaded.notes == ()
    assert loaded.loaded == len(backbone.state_dict())
    assert torch.equal(backbone.stages[3][2].expand.weight, state["layer4.2.conv3.weight"])
    assert str(loaded) == f"loaded {loaded.loaded} tensors from torchvision:ResNet50_Weights.IMAGENET1K_V2"


def test_weights_of_torchvision_are_downloaded(hub, monkeypatch, tmp_path):
    from torchvision.models import ResNet50_Weights, resnet50

    torch.save(resnet50().state_dict(), tmp_path / "served.pth")
    monkeypatch.setattr(ResNet50_Weights, "url", property(lambda self: (tmp_path / "served.pth").as_uri()))
    load_backbone_weights(create_backbone("resnet50"), "torchvision:ResNet50_Weights.IMAGENET1K_V2")
    assert (hub / "served.pth").is_file()
    monkeypatch.setattr(ResNet50_Weights, "url", property(lambda self: (tmp_path / "gone.pth").as_uri()))
    with pytest.raises(DataError, match=r"torchvision:ResNet50_Weights\.IMAGENET1K_V2: .* cannot be downloaded"):
        load_backbone_weights(create_backbone("resnet50"), "torchvision:ResNet50_Weights.IMAGENET1K_V2")


def test_weights_of_timm_by_name_from_the_cache_of_the_hub(tmp_path, monkeypatch):
    timm = pytest.importorskip("timm")
    from huggingface_hub import constants
    from safetensors.torch import save_file

    torch.manual_seed(0)
    state = timm.create_model("res2net50_26w_4s").state_dict()
    cached = tmp_path / "models--timm--res2net50_26w_4s.in1k"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("0" * 40)
    (cached / "snapshots" / ("0" * 40)).mkdir(parents=True)
    save_file(state, cached / "snapshots" / ("0" * 40) / "model.safetensors")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    backbone = create_backbone("res2net50", in_channels=4)
    random_state = torch.get_rng_state()
    loaded = load_backbone_weights(backbone, "timm:res2net50_26w_4s.in1k")
    assert torch.equal(torch.get_rng_state(), random_state)
    assert loaded.fresh == ()
    assert "from 3 to 4 input channels" in str(loaded)
    assert torch.equal(backbone.stages[2][5].reduce.weight, state["layer3.5.conv1.weight"])
    theirs = timm.create_model("res2net50_26w_4s.in1k", pretrained=True, in_chans=4)
    torch.testing.assert_close(backbone.stem.conv.weight, theirs.conv1.weight)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "empty"))
    with pytest.raises(DataError, match=r"timm:res2net50_26w_4s\.in1k: .* cannot be downloaded"):
        load_backbone_weights(backbone, "timm:res2net50_26w_4s.in1k")


@pytest.mark.parametrize("in_channels", [1, 2, 3, 4, 7])
def test_the_first_convolution_is_adapted_as_timm_does(in_channels):
    manipulate = pytest.importorskip("timm.models._manipulate")
    weight = torch.randn(8, 3, 7, 7)
    expected = manipulate.adapt_input_conv(in_channels, weight)
    torch.testing.assert_close(adapt_input_channels(weight, in_channels), expected)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("timm:res2net50_26w_4z", ["res2net50_26w_4s.in1k"]),
        ("timm:res2net50_26w_4s.in2k", ["res2net50_26w_4s.in1k"]),
        ("torchvision:ResNet50_Weights.IMAGENET1K_V3", ["ResNet50_Weights.IMAGENET1K_V2"]),
        ("torchvision:resnet50", ["ResNet50_Weights.IMAGENET1K_V2"]),
    ],
)
def test_unknown_names_list_the_nearest(source, words):
    pytest.importorskip("timm")
    with pytest.raises(UsageError) as caught:
        load_backbone_weights(create_backbone(SMALL), source)
    assert all(word in str(caught.value) for word in words)


def test_old_files_without_batch_counters(tmp_path):
    from torchvision.models import resnet50

    state = {key: value for key, value in resnet50().state_dict().items() if "num_batches_tracked" not in key}
    torch.save(state, tmp_path / "resnet50.pth")
    backbone = create_backbone("resnet50")
    assert load_backbone_weights(backbone, tmp_path / "resnet50.pth").fresh == ()
    assert torch.equal(backbone.stem.norm.running_var, state["bn1.running_var"])


def test_another_operator_keeps_its_kernels():
    timm = pytest.importorskip("timm")
    state = timm.create_model("res2net50_26w_4s").state_dict()
    model = create_backbone("sis50")
    with pytest.raises(DataError, match=r"Only the operators differ: strict=False"):
        load_backbone_weights(model, state)
    fresh = load_backbone_weights(model, state, strict=False).fresh
    assert fresh
    assert all(".split.convs." in name and not name.startswith("stage1") for name in fresh)
    assert torch.equal(model.stem.conv.weight, state["conv1.weight"])
    with pytest.raises(DataError, match="other"):
        load_backbone_weights(model, {"other": torch.zeros(1)}, strict=False)


def test_a_run_and_a_checkpoint_of_any_task(tmp_path):
    given = Segmenter(SMALL, 4, decoder={"decoder_channels": 16})
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    torch.save({"state_dict": as_task(given), "global_step": 3}, run / "checkpoints" / "last.ckpt")
    for source in (run, str(run), run / "checkpoints", run / "checkpoints" / "last.ckpt"):
        backbone = PoseNet(SMALL, 17, (8, 8, 8)).backbone
        assert load_backbone_weights(backbone, source).fresh == ()
        expected = given.encoder.backbone.state_dict()
        assert all(torch.equal(value, expected[key]) for key, value in backbone.state_dict().items())


def test_a_whole_network_but_its_head(tmp_path):
    decoder = {"decoder_channels": 16}
    given = Segmenter(SMALL, 4, decoder=decoder)
    torch.save({"state_dict": as_task(given)}, tmp_path / "last.ckpt")
    same, other = Segmenter(SMALL, 4, decoder=decoder), Segmenter(SMALL, 7, decoder=decoder, in_channels=1)
    assert load_model_weights(same, tmp_path / "last.ckpt").fresh == ()
    assert all(torch.equal(value, given.state_dict()[key]) for key, value in same.state_dict().items())
    before = {key: value.clone() for key, value in other.state_dict().items()}
    loaded = load_model_weights(other, tmp_path / "last.ckpt")
    assert set(loaded.fresh) == {key for key in before if key.startswith("segmentation_head.")}
    assert "segmentation_head" in str(loaded)
    for key, value in other.state_dict().items():
        if key in loaded.fresh:
            assert torch.equal(value, before[key])
        elif key == "encoder.backbone.stem.conv.weight":
            assert torch.equal(value, given.state_dict()[key].sum(dim=1, keepdim=True))
        else:
            assert torch.equal(value, given.state_dict()[key])


def test_a_classifier_from_published_weights():
    from torchvision.models import resnet50

    state = resnet50().state_dict()
    fine = Classifier("resnet50", 10)
    assert load_model_weights(fine, state).fresh == ("fc.weight", "fc.bias")
    assert load_model_weights(Classifier("resnet50", 1000), state).fresh == ()


def save_namespace(path):
    torch.save({"state_dict": {}, "args": argparse.Namespace(lr=1)}, path)


def save_module(path):
    torch.save(nn.Conv2d(1, 1, 1), path)


def save_pickle(path):
    path.write_bytes(pickle.dumps(argparse.Namespace(lr=1)))


def save_script(path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch.jit is deprecated, but its files exist
        torch.jit.save(torch.jit.script(nn.ReLU()), path)


@pytest.mark.parametrize(
    ("save", "what"),
    [
        (save_namespace, "Python objects such as argparse.Namespace, which could run code"),
        (save_module, "Python objects such as torch.nn.modules.conv.Conv2d, which could run code"),
        (save_pickle, "Python objects, which could run code"),
        (save_script, "Python objects, which could run code"),
    ],
)
def test_files_with_python_objects_are_refused_in_one_sentence(tmp_path, save, what):
    path = tmp_path / "foreign.pt"
    save(path)
    readers = [lambda: load_backbone_weights(create_backbone(SMALL), path)]
    readers += [lambda: read_checkpoint(path)] if zipfile.is_zipfile(path) else []  # other files are no checkpoints
    for read in readers:
        with pytest.raises(DataError, match=re.escape(what)) as caught:
            read()
        message = str(caught.value)
        assert message.startswith(f"{path}: ")
        assert not re.search(r"weights_only|safe_globals|trust|\n|\x1b|PyTorch", message)


def test_weights_that_do_not_fit(tmp_path):
    path = tmp_path / "other.ckpt"
    torch.save({"state_dict": as_task(Classifier(SMALL, 5, operator="recurrent1"))}, path)
    backbone = create_backbone(SMALL)
    with pytest.raises(DataError, match=r"other\.ckpt does not fit a backbone res2net14.*\n.*such as stage"):
        load_backbone_weights(backbone, path)
    with pytest.raises(DataError, match=r"other\.ckpt: no weight fits a Segmenter"):
        load_model_weights(Segmenter(SMALL, 5), path)
    torch.save({"epoch": 3}, path)
    with pytest.raises(DataError, match=r"other\.ckpt: no weight fits"):
        load_backbone_weights(backbone, path)
    path.write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"other\.ckpt: not a file of weights, or damaged"):
        load_backbone_weights(backbone, path)
    with pytest.raises(DataError, match=r"no such file"):
        load_backbone_weights(backbone, tmp_path / "gone.ckpt")
    with pytest.raises(DataError, match=r"no checkpoint in this folder"):
        load_backbone_weights(backbone, tmp_path)
