"""The .tflite file as an app meets it: by its flatbuffer, and in a plain LiteRT interpreter."""

import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flatbuffers.table
import numpy as np
import pytest
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.interpreter import Interpreter

from dinoexport.bundle import open_bundle
from dinoexport.errors import BundleError
from dinoexport.recipes import parse_recipe
from dinoexport.targets.table import get_target
from dinoexport.verify.parity import budget_of
from dinotrain.tasks import get_task

pytestmark = pytest.mark.e2e
PRECISIONS = ("fp32", "fp16")
WEIGHTED = ("FULLY_CONNECTED", "CONV_2D")
OPERATORS = {v: k for k, v in vars(schema.BuiltinOperator).items() if isinstance(v, int)}
TYPES = {v: k for k, v in vars(schema.TensorType).items() if isinstance(v, int)}


@pytest.fixture(params=PRECISIONS)
def file(request, built: Callable[[str, str], Path]) -> Path:
    return open_bundle(built("tflite", request.param)).artifact


def precision_of(path: Path) -> str:
    return "fp16" if "fp16" in path.name else "fp32"


class Graph:
    """The only subgraph of a file, by LiteRT's schema."""

    def __init__(self, path: Path) -> None:
        self.content = path.read_bytes()
        self.model: Any = schema.ModelT.InitFromObj(schema.Model.GetRootAs(self.content, 0))
        (self.graph,) = self.model.subgraphs
        self.tensors = self.graph.tensors
        self.operators = [
            (OPERATORS[self.model.operatorCodes[o.opcodeIndex].builtinCode], o.inputs, o.outputs)
            for o in self.graph.operators
        ]
        self.maker = {int(i): index for index, o in enumerate(self.operators) for i in o[2]}

    def type(self, index: int) -> str:
        return TYPES[self.tensors[index].type]

    def data(self, index: int) -> bytes:
        buffer = self.model.buffers[self.tensors[index].buffer]
        if buffer.data is not None:
            return bytes(np.asarray(buffer.data, np.uint8))
        return self.content[buffer.offset : buffer.offset + buffer.size]

    def constants(self) -> list[int]:
        inputs = {int(i) for i in self.graph.inputs}
        return [i for i in range(len(self.tensors)) if i not in self.maker and i not in inputs]

    def weights(self) -> list[int]:
        """The constant behind the weight input of each linear layer and convolution."""
        found = []
        for kind, inputs, _ in self.operators:
            if kind in WEIGHTED:
                index = int(inputs[1])
                if index in self.maker:
                    maker = self.operators[self.maker[index]]
                    assert maker[0] == "DEQUANTIZE"
                    index = int(maker[1][0])
                found.append(index)
        return found


# --- the format ----------------------------------------------------------------------------------


def test_it_is_a_tflite_file_of_one_graph(file):
    content = file.read_bytes()
    assert content[4:8] == b"TFL3"
    graph = Graph(file)
    assert graph.model.version == 3
    assert graph.model.description.decode() == f"dinoexport {file.stem}"
    assert "CUSTOM" not in {kind for kind, _, _ in graph.operators}, "an app has no such kernel"


def test_one_signature_names_inputs_and_outputs(file):
    manifest = open_bundle(file.parent).manifest
    signatures = Interpreter(model_path=str(file)).get_signature_list()
    assert list(signatures) == ["serving_default"]
    # A signature is a set of names: LiteRT gives them by alphabet.
    assert sorted(signatures["serving_default"]["inputs"]) == sorted(
        port.name for port in manifest.inputs
    )
    assert sorted(signatures["serving_default"]["outputs"]) == sorted(
        port.name for port in manifest.outputs
    )


def test_ports_stand_in_the_order_of_the_manifest(file):
    """Apps without signatures count inputs and outputs."""
    manifest = open_bundle(file.parent).manifest
    interpreter = Interpreter(model_path=str(file))
    for details, ports, dtype in (
        (interpreter.get_input_details(), manifest.inputs, np.uint8),
        (interpreter.get_output_details(), manifest.outputs, np.float32),
    ):
        assert len(details) == len(ports)
        for detail, port in zip(details, ports, strict=True):
            assert port.name in detail["name"]
            assert tuple(detail["shape"]) == port.shape
            assert detail["dtype"] is dtype
            # Neither scale nor zero point: pixels go in as they are, millimetres come out.
            assert detail["quantization"] == (0.0, 0)


def test_every_shape_is_static_and_at_most_four_dimensional(file):
    graph = Graph(file)
    shapes = [t.shape if t.shape is not None else () for t in graph.tensors]
    assert len(shapes) > 100
    assert all(len(shape) <= 4 for shape in shapes)
    assert all(side > 0 for shape in shapes for side in shape)
    # Where a side may change, it is −1 here.
    assert all(t.shapeSignature is None or -1 not in t.shapeSignature for t in graph.tensors)


