"""Quantised layers in ONNX: their numbers against NumPy, their structure against PyTorch."""

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import ModelProto, TensorProto, numpy_helper

from dinoexport.errors import BuildError
from dinoexport.graph.capture import CapturedProgram, capture_deploy
from dinoexport.passes.sequence import build_deploy_model
from dinoexport.quantize.calibration import CalibrationSet
from dinoexport.quantize.collect import calibrate
from dinoexport.quantize.layers import Layer
from dinoexport.quantize.prepare import prepare_
from dinoexport.quantize.weights import StoredWeight, store_weight
from dinoexport.recipes import PRECISIONS, Activations, parse_recipe
from dinoexport.targets.onnx.constants import LEAST_SIZE, store_constants_in_half_
from dinoexport.targets.onnx.draft import Draft
from dinoexport.targets.onnx.exact import to_exact_precision_
from dinoexport.targets.onnx.integer import WIDE_OPSET, grid_of, quantize_layers_
from dinoexport.targets.onnx.lower import OPSET, lower
from dinoexport.targets.onnx.weights import Place, unpack_weight
from dinoexport.verify.metrics import sqnr_db
from dinoexport.verify.parity import STRUCTURE_DB
from dinotrain.checkpoint import load_checkpoint

pytestmark = pytest.mark.e2e
FORMS = ("w8", "w8a8", "w8a8-dynamic", "w8a16")
FLOAT_LAYERS = ("blocks.1.mlp.fc1", "blocks.1.mlp.fc2")
Pictures = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Lowered:
    """The tiny model with int8 weights but for one MLP, lowered once; int8 forms share it."""

    program: CapturedProgram
    model: ModelProto
    pictures: Pictures
    taps: dict[str, np.ndarray]

    def layers(self, form: str) -> dict[str, Layer]:
        """Layers of which those with quantised activations have another form."""
        return {
            name: dataclasses.replace(layer, precision=PRECISIONS[form])
            if layer.precision.activations is not Activations.FLOAT
            else layer
            for name, layer in self.program.layers.items()
        }

    def build(self, form: str) -> ModelProto:
        """Return what ships."""
        model = ModelProto()
        model.CopyFrom(self.model)
        quantize_layers_(model, self.layers(form))
        store_constants_in_half_(model)
        return model


@pytest.fixture(scope="module")
def lowered(tiny_checkpoint: Path, eyes: list[Pictures]) -> Lowered:
    model, _ = load_checkpoint(tiny_checkpoint)
    deploy, recipe = build_deploy_model(model), parse_recipe("w8a8:blocks.1.mlp=fp16")
    # Another picture than the one that is run: some of its values are clipped.
    pictures = CalibrationSet((eyes[1],), "test", 0, "")
    layers = prepare_(deploy, recipe, calibrate(deploy, pictures))
    with torch.no_grad():
        _, taps = deploy.run(pixels_of(eyes[0]))
    program = capture_deploy(deploy, recipe, layers)
    found = {name: tap.numpy() for name, tap in taps.items()}
    return Lowered(program, lower(program), eyes[0], found)


def pixels_of(sample: Pictures) -> tuple[torch.Tensor, ...]:
    return tuple(torch.from_numpy(i).permute(2, 0, 1)[None].float() for i in sample.values())


def run(model: ModelProto, values: Sequence[str], pictures: Pictures) -> dict[str, np.ndarray]:
    """Values of a graph by name."""
    copy = ModelProto()
    copy.CopyFrom(model)
    typed = {value.name: value for value in copy.graph.value_info}
    copy.graph.output.extend(typed[name] for name in dict.fromkeys(values))
    session = onnxruntime.InferenceSession(copy.SerializeToString())
    feeds = {name: image[None] for name, image in pictures.items()}
    return dict(zip(values, session.run(list(values), feeds), strict=True))


