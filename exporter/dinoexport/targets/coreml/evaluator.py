"""Evaluates a saved .mlpackage on any machine, operation by operation, from its own file.

What ships is what is read: the program and the weights come from the package. It tests graph,
weights and range; it does not test Apple's kernels, their placement or their speed.
"""

import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from coremltools.converters.mil.frontend.milproto.load import load
from coremltools.converters.mil.mil import types
from coremltools.proto import FeatureTypes_pb2
from torch import Tensor

from dinoexport.errors import BundleError, ParityError, UnknownOperationError
from dinoexport.targets.coreml.mil_operands import (
    Kernel,
    Operands,
    Read,
    as_tensor,
    carrier,
    is_carried,
)
from dinoexport.targets.coreml.mil_ops import EXACT, KERNELS
from dinoexport.targets.coreml.package import Package, open_package
from dinotrain.errors import ShapeError, UsageError, unknown_name

FP16_LIMIT = 65504.0
"""The largest finite number in half precision."""

_LARGE = 2**16
"""Numbers of a constant from which on it is not kept as a tensor."""

_PART = 2**15
"""Numbers that are rounded at a time: they fit into a cache, and torch starts no threads for them,
which wait for each other longer than they work."""

_CHANNELS = {"RGB": 3, "BGR": 3, "GRAYSCALE": 1, "GRAYSCALE_FLOAT16": 1}
_IMAGE_TYPE: Any = FeatureTypes_pb2.ImageFeatureType
_COLOR_SPACES = {number: name for name, number in _IMAGE_TYPE.ColorSpace.items()}
_NUMBERED = re.compile(r"_\d+$")


