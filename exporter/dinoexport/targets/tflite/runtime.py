"""Run a TFLite file in LiteRT's interpreter on the CPU."""

import mmap
from collections import Counter
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.interpreter import Interpreter, OpResolverType

from dinoexport.errors import BundleError
from dinoexport.memory import release
from dinoexport.targets.base import Cut, RunResult, Runtime, plain, whole
from dinoexport.targets.tflite.exact import to_exact_form_
from dinoexport.targets.tflite.graph import Graph

CHANNELS_LAST = "channels-last:"
"""Before a tap's tensor name: it holds (B, H, W, C) where the reference has (B, C, H, W)."""


class TfliteRuntime(Runtime):
    """LiteRT's interpreter.

    Args:
        path: the artifact.
        taps: {tap: tensor name}. A delegate does not give its inner tensors, so these become
            outputs of the graph, and the kernels stay those that apps run.
        threads: of the XNNPACK delegate.
        exact: compute in float32 with the stored numbers, see ``to_exact_form_``.
        own_kernels: LiteRT's own, several times slower than XNNPACK; without a choice, those of
            exact arithmetic.
    """

    def __init__(
        self,
        path: Path,
        taps: Mapping[str, str],
        *,
        threads: int = 2,
        exact: bool = False,
        own_kernels: bool | None = None,
    ) -> None:
        # XNNPACK's sums lose digits where a group norm reads few places: 107 dB of 110 were seen.
        own = exact if own_kernels is None else own_kernels
        kernels = "reference kernels" if own else "XNNPACK"
        places = {tap: name.removeprefix(CHANNELS_LAST) for tap, name in taps.items()}
        self.name = f"ai-edge-litert {version('ai-edge-litert')} (CPU, {kernels})"
        try:
            content = path.read_bytes()
            _check_identifier(content)
            content = _rewrite(content, set(places.values()), exact)
            self._interpreter = Interpreter(
                model_content=content,
                num_threads=threads,
                experimental_op_resolver_type=(
                    OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES if own else OpResolverType.AUTO
                ),
            )
            self._interpreter.allocate_tensors()
            self._runner = self._interpreter.get_signature_runner()
        except (ValueError, RuntimeError, OSError) as error:
            reason = " ".join(str(error).split())[:200].rstrip(".")
            raise BundleError(
                f"{path}: LiteRT cannot load it: {reason}. Build it again."
            ) from error
        names = {d["name"]: d["index"] for d in self._interpreter.get_tensor_details()}
        missing = [name for name in places.values() if name not in names]
        if missing:
            raise BundleError(
                f"{path}: tensor {missing[0]}, named in the manifest as a tap, is not in the file. "
                "It is not the one that was built; build it again."
            )
        self._taps = {tap: names[name] for tap, name in places.items()}
        self._last = {tap for tap, name in taps.items() if name.startswith(CHANNELS_LAST)}
        # A signature gives its outputs by alphabet; apps that count them see the file's order.
        order = [d["index"] for d in self._interpreter.get_output_details()]
        details = self._runner.get_output_details()
        self._order = sorted(details, key=lambda name: order.index(details[name]["index"]))

    def run(self, images: Mapping[str, np.ndarray], cut: Cut = whole) -> RunResult:
        """See Runtime.run."""
        outputs = self._runner(**{name: image[np.newaxis] for name, image in images.items()})
        taps = {tap: cut(tap, self._tap(tap, index)) for tap, index in self._taps.items()}
        return RunResult({n: plain(outputs[n]).copy() for n in self._order}, taps)

    def count_operations(self) -> dict[str, int]:
        """Operators by type, without the delegate's own."""
        kinds = Counter(kind for kind, _ in self._results() if kind != "DELEGATE")
        return dict(kinds.most_common())

    def _tap(self, tap: str, index: int) -> np.ndarray:
        value = np.array(self._interpreter.get_tensor(index), np.float32)
        return value.transpose(0, 3, 1, 2) if tap in self._last else value

    def _results(self) -> list[tuple[str, list[int]]]:
        return [
            (op["op_name"], [int(i) for i in op["outputs"]])
            for op in self._interpreter._get_ops_details()
        ]


