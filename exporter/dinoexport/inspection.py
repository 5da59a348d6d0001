"""What a bundle or a checkpoint is, as plain values."""

from pathlib import Path
from typing import Any

import msgspec
from dinotrain.errors import UsageError

from dinoexport.bundle import check_files, open_bundle
from dinoexport.targets.table import get_target


def inspect_path(path: Path) -> dict[str, Any]:
    """Describe a bundle (manifest, embedded metadata, operations) or a checkpoint (its header).

    Raises:
        DinoError: it is neither, or corrupt.
    """
    if path.is_dir():
        return _inspect_bundle(path)
    if path.suffix == ".safetensors":
        from dinotrain.checkpoint import read_config

        return {"checkpoint": str(path)} | msgspec.to_builtins(read_config(path))
    raise UsageError(f"{path}: neither a bundle (a folder) nor a checkpoint (.safetensors)")


def _inspect_bundle(path: Path) -> dict[str, Any]:
    bundle = open_bundle(path)
    check_files(bundle)
    target = get_target(bundle.manifest.target)
    facts = msgspec.to_builtins(bundle.manifest)
    return {
        "bundle": str(path),
        "size_bytes": bundle.size_bytes(),
        **facts,
        "embedded_metadata": target.read_metadata(bundle.artifact),
        "operations": target.count_operations(bundle.artifact),
    }
