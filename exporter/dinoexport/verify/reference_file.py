"""A reference as a safetensors file, which comes from outside when it is read again."""

from pathlib import Path

import msgspec
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from dinoexport.errors import ParityError
from dinoexport.verify.reference import (
    FORMAT_VERSION,
    STRUCTURE_SAMPLES,
    Reference,
    ReferenceInfo,
    Values,
)


def encode_reference(reference: Reference) -> bytes:
    """Encode as a safetensors file."""
    tensors = {f"input.{n}": v for n, v in reference.inputs.items()}
    tensors |= {f"positions.{n}": v for n, v in reference.positions.items()}
    for kind, values in {"exact": reference.exact, **reference.deployed}.items():
        tensors |= {f"{kind}.output.{n}": v for n, v in values.outputs.items()}
        tensors |= {f"{kind}.tap.{n}": v for n, v in values.taps.items()}
    tensors = {name: np.ascontiguousarray(value) for name, value in sorted(tensors.items())}
    return save(tensors, metadata={"reference": msgspec.json.encode(reference.info).decode()})


def load_reference(path: Path) -> Reference:
    """Read a reference file from outside.

    Raises:
        ParityError: it is missing, corrupt, of another version, or its parts do not fit together.
    """
    if not path.is_file():
        raise ParityError(f"{path}: no such reference. Make one with `dinoexport reference`.")
    try:
        with safe_open(path, framework="numpy") as file:
            # First, so that nothing of a foreign file is read.
            raw = (file.metadata() or {}).get("reference", "")
            info = msgspec.json.decode(raw, type=ReferenceInfo)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    # NumPy lacks some of safetensors' types, which is a TypeError or an AttributeError.
    except (SafetensorError, OSError, ValueError, TypeError, AttributeError) as error:
        raise ParityError(
            f"{path}: not a reference file: {error}. Make one with `dinoexport reference`."
        ) from error
    if info.format_version != FORMAT_VERSION:
        raise ParityError(
            f"{path}: reference format {info.format_version}, this version reads "
            f"{FORMAT_VERSION}. Make it again with `dinoexport reference`."
        )
    reference = Reference(
        info,
        _part(tensors, "input."),
        Values(_part(tensors, "exact.output."), _part(tensors, "exact.tap.")),
        {
            p: Values(_part(tensors, f"{p}.output."), _part(tensors, f"{p}.tap."))
            for p in info.deployed
        },
        _part(tensors, "positions."),
    )
    _check_shapes(reference, path)
    return reference


def _part(tensors: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    return {n.removeprefix(prefix): v for n, v in tensors.items() if n.startswith(prefix)}


def _check_shapes(reference: Reference, path: Path) -> None:
    if not _fits(reference):
        raise ParityError(
            f"{path}: the parts of the reference do not fit together. "
            "Make it again with `dinoexport reference`."
        )


def _fits(reference: Reference) -> bool:
    """True if there is something to compare, and its parts have the shapes that they should."""
    exact, positions = reference.exact, reference.positions
    if not reference.inputs or not exact.outputs or not exact.taps:
        return False
    shapes = {images.shape for images in reference.inputs.values()}
    count = next(iter(shapes))[:1]
    if shapes != {(*count, *reference.info.image_size, 3)} or count == (0,):
        return False
    if any(images.dtype != np.uint8 for images in reference.inputs.values()):
        return False
    few = (len(STRUCTURE_SAMPLES),)
    if positions.keys() != exact.taps.keys():
        return False
    # An index below zero would be taken from the end.
    if any(
        p.ndim != 1 or p.dtype.kind != "i" or not p.size or p.min() < 0 for p in positions.values()
    ):
        return False
    for values, counts in [
        (exact, [count]),
        *((v, [count, few]) for v in reference.deployed.values()),
    ]:
        if values.outputs.keys() != exact.outputs.keys() or values.taps.keys() != exact.taps.keys():
            return False
        held = next(iter(values.outputs.values())).shape[:1]
        if held not in counts or any(
            value.shape != (*held, *exact.outputs[name].shape[1:])
            for name, value in values.outputs.items()
        ):
            return False
        if any(tap.shape != (*held, positions[n].size) for n, tap in values.taps.items()):
            return False
        if not all(np.isfinite(v).all() for v in (*values.outputs.values(), *values.taps.values())):
            return False
    return True
