"""Backbone weights: from a name, a file or a folder to a frozen ``VisionTransformer``.

First stage of every flow. Files come from outside: nothing in them is executed, and each is held
to its architecture, key by key, before a model sees it. Source: METHODS A1, A3, A4.
"""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import msgspec
import torch

from dinotrain.backbones.layouts import (
    Layout,
    State,
    detect,
    to_ours,
    unwrap,
)
from dinotrain.backbones.position import PositionRule, check_rule
from dinotrain.backbones.vit import VARIANTS, VisionTransformer, ViTConfig
from dinotrain.backbones.weight_files import (
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
from dinotrain.errors import ShapeError, WeightsError, unknown_name


class BackboneWeights(msgspec.Struct, frozen=True):
    """One backbone as read: its architecture, its tensors under our keys, and its layout."""

    config: ViTConfig
    state: State
    layout: Layout


class _Header(msgspec.Struct):
    """The part of our own checkpoint's ``config`` that describes its backbone."""

    backbone: ViTConfig


class _HFConfig(msgspec.Struct):
    """The fields of a transformers ``config.json`` that decide what the tensors mean."""

    model_type: str = ""
    hidden_size: int | None = None
    num_hidden_layers: int | None = None
    num_attention_heads: int | None = None
    num_register_tokens: int | None = None
    patch_size: int | list[int] | None = None
    layer_norm_eps: float = 1e-6
    hidden_act: str = "gelu"
    use_swiglu_ffn: bool = False
    qkv_bias: bool = True
    num_channels: int = 3


def load_backbone(
    source: str | Path | Contents,
    image_size: int | tuple[int, int] | None = None,
    *,
    position_rule: PositionRule | None = None,
    device: str | torch.device = "cpu",
) -> VisionTransformer:
    """Load a frozen DINOv2 backbone: evaluation mode, float32, no gradients.

    Args:
        source: a hub name such as ``dinov2_vits14`` (optionally ``@sha256:<hex>``), a weights
            file, a Hugging Face folder, or one that is open. A path that exists wins over a name.
        image_size: height and width in pixels that the model is meant for, only checked here: the
            model accepts every multiple of its patch size.
        position_rule: how position embeddings are resampled; by default the rule of the library
            that the file comes from, and the hub's for a hub name.
        device: where the parameters go.

    Raises:
        UsageError: an unknown name or position rule.
        WeightsError: the file is missing, corrupt, foreign or does not match its architecture.
        DownloadError: a named backbone that cannot be fetched.
        ShapeError: ``image_size`` is no multiple of the patch size.

    Source: METHODS A3, A4.
    """
    rule = check_rule(position_rule) if position_rule is not None else None
    name = None if isinstance(source, Contents) else hub_name(source)
    if name is None:
        weights = read_weights(source)
    else:
        # The patch size is known before the download, so a wrong image size costs nothing.
        check_image_size(image_size, VARIANTS[name].patch_size)
        weights = _named_weights(str(source), name)
    check_image_size(image_size, weights.config.patch_size)
    if rule is not None:
        weights = msgspec.structs.replace(
            weights, config=msgspec.structs.replace(weights.config, position_rule=rule)
        )
    return _build(weights, device)


def check_image_size(image_size: int | tuple[int, int] | None, patch_size: int) -> None:
    """Refuse an image size that patches do not tile, naming the nearest sizes that they do.

    Args:
        image_size: pixels, one side of a square or (height, width); None is accepted.
        patch_size: pixels.

    Raises:
        ShapeError: a side is no positive multiple of ``patch_size``.
    """
    if image_size is None:
        return
    sides = (image_size, image_size) if isinstance(image_size, int) else image_size
    for side in sides:
        if side >= patch_size and side % patch_size == 0:
            continue
        below = side // patch_size * patch_size
        near = [size for size in (below, below + patch_size) if size >= patch_size]
        near = near or [patch_size]
        raise ShapeError(
            f"image size {side} is not a multiple of the patch size {patch_size}. "
            f"Use {' or '.join(str(size) for size in near)}."
        )


def read_weights(source: str | Path | Contents) -> BackboneWeights:
    """Read backbone weights from a file or a Hugging Face folder, in any published layout.

    Returns:
        Architecture, tensors under our keys in the dtypes of the file, and the layout found. The
        tensors may be views of the file.

    Raises:
        WeightsError: one line that begins with the path.
    """
    contents = source if isinstance(source, Contents) else open_weights(source)
    with naming(contents.source):
        declared, loaded = _declared(contents.metadata, contents.loaded)
        state, training = unwrap(loaded)
        for key, value in state.items():
            check_storage(key, value)
        layout = "hub" if declared else detect(state, training)
        hf_config = _read_hf_config(contents.file.parent) if layout in ("hf", "hf_v5") else None
        config, tensors = to_ours(
            state,
            layout,
            declared,
            heads=hf_config.num_attention_heads if hf_config else None,
            layer_norm_eps=hf_config.layer_norm_eps if hf_config else 1e-6,
        )
        if hf_config:
            _cross_check(hf_config, config)
        for key, tensor in tensors.items():
            check_values(key, tensor)
    return BackboneWeights(config, tensors, layout)


def save_backbone(model: VisionTransformer, path: str | Path) -> None:
    """Write a bare backbone file: hub keys in safetensors, its ``ViTConfig`` in the header.

    The file is written beside its destination and renamed, so that it is never half there.
    """
    save_weights(model, model.config, path)


def hub_name(source: str | Path, known: Collection[str] = VARIANTS) -> str | None:
    """Return the backbone of ``known`` that ``source`` names, None for a path.

    Raises:
        UsageError: it is neither.
    """
    if isinstance(source, Path) or Path(source).exists():
        return None
    name = source.partition("@")[0]
    if name in known:
        return name
    looks_like_path = any(mark in source for mark in ("/", "\\", "~")) or Path(source).suffix
    if looks_like_path:
        return None
    raise unknown_name("backbone", name, known)


def _named_weights(source: str, name: str) -> BackboneWeights:
    # Imported here: a local file needs no network library.
    from dinotrain.backbones.hub import fetch

    path = fetch(source)
    weights = read_weights(path)
    expected = VARIANTS[name]
    if weights.config.name != name:
        raise WeightsError(f"{path}: holds {weights.config.name}, not {name}")
    return msgspec.structs.replace(weights, config=expected)


def _build(weights: BackboneWeights, device: str | torch.device) -> VisionTransformer:
    with torch.device("meta"):
        model = VisionTransformer(weights.config)
    assign_(model, weights.state, device)
    return model


def _declared(metadata: Mapping[str, str], loaded: Any) -> tuple[ViTConfig | None, Any]:
    """Return the architecture that a file of ours states, and its backbone's tensors."""
    try:
        if "config" in metadata:
            config = msgspec.json.decode(metadata["config"], type=_Header).backbone
            prefix = "backbone."
            return config, {k[len(prefix) :]: v for k, v in loaded.items() if k.startswith(prefix)}
        if "backbone" in metadata:
            return msgspec.json.decode(metadata["backbone"], type=ViTConfig), loaded
    except (msgspec.DecodeError, RecursionError) as error:
        raise WeightsError(f"its header names no backbone ({first_line(error)})") from error
    return None, loaded


def _read_hf_config(folder: Path) -> _HFConfig | None:
    path = folder / "config.json"
    return decode_json(path, _HFConfig) if path.is_file() else None


def _cross_check(stated: _HFConfig, found: ViTConfig) -> None:
    """Hold a transformers config against the shapes, and refuse what is not built here."""
    swiglu = found.ffn == "swiglu"
    patch = stated.patch_size
    if isinstance(patch, list):
        patch = patch[0] if len(set(patch)) == 1 else -1
    rows: tuple[tuple[str, object, object], ...] = (
        ("hidden_size", stated.hidden_size, found.embed_dim),
        ("num_hidden_layers", stated.num_hidden_layers, found.depth),
        ("num_register_tokens", stated.num_register_tokens, found.registers),
        ("patch_size", patch, found.patch_size),
        ("use_swiglu_ffn", stated.use_swiglu_ffn, swiglu),
        ("qkv_bias", stated.qkv_bias, True),
        ("num_channels", stated.num_channels, 3),
        # transformers' SwiGLU takes SiLU whatever the config says.
        ("hidden_act", None if swiglu else stated.hidden_act, "gelu"),
    )
    if stated.model_type not in ("dinov2", "dinov2_with_registers"):
        raise WeightsError(
            f"config.json says model_type '{stated.model_type}'. Accepted: dinov2, "
            "dinov2_with_registers."
        )
    for field, value, wanted in rows:
        if value is not None and value != wanted:
            raise WeightsError(
                f"config.json says {field} {value!r}, its tensors (or this program) need {wanted!r}"
            )