def structure_db(lowered: Lowered, model: ModelProto) -> float:
    """SQNR of the worst tap in exact arithmetic, as the structural gate has it."""
    exact = ModelProto()
    exact.CopyFrom(model)
    to_exact_precision_(exact)
    nodes = lowered.program.tap_nodes
    found = run(exact, list(nodes.values()), lowered.pictures)
    return min(sqnr_db(tap, found[nodes[name]]) for name, tap in lowered.taps.items())


def tensor_of(model: ModelProto, name: str) -> TensorProto:
    return next(t for t in model.graph.initializer if t.name == name)


def set_tensor_(model: ModelProto, name: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
    tensor = tensor_of(model, name)
    array = numpy_helper.to_array(tensor)
    tensor.CopyFrom(numpy_helper.from_array(change(array.copy()).astype(array.dtype), name))


def constants(model: ModelProto) -> dict[str, np.ndarray]:
    """Initializers in float32 where they are stored in half."""
    found = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    return {
        n.removesuffix("_half"): a.astype(np.float32) if a.dtype == np.float16 else a
        for n, a in found.items()
    }


# --- structure -----------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_in_exact_arithmetic_it_is_the_rounded_model(lowered, form):
    assert structure_db(lowered, lowered.build(form)) >= STRUCTURE_DB


def test_the_shipped_form_does_round_activations(lowered):
    """Else the gate would pass for a graph in which nothing is quantised."""
    nodes = lowered.program.tap_nodes
    worst = {}
    for form in FORMS:
        found = run(lowered.build(form), list(nodes.values()), lowered.pictures)
        worst[form] = min(sqnr_db(tap, found[nodes[n]]) for n, tap in lowered.taps.items())
    assert worst["w8"] >= STRUCTURE_DB
    assert worst["w8a16"] < STRUCTURE_DB
    assert worst["w8a8"] < 60
    assert worst["w8a8-dynamic"] < 60


def weight_of(lowered: Lowered, layer: str) -> str:
    """Name of the weight that a layer's product reads."""
    node = lowered.program.layers[layer].node
    makers = {n.output[0]: n for n in lowered.model.graph.node}
    return makers[makers[node].input[0]].input[1]


def plant_scale(lowered: Lowered, model: ModelProto) -> None:
    def change(scale: np.ndarray) -> np.ndarray:
        scale.reshape(-1)[3] *= 1.05
        return scale

    set_tensor_(model, f"{weight_of(lowered, 'blocks.0.attn.proj')}_scale", change)


def plant_swapped_codes(lowered: Lowered, model: ModelProto) -> None:
    def change(codes: np.ndarray) -> np.ndarray:
        codes[:, [5, 6]] = codes[:, [6, 5]]
        return codes

    set_tensor_(model, f"{weight_of(lowered, 'blocks.0.mlp.fc1')}_codes", change)


def plant_zero_point(lowered: Lowered, model: ModelProto) -> None:
    """What takes the zero point off takes one more."""
    reader = next(n for n in model.graph.node if n.op_type in ("MatMulInteger", "DequantizeLinear"))
    if reader.op_type == "DequantizeLinear":
        reader = next(
            n
            for n in model.graph.node
            if n.op_type == "DequantizeLinear" and n.input[0].endswith("_quantized")
        )
        zero = numpy_helper.to_array(tensor_of(model, reader.input[2]))
        wrong = numpy_helper.from_array(zero + zero.dtype.type(1), "wrong_zero")
        model.graph.initializer.append(wrong)
    else:
        one = numpy_helper.from_array(np.array(1, np.uint8), "one")
        model.graph.initializer.append(one)
        place = list(model.graph.node).index(reader)
        add = onnx.helper.make_node("Add", [reader.input[2], "one"], ["wrong_zero"], "wrong")
        nodes = [*model.graph.node]
        nodes.insert(place, add)
        reader = nodes[place + 1]
        copies = [onnx.NodeProto.FromString(n.SerializeToString()) for n in nodes]
        del model.graph.node[:]
        model.graph.node.extend(copies)
        reader = model.graph.node[place + 1]
    reader.input[2] = "wrong_zero"


FAULTS = {
    "scale": plant_scale,
    "codes": plant_swapped_codes,
    "zero-point": plant_zero_point,
}


@pytest.mark.parametrize(
    ("form", "fault"),
    [(form, fault) for form in FORMS for fault in FAULTS if (form, fault) != ("w8", "zero-point")],
)
def test_a_planted_fault_is_seen(lowered, form, fault):
    model = lowered.build(form)
    FAULTS[fault](lowered, model)
    # As far below the gate as the faults that it was set by; a step of 16 bits is a small one.
    limit = STRUCTURE_DB if (form, fault) == ("w8a16", "zero-point") else 96
    assert structure_db(lowered, model) < limit


# --- numbers -------------------------------------------------------------------------------------


def dynamic_grid(x: np.ndarray) -> tuple[np.ndarray, int, int]:
    """Scale, zero point and largest code of asymmetric uint8 over what is there and zero."""
    low, high = min(x.min(), 0.0), max(x.max(), 0.0)
    scale = np.float32((high - low) / 255)
    return scale, int(np.round(-low / scale)), 255


def static_grid(span: tuple[float, float]) -> tuple[np.ndarray, int, int]:
    scale = np.float32((span[1] - span[0]) / 255)
    return scale, int(np.round(-span[0] / scale)), 255


def wide_grid(span: tuple[float, float]) -> tuple[np.ndarray, int, int]:
    """Symmetric, with codes from 0 on as the others have them."""
    return np.float32(max(-span[0], span[1]) / 32767), 32768, 65535


def expected(form: str, layer: Layer, x: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """What a layer of a form gives, by the definition of its form."""
    stored = layer.stored
    assert stored is not None
    assert layer.input_range is not None
    x = x.astype(np.float64)
    if form != "w8":
        scale, zero, top = {
            "w8a8-dynamic": lambda: dynamic_grid(x),
            "w8a8": lambda: static_grid(layer.input_range),
            "w8a16": lambda: wide_grid(layer.input_range),
        }[form]()
        q = np.clip(np.round(x / scale) + zero, 0, top)
        x = (q - zero) * scale
    return x @ (stored.codes * stored.scale).T.astype(np.float64) + bias


@pytest.mark.parametrize("form", FORMS)
def test_each_layer_gives_what_its_form_means(lowered, form):
    model = lowered.build(form)
    makers = {n.output[0]: n for n in lowered.model.graph.node}
    values = constants(model)
    checked = 0
    for name, layer in lowered.program.layers.items():
        if layer.precision.activations is Activations.FLOAT:
            continue
        add = makers[layer.node]
        source = makers[add.input[0]].input[0]
        found = run(model, [source, layer.node], lowered.pictures)
        wanted = expected(form, layer, found[source], values[add.input[1]])
        # Float32 sums; now and then a number half-way between two codes goes to the other one.
        tolerance = 2e-4 if form.startswith("w8a8") else 1e-5
        error = np.linalg.norm(found[layer.node] - wanted) / np.linalg.norm(wanted)
        assert error < tolerance, (name, error)
        # Another form of the same layer would not do.
        for other in set(FORMS) - {form, "w8a16", "w8"}:
            odd = expected(other, layer, found[source], values[add.input[1]])
            assert np.linalg.norm(odd - wanted) / np.linalg.norm(wanted) > 5 * tolerance
        checked += 1
    assert checked == 10


@pytest.mark.parametrize(
    ("span", "activations", "scale", "zero"),
    [
        ((-1.0, 3.0), Activations.INT8, 4 / 255, np.uint8(64)),
        ((0.5, 3.0), Activations.INT8, 3 / 255, np.uint8(0)),
        ((-2.0, -1.0), Activations.INT8, 2 / 255, np.uint8(255)),
        ((-1.0, 3.0), Activations.INT16, 3 / 32767, np.int16(0)),
    ],
)
def test_a_grid_holds_its_range_and_zero(span, activations, scale, zero):
    found = grid_of(span, activations)
    assert found[0] == np.float32(scale)
    assert (found[1], found[1].dtype) == (zero, zero.dtype)


@pytest.mark.parametrize("form", ["w8a8", "w8a16"])
def test_a_value_is_rounded_once_for_all_layers_that_read_it(lowered, form):
    kinds = Counter(node.op_type for node in lowered.build(form).graph.node)
    # Ten layers, of which q, k and v of each block read one value.
    assert kinds["QuantizeLinear"] == 6
    layers = lowered.layers(form)
    low, high = layers["blocks.0.attn.k"].input_range
    layers["blocks.0.attn.k"] = dataclasses.replace(
        layers["blocks.0.attn.k"], input_range=(low / 2, high / 2)
    )
    model = ModelProto()
    model.CopyFrom(lowered.model)
    quantize_layers_(model, layers)
    onnx.checker.check_model(model, full_check=True)
    assert Counter(node.op_type for node in model.graph.node)["QuantizeLinear"] == 7


# --- weights alone -------------------------------------------------------------------------------

PLACES = {
    "matmul": ((96, 40), True),
    "gemm": ((40, 96), False),
    "conv": ((40, 8, 4, 3), False),
    "pointwise": ((40, 96, 1, 1), False),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("precision", ["w8", "w4-block32", "pal8", "pal4"])
def test_stored_weights_are_unpacked_to_their_values(precision, place):
    shape, transposed = PLACES[place]
    weight_shape = shape[::-1] if transposed else shape
    weight = np.random.default_rng(4).normal(size=weight_shape).astype(np.float32)
    stored = store_weight(weight, PRECISIONS[precision])
    draft = Draft()
    unpack_weight(draft, Place("weight", shape, transposed), stored)
    wanted = stored.values().T if transposed else stored.values()
    np.testing.assert_array_equal(evaluate(draft, "weight", shape), wanted)
    # Codes are most of the bytes.
    codes = next(c for c in draft.constants if c.name == "weight_codes")
    assert len(codes.raw_data) * 8 == weight.size * stored.precision.bits


def test_palettes_of_odd_rows_are_not_packed():
    weight = np.random.default_rng(4).normal(size=(20, 7)).astype(np.float32)
    stored = store_weight(weight, PRECISIONS["pal4"])
    draft = Draft()
    unpack_weight(draft, Place("weight", (7, 20), True), stored)
    np.testing.assert_array_equal(evaluate(draft, "weight", (7, 20)), stored.values().T)


def evaluate(draft: Draft, name: str, shape: Sequence[int]) -> np.ndarray:
    """Run a draft by itself."""
    value = onnx.helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
    graph = onnx.helper.make_graph(draft.nodes, "draft", [], [value], draft.constants)
    opset = onnx.helper.make_opsetid("", OPSET)
    model = onnx.helper.make_model(graph, opset_imports=[opset], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    return np.asarray(onnxruntime.InferenceSession(model.SerializeToString()).run(None, {})[0])


# --- what ships ----------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_only_standard_operators_of_the_stated_opset(lowered, form):
    model = lowered.build(form)
    onnx.checker.check_model(model, full_check=True)
    opset = WIDE_OPSET if form == "w8a16" else OPSET
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", opset)]
    assert {node.domain for node in model.graph.node} == {""}
    assert model.ir_version <= 10


@pytest.mark.parametrize(
    ("form", "fused"),
    [
        ("w8a8", {"MatMulIntegerToFloat": 10}),
        # One operator rounds and multiplies, but where q, k and v read what is rounded once.
        ("w8a8-dynamic", {"DynamicQuantizeMatMul": 4, "MatMulIntegerToFloat": 6}),
    ],
    ids=["w8a8", "w8a8-dynamic"],
)
def test_onnxruntime_multiplies_integers(lowered, tmp_path, form, fused):
    """The forms were chosen for this; unfused they take 1.4 times as long as float32."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(lowered.build(form).SerializeToString(), options)
    kinds = Counter(n.op_type for n in onnx.load(options.optimized_model_filepath).graph.node)
    assert {kind: kinds[kind] for kind in fused} == fused
    assert not {"MatMulInteger", "DequantizeLinear"} & kinds.keys()


@pytest.mark.parametrize("form", ["w8", "w8a16"])
def test_float_products_stay_float(lowered, tmp_path, form):
    """DequantizeLinear of weights alone would become products of rounded activations."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(lowered.build(form).SerializeToString(), options)
    kinds = Counter(n.op_type for n in onnx.load(options.optimized_model_filepath).graph.node)
    assert "MatMulNBits" not in kinds
    # One of 8 in blocks, the patch embedding's convolution aside, and those of the head.
    assert kinds["Gemm"] >= 8


@pytest.mark.parametrize("form", FORMS)
def test_layers_that_a_recipe_leaves_float_are(lowered, form):
    model = lowered.build(form)
    makers = {name: node for node in model.graph.node for name in node.output}
    for name in FLOAT_LAYERS:
        weight = weight_of(lowered, name)
        product = makers[makers[lowered.program.layers[name].node].input[0]]
        assert product.op_type == "MatMul"
        assert product.input[1] == weight
        assert makers[product.input[0]].op_type in ("LayerNormalization", "Gelu")
        assert tensor_of(model, f"{weight}_half").data_type == TensorProto.FLOAT16


@pytest.mark.parametrize("form", FORMS)
def test_weights_are_stored_in_one_byte(lowered, form):
    model = lowered.build(form)
    kinds = Counter()
    for tensor in model.graph.initializer:
        kinds[tensor.data_type] += int(np.prod(tensor.dims))
    quantised = [y.stored for y in lowered.program.layers.values() if y.stored is not None]
    assert kinds[TensorProto.INT8] == sum(stored.codes.size for stored in quantised)
    # What is left in float32 is small: scales, biases, the decoder.
    large = [t for t in model.graph.initializer if t.data_type == TensorProto.FLOAT]
    assert all(np.prod(t.dims) < LEAST_SIZE for t in large)
    read = {name for node in model.graph.node for name in node.input}
    assert {t.name for t in model.graph.initializer} <= read


def test_constants_that_half_precision_cannot_hold_stay(lowered):
    model = ModelProto()
    model.CopyFrom(lowered.model)
    name = next(t.name for t in model.graph.initializer if np.prod(t.dims) > LEAST_SIZE)
    set_tensor_(model, name, lambda a: a + np.float32(1e-6))
    before = numpy_helper.to_array(tensor_of(model, name)).copy()
    store_constants_in_half_(model)
    np.testing.assert_array_equal(numpy_helper.to_array(tensor_of(model, name)), before)
    halves = [t for t in model.graph.initializer if t.name.endswith("_half")]
    assert halves
    for tensor in halves:
        wanted = numpy_helper.to_array(tensor_of(lowered.model, tensor.name.removesuffix("_half")))
        np.testing.assert_array_equal(numpy_helper.to_array(tensor).astype(np.float32), wanted)


# --- refusals ------------------------------------------------------------------------------------


def change_layer(lowered: Lowered, **changes) -> dict[str, Layer]:
    name = "blocks.0.attn.proj"
    return {name: dataclasses.replace(lowered.program.layers[name], **changes)}


def shifted(stored: StoredWeight) -> StoredWeight:
    return dataclasses.replace(stored, codes=np.roll(stored.codes, 1, axis=0))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"node": "nowhere"}, "layer blocks.0.attn.proj .node nowhere. is not in the exported"),
        ({"node": "add_1"}, "is not in the exported"),
        ({"input_range": None}, "blocks.0.attn.proj has no range of its input"),
        ({"stored": shifted}, "the exporter changed the weights of blocks.0.attn.proj"),
    ],
    ids=["no-node", "other-node", "no-range", "other-weights"],
)
def test_a_layer_that_does_not_fit_is_refused(lowered, changes, message):
    stored = lowered.program.layers["blocks.0.attn.proj"].stored
    values = {k: v(stored) if callable(v) else v for k, v in changes.items()}
    model = ModelProto()
    model.CopyFrom(lowered.model)
    with pytest.raises(BuildError, match=message) as error:
        quantize_layers_(model, change_layer(lowered, **values))
    assert "\n" not in str(error.value)