def test_no_operation_that_gpus_refuse(file):
    """FINDINGS, delegates; BROADCAST_TO is left, on the prefix tokens alone."""
    graph = Graph(file)
    kinds = [kind for kind, _, _ in graph.operators]
    for bad in ("GATHER_ND", "STABLEHLO_COMPOSITE", "TRANSPOSE_CONV", "WHERE", "ERF", "SELECT_V2"):
        assert bad not in kinds
    assert kinds.count("BROADCAST_TO") <= 1


def test_the_recursion_limit_is_what_it_was(file):
    """With litert-torch's, a nested manifest from outside would end the process."""
    assert sys.getrecursionlimit() < 10_000


def test_products_of_attention_have_four_axes(file):
    """FINDINGS, traps: with three, a GPU delegate gave wrong values; it ignores marks besides."""
    graph = Graph(file)
    products = [
        (operator, [graph.tensors[int(i)].shape for i in (*inputs, *outputs)])
        for operator, (kind, inputs, outputs) in zip(
            graph.graph.operators, graph.operators, strict=True
        )
        if kind == "BATCH_MATMUL"
    ]
    assert products
    for operator, shapes in products:
        assert [len(shape) for shape in shapes] == [4, 4, 4]
        assert not operator.builtinOptions.adjX
        assert not operator.builtinOptions.adjY


def test_nothing_ships_that_is_not_read(file):
    graph = Graph(file)
    read = {int(i) for _, inputs, _ in graph.operators for i in inputs}
    read |= {int(i) for i in graph.graph.outputs}
    for index in graph.constants():
        assert index in read, graph.tensors[index].name
    for index in graph.maker:
        assert index in read or graph.operators[graph.maker[index]][0] == "SPLIT"


def test_no_trace_of_the_machine_that_built_it(file):
    content = file.read_bytes()
    for word in (b"site-packages", b".py", b"/home", b"/root", b"/work", b"/tmp/"):
        assert word not in content


# --- precision -----------------------------------------------------------------------------------


def test_the_full_precision_file_has_no_half(built):
    graph = Graph(open_bundle(built("tflite", "fp32")).artifact)
    assert {graph.type(i) for i in range(len(graph.tensors))} == {"FLOAT32", "INT32", "UINT8"}
    assert "DEQUANTIZE" not in {kind for kind, _, _ in graph.operators}


def test_only_weights_are_half(built):
    graph = Graph(open_bundle(built("tflite", "fp16")).artifact)
    half = {i for i in range(len(graph.tensors)) if graph.type(i) == "FLOAT16"}
    # Patch, six layers in each of two blocks, two in each of two heads.
    assert half == set(graph.weights())
    assert len(half) == 1 + 2 * 6 + 2 * 2
    assert half <= set(graph.constants())
    for _, inputs, _ in graph.operators:
        for index in inputs[2:]:
            assert index < 0 or graph.type(int(index)) != "FLOAT16", "a bias"


def test_what_is_half_is_unpacked_and_no_more(built):
    graph = Graph(open_bundle(built("tflite", "fp16")).artifact)
    unpacked = [(i, o) for kind, i, o in graph.operators if kind == "DEQUANTIZE"]
    assert {int(i[0]) for i, _ in unpacked} == set(graph.weights())
    for _, outputs in unpacked:
        assert graph.type(int(outputs[0])) == "FLOAT32"


def test_half_precision_weights_are_the_single_ones_rounded(built):
    full, half = (Graph(open_bundle(built("tflite", p)).artifact) for p in PRECISIONS)
    for one, two in zip(full.weights(), half.weights(), strict=True):
        wanted = np.frombuffer(full.data(one), np.float32).astype(np.float16)
        np.testing.assert_array_equal(np.frombuffer(half.data(two), np.float16), wanted)


def test_constants_that_stay_single_hold_rounded_numbers(built):
    """Weights were rounded before lowering, so that all targets ship the same ones."""
    graph = Graph(open_bundle(built("tflite", "fp16")).artifact)
    biases = [
        np.frombuffer(graph.data(int(inputs[2])), np.float32)
        for kind, inputs, _ in graph.operators
        if kind in WEIGHTED and len(inputs) > 2 and int(inputs[2]) in graph.constants()
    ]
    assert len(biases) > 5
    for bias in biases:
        np.testing.assert_array_equal(bias, bias.astype(np.float16).astype(np.float32))


# --- metadata by the format's own way ------------------------------------------------------------


def follow(content: bytes, at: int) -> flatbuffers.table.Table:
    (step,) = struct.unpack_from("<I", content, at)
    return flatbuffers.table.Table(bytearray(content), at + step)


def metadata_by_hand(content: bytes) -> dict[str, str]:
    """Walk the flatbuffer by the offsets of TFLite's schema, without any generated code.

    Model: buffers is field 4, metadata field 6. Metadata: name 0, buffer 1. Buffer: data 0.
    """
    model = follow(content, 0)

    def field(table: flatbuffers.table.Table, number: int) -> int:
        return table.Offset(4 + 2 * number)

    buffers, entries = field(model, 4), field(model, 6)
    found = {}
    for index in range(model.VectorLen(entries)):
        entry = follow(content, model.Vector(entries) + 4 * index)
        name = entry.String(entry.Pos + field(entry, 0)).decode()
        (place,) = struct.unpack_from("<I", content, entry.Pos + field(entry, 1))
        buffer = follow(content, model.Vector(buffers) + 4 * place)
        data = field(buffer, 0)
        start, length = buffer.Vector(data), buffer.VectorLen(data)
        found[name] = content[start : start + length].decode()
    return found


