"""Key layouts: the names under which DINOv2 weights are published, to ours and back.

Ours are the names of the hub checkpoints. ``weights.py`` reads files and calls this module; here
are only names and shapes, so that a round trip through any layout is exact. Source: METHODS A3.
"""

import math
import re
from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import Any, Literal, get_args

import msgspec
import torch
from torch import Tensor

from dinotrain.backbones.position import PositionRule
from dinotrain.backbones.vit import VARIANTS, VisionTransformer, ViTConfig
from dinotrain.errors import WeightsError, unknown_name

Layout = Literal["hub", "hf", "hf_v5", "timm", "training"]
"""``hub``: flat ``.pth``. ``hf``: transformers on disk. ``hf_v5``: the module names inside
transformers 5, which differ from those that it writes. ``timm``: with registers, CLS and its
position are one tensor. ``training``: teacher checkpoint, blocks in chunks, heads beside."""

State = dict[str, Tensor]

HEAD_DIM = 64
"""Width of one attention head in every published DINOv2; shapes alone do not show it."""

FIRST_NAMES = 3
"""So many keys of each kind an error names before it only counts."""


class _Names(msgspec.Struct, frozen=True):
    """Names of one layout: whole keys, block prefix, and per block leaf its parts (dim 0)."""

    whole: dict[str, str]
    blocks: str
    leaves: dict[str, tuple[str, ...]]

    def of(self, key: str) -> tuple[str, ...]:
        """Return the keys whose tensors, joined along dim 0, are our ``key``."""
        match = re.fullmatch(r"blocks\.(\d{1,4})\.(.+)", key)
        if not match:
            return (self.whole[key],) if key in self.whole else (key,)
        index, leaf = match.groups()
        return tuple(f"{self.blocks}{index}.{part}" for part in self.leaves.get(leaf, (leaf,)))


