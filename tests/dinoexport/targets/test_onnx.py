"""The .onnx file as an app meets it: checked by onnx, run by a plain onnxruntime session."""

import errno
import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import ModelProto, TensorProto, numpy_helper, shape_inference

from dinoexport.bundle import open_bundle
from dinoexport.errors import BuildError, BundleError
from dinoexport.recipes import parse_recipe
from dinoexport.targets.onnx import OnnxTarget
from dinoexport.targets.onnx.lower import OPSET, save
from dinoexport.targets.onnx.quantize import to_half_precision_
from dinoexport.targets.table import get_target
from dinoexport.verify.parity import budget_of
from dinotrain.tasks import get_task

pytestmark = pytest.mark.e2e
PRECISIONS = ("fp32", "fp16")
FLOATS = {TensorProto.FLOAT: "fp32", TensorProto.FLOAT16: "fp16"}


@pytest.fixture(params=PRECISIONS)
def file(request, built: Callable[[str, str], Path]) -> Path:
    return open_bundle(built("onnx", request.param)).artifact


@pytest.fixture
def half(built: Callable[[str, str], Path]) -> ModelProto:
    """The half-precision file, with the type of every value inferred anew."""
    model = onnx.load(open_bundle(built("onnx", "fp16")).artifact)
    del model.graph.value_info[:]
    return shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)


def precision_of(path: Path) -> str:
    return "fp16" if "fp16" in path.name else "fp32"


def free_sides(model: ModelProto) -> set[str]:
    """Names of values with a side that is not a number, or with more than four."""
    values = (*model.graph.value_info, *model.graph.input, *model.graph.output)
    return {
        value.name
        for value in values
        if len(value.type.tensor_type.shape.dim) > 4
        or not all(
            side.WhichOneof("value") == "dim_value" for side in value.type.tensor_type.shape.dim
        )
    }


def element_types(model: ModelProto) -> dict[str, int]:
    values = (*model.graph.value_info, *model.graph.input, *model.graph.output)
    types = {value.name: value.type.tensor_type.elem_type for value in values}
    return types | {tensor.name: tensor.data_type for tensor in model.graph.initializer}


# --- the format ----------------------------------------------------------------------------------


def test_onnx_itself_accepts_the_file(file):
    onnx.checker.check_model(str(file), full_check=True)
    model = onnx.load(file)
    shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)


def test_the_opset_is_the_one_that_is_stated(file):
    model = onnx.load(file)
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", OPSET)]
    assert f"Opset {OPSET};" in (OnnxTarget.__doc__ or "")
    assert {node.domain for node in model.graph.node} == {""}, "no operators of a vendor"
    assert not model.functions
    # A runtime refuses a newer one than its own; 10 is that of onnx 1.16, of 2024.
    assert model.ir_version <= 10


def test_every_shape_is_static_and_at_most_four_dimensional(file):
    model = onnx.load(file)
    del model.graph.value_info[:]
    inferred = shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
    produced = {name for node in model.graph.node for name in node.output}
    typed = {v.name for v in (*inferred.graph.value_info, *inferred.graph.output)}
    assert produced == typed
    assert free_sides(inferred) == set()
    # The same stands in the file, where tools look that infer nothing.
    stored = onnx.load(file)
    assert {v.name for v in (*stored.graph.value_info, *stored.graph.output)} >= produced
    assert free_sides(stored) == set()


def test_a_free_side_is_seen(file):
    model = onnx.load(file)
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "batch"
    assert free_sides(model) == {"primary"}


def test_inputs_and_outputs_are_those_of_the_manifest(file):
    manifest = open_bundle(file.parent).manifest
    graph = onnx.load(file).graph
    for values, ports, kind in (
        (graph.input, manifest.inputs, TensorProto.UINT8),
        (graph.output, manifest.outputs, TensorProto.FLOAT),
    ):
        assert [v.name for v in values] == [p.name for p in ports]
        for value, port in zip(values, ports, strict=True):
            sides = value.type.tensor_type.shape.dim
            assert tuple(side.dim_value for side in sides) == port.shape
            assert value.type.tensor_type.elem_type == kind