class Port(msgspec.Struct, frozen=True, kw_only=True):
    """One input or output; ``dtype`` is MIL's name of it, such as ``fp32``.

    ``color`` is the layout of an image (``RGB``, ``BGR``, ``GRAYSCALE``), None for a tensor.
    ``shape`` is the program's, (1, channels, height, width) for an image; −1 is a free side.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    color: str | None = None


class OperationInfo(msgspec.Struct, frozen=True, kw_only=True):
    """One operation of the program: its type, and the name and type of each output.

    ``settings`` holds its constant scalars, such as ``{"mode": "EXACT"}`` of a ``gelu``; ``inputs``
    names the variables that it reads, constants included.
    """

    kind: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    dtypes: tuple[str, ...]
    settings: dict[str, str | float]


class Peak(msgspec.Struct, frozen=True, kw_only=True):
    """The largest magnitude that one output took, before it was rounded.

    ``overflow`` says that its declared type is half precision and cannot hold that magnitude, or
    that it is not finite at all. Without rounding this finds overflow at its origin.
    """

    kind: str
    output: str
    dtype: str
    max_abs: float
    overflow: bool


class Evaluation(msgspec.Struct, frozen=True, kw_only=True):
    """What one run gave: float32, int32 or bool arrays by name, and peaks in running order."""

    outputs: dict[str, np.ndarray]
    values: dict[str, np.ndarray]
    peaks: tuple[Peak, ...]

    @property
    def overflowed(self) -> tuple[str, ...]:
        """Outputs of operations that overflowed, in running order; the first is the origin."""
        return tuple(peak.output for peak in self.peaks if peak.overflow)


class PackageEvaluator:
    """Runs one function of a saved ML program with torch on the CPU.

    Args:
        path: the ``.mlpackage`` folder.
        function: name of the function, by default the package's own default.

    Raises:
        BundleError: the package is missing, corrupt or truncated.
        UnknownOperationError: the program holds an operation that is not in ``KERNELS``.
        UsageError: the package has no such function.
    """

    def __init__(self, path: Path, function: str | None = None) -> None:
        self.path = Path(path)
        package = open_package(self.path)
        name = _function_name(package, function)
        _refuse_unknown(package, name)
        try:
            program = load(
                package.spec, package.spec.specificationVersion, str(package.weights_dir)
            )
        except Exception as error:  # coremltools raises every kind on a damaged program
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise BundleError(
                f"{self.path}: its program cannot be read ({reason}). Build it again."
            ) from error
        self._function = program.functions[name]
        self._operations = [op for op in self._function.operations if op.op_type != "const"]
        self._constants = _small_constants(self._operations)
        self._unpacked: dict[bool, dict[int, Tensor]] = {}
        description = _described(package.spec.description, name)
        self.inputs = {
            name: _port(name, var, description) for name, var in self._function.inputs.items()
        }
        self.outputs = {var.name: _port(var.name, var, description) for var in self._results}
        self.operations = [_info(op) for op in self._operations]
        self._by_name = {var.name: var for op in self._operations for var in op.outputs}

    @property
    def _results(self) -> Sequence[Any]:
        return self._function.outputs

    @property
    def counts(self) -> Counter[str]:
        """How often each operation type occurs, constants left out."""
        return Counter(op.kind for op in self.operations)

    def locate(self, fx_name: str, shape: Sequence[int] | None = None) -> str:
        """Find the variable that holds the value of a node of the captured program.

        The converter keeps node names: ``add_3`` stays ``add_3``, and computed in half precision
        it becomes ``add_3_cast_fp16``. It also moves transposes through other operations, merges
        equal nodes and appends a number to a name already taken: what cannot be told apart is
        refused instead of guessed. Sums of the residual stream keep name and layout.

        Args:
            fx_name: ``node.name`` in the exported program's graph.
            shape: the node's shape; give it, as it catches a node that moved behind a transpose.

        Returns:
            A name that ``run(keep=...)`` accepts.

        Raises:
            ParityError: no variable has this name, several could be meant, or its shape differs.
        """
        found = [name for name in (fx_name, f"{fx_name}_cast_fp16") if name in self._by_name]
        if _NUMBERED.search(fx_name):
            pattern = re.compile(re.escape(fx_name) + r"_\d+(_cast_fp16)?")
            found += [name for name in self._by_name if pattern.fullmatch(name)]
        # The passes make transposes of their own, under names that nodes may have too.
        if fx_name.startswith(("transpose", "permute")) or not found:
            raise ParityError(
                f"{self.path}: no variable for node '{fx_name}'; the converter folded, fused or "
                f"moved it. Tap a residual sum or an output."
            )
        if len({name.removesuffix("_cast_fp16") for name in found}) > 1 and shape is not None:
            # What a GroupNorm is written out to takes names of its own kind, such as add_3.
            fitting = [name for name in found if _fits(tuple(shape), self._by_name[name].shape)]
            found = fitting or found
        if len({name.removesuffix("_cast_fp16") for name in found}) > 1:
            raise ParityError(
                f"{self.path}: node '{fx_name}' could be any of {', '.join(found)}. Tap a node "
                f"with a unique name."
            )
        declared = self._by_name[found[0]].shape
        if shape is not None and not _fits(tuple(shape), declared):
            raise ParityError(
                f"{self.path}: node '{fx_name}' is {tuple(shape)} and variable '{found[0]}' "
                f"{tuple(declared)}, so the converter moved it. Tap a residual sum or an output."
            )
        return found[0]

    def run(
        self,
        inputs: Mapping[str, np.ndarray],
        round_activations: bool,
        keep: Collection[str] | None = None,
        take: Callable[[str, np.ndarray], None] | None = None,
        watch: bool = False,
    ) -> Evaluation:
        """Evaluate the program once.

        Args:
            inputs: by name; an image is uint8 (H, W, 3) RGB (or (H, W) grayscale), anything else
                an array of the input's shape.
            round_activations: round every result that the program declares as half precision,
                unpacked weights included, and quantise activations. False computes all in
                float32, where quantising only scales, so only graph and weights are tested.
            keep: variable names whose values are wanted beside the outputs.
            take: given each of these by its name once it is computed, which it may look at and not
                hold; without it, copies are returned.
            watch: record the largest magnitude of every floating-point result.

        Returns:
            Outputs, kept values and peaks.

        Raises:
            UsageError: an unknown or a missing input, or an unknown name in ``keep``.
            ShapeError: an input of another shape or type.
            ParityError: an operation failed or gave another shape than it declares.
        """
        wanted = set(keep or ())
        for name in sorted(wanted - self._by_name.keys()):
            raise unknown_name("variable", name, self._by_name)
        kernels = KERNELS if round_activations else KERNELS | EXACT
        unpacked = self._unpack_weights(round_activations)
        values = self._feed(inputs, round_activations)
        last_use = self._last_use(wanted)
        kept: dict[str, np.ndarray] = {}
        take = take or (lambda name, value: kept.update({name: value.copy()}))
        left = set(wanted)
        peaks: list[Peak] = []
        with torch.inference_mode():
            for step, operation in enumerate(self._operations):
                if id(operation.outputs[0]) in unpacked:
                    continue
                read = self._reader(values, unpacked)
                exact = not round_activations and operation.op_type in EXACT
                results = self._compute(kernels[operation.op_type], operation, read)
                for var, raw in zip(operation.outputs, results, strict=True):
                    value = raw if exact else _settle(raw, var.dtype, round_activations)
                    if watch and raw.is_floating_point():
                        peaks.append(_peak(operation.op_type, var, raw))
                    values[id(var)] = value
                    if var.name in left:
                        take(var.name, value.numpy())
                        left.remove(var.name)
                # A large map would outlive its use by a step, unrounded beside rounded.
                del results, raw, value
                for key in last_use.get(step, ()):
                    values.pop(key, None)
            read = self._reader(values, unpacked)
            outputs = {var.name: read(var).numpy().copy() for var in self._results}
            for name in left:
                take(name, read(self._by_name[name]).numpy())
        return Evaluation(outputs=outputs, values=kept, peaks=tuple(peaks))

    def _unpack_weights(self, rounded: bool) -> dict[int, Tensor]:
        """Compute ``constexpr`` operations once; Core ML does so when it loads the model."""
        if rounded not in self._unpacked:
            found: dict[int, Tensor] = {}

            # Each is read once; kept, the codes would take as much as the weights themselves.
            def read(var: Any, found: Mapping[int, Tensor] = found) -> Tensor:
                return found[id(var)] if id(var) in found else as_tensor(var.val, var.dtype)

            for operation in self._operations:
                if operation.op_type.startswith("constexpr_"):
                    results = self._compute(KERNELS[operation.op_type], operation, read)
                    for var, raw in zip(operation.outputs, results, strict=True):
                        found[id(var)] = _settle(raw, var.dtype, rounded)
            self._unpacked[rounded] = found
        return self._unpacked[rounded]

    def _reader(self, values: Mapping[int, Tensor], unpacked: Mapping[int, Tensor]) -> Read:
        def read(var: Any) -> Tensor:
            for known in (values, unpacked, self._constants):
                if id(var) in known:
                    return known[id(var)]
            # Large ones are turned into float32 each time, which is little beside what they are
            # multiplied with: kept, all weights would be there once more.
            return as_tensor(var.val, var.dtype)

        return read

    def _compute(self, kernel: Kernel, operation: Any, read: Read) -> list[Tensor]:
        try:
            found = kernel(Operands(operation, read))
        except (RuntimeError, ValueError, IndexError, TypeError, KeyError) as error:
            raise ParityError(
                f"{self.path}: operation '{operation.name}' ({operation.op_type}) cannot be "
                f"evaluated: {str(error).splitlines()[0]}. Report it with the package."
            ) from error
        results = [found] if isinstance(found, Tensor) else list(found)
        for var, result in zip(operation.outputs, results, strict=True):
            if not _fits(tuple(result.shape), var.shape):
                raise ParityError(
                    f"{self.path}: '{var.name}' ({operation.op_type}) came out as "
                    f"{tuple(result.shape)}, and the program declares {tuple(var.shape)}. "
                    f"Report it with the package."
                )
        return results

    def _feed(self, inputs: Mapping[str, np.ndarray], rounded: bool) -> dict[int, Tensor]:
        for name in inputs:
            if name not in self.inputs:
                raise unknown_name("input", name, self.inputs)
        missing = sorted(self.inputs.keys() - inputs.keys())
        if missing:
            raise UsageError(f"{self.path}: input '{missing[0]}' was not given")
        values = {}
        for name, var in self._function.inputs.items():
            port = self.inputs[name]
            array = np.asarray(inputs[name])
            tensor = _image(port, array) if port.color else _array(port, array, var.dtype)
            values[id(var)] = _settle(tensor, var.dtype, rounded)
        return values

    def _last_use(self, wanted: Collection[str]) -> dict[int, list[int]]:
        """Values that may be dropped after each step, so that memory stays that of a few."""
        last: dict[int, int] = {}
        for step, operation in enumerate(self._operations):
            for entry in operation.inputs.values():
                for var in entry if isinstance(entry, list | tuple) else [entry]:
                    last[id(var)] = step
            for var in operation.outputs:
                last.setdefault(id(var), step)
        held = {id(var) for var in self._results}
        freed: dict[int, list[int]] = {}
        for key, step in last.items():
            if key not in held:
                freed.setdefault(step, []).append(key)
        return freed


def norm_epsilons(operations: Sequence[OperationInfo]) -> list[float]:
    """Return the epsilon of each LayerNorm and GroupNorm, in running order.

    A GroupNorm is written out and ends in (x − mean) / sqrt(variance + epsilon), a guarded
    LayerNorm in (x − mean)/m · rsqrt(variance + epsilon/m²).
    """
    sums: dict[str, float] = {}
    factors: dict[str, float] = {}
    for op in operations:
        if op.kind in ("mul", "add") and "y" in op.settings:
            (factors if op.kind == "mul" else sums)[op.outputs[0]] = float(op.settings["y"])
        elif op.kind == "add":
            added = [factors[name] for name in op.inputs if name in factors]
            sums |= dict.fromkeys(op.outputs[:1] if added else (), *added[:1])
    found = []
    for op in operations:
        if op.kind == "layer_norm":
            found.append(float(op.settings.get("epsilon", 1e-5)))
        elif op.kind in ("sqrt", "rsqrt") and op.inputs[0] in sums:
            found.append(sums[op.inputs[0]])
    return found


def _small_constants(operations: Sequence[Any]) -> dict[int, Tensor]:
    """Constants that are kept, as tensors.

    They are made before anything runs: between large values they would leave holes in the heap that
    the next large ones do not fit into, twice as much in all as what is alive (ViT-B at 518 px).
    """
    # Many operations share one, such as an axis.
    shared = {
        id(var): var
        for operation in operations
        # Of these each input is read once, when weights are unpacked.
        if not operation.op_type.startswith("constexpr_")
        for entry in operation.inputs.values()
        for var in (entry if isinstance(entry, list | tuple) else [entry])
        if var is not None and _is_constant(var) and np.size(var.val) < _LARGE
    }
    return {key: as_tensor(var.val, var.dtype) for key, var in shared.items()}


def _is_constant(var: Any) -> bool:
    return var.op is not None and var.op.op_type == "const" and is_carried(var.dtype)


def _function_name(package: Package, wanted: str | None) -> str:
    functions = package.spec.mlProgram.functions
    name = wanted or str(package.spec.description.defaultFunctionName or "main")
    if name not in functions:
        raise unknown_name("function", name, functions)
    return name


def _refuse_unknown(package: Package, function: str) -> None:
    spec = package.spec.mlProgram.functions[function]
    for operation in spec.block_specializations[spec.opset].operations:
        if operation.type != "const" and operation.type not in KERNELS:
            label = operation.outputs[0].name if operation.outputs else "without output"
            raise UnknownOperationError(
                f"{package.path}: operation '{operation.type}' ({label}) in function "
                f"'{function}' is not known to the evaluator, so nothing was run. Verify this "
                f"package on a Mac, or add the operation to mil_ops.py."
            )


def _described(description: Any, function: str) -> dict[str, Any]:
    """Feature descriptions by name; a package with several functions keeps them per function."""
    for entry in description.functions:
        if entry.name == function:
            description = entry
    return {feature.name: feature for feature in (*description.input, *description.output)}


def _info(operation: Any) -> OperationInfo:
    settings = {}
    read: list[str] = []
    for name, entry in operation.inputs.items():
        read += [var.name for var in (entry if isinstance(entry, list | tuple) else [entry]) if var]
        value = None if isinstance(entry, list | tuple) or entry is None else entry.val
        if isinstance(value, str | bool | int | float | np.generic):
            settings[name] = value.item() if isinstance(value, np.generic) else value
    return OperationInfo(
        kind=operation.op_type,
        inputs=tuple(read),
        outputs=tuple(var.name for var in operation.outputs),
        dtypes=tuple(types.builtin_to_string(var.dtype) for var in operation.outputs),
        settings=settings,
    )


def _port(name: str, var: Any, described: Mapping[str, Any]) -> Port:
    color = None
    feature = described.get(name)
    if feature is not None and feature.type.WhichOneof("Type") == "imageType":
        space = feature.type.imageType.colorSpace
        color = _COLOR_SPACES[space]
    shape = tuple(side if isinstance(side, int) else -1 for side in map(_side, var.shape))
    return Port(name=name, shape=shape, dtype=types.builtin_to_string(var.dtype), color=color)


def _side(side: Any) -> Any:
    return int(side) if isinstance(side, int | np.integer) else side


def _fits(shape: tuple[int, ...], declared: Sequence[Any]) -> bool:
    sides = [_side(side) for side in declared]
    return len(shape) == len(sides) and all(
        not isinstance(want, int) or want in (have, -1)
        for have, want in zip(shape, sides, strict=True)
    )


def _image(port: Port, array: np.ndarray) -> Tensor:
    """(H, W, 3) or (H, W) uint8 → (1, C, H, W) float32 in 0..255, channels as the model wants."""
    channels = _CHANNELS.get(port.color or "", 0)
    height, width = port.shape[-2:]
    wanted = (height, width, 3) if channels == 3 else (height, width)
    if array.dtype != np.uint8 or not _fits(array.shape, wanted):
        raise ShapeError(
            f"image input '{port.name}' is {array.dtype} {array.shape}; it takes uint8 {wanted}"
        )
    planes = array[..., None] if channels == 1 else array
    if port.color == "BGR":
        planes = planes[..., ::-1]
    return torch.from_numpy(np.ascontiguousarray(planes.transpose(2, 0, 1))[None]).float()


def _array(port: Port, array: np.ndarray, dtype: Any) -> Tensor:
    if not _fits(array.shape, port.shape):
        raise ShapeError(f"input '{port.name}' has shape {array.shape}; it takes {port.shape}")
    if array.dtype.kind == "f" and not carrier(dtype).is_floating_point:
        raise ShapeError(f"input '{port.name}' is {array.dtype}; it takes {port.dtype}")
    return as_tensor(array, dtype)


def _settle(value: Tensor, dtype: Any, rounded: bool) -> Tensor:
    """Bring a result into the carrier of its declared type, rounded to half where asked."""
    if rounded and dtype is types.fp16:
        return _round_to_half(value)
    return value.to(carrier(dtype))


def _round_to_half(value: Tensor) -> Tensor:
    """Round to half precision, in parts that a cache holds: ten times as fast on large maps."""
    flat = value.float().reshape(-1)
    rounded = torch.empty_like(flat)
    for source, target in zip(flat.split(_PART), rounded.split(_PART), strict=True):
        target.copy_(source.half())
    return rounded.reshape(value.shape)


def _peak(kind: str, var: Any, raw: Tensor) -> Peak:
    low, high = raw.aminmax() if raw.numel() else (torch.zeros(()), torch.zeros(()))
    # torch's maximum is NaN where either side is.
    largest = torch.maximum(-low, high).item()
    half = var.dtype is types.fp16
    # not <=, so that NaN counts as overflow too.
    overflow = not largest <= (FP16_LIMIT if half else float(np.finfo(np.float32).max))
    return Peak(
        kind=kind,
        output=var.name,
        dtype=types.builtin_to_string(var.dtype),
        max_abs=largest,
        overflow=overflow,
    )