def _both(leaves: Mapping[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    """Give each module's parts as those of its weight and of its bias."""
    return {
        f"{module}.{kind}": tuple(f"{part}.{kind}" for part in parts)
        for module, parts in leaves.items()
        for kind in ("weight", "bias")
    }


_HF_WHOLE = {
    "cls_token": "embeddings.cls_token",
    "pos_embed": "embeddings.position_embeddings",
    "register_tokens": "embeddings.register_tokens",
    "mask_token": "embeddings.mask_token",
    "patch_embed.proj.weight": "embeddings.patch_embeddings.projection.weight",
    "patch_embed.proj.bias": "embeddings.patch_embeddings.projection.bias",
    "norm.weight": "layernorm.weight",
    "norm.bias": "layernorm.bias",
}
_HF_SCALES = {
    "ls1.gamma": ("layer_scale1.lambda1",),
    "ls2.gamma": ("layer_scale2.lambda1",),
}
_HF_LEAVES = _HF_SCALES | _both(
    {
        "attn.qkv": tuple(f"attention.attention.{part}" for part in ("query", "key", "value")),
        "attn.proj": ("attention.output.dense",),
        "mlp.w12": ("mlp.weights_in",),
        "mlp.w3": ("mlp.weights_out",),
    }
)
_HF_V5_LEAVES = _HF_SCALES | _both(
    {
        "attn.qkv": ("attention.q_proj", "attention.k_proj", "attention.v_proj"),
        "attn.proj": ("attention.o_proj",),
        "mlp.w12": ("mlp.gate_proj", "mlp.up_proj"),
        "mlp.w3": ("mlp.down_proj",),
    }
)
_TIMM_SWIGLU = _both({"mlp.w12": ("mlp.fc1",), "mlp.w3": ("mlp.fc2",)})

_HUB = _Names({}, "blocks.", {})
_HF = _Names(_HF_WHOLE, "encoder.layer.", _HF_LEAVES)
_HF_V5 = _Names(_HF_WHOLE, "encoder.layer.", _HF_V5_LEAVES)
_TIMM_GELU_NAMES = _Names({"register_tokens": "reg_token"}, "blocks.", {})
_TIMM_SWIGLU_NAMES = _Names({"register_tokens": "reg_token"}, "blocks.", _TIMM_SWIGLU)

_HF_PREFIXES = ("dinov2_with_registers.", "dinov2.")
_NESTS = ("teacher", "model", "state_dict")
_HEADS: dict[Layout, tuple[str, ...]] = {
    "hub": (),
    "hf": ("classifier.",),
    "hf_v5": ("classifier.",),
    "timm": ("head.", "fc_norm."),
    "training": ("dino_head.", "ibot_head.", "linear_head."),
}
"""Parts of a checkpoint that are no backbone, and are passed over."""

_CHUNKED = re.compile(r"blocks\.(\d{1,4})\.(\d{1,4})\.(.+)")


def unwrap(loaded: Any) -> tuple[dict[str, Any], bool]:
    """Take the state dict out of what a file holds.

    Args:
        loaded: a state dict, or a checkpoint with one under ``teacher``, ``model`` or
            ``state_dict``, at any depth.

    Returns:
        The state dict without ``module.`` and ``teacher.`` prefixes, and whether the file is a
        training checkpoint (nested under, or prefixed with, ``teacher``).

    Raises:
        WeightsError: there is no dict, or its keys are not strings.
    """
    training = False
    while isinstance(loaded, dict):
        nest = next((name for name in _NESTS if isinstance(loaded.get(name), dict)), None)
        if nest is None:
            break
        training |= nest == "teacher"
        loaded = loaded[nest]
    if not isinstance(loaded, dict) or not all(isinstance(key, str) for key in loaded):
        raise WeightsError(f"a {type(loaded).__name__} is no state dict (names to tensors)")
    state = _strip(loaded, "module.")
    if any(key.startswith("teacher.") for key in state):
        # The other side of a full training checkpoint is the student, and the loss centres.
        state = _strip({k: v for k, v in state.items() if k.startswith("teacher.")}, "teacher.")
        training = True
    return state, training


def _strip(state: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return _renamed(state, {key: key.removeprefix(prefix) for key in state})


def _renamed(state: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """Rename keys; two that fall together are refused, or one would win unseen."""
    out: dict[str, Any] = {}
    for key, value in state.items():
        name = names.get(key, key)
        if name in out:
            raise WeightsError(f"two of its keys stand for {name}, one of them {key}")
        out[name] = value
    return out


def detect(keys: Iterable[str], training: bool = False) -> Layout:
    """Name the layout of a state dict by its keys.

    Hub and timm files without registers differ only in the mask token, which timm drops.

    Args:
        keys: as ``unwrap`` returns them.
        training: the file was nested as a training checkpoint is.

    Raises:
        WeightsError: the keys are of no DINOv2 backbone; the first few are named.
    """
    names = list(keys)
    found = set(names)
    if any(name.startswith("backbone.") for name in names):
        return "training"
    if "cls_token" in found and any(name.startswith("blocks.") for name in names):
        if training or any(_CHUNKED.fullmatch(name) for name in names):
            return "training"
        is_timm = "reg_token" in found or found.isdisjoint(("mask_token", "register_tokens"))
        return "timm" if is_timm else "hub"
    if any(name.endswith("embeddings.cls_token") for name in names):
        return "hf_v5" if any(".attention.q_proj." in name for name in names) else "hf"
    shown = ", ".join(sorted(names)[:FIRST_NAMES]) or "none"
    raise WeightsError(
        f"no DINOv2 backbone: its {len(names)} keys begin with {shown}. Accepted layouts: "
        f"{', '.join(get_args(Layout))}"
    )


def to_ours(
    state: Mapping[str, Any],
    layout: Layout,
    declared: ViTConfig | None = None,
    heads: int | None = None,
    layer_norm_eps: float = 1e-6,
) -> tuple[ViTConfig, State]:
    """Rename a state dict to our keys and derive its architecture from the shapes.

    Args:
        state: as ``unwrap`` returns it; tensors of any floating dtype.
        layout: as ``detect`` returns it.
        declared: the architecture that the file itself states; it must agree with the shapes, and
            adds what they do not show (name, heads, LayerNorm epsilon, position rule).
        heads: attention heads, where known; else embed_dim / 64.
        layer_norm_eps: where known; 1e-6 in every published DINOv2.

    Returns:
        The architecture and the tensors under our names, dtypes as they were. A mask token that
        the layout lacks (timm drops it; it serves SSL only) is zero.

    Raises:
        WeightsError: keys missing, unexpected or of another shape (the first few are named as the
            file names them), or an architecture that is not DINOv2's.
    """
    flat = _flatten(state, layout)
    not_tensors = [key for key, value in flat.items() if not isinstance(value, Tensor)]
    if not_tensors:
        raise WeightsError(f"'{not_tensors[0]}' is no tensor but {flat[not_tensors[0]]!r:.40}")
    names = _names(layout, flat)
    ours, leftover = _rename(flat, names)
    pos_embed = ours.get("pos_embed")
    folded = layout == "timm" and "register_tokens" in ours
    if folded and pos_embed is not None and pos_embed.ndim == 3:
        # timm adds CLS's position into CLS itself: with a zero position the sum is the same.
        ours["pos_embed"] = torch.cat((torch.zeros_like(pos_embed[:, :1]), pos_embed), dim=1)
    if "mask_token" not in ours and layout in ("hf", "hf_v5", "timm") and "cls_token" in ours:
        ours["mask_token"] = torch.zeros_like(ours["cls_token"].flatten()[None])
    config = _derive(ours, layout, names, declared, heads, layer_norm_eps)
    _check_shapes(ours, config, names, leftover)
    return config, ours


def to_layout(state: Mapping[str, Tensor], layout: Layout, config: ViTConfig) -> State:
    """Rename our state dict to another layout: the inverse of ``to_ours``.

    Exact for every layout but timm, which has no mask token and, with registers, only the sum of
    CLS and its position: there ours → timm loses both, while timm → ours → timm is exact.

    Args:
        state: our keys, as ``VisionTransformer.state_dict()`` gives them.
        layout: the layout wanted; ``training`` is flat with the prefix ``backbone.``.
        config: the architecture of ``state``.

    Raises:
        UsageError: an unknown layout.
        WeightsError: ``state`` does not match ``config``.
    """
    if layout not in get_args(Layout):
        raise unknown_name("layout", layout, get_args(Layout))
    _check_shapes(state, config, _HUB, [])
    tensors = dict(state)
    if layout == "training":
        return {f"backbone.{key}": value for key, value in tensors.items()}
    names = {
        "hub": _HUB,
        "hf": _HF,
        "hf_v5": _HF_V5,
        "timm": _TIMM_SWIGLU_NAMES if config.ffn == "swiglu" else _TIMM_GELU_NAMES,
    }[layout]
    if layout == "timm":
        del tensors["mask_token"]
        if config.registers:
            tensors["cls_token"] = tensors["cls_token"] + tensors["pos_embed"][:, :1]
            tensors["pos_embed"] = tensors["pos_embed"][:, 1:]
    out: State = {}
    for key, value in tensors.items():
        parts = names.of(key)
        # Clones: parts that share one storage are refused by safetensors.
        out.update(
            zip(parts, (part.clone() for part in value.chunk(len(parts), dim=0)), strict=True)
        )
    return out


def library_rule(layout: Layout, registers: int) -> PositionRule:
    """Return the position rule of the library that a layout comes from. Source: METHODS A4."""
    if registers or layout == "timm":
        return "size_antialias"
    return "size" if layout in ("hf", "hf_v5") else "scale"


def _flatten(state: Mapping[str, Any], layout: Layout) -> dict[str, Any]:
    """Drop prefixes, heads and block chunks, so that only backbone keys stay."""
    if layout in ("hf", "hf_v5"):
        for prefix in _HF_PREFIXES:
            if f"{prefix}embeddings.cls_token" in state:
                state = _strip(state, prefix)
                break
    if layout == "training":
        state = _strip(state, "backbone.")
    flat = {key: value for key, value in state.items() if not key.startswith(_HEADS[layout])}
    return _unchunk(flat) if layout == "training" else flat


def _unchunk(state: dict[str, Any]) -> dict[str, Any]:
    """Rename ``blocks.{chunk}.{i}.leaf`` to ``blocks.{i}.leaf``.

    The published code pads each chunk, so that i counts through the whole network; a file in
    which i starts anew in every chunk is numbered in order instead.

    Raises:
        WeightsError: i starts anew and a chunk has a gap, so that its blocks cannot be numbered.
    """
    found = [match for key in state if (match := _CHUNKED.fullmatch(key))]
    pairs = sorted({(int(match[1]), int(match[2])) for match in found})
    numbers = {pair: pair[1] for pair in pairs}
    if len(set(numbers.values())) < len(pairs):
        for (chunk, inner), (next_chunk, following) in pairwise([(-1, 0), *pairs]):
            expected = inner + 1 if next_chunk == chunk else 0
            if following != expected:
                raise WeightsError(f"block {expected} is missing in chunk {next_chunk}")
        numbers = {pair: number for number, pair in enumerate(pairs)}
    renamed = {
        match[0]: f"blocks.{numbers[int(match[1]), int(match[2])]}.{match[3]}" for match in found
    }
    return _renamed(state, renamed)


def _names(layout: Layout, flat: Mapping[str, Any]) -> _Names:
    if layout == "hf":
        return _HF
    if layout == "hf_v5":
        return _HF_V5
    if layout != "timm":
        return _HUB
    first, second = flat.get("blocks.0.mlp.fc1.weight"), flat.get("blocks.0.mlp.fc2.weight")
    # timm calls both FFNs fc1 and fc2; a SwiGLU's first layer is twice as wide as its second.
    if first is None or second is None or not first.ndim == second.ndim == 2:
        return _TIMM_GELU_NAMES
    return _TIMM_SWIGLU_NAMES if first.shape[0] == 2 * second.shape[1] else _TIMM_GELU_NAMES


def _rename(flat: Mapping[str, Tensor], names: _Names) -> tuple[State, list[str]]:
    """Return the tensors under our names, and the keys that stand for none of ours."""
    leaves = {part: leaf for leaf, parts in names.leaves.items() for part in parts}
    whole = {theirs: ours for ours, theirs in names.whole.items()}
    wanted: dict[str, tuple[str, ...]] = {}
    block = re.compile(rf"{re.escape(names.blocks)}(\d{{1,4}})\.(.+)")
    for key in flat:
        match = block.fullmatch(key)
        ours = whole.get(key, key)
        if match:
            ours = f"blocks.{int(match[1])}.{leaves.get(match[2], match[2])}"
        wanted[ours] = names.of(ours)
    out: State = {}
    leftover = []
    for ours, parts in wanted.items():
        present = [flat[part] for part in parts if part in flat]
        if len(present) == len(parts) and _joinable(present):
            out[ours] = present[0] if len(present) == 1 else torch.cat(present, dim=0)
    used = {part for ours in out for part in names.of(ours)}
    for key in flat:
        if key not in used:
            leftover.append(key)
    return out, leftover


def _joinable(parts: list[Tensor]) -> bool:
    if len(parts) == 1:
        return True
    return all(part.shape == parts[0].shape and part.ndim > 0 for part in parts)


def _derive(
    ours: State,
    layout: Layout,
    names: _Names,
    declared: ViTConfig | None,
    heads: int | None,
    layer_norm_eps: float,
) -> ViTConfig:
    """Read the architecture off the shapes; ``_check_shapes`` then holds every tensor to it."""
    swiglu = "blocks.0.mlp.w12.weight" in ours
    ffn_key = "blocks.0.mlp.w3.weight" if swiglu else "blocks.0.mlp.fc2.weight"
    needed = {"cls_token": 3, "pos_embed": 3, "patch_embed.proj.weight": 4, ffn_key: 2}
    if "register_tokens" in ours:
        needed["register_tokens"] = 3
    for key, ndim in needed.items():
        if key not in ours:
            raise WeightsError(f"missing key {names.of(key)[0]} of the {layout} layout")
        if ours[key].ndim != ndim:
            raise WeightsError(f"{names.of(key)[0]} has shape {tuple(ours[key].shape)}")
    embed_dim = ours["cls_token"].shape[-1]
    patch = ours["patch_embed.proj.weight"].shape[-1]
    config = ViTConfig(
        name="",
        embed_dim=embed_dim,
        depth=_depth(ours),
        heads=_heads(embed_dim, declared.heads if declared else heads),
        ffn="swiglu" if swiglu else "gelu",
        ffn_dim=ours[ffn_key].shape[-1],
        registers=ours["register_tokens"].shape[1] if "register_tokens" in ours else 0,
        patch_size=patch,
        grid=declared.grid if declared else _square(ours["pos_embed"].shape[1] - 1),
        layer_norm_eps=declared.layer_norm_eps if declared else layer_norm_eps,
    )
    if not (math.isfinite(config.layer_norm_eps) and config.layer_norm_eps > 0):
        raise WeightsError(f"LayerNorm epsilon {config.layer_norm_eps} is no positive number")
    if min(patch, *config.grid) < 1:
        raise WeightsError(f"patch size {patch} or position grid {config.grid} is not positive")
    rule = declared.position_rule if declared else library_rule(layout, config.registers)
    config = msgspec.structs.replace(
        config, name=declared.name if declared else variant_name(config), position_rule=rule
    )
    if declared and config != declared:
        field = next(
            f for f in config.__struct_fields__ if getattr(config, f) != getattr(declared, f)
        )
        raise WeightsError(
            f"its header declares {field} {getattr(declared, field)}, its tensors have "
            f"{getattr(config, field)}"
        )
    return config


def variant_name(config: ViTConfig) -> str:
    """Return the published name of an architecture, else one such as ``vit_d192_l8_reg4``."""
    for name, variant in VARIANTS.items():
        fixed = msgspec.structs.replace(
            variant, name=config.name, position_rule=config.position_rule
        )
        if fixed == config:
            return name
    registers = f"_reg{config.registers}" if config.registers else ""
    return f"vit_d{config.embed_dim}_l{config.depth}{registers}"


def _depth(ours: State) -> int:
    found = {int(match[1]) for key in ours if (match := re.match(r"blocks\.(\d{1,4})\.", key))}
    # Before any module is built: a hostile key may name block 999999999.
    if found != set(range(len(found))):
        gap = min(set(range(len(found))) - found)
        raise WeightsError(f"block {gap} is missing among {len(found)} blocks")
    return len(found)


def _heads(embed_dim: int, heads: int | None) -> int:
    if heads is None and embed_dim % HEAD_DIM == 0 and embed_dim:
        return embed_dim // HEAD_DIM
    if heads is None or heads < 1 or embed_dim < 1 or embed_dim % heads:
        raise WeightsError(
            f"width {embed_dim} does not divide into {heads or 'heads of 64'}"
            f"{' heads' if heads else ''}; a config.json beside the file can name the heads"
        )
    return heads


def _square(patches: int) -> tuple[int, int]:
    side = math.isqrt(max(patches, 0))
    if side < 1 or side * side != patches:
        raise WeightsError(f"a position embedding of {patches} patches is no square grid")
    return side, side


def expected_shapes(config: ViTConfig) -> dict[str, tuple[int, ...]]:
    """Return our keys and their shapes for an architecture, without allocating a tensor."""
    with torch.device("meta"):
        model = VisionTransformer(config)
    return {key: tuple(value.shape) for key, value in model.state_dict().items()}


def _check_shapes(
    ours: Mapping[str, Tensor], config: ViTConfig, names: _Names, leftover: list[str]
) -> None:
    expected = expected_shapes(config)
    parts = {key: names.of(key) for key in expected}
    known = {part for found in parts.values() for part in found}
    absent = [part for key in expected if key not in ours for part in parts[key]]
    missing = [part for part in absent if part not in leftover]
    unexpected = [key for key in leftover if key not in known]
    unexpected += [names.of(key)[0] for key in ours if key not in expected]
    shapes = [
        f"{' + '.join(parts[key])} {tuple(ours[key].shape)} instead of {shape}"
        for key, shape in expected.items()
        if key in ours and tuple(ours[key].shape) != shape
    ]
    # All parts are there and yet were not joined: they differ in shape from one another.
    shapes += [
        f"{' + '.join(found)} of unequal shapes"
        for key, found in parts.items()
        if key not in ours and set(found) <= set(leftover)
    ]
    problems = [
        f"{kind} {few(found)}"
        for kind, found in (("missing", missing), ("unexpected", unexpected), ("shape", shapes))
        if found
    ]
    if problems:
        raise WeightsError(f"its keys do not match {config.name}: {'; '.join(problems)}")


def few(names: list[str]) -> str:
    """Name the first few, and count the others."""
    more = f" and {len(names) - FIRST_NAMES} more" if len(names) > FIRST_NAMES else ""
    return ", ".join(names[:FIRST_NAMES]) + more