def test_nothing_ships_that_is_not_read(file):
    graph = onnx.load(file).graph
    read = {name for node in graph.node for name in node.input} | {v.name for v in graph.output}
    assert {tensor.name for tensor in graph.initializer} <= read
    assert all(read.intersection(node.output) for node in graph.node)


def test_no_trace_of_the_machine_that_built_it(file):
    content = file.read_bytes()
    for word in (b"site-packages", b".py", b"/home", b"/root", b"/work", b"/tmp", b"torch.nn"):
        assert word not in content


# --- precision -----------------------------------------------------------------------------------


def test_the_full_precision_file_has_no_half(built):
    model = onnx.load(open_bundle(built("onnx", "fp32")).artifact)
    inferred = shape_inference.infer_shapes(model, strict_mode=True)
    found = {FLOATS.get(kind) for kind in element_types(inferred).values()}
    assert found - {None} == {"fp32"}


NETWORK = {"Gemm", "MatMul", "Conv", "LayerNormalization", "Gelu", "Softmax"}


def misplaced(model: ModelProto) -> list[str]:
    """What breaks the rule: half up to the one cast back, single behind it, where decoding is."""
    types = element_types(model)
    nodes = model.graph.node
    border = [
        node.output[0]
        for node in nodes
        if node.op_type == "Cast" and types[node.input[0]] == TensorProto.FLOAT16
    ]
    if len(border) != 1:
        return [f"{len(border)} casts back"]
    behind = set(border)
    for node in nodes:
        if behind.intersection(node.input):
            behind.update(node.output)
    problems = []
    for node in nodes:
        inside = node.output[0] in behind
        problems += [
            name
            for name in node.output
            if types[name] != (TensorProto.FLOAT if inside else TensorProto.FLOAT16)
        ]
        if node.op_type == "Sigmoid" and not inside:
            problems.append(f"{node.output[0]}: decoded in half precision")
        if node.op_type in NETWORK and inside:
            problems.append(f"{node.output[0]}: part of the network")
    return problems + [value.name for value in model.graph.output if value.name not in behind]


def test_half_precision_ends_where_decoding_starts(half):
    assert misplaced(half) == []


@pytest.mark.parametrize("border", [(), ("gelu_3",)], ids=["too-late", "too-early"])
def test_a_border_elsewhere_is_seen(built, border):
    model = onnx.load(open_bundle(built("onnx", "fp32")).artifact)
    to_half_precision_(model, border)
    onnx.checker.check_model(model, full_check=True)
    assert misplaced(model)


def test_taps_are_half_precision(built, half):
    types = element_types(half)
    taps = open_bundle(built("onnx", "fp16")).manifest.taps
    assert len(taps) == 6
    assert {types[value] for value in taps.values()} == {TensorProto.FLOAT16}


def test_initialisers_are_half_but_for_the_decoder(half):
    readers: dict[str, set[int]] = {}
    types = element_types(half)
    for node in half.graph.node:
        for name in node.input:
            readers.setdefault(name, set()).add(types[node.output[0]])
    floats = [t for t in half.graph.initializer if t.data_type in FLOATS]
    single = {t.name for t in floats if t.data_type == TensorProto.FLOAT}
    assert {"core.decoder.low", "core.decoder.span", "core.decoder.bit_weights"} <= single
    for tensor in floats:
        # A constant has the type of what reads it.
        assert readers[tensor.name] == {tensor.data_type}, tensor.name
        if tensor.data_type == TensorProto.FLOAT:
            assert np.prod(tensor.dims) <= 8, f"{tensor.name} is no part of the decoder"
    assert sum(t.data_type == TensorProto.FLOAT16 for t in floats) > 20


def test_half_precision_weights_are_the_single_ones_rounded(built):
    first, second = (
        {
            tensor.name: numpy_helper.to_array(tensor)
            for tensor in onnx.load(open_bundle(built("onnx", p)).artifact).graph.initializer
            if tensor.data_type in FLOATS
        }
        for p in PRECISIONS
    )
    assert first.keys() == second.keys()
    for name, value in second.items():
        np.testing.assert_array_equal(value, first[name].astype(value.dtype), err_msg=name)


# --- as an app uses it ---------------------------------------------------------------------------


