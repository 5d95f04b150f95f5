"""Pretrained weights: published ones of timm and torchvision, files, and checkpoints of the package's tasks."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sis_lightning.backbones.resnet import Backbone
from sis_lightning.errors import DataError, UsageError, nearest

#: A name such as `timm:NAME` or `torchvision:WEIGHTS`, a path, or a state dict.
Source = str | Path | Mapping[str, Tensor]

# The ResNets of torchvision and timm share their names. The Res2Nets of timm and of their authors have `convs` and
# `bns` inside a block.
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
# A weight that every backbone has; what is before it in a key is the place of the backbone in a network.
_STEM = "stem.conv.weight"
# Old files lack this counter of batch norm, which only matters for batch norm without momentum.
_COUNTER = "num_batches_tracked"


@dataclass(frozen=True)
class LoadedWeights:
    """The result of loading pretrained weights.

    Attributes:
        source: Name or path of the weights.
        loaded: Number of tensors that were loaded.
        fresh: Names of the weights that kept their values, because the source does not have them.
        notes: Sentences for the user about everything that was adapted or kept.
    """

    source: str
    loaded: int
    fresh: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        """Says in a line, and one more for each note, what was loaded."""
        return "\n  ".join([f"loaded {self.loaded} tensors from {self.source}", *self.notes])


def load_backbone_weights(backbone: Backbone, source: Source, *, strict: bool = True) -> LoadedWeights:
    """Loads pretrained weights into a backbone, in place.

    If the backbone takes another number of channels than 3, the first convolution of weights for RGB images is adapted
    as timm does: its kernels are repeated over the channels and scaled by 3 / in_channels, or summed for one channel.

    Args:
        backbone: The backbone, also that of a network or task.
        source: Name, path or state dict of the weights:

            - `timm:NAME`, such as `timm:res2net50_26w_4s.in1k`, which timm downloads, or reads from its cache;
            - `torchvision:WEIGHTS`, such as `torchvision:ResNet50_Weights.IMAGENET1K_V2`, by torchvision in the same
              way;
            - the path of a run's folder, whose last checkpoint is read, or of a checkpoint of any task of the package;
            - the path of a file with a state dict of a `Backbone`, or of a ResNet, ResNeXt, Res2Net or Res2NeXt of
              torchvision, timm or the Res2Net authors;
            - such a state dict.
        strict: Whether all weights must fit. Otherwise those that the source does not have in the same shape keep their
            values, as for a backbone with another operator.

    Returns:
        The number of tensors that were loaded, the weights that kept their values, and notes for the user.

    Raises:
        UsageError: If timm or torchvision does not have these weights, or timm is not installed.
        DataError: If the weights cannot be downloaded or read, or do not fit.
    """
    state, name = _read(source)
    prefix = next((key.removesuffix(_STEM) for key in state if key.endswith(_STEM)), None)
    own = backbone.state_dict()
    if prefix is None:
        weights = {_renamed(key): value for key, value in state.items() if not key.startswith("fc.")}
    else:
        # With a short prefix, weights of a classifier or decoder may have it too.
        parts = {key.split(".")[0] for key in own}
        inner = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        weights = {key: value for key, value in inner.items() if key.split(".")[0] in parts}
    return _load(backbone, weights, name, f"a backbone {backbone.config.slug}", strict=strict)


def load_model_weights(model: nn.Module, source: Source, *, strict: bool = True) -> LoadedWeights:
    """Loads the weights of a whole network into another of the same kind, in place, except a head that does not fit.

    The head consists of the modules that depend on the classes, or on the keypoints. If any of its weights has another
    shape, the whole head keeps its values. The first convolution is adapted as in `load_backbone_weights`.

    Args:
        model: One of the four networks.
        source: A run's folder, a checkpoint or a state dict of the same kind of network, as for
            `load_backbone_weights`. A `Classifier` also takes weights of timm or torchvision.
        strict: Whether all weights outside the head must fit.

    Returns:
        The number of tensors that were loaded, the weights that kept their values, and notes for the user.

    Raises:
        UsageError: If timm or torchvision does not have these weights, or timm is not installed.
        DataError: If the weights cannot be downloaded or read, or do not fit.
    """
    if isinstance(model, Backbone):
        return load_backbone_weights(model, source, strict=strict)
    state, name = _read(source)
    prefix = next((key.removesuffix(_STEM) for key in state if key.endswith(_STEM)), None)
    if prefix is None:
        renamed = {key if key.startswith("fc.") else f"backbone.{_renamed(key)}": value for key, value in state.items()}
        state = renamed
    elif prefix.startswith("model."):
        # A task holds its network in the attribute `model`.
        state = {key.removeprefix("model."): value for key, value in state.items() if key.startswith("model.")}
    slug = next((module.config.slug for module in model.modules() if isinstance(module, Backbone)), "no backbone")
    heads: Sequence[str] = getattr(model, "head", ())
    return _load(model, state, name, f"a {type(model).__name__} with {slug}", strict=strict, heads=heads)


def _renamed(key: str) -> str:
    for pattern, replacement in _NAMES:
        key = re.sub(pattern, replacement, key)
    return key


def _load(
    model: nn.Module,
    weights: Mapping[str, Tensor],
    name: str,
    expected: str,
    *,
    strict: bool,
    heads: Sequence[str] = (),
) -> LoadedWeights:
    weights, notes = dict(weights), []
    own = model.state_dict()
    stem = next((key for key in own if key.endswith(_STEM)), "")
    if stem in weights and weights[stem].ndim == 4 and weights[stem].shape[1] == 3 != own[stem].shape[1]:
        channels = own[stem].shape[1]
        weights[stem] = adapt_input_channels(weights[stem], channels)
        how = "summed over the channels" if channels == 1 else f"repeated and scaled by 3/{channels}"
        notes.append(f"adapted the first convolution from 3 to {channels} input channels: its kernels are {how}")
    fresh: list[str] = []
    for head in heads:
        keys = [key for key in own if key.startswith(f"{head}.")]
        if any(key not in weights or weights[key].shape != own[key].shape for key in keys):
            weights = {key: value for key, value in weights.items() if not key.startswith(f"{head}.")}
            fresh += keys
            notes.append(f"the head '{head}' keeps its initial weights: those of {name} have other shapes")
    missing = [key for key in own if key not in weights and key not in fresh and not key.endswith(_COUNTER)]
    unknown = [key for key in weights if key not in own]
    shapes = [key for key in own if key in weights and weights[key].shape != own[key].shape]
    wrong = [*missing, *unknown, *shapes]
    shared = {key: value for key, value in weights.items() if key in own and key not in shapes}
    if not shared:
        raise DataError(
            f"{name}: no weight fits {expected}; the first key is '{next(iter(weights), 'missing: there is none')}'"
        )
    if wrong and strict:
        hint = ""
        if all(".split.convs." in key for key in wrong):
            hint = "\n  Only the operators differ: strict=False loads everything else, and keeps their kernels."
        raise DataError(
            f"{name} does not fit {expected}: {len(missing)} weights are missing, {len(unknown)} unknown, "
            f"{len(shapes)} of another shape,\n  such as {wrong[0]}{hint}"
        )
    if missing or shapes:
        kept = [*missing, *shapes]
        fresh += kept
        notes.append(f"{len(kept)} tensors keep their initial values, such as {kept[0]}")
    model.load_state_dict(shared, strict=False)
    return LoadedWeights(name, len(shared), tuple(fresh), tuple(notes))


def adapt_input_channels(weight: Tensor, in_channels: int) -> Tensor:
    """Adapts the first convolution of a network for RGB images to another number of channels.

    The method is that of timm (`adapt_input_conv`): for one channel the kernels are summed over the channels, otherwise
    they are repeated and scaled such that the response to a grey image stays the same.

    Args:
        weight: Kernels (C, 3, k, k).
        in_channels: Number of input channels, at least 1.

    Returns:
        Kernels (C, in_channels, k, k).
    """
    if in_channels == 1:
        return weight.sum(dim=1, keepdim=True)
    repeated = weight.repeat(1, math.ceil(in_channels / 3), 1, 1)[:, :in_channels]
    return repeated * (3 / in_channels)


def _read(source: Source) -> tuple[dict[str, Tensor], str]:
    """Returns the state dict of a source, with the keys as they are there, and a name for messages."""
    if isinstance(source, Mapping):
        return dict(source), "the state dict"
    text = str(source)
    if text.startswith("timm:"):
        return _from_timm(text.removeprefix("timm:")), text
    if text.startswith("torchvision:"):
        return _from_torchvision(text.removeprefix("torchvision:")), text
    if text.startswith("run:"):
        raise UsageError(f"{text} names a run only in a configuration: give the run's directory, such as runs/…/seed0")
    path = Path(source).expanduser()
    if path.is_dir():
        places = [path / "checkpoints" / "last.ckpt", path / "last.ckpt"]
        found = next((place for place in places if place.is_file()), None)
        if found is None:
            raise DataError(f"{path}: no checkpoint in this folder (no checkpoints/last.ckpt)")
        path = found
    if not path.is_file():
        raise DataError(
            f"weights '{source}': there is no such file or run folder (timm:NAME and torchvision:WEIGHTS name "
            "published ones)"
        )
    try:
        content = load_tensors(path)
    except Exception as error:  # a damaged file makes torch raise almost anything
        raise DataError(f"{path}: not a file of weights, or damaged ({why_not_loaded(error)})"[:400]) from None
    state = content.get("state_dict", content) if isinstance(content, dict) else {}
    return {key: value for key, value in state.items() if isinstance(value, Tensor)}, str(path)


def load_tensors(path: Path, *, mmap: bool = False) -> Any:
    """The content of a file of `torch.save`, which may hold tensors and plain data but nothing that could run code.

    Args:
        path: The file.
        mmap: Whether the tensors stay in the file until they are used.
    """
    with warnings.catch_warnings():
        # About foreign files, of which the error says more.
        warnings.filterwarnings("ignore", "Detected pickle protocol|'torch.load' received a zip file")
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)


def why_not_loaded(error: Exception) -> str:
    """Why `load_tensors` failed, without torch's advice to load the file in an unsafe way.

    Args:
        error: What it raised.

    Returns:
        A clause for a message.
    """
    text = str(error).strip()
    if "weights_only" not in text:
        return f"{type(error).__name__}: {text.partition(chr(10))[0]}"
    name = re.search(r"GLOBAL (\S+) was not an allowed global", text)
    what = f"Python objects such as {name[1]}" if name else "Python objects"
    return f"it holds {what}, which could run code: only files of torch.save(model.state_dict(), FILE) are loaded"


def _from_timm(name: str) -> dict[str, Tensor]:
    try:
        import timm
    except ImportError:
        raise UsageError(f"timm:{name} needs the package timm: pip install timm") from None
    # Names such as hf-hub:… and local-dir:… are resolved by timm.
    if ":" not in name and not timm.is_model(name):
        raise UsageError(f"timm has no model '{name}': {nearest(name, timm.list_pretrained())}")
    if ":" not in name and not timm.is_model_pretrained(name):
        raise UsageError(f"timm has no weights for '{name}': {nearest(name, timm.list_pretrained())}")
    try:
        with torch.random.fork_rng(devices=[]):
            state: dict[str, Tensor] = timm.create_model(name, pretrained=True).state_dict()
    except Exception as error:  # the hub, the network and timm each raise their own
        raise _unavailable(f"timm:{name}", error) from error
    return state


def _from_torchvision(name: str) -> dict[str, Tensor]:
    from torchvision import models

    try:
        weights = models.get_weight(name)
    except (ValueError, KeyError):
        builders = [builder for builder in models.list_models(models) if "resne" in builder]
        known = [str(weights) for builder in builders for weights in models.get_model_weights(builder)]
        raise UsageError(f"torchvision has no weights '{name}': {nearest(name, known)}") from None
    try:
        return dict(weights.get_state_dict(progress=False, check_hash=True))
    except Exception as error:
        raise _unavailable(f"torchvision:{name}", error) from error


def _unavailable(name: str, error: Exception) -> DataError:
    reason = str(error).strip().partition("\n")[0]
    return DataError(f"{name}: the weights cannot be downloaded or read ({type(error).__name__}: {reason})"[:400])
