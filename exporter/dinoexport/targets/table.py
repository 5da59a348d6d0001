"""Target name → implementation, imported when it is asked for: SDKs are heavy."""

from importlib import import_module

from dinoexport.targets.base import Target
from dinotrain.errors import unknown_name

TABLE = {
    "onnx": "dinoexport.targets.onnx:OnnxTarget",
    "coreml": "dinoexport.targets.coreml:CoremlTarget",
    "tflite": "dinoexport.targets.tflite:TfliteTarget",
}


def get_target(name: str) -> Target:
    """Return the target of a name, or UsageError with the nearest known one."""
    if name not in TABLE:
        raise unknown_name("target", name, [*TABLE, "all"])
    module, cls = TABLE[name].split(":")
    return getattr(import_module(module), cls)()


def expand_targets(names: str) -> list[str]:
    """``all`` → every target; ``onnx,tflite`` → each of them once, checked."""
    if names == "all":
        return list(TABLE)
    chosen = list(dict.fromkeys(name.strip() for name in names.split(",")))
    for name in chosen:
        if name not in TABLE:
            raise unknown_name("target", name, [*TABLE, "all"])
    return chosen