def test_a_plain_session_measures_what_the_trained_model_does(file, eyes, measured):
    session = onnxruntime.InferenceSession(str(file))
    budget = budget_of(get_task("eyelid"), parse_recipe(precision_of(file)))
    assert [p.type for p in session.get_inputs()] == 3 * ["tensor(uint8)"]
    for sample, wanted in zip(eyes, measured, strict=True):
        # Photographs as decoded: (1, H, W, 3) uint8.
        values = session.run(None, {name: image[None] for name, image in sample.items()})
        assert [(v.shape, v.dtype) for v in values] == 3 * [((1,), np.float32)]
        found = dict(zip((o.name for o in session.get_outputs()), values, strict=True))
        assert list(found) == list(wanted)
        for name, value in found.items():
            assert float(value[0]) == pytest.approx(wanted[name], abs=budget)


def test_other_pictures_are_refused_by_the_file_itself(file, eyes):
    session = onnxruntime.InferenceSession(str(file))
    good = {name: image[None] for name, image in eyes[0].items()}
    for wrong in (
        good["up"].astype(np.float32),
        good["up"].transpose(0, 3, 1, 2),
        good["up"][:, :28],
        good["up"][0],
    ):
        with pytest.raises(Exception, match="INVALID_ARGUMENT"):
            session.run(None, good | {"up": wrong})


def test_a_session_reads_the_metadata(file):
    manifest = open_bundle(file.parent).manifest
    facts = onnxruntime.InferenceSession(str(file)).get_modelmeta()
    assert facts.producer_name == "dinoexport"
    found = facts.custom_metadata_map
    assert found["name"] == manifest.name
    assert found["notice"] == manifest.notice
    assert found["output.mrd1_mm"].endswith("(mm)")
    # Other keys would be the exporter's own.
    assert not [key for key in found if key.startswith("pkg.torch")]


# --- damage --------------------------------------------------------------------------------------


def opened(path: Path) -> dict[str, Callable[[], object]]:
    """Every way in which the target reads a file."""
    target = get_target("onnx")
    return {
        "shipped": lambda: target.runtime(path),
        "taps": lambda: target.runtime(path, {"tokens": "cat_1"}),
        "exact": lambda: target.runtime(path, exact=True),
        "metadata": lambda: target.read_metadata(path),
        "operations": lambda: target.count_operations(path),
        "gelu": lambda: target.gelu_forms(path),
        "epsilons": lambda: target.norm_epsilons(path),
    }


@pytest.mark.parametrize(
    "how", ["missing", "empty", "text", "zeros", "start", "half", "almost", "no-graph"]
)
def test_a_damaged_file_is_one_line(built, damaged, how):
    own = {"no-graph": ModelProto(ir_version=10).SerializeToString()}
    path = damaged(open_bundle(built("onnx", "fp16")).artifact, how, own)
    for call in opened(path).values():
        with pytest.raises(BundleError) as caught:
            call()
        text = str(caught.value)
        assert text.startswith(f"{path}: ")
        assert text.endswith("Build it again.")
        assert "\n" not in text


def test_an_undamaged_file_is_read_in_every_way(file):
    for call in opened(file).values():
        call()


def test_a_tap_that_is_not_there_is_told(file):
    with pytest.raises(BundleError, match="value nowhere, named in the manifest as a tap") as error:
        get_target("onnx").runtime(file, {"tokens": "nowhere"})
    assert "\n" not in str(error.value)


def test_a_full_temporary_folder_is_told(file, tmp_path, monkeypatch):
    """Within a build it would read as if the folder of the bundle were full."""

    def full(_path: Path, _data: bytes) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(BuildError) as error:
        get_target("onnx").runtime(file, exact=True)
    assert re.fullmatch(
        rf"onnx: {re.escape(str(tmp_path))}: a temporary model of \d+ MiB cannot be written: "
        r"No space left on device\. Free some space or set TMPDIR to another folder\.",
        str(error.value),
    )
    assert not list(tmp_path.iterdir())


def test_a_model_that_onnx_refuses_is_not_written(file, tmp_path):
    model = onnx.load(file)
    model.graph.node[5].input[0] = "nobody"
    with pytest.raises(BuildError, match="the checker refuses the model"):
        save(model, tmp_path / "model.onnx", {})
    assert not list(tmp_path.iterdir())