def test_metadata_is_read_by_hand(file):
    manifest = open_bundle(file.parent).manifest
    found = metadata_by_hand(file.read_bytes())
    assert found["name"] == manifest.name
    assert found["precision"] == manifest.precision == precision_of(file)
    assert found["checkpoint_sha256"] == manifest.checkpoint.sha256
    assert found["output.lf_mm"].endswith("(mm)")
    assert '"window_mm":40.0' in found["preprocessing"]
    ours = get_target("tflite").read_metadata(file)
    # Only the converter's own values are padded.
    assert {k: v.rstrip("\0") for k, v in found.items()} == ours
    assert not [key for key, value in ours.items() if "\0" in value]


# --- as an app uses it ---------------------------------------------------------------------------


def test_a_plain_interpreter_measures_what_the_trained_model_does(file, eyes, measured):
    runner = Interpreter(model_path=str(file)).get_signature_runner()
    budget = budget_of(get_task("eyelid"), parse_recipe(precision_of(file)))
    for sample, wanted in zip(eyes, measured, strict=True):
        found = runner(**{name: image[None] for name, image in sample.items()})
        assert found.keys() == wanted.keys()
        for name, value in found.items():
            assert (value.shape, value.dtype) == ((1,), np.float32)
            assert float(value[0]) == pytest.approx(wanted[name], abs=budget)


def test_an_app_without_signatures_measures_the_same(file, eyes, measured):
    """Java's and C's first interface: by number, in the order of the manifest."""
    manifest = open_bundle(file.parent).manifest
    interpreter = Interpreter(model_path=str(file), num_threads=1)
    interpreter.allocate_tensors()
    budget = budget_of(get_task("eyelid"), parse_recipe(precision_of(file)))
    for port, detail in zip(manifest.inputs, interpreter.get_input_details(), strict=True):
        interpreter.set_tensor(detail["index"], eyes[0][port.name][None])
    interpreter.invoke()
    for port, detail in zip(manifest.outputs, interpreter.get_output_details(), strict=True):
        value = interpreter.get_tensor(detail["index"])
        assert float(value[0]) == pytest.approx(measured[0][port.name], abs=budget)


def test_other_pictures_are_refused_by_the_file_itself(file, eyes):
    interpreter = Interpreter(model_path=str(file))
    interpreter.allocate_tensors()
    place = interpreter.get_input_details()[0]["index"]
    good = eyes[0]["primary"][None]
    for wrong in (good.astype(np.float32), good.transpose(0, 3, 1, 2), good[:, :28], good[0]):
        with pytest.raises(ValueError, match="Cannot set tensor"):
            interpreter.set_tensor(place, wrong)


def test_the_runtime_keeps_the_order_of_the_manifest(file, eyes):
    outputs = get_target("tflite").runtime(file).run(eyes[0]).outputs
    assert list(outputs) == [port.name for port in open_bundle(file.parent).manifest.outputs]


# --- damage --------------------------------------------------------------------------------------


def opened(path: Path) -> dict[str, Callable[[], object]]:
    """Every way in which the target reads a file."""
    target = get_target("tflite")
    return {
        "shipped": lambda: target.runtime(path),
        "taps": lambda: target.runtime(path, {"tokens": "somewhere"}),
        "metadata": lambda: target.read_metadata(path),
        "operations": lambda: target.count_operations(path),
        "gelu": lambda: target.gelu_forms(path),
        "epsilons": lambda: target.norm_epsilons(path),
    }


def refusal(call: Callable[[], object], path: Path) -> None:
    with pytest.raises(BundleError) as caught:
        call()
    text = str(caught.value)
    assert text.startswith(f"{path}: ")
    assert text.endswith("uild it again.")
    assert ".." not in text.removeprefix(str(path))
    assert "\n" not in text


@pytest.mark.parametrize(
    "how", ["missing", "empty", "text", "zeros", "start", "half", "other-identifier"]
)
def test_a_damaged_file_is_one_line(built, damaged, how):
    file = open_bundle(built("tflite", "fp16")).artifact
    content = file.read_bytes()
    path = damaged(file, how, {"other-identifier": content[:4] + b"TFL2" + content[8:]})
    for call in opened(path).values():
        refusal(call, path)


@pytest.mark.parametrize("missing", [1, 100, 5000])
def test_an_end_that_is_missing_is_noticed_when_it_is_run(file, tmp_path, missing):
    """Metadata lies before the graph, so it alone may still be whole."""
    path = tmp_path / "cut.tflite"
    path.write_bytes(file.read_bytes()[:-missing])
    refusal(lambda: get_target("tflite").runtime(path), path)


def test_a_tap_that_is_not_there_is_told(file):
    with pytest.raises(BundleError, match="tensor nowhere, named in the manifest as a tap"):
        get_target("tflite").runtime(file, {"tokens": "nowhere"})
