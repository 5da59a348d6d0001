"""Weights of convolutional backbones: from a name, a file or a folder to a frozen ``ConvNet``.

Ours are timm's names, so that a file's keys are held against the architecture as they are. Source:
METHODS G.
"""

import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor

from dinotrain.backbones.convnets.backbone import ConvNet, check_image_size
from dinotrain.backbones.convnets.config import CONVNETS, ConvNetConfig, Family
from dinotrain.backbones.convnets.published import REPOSITORIES, TAGS
from dinotrain.backbones.convnets.table import build_convnet, expected_shapes
from dinotrain.backbones.layouts import State, few, unwrap
from dinotrain.backbones.weight_files import (
    ACCEPTED,
    Contents,
    assign_,
    check_storage,
    check_values,
    decode_json,
    first_line,
    naming,
    open_weights,
    save_weights,
)
from dinotrain.errors import UsageError, WeightsError, unknown_name

CLASSIFIERS = ("fc.", "classifier.")
"""Parts of a file that are no backbone, and are passed over."""

COUNTER = ".num_batches_tracked"
"""How many batches torch's BatchNorm has seen; nothing reads it."""

_NAMED = re.compile(r"((?:tf_)?efficientnet_b[0-7]|seresnet50)(?![0-9a-z])[._-]?(.*)", re.DOTALL)
_OTHER_PIXELS = ("ap", "ra4")
"""Beginnings of the tags whose weights expect pixels normalised with 0.5 in place of ImageNet's."""

_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


class ConvNetWeights(msgspec.Struct, frozen=True):
    """One backbone as read: its architecture, and its tensors under our keys."""

    config: ConvNetConfig
    state: State


class _Header(msgspec.Struct):
    """The part of our own checkpoint's ``config`` that describes its backbone."""

    backbone: ConvNetConfig


class _Pixels(msgspec.Struct):
    """The pixels that timm's ``config.json`` says the weights expect."""

    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None


class _TimmConfig(msgspec.Struct):
    """The fields of timm's ``config.json`` that decide what the tensors mean."""

    architecture: str = ""
    pretrained_cfg: _Pixels = msgspec.field(default_factory=_Pixels)


def load_convnet(
    source: str | Path,
    image_size: int | tuple[int, int] | None = None,
    *,
    device: str | torch.device = "cpu",
) -> ConvNet:
    """Load a frozen convolutional backbone: evaluation mode, float32, no gradients.

    Args:
        source: a hub name such as ``efficientnet_b0`` or ``seresnet50.a1_in1k`` (optionally
            ``@sha256:<hex>``), a weights file, or a folder. A path that exists wins over a name.
        image_size: height and width in pixels that the model is meant for, only checked here.
        device: where the parameters go.

    Raises:
        UsageError: an unknown name, or an architecture that has no published weights.
        WeightsError: the file is missing, corrupt, foreign or does not match its architecture.
        DownloadError: a named backbone that cannot be fetched.
        ShapeError: ``image_size`` is under 32.
    """
    check_image_size(image_size)
    name = convnet_name(source)
    weights = interpret(open_weights(source)) if name is None else _named_weights(str(source), name)
    return build_frozen(weights, device)


def build_frozen(weights: ConvNetWeights, device: str | torch.device = "cpu") -> ConvNet:
    """Make the frozen model of some weights."""
    with torch.device("meta"):
        model = build_convnet(weights.config)
    assign_(model, weights.state, device)
    return model


def save_convnet(model: ConvNet, path: str | Path) -> None:
    """Write a bare backbone file: our keys in safetensors, its ``ConvNetConfig`` in the header."""
    save_weights(model, model.config, path)


def convnet_name(source: str | Path) -> str | None:
    """Return the hub name in ``source``, None for a path or what is no convolutional backbone.

    Raises:
        UsageError: an architecture of ours without published weights, or an unknown tag of one.
    """
    if isinstance(source, Path) or Path(source).exists():
        return None
    name = source.partition("@")[0]
    if name in REPOSITORIES:
        return name
    architecture, _, tag = name.partition(".")
    if architecture not in CONVNETS or tag in ("pth", "pt", "bin", "safetensors", "tar"):
        return None
    if architecture not in TAGS:
        raise UsageError(
            f"{architecture} has no published weights. Use tf_{architecture}, or a weights file."
        )
    raise unknown_name("backbone", name, [f"{architecture}.{tag}" for tag in TAGS[architecture]])


def _named_weights(source: str, name: str) -> ConvNetWeights:
    # Imported here: a local file needs no network library.
    from dinotrain.backbones.hub import fetch

    path = fetch(source, repositories=REPOSITORIES)
    return interpret(open_weights(path), CONVNETS[name.partition(".")[0]])


def family_of(contents: Contents) -> Family | None:
    """Tell by its keys whether a file holds a convolutional backbone, and of which family."""
    try:
        names = set(_backbone_tensors(contents))
    except WeightsError:
        return None
    if {"conv_stem.weight", "blocks.0.0.conv_dw.weight"} <= names:
        return "efficientnet"
    if {"conv1.weight", "layer1.0.conv1.weight"} <= names:
        return "seresnet"
    return None


