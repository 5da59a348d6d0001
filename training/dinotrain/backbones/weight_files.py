"""Weight files: from a path to what the file holds, with nothing in it executed.

``weights.py`` and ``convnets/weights.py`` give its tensors their meaning. Files come from outside:
every error names the file in one printable line.
"""

import pickle
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from dinotrain.backbones.layouts import State
from dinotrain.errors import WeightsError

T = TypeVar("T")

ACCEPTED = "a hub name, a .pth, .pt, .bin or .safetensors file, or a Hugging Face folder"

WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
"""What a Hugging Face folder may hold, in order of preference."""

MAX_HEADER_BYTES = 100_000_000
"""The safetensors format's own limit."""

MAX_MESSAGE = 400

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Contents(NamedTuple):
    """What a weights file holds: whatever was saved in it, and a safetensors header's metadata."""

    source: Path
    """As it was given: a file or a folder."""
    file: Path
    loaded: Any
    metadata: dict[str, str]


class _Index(msgspec.Struct):
    """A sharded checkpoint's index: which file holds which tensor."""

    weight_map: dict[str, str]


def open_weights(source: str | Path) -> Contents:
    """Open a weights file by its content, whatever its suffix, or the one in a folder.

    Returns:
        What it holds; tensors may be views of the file.

    Raises:
        WeightsError: missing, empty, corrupt, or asking to run code; begins with the path.
    """
    path = Path(source)
    with naming(path):
        file = _find(path)
        if file.name.endswith(".index.json"):
            return Contents(path, file, _read_shards(file), {})
        return Contents(path, file, *_read_file(file))


@contextmanager
def naming(path: Path) -> Iterator[None]:
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
    # First of all: a header of 128 bytes (mod 256) begins as a pickle does.
    if (
        len(start) == 9
        and start[8:] == b"{"
        and int.from_bytes(start[:8], "little") < MAX_HEADER_BYTES
    ):
        return _read_safetensors(path)
    if start.startswith(b"PK\x03\x04") or start[:1] == b"\x80":
        return _read_torch(path, mmap=start.startswith(b"PK")), {}
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
        raise WeightsError(f"truncated or corrupt ({first_line(error)}); fetch it again") from error


def _read_safetensors(path: Path) -> tuple[State, dict[str, str]]:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            keys = file.keys()
            return {key: file.get_tensor(key) for key in keys}, file.metadata() or {}
    except (SafetensorError, ValueError, TypeError) as error:
        raise WeightsError(f"truncated or corrupt ({first_line(error)}); fetch it again") from error


def _read_shards(index_path: Path) -> State:
    index = decode_json(index_path, _Index)
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


def check_storage(key: str, value: Any) -> None:
    """Refuse a tensor that is not backed by bytes of the file, before anything copies it."""
    if not isinstance(value, Tensor):
        return
    if value.layout is not torch.strided or value.device.type != "cpu":
        raise WeightsError(f"{key} is a {value.layout} tensor; accepted: dense")
    # A zero stride lets a tiny file claim terabytes.
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        raise WeightsError(f"{key} claims {value.numel()} values, more than the file holds")


def check_values(key: str, tensor: Tensor) -> None:
    """Refuse a tensor that is not of floating point, or holds NaN or infinity."""
    if tensor.dtype not in FLOATS:
        raise WeightsError(
            f"{key} is {tensor.dtype}; accepted: float16, bfloat16, float32, float64"
        )
    if not torch.isfinite(tensor).all():
        raise WeightsError(f"{key} holds values that are not finite")


def decode_json(path: Path, kind: type[T]) -> T:
    """Read a JSON file that stands beside weights."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except (msgspec.DecodeError, RecursionError) as error:
        raise WeightsError(f"{path.name} cannot be used ({first_line(error)})") from error


def first_line(error: BaseException) -> str:
    """Return what an error of another library says, shortened."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200].rstrip(".")


def save_weights(model: nn.Module, config: msgspec.Struct, path: str | Path) -> None:
    """Write a bare backbone file: our keys in safetensors, its config in the header.

    The file is written beside its destination and renamed, so that it is never half there.
    """
    path = Path(path)
    header = {"backbone": msgspec.json.encode(config).decode()}
    tensors = {
        key: value.detach().cpu().contiguous().clone() for key, value in model.state_dict().items()
    }
    part = path.with_name(path.name + ".part")
    save_file(tensors, part, metadata=header)
    part.replace(path)


def assign_(model: nn.Module, state: Mapping[str, Tensor], device: str | torch.device) -> None:
    """Give a model on the meta device its weights, in place: float32, strict, then frozen."""
    # Copies: a model must not change when the file that it came from is overwritten.
    tensors = {
        key: value.to(device=device, dtype=torch.float32, copy=True).contiguous()
        for key, value in state.items()
    }
    model.load_state_dict(tensors, strict=True, assign=True)
    model.requires_grad_(False).eval()
