"""Weights from elsewhere: published ones of the same networks under our names, and other tasks' backbones."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from sis_lightning.backbones.resnet import Backbone
from sis_lightning.errors import DataError
from sis_lightning.models.classifier import Classifier

# torchvision's and timm's ResNets share their names; timm's (and the authors') Res2Nets have `convs` and `bns` inside.
_NAMES = [
    (r"^conv1\.", "stem.conv."),
    (r"^bn1\.", "stem.norm."),
    (r"^layer(\d+)\.", r"stage\1."),
    (r"\.conv1\.", ".reduce."),
    (r"\.bn1\.", ".reduce_norm."),
    (r"\.conv2\.weight", ".split.convs.0.K"),
    (r"\.bn2\.", ".split.norms.0."),
    (r"\.convs\.(\d+)\.weight", r".split.convs.\1.K"),
    (r"\.bns\.(\d+)\.", r".split.norms.\1."),
    (r"\.conv3\.", ".expand."),
    (r"\.bn3\.", ".expand_norm."),
    (r"\.downsample\.", ".shortcut."),
]


def load_torchvision_weights(
    model: Backbone | Classifier, state_dict: Mapping[str, Tensor], *, strict: bool = True
) -> list[str]:
    """Loads a torchvision ResNet's or ResNeXt's state dict into our network of the same shape, in place.

    Args:
        model: A backbone (`fc.*` is then ignored) or a classifier.
        state_dict: As `torchvision.models.resnet50().state_dict()`.
        strict: False starts a network with another operator or classifier from those weights that it shares with the
            source; the others stay as they were drawn.

    Returns:
        The names of `model`'s weights that were not in the source; empty where `strict`.

    Raises:
        DataError: Where `strict` and the two differ, or where they share nothing at all.
    """
    ours = model.state_dict()
    converted: dict[str, Tensor] = {}
    for key, value in state_dict.items():
        name = key
        for pattern, replacement in _NAMES:
            name = re.sub(pattern, replacement, name)
        if isinstance(model, Classifier):
            name = name if name.startswith("fc.") else f"backbone.{name}"
        elif name.startswith("fc."):
            continue
        converted[name] = value
    missing = [name for name in ours if name not in converted]
    unknown = [name for name in converted if name not in ours]
    shapes = [name for name in ours if name in converted and ours[name].shape != converted[name].shape]
    if strict and (missing or unknown or shapes):
        raise DataError(
            f"these weights are of another network: {len(missing)} of ours are missing, {len(unknown)} are unknown, "
            f"{len(shapes)} differ in shape;\n  first: {(missing + unknown + shapes)[0]}\n"
            "  strict=False loads what both have in common."
        )
    shared = {name: value for name, value in converted.items() if name in ours and name not in shapes}
    if not shared:
        raise DataError(f"no weight fits: the first key is '{next(iter(state_dict), 'missing')}'")
    model.load_state_dict(shared, strict=False)
    return [name for name in ours if name not in shared]


def load_timm_weights(
    model: Backbone | Classifier, state_dict: Mapping[str, Tensor], *, strict: bool = True
) -> list[str]:
    """Loads the state dict of timm's ResNet, ResNeXt, Res2Net or Res2NeXt, or the Res2Net authors' own, in place.

    The same as `load_torchvision_weights`: all these networks share one way of naming.
    """
    return load_torchvision_weights(model, state_dict, strict=strict)


def load_backbone_weights(backbone: Backbone, path: Path) -> None:
    """Loads a backbone, in place and strictly, from a file.

    Args:
        backbone: The body of any task.
        path: A checkpoint of any of our tasks, a state dict with a backbone of ours in it, or one of torchvision's,
            timm's or the Res2Net authors'.

    Raises:
        DataError: Where there is no such file, it is damaged, or holds another backbone.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise DataError(f"model.backbone_weights '{path}' does not exist") from None
    except Exception as error:  # whatever a damaged file makes torch raise
        raise DataError(f"{path}: no weights in it, or damaged ({type(error).__name__}: {error})"[:400]) from None
    state = content.get("state_dict", content) if isinstance(content, dict) else {}
    mark = "stem.conv.weight"
    prefix = next((key.removesuffix(mark) for key in state if key.endswith(mark)), None)
    if prefix is None:
        try:
            load_torchvision_weights(backbone, state)
        except DataError as error:
            raise DataError(f"{path}: {error}") from None
        return
    theirs = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    ours = backbone.state_dict()
    # A classifier's or a decoder's own weights may stand beside the body's where the prefix is short.
    theirs = {key: value for key, value in theirs.items() if key.split(".")[0] in {name.split(".")[0] for name in ours}}
    other = [key for key in (*ours, *theirs) if key not in ours or key not in theirs]
    other += [key for key in ours if key in theirs and ours[key].shape != theirs[key].shape]
    if other:
        raise DataError(
            f"{path} holds another backbone: {len(other)} weights are missing, unknown or of another shape,\n"
            f"  such as {other[0]}; asked for is {backbone.config.slug}."
        )
    backbone.load_state_dict(theirs)
