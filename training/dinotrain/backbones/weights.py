"""Backbone weights: from a name, a file or a folder to a frozen ``VisionTransformer``.

First stage of every flow. Files come from outside: nothing in them is executed, and each is held
to its architecture, key by key, before a model sees it. Source: METHODS A1, A3, A4.
"""

import pickle
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dinotrain.backbones.layouts import (
    Layout,
    State,
    detect,
    to_ours,
    unwrap,
)
from dinotrain.backbones.position import PositionRule, check_rule
from dinotrain.backbones.vit import VARIANTS, VisionTransformer, ViTConfig
from dinotrain.errors import ShapeError, WeightsError, unknown_name

T = TypeVar("T")

ACCEPTED = "a hub name, a .pth, .pt, .bin or .safetensors file, or a Hugging Face folder"

WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
"""What a Hugging Face folder may hold, in order of preference."""

MAX_HEADER_BYTES = 100_000_000
"""The safetensors format's own limit."""


MAX_MESSAGE = 400

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


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


class _Index(msgspec.Struct):
    """A sharded checkpoint's index: which file holds which tensor."""

    weight_map: dict[str, str]


def load_backbone(
    source: str | Path,
    image_size: int | tuple[int, int] | None = None,
    *,
    position_rule: PositionRule | None = None,
    device: str | torch.device = "cpu",
) -> VisionTransformer:
    """Load a frozen DINOv2 backbone: evaluation mode, float32, no gradients.

    Args:
        source: a hub name such as ``dinov2_vits14`` (optionally ``@sha256:<hex>``), a weights
            file, or a Hugging Face folder. A path that exists wins over a name.
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
    name = _hub_name(source)
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


def read_weights(source: str | Path) -> BackboneWeights:
    """Read backbone weights from a file or a Hugging Face folder, in any published layout.

    Returns:
        Architecture, tensors under our keys in the dtypes of the file, and the layout found. The
        tensors may be views of the file.

    Raises:
        WeightsError: one line that begins with the path.
    """
    path = Path(source)
    with _naming(path):
        weights_file = _find(path)
        if weights_file.name.endswith(".index.json"):
            loaded, metadata = _read_shards(weights_file), {}
        else:
            loaded, metadata = _read_file(weights_file)
        declared, loaded = _declared(metadata, loaded)
        state, training = unwrap(loaded)
        for key, value in state.items():
            _check_storage(key, value)
        layout = "hub" if declared else detect(state, training)
        hf_config = _read_hf_config(weights_file.parent) if layout in ("hf", "hf_v5") else None
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
            _check_values(key, tensor)
    return BackboneWeights(config, tensors, layout)


def save_backbone(model: VisionTransformer, path: str | Path) -> None:
    """Write a bare backbone file: hub keys in safetensors, its ``ViTConfig`` in the header.

    The file is written beside its destination and renamed, so that it is never half there.
    """
    path = Path(path)
    header = {"backbone": msgspec.json.encode(model.config).decode()}
    tensors = {
        key: value.detach().cpu().contiguous().clone() for key, value in model.state_dict().items()
    }
    part = path.with_name(path.name + ".part")
    save_file(tensors, part, metadata=header)
    part.replace(path)


def _hub_name(source: str | Path) -> str | None:
    """Return the variant that ``source`` names, None for a path; unknown names are an error."""
    if isinstance(source, Path) or Path(source).exists():
        return None
    name = source.partition("@")[0]
    if name in VARIANTS:
        return name
    looks_like_path = any(mark in source for mark in ("/", "\\", "~")) or Path(source).suffix
    if looks_like_path:
        return None
    raise unknown_name("backbone", name, VARIANTS)


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
    # Copies: a model must not change when the file that it came from is overwritten.
    tensors = {
        key: value.to(device=device, dtype=torch.float32, copy=True).contiguous()
        for key, value in weights.state.items()
    }
    model.load_state_dict(tensors, strict=True, assign=True)
    return model.requires_grad_(False).eval()


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Begin every WeightsError raised inside with the path, and keep it one printable line."""
    try:
        yield
    except WeightsError as error:
        # Keys come from the file: they may be long, or hold newlines and terminal escapes.
        message = "".join(char if char.isprintable() else "?" for char in str(error))
        if len(message) > MAX_MESSAGE:
            message = message[:MAX_MESSAGE] + "…"
        raise WeightsError(f"{path}: {message}") from error.__cause__
    except OSError as error:
        raise WeightsError(f"{path}: {error.strerror or error}") from error