def _rewrite(content: bytes, outputs: set[str], exact: bool) -> bytes:
    """Return a file with further outputs, or in its exact form; as it is if neither is asked for.

    Raises:
        ValueError: it is damaged.
    """
    try:
        if not (outputs or exact):
            return content
        graph = Graph(content)
        if exact:
            to_exact_form_(graph)
        graph.add_outputs(outputs)
        packed = graph.pack()
        # The weights of the graph would be there a third time.
        del graph
        release(len(packed))
        return bytes(packed)
    except Exception as error:  # a damaged flatbuffer fails in any access
        raise ValueError(f"it is damaged ({error})") from error


def gelu_forms(path: Path) -> set[str]:
    """Return the forms of GELU in a file: ``exact`` or ``tanh``.

    Raises:
        BundleError: it is no flatbuffer.
    """
    model, _ = _parse(path)
    return {
        "tanh" if operator.builtinOptions.approximate else "exact"
        for graph in model.subgraphs
        for operator in graph.operators
        if _kind(model, operator) == schema.BuiltinOperator.GELU
    }


def norm_epsilons(path: Path) -> list[float]:
    """Return the epsilon of each LayerNorm and GroupNorm, in running order.

    TFLite has no such operators: the converter writes rsqrt(variance + epsilon) and no other RSQRT,
    for a GroupNorm with a RESHAPE in between. A guarded LayerNorm adds a multiple of epsilon.

    Raises:
        BundleError: it is no flatbuffer, or an RSQRT reads no such sum.
    """
    model, content = _parse(path)
    found = []
    for graph in model.subgraphs:
        producers = {int(i): op for op in graph.operators for i in op.outputs}
        for operator in graph.operators:
            if _kind(model, operator) != schema.BuiltinOperator.RSQRT:
                continue
            source = producers[int(operator.inputs[0])]
            while _kind(model, source) == schema.BuiltinOperator.RESHAPE:
                source = producers[int(source.inputs[0])]
            sources = [int(i) for i in source.inputs]
            constants = [i for i in sources if i not in producers]
            if not constants:
                made = [producers[i] for i in sources]
                factors = [p for p in made if _kind(model, p) == schema.BuiltinOperator.MUL]
                constants = [int(i) for p in factors for i in p.inputs if int(i) not in producers]
            if len(constants) != 1:
                raise BundleError(f"{path}: an RSQRT follows no sum with a constant")
            buffer = model.buffers[graph.tensors[constants[0]].buffer]
            data = buffer.data
            if data is None:
                data = np.frombuffer(content[buffer.offset : buffer.offset + buffer.size], np.uint8)
            found.append(float(np.asarray(data, np.uint8).view(np.float32)[0]))
    return found


def _check_identifier(content: Any) -> None:
    """Refuse other files before they are walked: of zeros a flatbuffer reads an empty model."""
    if not schema.Model.ModelBufferHasIdentifier(content, 0):
        raise ValueError("it does not start with the format's identifier")


def _kind(model: schema.ModelT, operator: schema.OperatorT) -> int:
    return model.operatorCodes[operator.opcodeIndex].builtinCode  # type: ignore[index]


def _parse(path: Path) -> tuple[Any, bytes]:
    """Read a whole file as objects, or BundleError."""
    try:
        content = path.read_bytes()
        _check_identifier(content)
        return schema.ModelT.InitFromObj(schema.Model.GetRootAs(content, 0)), content
    except Exception as error:  # a damaged flatbuffer fails in any access
        raise BundleError(
            f"{path}: not a readable TFLite file: {error}. Build it again."
        ) from error


def read_metadata(path: Path) -> dict[str, str]:
    """Return the metadata pairs of a file.

    Raises:
        BundleError: it is missing or no flatbuffer.
    """
    try:
        with (
            path.open("rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content,
        ):
            _check_identifier(content)
            model = schema.Model.GetRootAs(content, 0)
            found = {}
            for i in range(model.MetadataLength()):
                entry: Any = model.Metadata(i)
                if entry is None or entry.Name() is None:
                    continue
                buffer = model.Buffers(entry.Buffer())
                data = _buffer_bytes(content, buffer)
                # The converter pads a value of its own with zeros.
                found[entry.Name().decode()] = data.rstrip(b"\0").decode(errors="replace")
            return found
    except Exception as error:  # a damaged flatbuffer fails in any access
        raise BundleError(
            f"{path}: not a readable TFLite file: {error}. Build it again."
        ) from error


def _buffer_bytes(content: mmap.mmap, buffer) -> bytes:
    # A quantised file keeps buffers behind the flatbuffer, by offset.
    if buffer.DataLength():
        return buffer.DataAsNumpy().tobytes()
    return bytes(content[buffer.Offset() : buffer.Offset() + buffer.Size()])