def interpret(contents: Contents, expected: ConvNetConfig | None = None) -> ConvNetWeights:
    """Give the tensors of an opened file their meaning.

    Args:
        contents: as ``open_weights`` gives them.
        expected: the architecture, where it is known; else the file's header, timm's config.json
            beside it or the file's name tell it. Shapes alone do not: both forms of EfficientNet
            have the same.

    Returns:
        Architecture and tensors under our keys, in the dtypes of the file; tensors may be views of
        the file.

    Raises:
        WeightsError: one line that begins with the path.
    """
    with naming(contents.source):
        family = family_of(contents)
        if family is None:
            raise WeightsError(f"no convolutional backbone. Give {ACCEPTED}.")
        state = _backbone_tensors(contents)
        for key, value in state.items():
            if not isinstance(value, Tensor):
                raise WeightsError(f"'{key}' is no tensor but {value!r:.40}")
            check_storage(key, value)
        config = expected or _declared(contents.metadata) or _told(contents, family, state)
        _check_shapes(state, config)
        for key, value in state.items():
            check_values(key, value)
            if key.endswith(".running_var") and bool((value < 0).any()):
                raise WeightsError(f"{key} holds a negative variance")
    return ConvNetWeights(config, state)


def _backbone_tensors(contents: Contents) -> dict[str, Any]:
    """Take the state dict out of a file, without classifier, counters and our own prefix."""
    loaded = contents.loaded
    if "config" in contents.metadata:
        prefix = "backbone."
        loaded = {k.removeprefix(prefix): v for k, v in loaded.items() if k.startswith(prefix)}
    state, _ = unwrap(loaded)
    return {
        key: value
        for key, value in state.items()
        if not key.startswith(CLASSIFIERS) and not key.endswith(COUNTER)
    }


def _declared(metadata: Mapping[str, str]) -> ConvNetConfig | None:
    """Return the architecture that a file of ours states."""
    try:
        if "config" in metadata:
            return msgspec.json.decode(metadata["config"], type=_Header).backbone
        if "backbone" in metadata:
            return msgspec.json.decode(metadata["backbone"], type=ConvNetConfig)
    except (msgspec.DecodeError, RecursionError, UsageError) as error:
        raise WeightsError(f"its header names no backbone ({first_line(error)})") from error
    return None


def _told(contents: Contents, family: Family, state: Mapping[str, Tensor]) -> ConvNetConfig:
    """Learn the architecture of a foreign file from what stands beside it, or from its name."""
    beside = contents.file.parent / "config.json"
    stated = decode_json(beside, _TimmConfig) if beside.is_file() else _TimmConfig()
    if stated.architecture:
        _check_pixels(stated.pretrained_cfg)
        if stated.architecture not in CONVNETS:
            raise WeightsError(
                f"config.json says architecture '{stated.architecture}'. Known: "
                f"{', '.join(CONVNETS)}."
            )
        return CONVNETS[stated.architecture]
    named = _NAMED.fullmatch(contents.file.name)
    if named and CONVNETS[named[1]].family == family:
        if named[2].startswith(_OTHER_PIXELS):
            raise WeightsError("it was trained on pixels that were not normalised as ImageNet's")
        return CONVNETS[named[1]]
    nearest = _nearest(family, state)
    if family == "seresnet":
        return nearest
    raise WeightsError(
        f"its shapes are both {nearest.name}'s and tf_{nearest.name}'s, which compute differently. "
        "Begin the file's name with the right one, or put timm's config.json beside it."
    )


def _check_pixels(pixels: _Pixels) -> None:
    for found, wanted in zip((pixels.mean, pixels.std), _IMAGENET, strict=True):
        if found is not None and found != wanted:
            raise WeightsError(
                f"config.json says that pixels are normalised with {list(found)}; this program "
                f"does it with {list(wanted)}"
            )


def _nearest(family: Family, state: Mapping[str, Tensor]) -> ConvNetConfig:
    """Return the architecture, in its plain form, that the fewest tensors speak against."""
    known = [
        config
        for config in CONVNETS.values()
        if config.family == family and config.padding == "symmetric"
    ]
    found = {(key, tuple(value.shape)) for key, value in state.items()}
    return min(known, key=lambda config: len(found ^ _shapes(config)))


@lru_cache(maxsize=32)
def _shapes(config: ConvNetConfig) -> frozenset[tuple[str, tuple[int, ...]]]:
    return frozenset(expected_shapes(config).items())


def _check_shapes(state: Mapping[str, Tensor], config: ConvNetConfig) -> None:
    expected = dict(_shapes(config))
    problems = {
        "missing": [key for key in expected if key not in state],
        "unexpected": [key for key in state if key not in expected],
        "shape": [
            f"{key} {tuple(state[key].shape)} instead of {shape}"
            for key, shape in expected.items()
            if key in state and tuple(state[key].shape) != shape
        ],
    }
    found = [f"{kind} {few(sorted(names))}" for kind, names in problems.items() if names]
    if found:
        raise WeightsError(f"its keys do not match {config.name}: {'; '.join(found)}")
