"""What a bundle or a checkpoint is, as plain values."""

import os
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec

from dinoexport.bundle import check_files, open_bundle
from dinoexport.console import quiet
from dinoexport.targets.table import get_target
from dinotrain.errors import UsageError, unknown_name


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


def inspect_passes(path: Path, layout: str = "tokens") -> dict[str, Any]:
    """Count the captured ATen operations of a checkpoint before and after each pass.

    Args:
        path: a checkpoint.
        layout: whose passes.

    Returns:
        ``operations``, the last counts by name, most frequent first, and ``passes``: of each its
        name, operations and parameters in all as [before, after], and ``changed``, the same of
        each operation whose count it changes.

    Raises:
        DinoError: it is no checkpoint, or there is no such layout for it.
    """
    if path.suffix != ".safetensors" or not path.is_file():
        raise UsageError(f"{path}: --passes reads a checkpoint (.safetensors). Give such a file.")
    from dinoexport.graph.capture import export
    from dinoexport.graph.deploy_model import DeployModel
    from dinoexport.passes.base import apply_passes
    from dinoexport.passes.sequence import LAYOUTS, PASSES
    from dinotrain.checkpoint import load_checkpoint

    if layout not in LAYOUTS:
        raise unknown_name("layout", layout, LAYOUTS)

    def measure() -> tuple[Counter[str], int]:
        with quiet(Path(os.devnull)):
            program = export(model)
        names = [str(node.target) for node in program.graph.nodes]
        # What is left takes one result out of several.
        counts = Counter(name.split(".")[1] for name in names if name.startswith("aten."))
        return counts, sum(weight.numel() for weight in model.parameters())

    model = DeployModel(load_checkpoint(path)[0])
    counts, size = measure()
    steps = []
    for step in (*PASSES, *LAYOUTS[layout]):
        apply_passes(model, [step])
        (old, old_size), (counts, size) = (counts, size), measure()
        steps.append(
            {
                "name": step.name,
                "operations": [old.total(), counts.total()],
                "parameters": [old_size, size],
                "changed": {
                    name: [old[name], counts[name]]
                    for name in sorted(old | counts)
                    if old[name] != counts[name]
                },
            }
        )
    return {"checkpoint": str(path), "passes": steps, "operations": dict(counts.most_common())}


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
