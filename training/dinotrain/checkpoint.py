"""One file per trained model: a .safetensors whose header holds the whole configuration as JSON.

Never pickle. Weights may be stored in half precision; they are loaded as float32.
"""

import json
import os
import struct
import tempfile
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from dinotrain.errors import CheckpointError, DinoError
from dinotrain.model import ModelConfig, TaskModel

FORMAT_VERSION = 2
MAX_HEADER_BYTES = 16 * 2**20


class CheckpointConfig(ModelConfig, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The model, and where it comes from."""

    format_version: int = FORMAT_VERSION
    name: str = ""
    window_mm: float = 40.0
    orientation: str = "right"
    """Left eyes are mirrored before the model sees them."""
    trained_on: str = ""
    notice: str = ""
    licence: str = "Apache-2.0"
    dataset_fingerprint: str = ""
    metrics: dict[str, Any] = msgspec.field(default_factory=dict)
    training: dict[str, Any] = msgspec.field(default_factory=dict)
    versions: dict[str, str] = msgspec.field(default_factory=dict)


def save_checkpoint(
    model: TaskModel,
    config: CheckpointConfig,
    path: Path,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Write a checkpoint in one step: beside its place, then renamed.

    Args:
        model: the weights.
        config: stored as JSON in the header.
        path: ends in .safetensors.
        dtype: of the stored weights; float16 halves the file.
    """
    if path.suffix != ".safetensors":
        raise CheckpointError(f"{path}: a checkpoint ends in .safetensors. Use {path}.safetensors")
    state = {
        key: value.detach().to("cpu", dtype).contiguous()
        for key, value in model.state_dict().items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    os.close(handle)
    partial = Path(name)
    try:
        save_file(state, partial, metadata={"config": msgspec.json.encode(config).decode()})
        partial.chmod(0o644)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def read_config(path: Path) -> CheckpointConfig:
    """Read only the header of a checkpoint.

    Raises:
        CheckpointError: no such file, not a checkpoint, an unknown key, or another version.
    """
    raw = _read_header(path).get("config")
    if raw is None:
        raise CheckpointError(
            f"{path}: safetensors file without a dinoexport config; it is no trained checkpoint. "
            "Train one with `dinoexport train --backbone FILE`."
        )
    try:
        version = json.loads(raw).get("format_version")
        if version != FORMAT_VERSION:
            raise CheckpointError(
                f"{path}: checkpoint format {version}, this version reads {FORMAT_VERSION}. "
                "Use the dinoexport that wrote it."
            )
        return msgspec.json.decode(raw, type=CheckpointConfig)
    except (msgspec.MsgspecError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path}: its config cannot be read: {error}") from error


def load_checkpoint(path: Path) -> tuple[TaskModel, CheckpointConfig]:
    """Load a model for inference: float32, CPU, eval mode, no gradients.

    Raises:
        CheckpointError: the file is missing, corrupt, or does not fit its own config.
    """
    config = read_config(path)
    try:
        model = TaskModel(config)
        state = {key: value.float() for key, value in load_file(path).items()}
        model.load_state_dict(state)
    except (SafetensorError, RuntimeError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{path}: weights do not fit their config: {reason}") from error
    except DinoError as error:
        raise CheckpointError(f"{path}: {error}") from error
    bad = next((key for key, value in state.items() if not bool(value.isfinite().all())), None)
    if bad:
        raise CheckpointError(f"{path}: tensor {bad} holds NaN or infinity. Train it again.")
    return model.eval().requires_grad_(False), config


def _read_header(path: Path) -> dict[str, str]:
    """Return the metadata of a safetensors file, without reading its tensors."""
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint. Give a .safetensors file.")
    foreign = CheckpointError(
        f"{path}: not a .safetensors checkpoint (foreign or truncated file). "
        "Backbone weights go to `dinoexport train --backbone FILE`."
    )
    with path.open("rb") as file:
        start = file.read(8)
        if len(start) < 8:
            raise foreign
        (length,) = struct.unpack("<Q", start)
        if not 2 <= length <= min(MAX_HEADER_BYTES, path.stat().st_size - 8):
            raise foreign
        try:
            header = json.loads(file.read(length))
        except (ValueError, RecursionError) as error:
            raise foreign from error
    if not isinstance(header, dict):
        raise foreign
    metadata = header.get("__metadata__", {})
    return metadata if isinstance(metadata, dict) else {}
