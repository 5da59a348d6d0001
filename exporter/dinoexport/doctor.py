"""Can this installation do the main job? Versions, devices, space, the embedded checkpoint."""

import os
import platform
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from dinoexport.embedded import EMBEDDED, embedded_checkpoint
from dinotrain.errors import DinoError

_MODULES = {
    "torch": "torch",
    "onnx": "onnx",
    "onnxruntime": "onnxruntime",
    "coremltools": "coremltools",
    "litert-torch": "litert_torch",
    "ai-edge-litert": "ai_edge_litert.interpreter",
}
MIN_FREE_BYTES = 2**30


@dataclass(frozen=True)
class Check:
    """One finding."""

    name: str
    passed: bool
    found: str


def examine() -> list[Check]:
    """Run all checks; none changes anything."""
    from dinoexport.console import quiet

    with quiet(Path(os.devnull)):
        packages = [_package(name, module) for name, module in _MODULES.items()]
    free = shutil.disk_usage(Path.cwd()).free
    return [
        Check("python", True, f"{platform.python_version()} on {platform.platform()}"),
        *packages,
        Check("processors", True, f"{os.cpu_count()}"),
        Check("reference device", True, _device()),
        Check("Core ML", True, _coreml()),
        Check("free disk", free >= MIN_FREE_BYTES, f"{free / 2**30:.0f} GiB here, 1 wanted"),
        *(_guard(f"embedded {task}", lambda task=task: _embedded(task)) for task in EMBEDDED),
    ]


def _package(name: str, module: str) -> Check:
    try:
        import_module(module)
        return Check(name, True, version(name))
    except (ImportError, OSError, PackageNotFoundError) as error:
        return Check(name, False, f"does not import: {error}. Install with -c constraints.txt")


def _guard(name: str, find: Callable[[], str]) -> Check:
    try:
        return Check(name, True, find())
    except DinoError as error:
        return Check(name, False, str(error))


def _device() -> str:
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name(0)
    return "CPU (no GPU; the report will say so)"


def _coreml() -> str:
    if platform.system() == "Darwin":
        return "packages run on this Mac"
    return "packages are evaluated operation by operation; Core ML itself needs a Mac"


def _embedded(task: str) -> str:
    from dinotrain.checkpoint import load_checkpoint
    from dinotrain.digests import digest

    path = embedded_checkpoint(task)
    _, config = load_checkpoint(path)
    return f"{path.name}, sha256 {digest(path)[:12]}, {config.notice or 'no notice'}"