def _find(path: Path) -> Path:
    if path.is_file():
        return path
    if not path.is_dir():
        raise WeightsError(f"no such file or folder. Give {ACCEPTED}.")
    for name in WEIGHT_FILES:
        if (path / name).is_file():
            return path / name
    raise WeightsError(f"the folder holds none of {', '.join(WEIGHT_FILES)}. Give {ACCEPTED}.")


def _read_file(path: Path) -> tuple[Any, dict[str, str]]:
    """Read one file by its content, whatever its suffix: what it holds, and its metadata."""
    size = path.stat().st_size
    if size == 0:
        raise WeightsError("the file is empty; fetch it again")
    with path.open("rb") as file:
        start = file.read(9)
    if start.startswith(b"PK\x03\x04") or start[:1] == b"\x80":
        return _read_torch(path, mmap=start.startswith(b"PK")), {}
    if (
        len(start) == 9
        and start[8:] == b"{"
        and int.from_bytes(start[:8], "little") < MAX_HEADER_BYTES
    ):
        return _read_safetensors(path)
    raise WeightsError(
        f"neither a PyTorch nor a safetensors file (it begins with {start!r}). Give {ACCEPTED}."
    )


def _read_torch(path: Path, mmap: bool) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        # Raised for every name outside torch's list of harmless ones, before it is looked up.
        code = re.search(r"GLOBAL (\S+)", str(error))
        what = f"it asks to run code ('{code[1]}') when opened" if code else "it holds no tensors"
        raise WeightsError(
            f"refused, because {what}. Use a plain state dict, or .safetensors."
        ) from error
    except Exception as error:
        raise WeightsError(
            f"truncated or corrupt ({_first_line(error)}); fetch it again"
        ) from error


def _read_safetensors(path: Path) -> tuple[State, dict[str, str]]:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            keys = file.keys()
            return {key: file.get_tensor(key) for key in keys}, file.metadata() or {}
    except (SafetensorError, ValueError, TypeError) as error:
        raise WeightsError(
            f"truncated or corrupt ({_first_line(error)}); fetch it again"
        ) from error


def _read_shards(index_path: Path) -> State:
    index = _decode(index_path, _Index)
    state: State = {}
    for name in sorted(set(index.weight_map.values())):
        # The index comes from outside: a shard is a plain name in the same folder.
        if not name or Path(name).name != name or name in (".", ".."):
            raise WeightsError(f"{index_path.name} names a shard outside its folder: '{name}'")
        if not (index_path.parent / name).is_file():
            raise WeightsError(f"shard '{name}' that {index_path.name} names is missing")
        state.update(_read_safetensors(index_path.parent / name)[0])
    lost = sorted(set(index.weight_map) - set(state))
    if lost:
        raise WeightsError(f"'{lost[0]}' is in none of the shards that {index_path.name} names")
    return state


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
        raise WeightsError(f"its header names no backbone ({_first_line(error)})") from error
    return None, loaded


def _read_hf_config(folder: Path) -> _HFConfig | None:
    path = folder / "config.json"
    return _decode(path, _HFConfig) if path.is_file() else None


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


def _check_storage(key: str, value: Any) -> None:
    """Refuse a tensor that is not backed by bytes of the file, before anything copies it."""
    if not isinstance(value, Tensor):
        return
    if value.layout is not torch.strided or value.device.type != "cpu":
        raise WeightsError(f"{key} is a {value.layout} tensor; accepted: dense")
    # A zero stride lets a tiny file claim terabytes.
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        raise WeightsError(f"{key} claims {value.numel()} values, more than the file holds")


def _check_values(key: str, tensor: Tensor) -> None:
    if tensor.dtype not in FLOATS:
        raise WeightsError(
            f"{key} is {tensor.dtype}; accepted: float16, bfloat16, float32, float64"
        )
    if not torch.isfinite(tensor).all():
        raise WeightsError(f"{key} holds values that are not finite")


def _decode(path: Path, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except (msgspec.DecodeError, RecursionError) as error:
        raise WeightsError(f"{path.name} cannot be used ({_first_line(error)})") from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200].rstrip(".")
