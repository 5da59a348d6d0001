"""What a bundle or a checkpoint is, as plain values."""

import os
from pathlib import Path
from typing import Any

import msgspec

from dinoexport.bundle import check_files, open_bundle
from dinoexport.console import quiet
from dinoexport.targets.table import get_target
from dinotrain.errors import UsageError


def inspect_path(path: Path) -> dict[str, Any]:
    """Describe a bundle (manifest, embedded metadata, operations) or a checkpoint (its header).

    Raises:
        DinoError: it is neither, or corrupt.
    """
    if not path.exists():
        raise UsageError(f"{path}: no such file or folder. Give a bundle or a checkpoint.")
    if path.is_dir():
        return _inspect_bundle(path)
    if path.suffix == ".safetensors":
        from dinotrain.checkpoint import read_config

        facts = msgspec.to_builtins(read_config(path))
        return {"checkpoint": str(path), "size_bytes": path.stat().st_size, **facts}
    raise UsageError(
        f"{path}: neither a bundle (a folder) nor a checkpoint (.safetensors). "
        "Give the folder that `dinoexport build` wrote, or what `dinoexport train` wrote."
    )


def _inspect_bundle(path: Path) -> dict[str, Any]:
    bundle = open_bundle(path)
    check_files(bundle)
    # Opening a Core ML package imports its SDK, which warns on the way.
    with quiet(Path(os.devnull)):
        target = get_target(bundle.manifest.target)
        metadata = target.read_metadata(bundle.artifact)
        operations = target.count_operations(bundle.artifact)
    return {
        "bundle": str(path),
        "size_bytes": bundle.size_bytes(),
        **msgspec.to_builtins(bundle.manifest),
        "embedded_metadata": metadata,
        "operations": operations,
    }
