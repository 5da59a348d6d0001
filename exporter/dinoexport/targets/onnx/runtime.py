"""Run an ONNX file in onnxruntime on the CPU; taps are added as outputs of the shipped graph."""

import math
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from google.protobuf.message import DecodeError
from onnx import ModelProto, NodeProto
from onnxruntime import OrtValue

from dinoexport.errors import BuildError, BundleError
from dinoexport.memory import release
from dinoexport.targets.base import Cut, RunResult, Runtime, artifact_bytes, plain, whole
from dinoexport.targets.onnx.exact import to_exact_precision_

_WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"
"""Where onnxruntime looks for the weights of a model that lies elsewhere."""


def load(path: Path) -> ModelProto:
    """Read an .onnx file, without the weights that lie in a file beside it.

    Raises:
        BundleError: it is missing, cannot be parsed, or holds no graph.
    """
    try:
        model = onnx.load(path, load_external_data=False)
    except (OSError, DecodeError, ValueError) as error:
        raise BundleError(f"{path}: not a readable ONNX file: {error}. Build it again.") from error
    # Of no bytes at all protobuf reads an empty model.
    if not model.graph.node:
        raise BundleError(f"{path}: not a readable ONNX file: it holds no graph. Build it again.")
    return model


def gelu_forms(model: ModelProto) -> set[str]:
    """Return the forms of Gelu in a model: ``exact`` or ``tanh``."""
    forms = set()
    for node in model.graph.node:
        if node.op_type == "Gelu":
            texts = [a.s.decode() for a in node.attribute if a.name == "approximate"]
            forms.add("tanh" if texts == ["tanh"] else "exact")
    return forms


def norm_epsilons(model: ModelProto) -> list[float]:
    """Return the epsilon of each normalisation, in running order.

    A GroupNorm is written as InstanceNormalization of its reshaped groups. A LayerNorm of another
    axis, or one that is guarded, is written out: its epsilon, or a multiple of it, is added before
    the square root.
    """
    found = []
    makers = {name: node for node in model.graph.node for name in node.output}
    scalars = _scalars(model)
    for node in model.graph.node:
        if node.op_type == "Sqrt":
            found += _added(makers.get(node.input[0]), makers, scalars)
        if node.op_type in ("LayerNormalization", "InstanceNormalization"):
            # The operators' own default, which exporters leave out.
            found.append(next((a.f for a in node.attribute if a.name == "epsilon"), 1e-5))
    return found


def _scalars(model: ModelProto) -> dict[str, float]:
    """Constants of one element by name."""
    scalars = [t for t in model.graph.initializer if math.prod(t.dims) == 1]
    values = {t.name: onnx.numpy_helper.to_array(t) for t in scalars}
    for node in model.graph.node:
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            values[node.output[0]] = onnx.numpy_helper.to_array(node.attribute[0].t)
    return {name: float(v.reshape(-1)[0]) for name, v in values.items() if v.size == 1}


def _added(
    node: NodeProto | None, makers: Mapping[str, NodeProto], scalars: Mapping[str, float]
) -> list[float]:
    """The constant that a sum adds to what is computed, or the constant factor of what it adds."""
    if node is None or node.op_type != "Add":
        return []
    direct = [scalars[name] for name in node.input if name in scalars]
    products = [makers[n] for n in node.input if n in makers and makers[n].op_type == "Mul"]
    return direct or [scalars[n] for product in products for n in product.input if n in scalars]


class OnnxRuntime(Runtime):
    """onnxruntime's CPU provider."""

    def __init__(
        self, path: Path, taps: Mapping[str, str], *, exact: bool, threads: int = 0
    ) -> None:
        self.name = f"onnxruntime {onnxruntime.__version__} (CPU)"
        self._taps = dict(taps)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = threads
        # A plan of the second run would take its memory beside what the first has left.
        options.enable_mem_pattern = False
        # Blocks kept for further runs, of which there are few here; apps have many.
        options.enable_cpu_mem_arena = not (taps or exact)
        if exact:
            self.name += ", float32 arithmetic on the stored weights"
        with tempfile.TemporaryDirectory(prefix="dinoexport-") as folder:
            source = path
            if taps or exact:
                # A file, because of bytes a session keeps a copy.
                source = Path(folder) / "model.onnx"
                _rewrite(path, source, list(taps.values()), exact)
                options.add_session_config_entry(_WEIGHTS_FOLDER, str(path.parent))
            try:
                self._session = onnxruntime.InferenceSession(
                    str(source), options, providers=["CPUExecutionProvider"]
                )
            except Exception as error:  # onnxruntime raises a family of undocumented types
                reason = str(error).strip().splitlines()[0][:200].rstrip(".")
                raise BundleError(
                    f"{path}: onnxruntime cannot load it: {reason}. Build it again."
                ) from error
        if taps or exact:
            # What loading took would lie beside what running takes.
            release(artifact_bytes(path))

    def run(self, images: Mapping[str, np.ndarray], cut: Cut = whole) -> RunResult:
        """See Runtime.run."""
        names = [output.name for output in self._session.get_outputs()]
        feeds = {n: OrtValue.ortvalue_from_numpy(x[np.newaxis]) for n, x in images.items()}
        # Its own values, turned into arrays one by one: all taps of a large model would be there
        # twice.
        found = self._session.run_with_ort_values(names, feeds)
        values = dict(zip(names, found, strict=True))
        taps = {
            tap: cut(tap, np.asarray(values[name].numpy(), np.float32))
            for tap, name in self._taps.items()
        }
        inner = set(self._taps.values())
        outputs = {n: plain(v.numpy()) for n, v in values.items() if n not in inner}
        return RunResult(outputs, taps)


def _rewrite(path: Path, to: Path, outputs: list[str], exact: bool) -> None:
    """Write a model with further outputs, or in its exact form, or both.

    Raises:
        BundleError: the model cannot be read, or has no such values.
        BuildError: the temporary folder is full. Of the bundle's folder nothing is wrong.
    """
    model = load(path)
    if exact:
        to_exact_precision_(model)
    _add_outputs_(model, outputs, path)
    try:
        to.write_bytes(model.SerializeToString())
    except OSError as error:
        raise BuildError(
            f"onnx: {to.parent.parent}: a temporary model of {model.ByteSize() / 2**20:.0f} MiB "
            f"cannot be written: {error.strerror}. Free some space or set TMPDIR to another folder."
        ) from error


def _add_outputs_(model: ModelProto, names: list[str], path: Path) -> None:
    typed = {value.name: value for value in model.graph.value_info}
    missing = [name for name in names if name not in typed]
    if missing:
        raise BundleError(
            f"{path}: value {missing[0]}, named in the manifest as a tap, is not in the graph. "
            "The file is not the one that was built; build it again."
        )
    model.graph.output.extend(typed[name] for name in names)
