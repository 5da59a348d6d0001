"""Integer weights and layers in a TFLite file: the numbers of the recipe, seen from outside.

One conversion serves all recipes of 8-bit weights, since all of them ship the same codes.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flatbuffers
import numpy as np
import pytest
import torch
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.interpreter import Interpreter, OpResolverType

from dinoexport.graph.capture import CapturedProgram, capture_deploy
from dinoexport.passes.sequence import build_deploy_model
from dinoexport.quantize.collect import calibrate
from dinoexport.quantize.layers import Layer
from dinoexport.quantize.pictures import read_calibration_set
from dinoexport.quantize.prepare import prepare_
from dinoexport.recipes import PRECISIONS, Precision, Recipe, parse_recipe
from dinoexport.targets.table import get_target
from dinoexport.targets.tflite.graph import Graph
from dinoexport.targets.tflite.lower import lower
from dinoexport.targets.tflite.quantize import store_layers_
from dinoexport.targets.tflite.taps import debug_file
from dinoexport.verify.metrics import max_error, sqnr_db
from dinoexport.verify.parity import STRUCTURE_DB, budget_of, run_samples
from dinoexport.verify.reference import Reference, make_reference, with_deployed
from dinotrain.checkpoint import load_checkpoint
from dinotrain.model import TaskModel
from dinotrain.tasks import get_task

pytestmark = pytest.mark.e2e
RECIPES = ("w8", "w8a8-dynamic", "w8a8", "w8a16")
MIXTURE = "w8a8:blocks.0.attn=w8a8-dynamic,blocks.0.mlp=w4-block32,blocks.1.mlp=fp16,head=fp32"
OPERATORS = {v: k for k, v in vars(schema.BuiltinOperator).items() if isinstance(v, int)}
TYPES = {v: k for k, v in vars(schema.TensorType).items() if isinstance(v, int)}
FC2 = 6
"""Place of the first block's second MLP layer, whose input has a mean: behind a LayerNorm a wrong
zero of weights adds nothing."""
NUMBERS = {"INT8": np.int8, "INT32": np.int32, "INT64": np.int64}
TORCH_ORDER = {"FULLY_CONNECTED": (0, 1), "CONV_2D": (0, 3, 1, 2)}


@dataclass(frozen=True)
class Prepared:
    """A converted program in float32, which recipes of the same weights are written from."""

    program: CapturedProgram
    content: bytes
    taps: dict[str, str]
    reference: Reference

    def of(self, recipe: str) -> CapturedProgram:
        """The same program under a recipe of 8-bit weights."""
        parsed = parse_recipe(recipe)
        layers = {n: _retyped(layer, parsed.base) for n, layer in self.program.layers.items()}
        return dataclasses.replace(self.program, recipe=parsed, layers=layers)


def _retyped(layer: Layer, precision: Precision) -> Layer:
    keep = layer.precision.name == "w8"
    return dataclasses.replace(layer, precision=layer.precision if keep else precision)


def prepare(model: TaskModel, recipe: Recipe, locate: bool) -> Prepared:
    reference = make_reference(model, "0" * 64, torch.device("cpu"))
    deploy = build_deploy_model(model)
    pictures = read_calibration_set(model.task, model.config.image_size, count=8)
    calibration = calibrate(deploy, pictures) if recipe.calibrated else None
    layers = prepare_(deploy, recipe, calibration)
    reference = with_deployed(reference, recipe.name, deploy, torch.device("cpu"))
    program = capture_deploy(deploy, recipe, layers)
    graph = lower(program)
    with debug_file(program if locate else dataclasses.replace(program, tap_nodes={})) as debug:
        taps = debug.locate(graph)
    graph.add_metadata({"name": "n", "t": "u"})
    return Prepared(program, graph.encode(), taps, reference)


def store(prepared: Prepared, program: CapturedProgram, path: Path) -> None:
    """Write the prepared file with the numbers of a recipe."""
    graph = Graph(prepared.content)
    store_layers_(graph, program)
    graph.save(path)


@pytest.fixture(scope="module")
def prepared(tiny_checkpoint: Path) -> Prepared:
    model, _ = load_checkpoint(tiny_checkpoint)
    return prepare(model, parse_recipe("w8a8"), locate=True)


@pytest.fixture(scope="module")
def file(prepared: Prepared, tmp_path_factory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("integer")

    def path(recipe: str) -> Path:
        place = folder / f"{recipe}.tflite"
        if not place.exists():
            store(prepared, prepared.of(recipe), place)
        return place

    return path


class Model:
    """A file by LiteRT's schema, to look at and to break."""

    def __init__(self, path: Path) -> None:
        content = path.read_bytes()
        self.model: Any = schema.ModelT.InitFromObj(schema.Model.GetRootAs(content, 0))
        (self.graph,) = self.model.subgraphs
        self.tensors = self.graph.tensors
        self.maker = {int(i): o for o in self.graph.operators for i in o.outputs}

    def kind(self, operator: Any) -> str:
        return OPERATORS[self.model.operatorCodes[operator.opcodeIndex].builtinCode]

    def type(self, index: int) -> str:
        return TYPES[self.tensors[index].type]

    def buffer(self, index: int) -> Any:
        return self.model.buffers[self.tensors[index].buffer]

    def values(self, index: int) -> np.ndarray:
        data = np.asarray(self.buffer(index).data, np.uint8)
        return data.view(NUMBERS[self.type(index)]).reshape(self.tensors[index].shape)

    def layers(self) -> list[tuple[Any, int]]:
        """Each linear layer and convolution, and the constant that holds its weights."""
        found = []
        for operator in self.graph.operators:
            if self.kind(operator) in TORCH_ORDER:
                weight = int(operator.inputs[1])
                if weight in self.maker:
                    assert self.kind(self.maker[weight]) == "DEQUANTIZE"
                    weight = int(self.maker[weight].inputs[0])
                found.append((operator, weight))
        return found

    def save(self, path: Path) -> Path:
        builder = flatbuffers.Builder(1024)
        builder.Finish(self.model.Pack(builder), file_identifier=b"TFL3")
        path.write_bytes(bytes(builder.Output()))
        return path


def structure(path: Path, prepared: Prepared, taps: dict[str, str], recipe: str) -> float:
    """The worst tap of the exact form, as the gate reads it."""
    runtime = get_target("tflite").runtime(path, taps, exact=True)
    found = run_samples(runtime, prepared.reference, indices=prepared.reference.few)
    wanted = prepared.reference.deployed[recipe]
    assert found.taps.keys() == wanted.taps.keys()
    return min(sqnr_db(wanted.taps[tap], found.taps[tap]) for tap in wanted.taps)


# --- the gate ------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_tap_has_the_numbers_of_the_recipe(file, prepared, recipe):
    assert structure(file(recipe), prepared, prepared.taps, "w8a8") >= STRUCTURE_DB


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_shipped_file_measures_within_the_budget(file, prepared, recipe):
    task = get_task("eyelid")
    found = run_samples(get_target("tflite").runtime(file(recipe)), prepared.reference)
    for name, wanted in prepared.reference.exact.outputs.items():
        error = max_error(wanted, found.outputs[name], task.error)
        assert 0 < error <= budget_of(task, parse_recipe(recipe))


def scale_up(model: Model, weight: int) -> None:
    model.tensors[weight].quantization.scale = model.tensors[weight].quantization.scale * 1.05


def swap_rows(model: Model, weight: int) -> None:
    codes = model.values(weight).copy()
    codes[[0, 1]] = codes[[1, 0]]
    model.buffer(weight).data = codes.reshape(-1).view(np.uint8)


def shift_zero(model: Model, weight: int) -> None:
    record = model.tensors[weight].quantization
    record.zeroPoint = record.zeroPoint + 1


FAULTS = {"scale": scale_up, "codes": swap_rows, "zero-point": shift_zero}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("recipe", ["w8", "w8a8-dynamic", "w8a8"])
def test_a_planted_fault_is_caught(file, prepared, tmp_path, recipe, fault):
    model = Model(file(recipe))
    FAULTS[fault](model, model.layers()[FC2][1])
    path = model.save(tmp_path / "fault.tflite")
    assert structure(path, prepared, prepared.taps, "w8a8") < STRUCTURE_DB


def test_a_bias_of_other_integers_is_caught(file, prepared, tmp_path):
    """The float numbers beside them do not hide it."""
    model = Model(file("w8a8"))
    bias = int(model.layers()[FC2][0].inputs[2])
    assert model.type(bias) == "INT32"
    changed = np.round(model.values(bias) * 1.05).astype(np.int32)
    model.buffer(bias).data = changed.view(np.uint8)
    path = model.save(tmp_path / "fault.tflite")
    assert structure(path, prepared, prepared.taps, "w8a8") < STRUCTURE_DB


def test_a_wrong_range_of_activations_is_caught_by_the_budget(file, prepared, tmp_path):
    """The exact form has no activations of integers, so this is for the run of the file itself."""
    model = Model(file("w8a8"))
    for operator, weight in model.layers():
        if int(operator.inputs[1]) == weight:
            record = model.tensors[int(operator.outputs[0])].quantization
            record.scale = record.scale / 32
    path = model.save(tmp_path / "fault.tflite")
    task = get_task("eyelid")
    found = run_samples(get_target("tflite").runtime(path), prepared.reference)
    errors = [
        max_error(wanted, found.outputs[name], task.error)
        for name, wanted in prepared.reference.exact.outputs.items()
    ]
    assert max(errors) > budget_of(task, parse_recipe("w8a8"))


# --- what is in the file -------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", RECIPES)
def test_codes_and_scales_are_those_of_the_layers(file, prepared, recipe):
    model = Model(file(recipe))
    left = set(prepared.program.layers)
    for operator, weight in model.layers():
        assert model.type(weight) == "INT8"
        layer = owner(model, operator, weight, prepared)
        record = model.tensors[weight].quantization
        assert record.quantizedDimension == TORCH_ORDER[model.kind(operator)][0]
        assert not np.any(record.zeroPoint)
        np.testing.assert_array_equal(layer.stored.scale[:, 0], record.scale)  # type: ignore[union-attr]
        left.remove(layer.name)
    assert not left


def owner(model: Model, operator: Any, weight: int, prepared: Prepared) -> Layer:
    """The layer whose codes an operator has."""
    codes = model.values(weight).transpose(TORCH_ORDER[model.kind(operator)])
    flat = codes.reshape(len(codes), -1)
    (found,) = (
        layer
        for layer in prepared.program.layers.values()
        if layer.stored is not None and np.array_equal(layer.stored.codes, flat)
    )
    return found


@pytest.mark.parametrize(
    ("recipe", "input_type", "quantize", "integer"),
    [
        ("w8", "FLOAT32", 0, 0),
        ("w8a8-dynamic", "FLOAT32", 0, 12),
        # Queries, keys and values share what they read.
        ("w8a8", "INT8", 8, 12),
        ("w8a16", "INT16", 8, 12),
    ],
)
def test_only_linear_layers_of_blocks_are_integer(file, recipe, input_type, quantize, integer):
    model = Model(file(recipe))
    kinds = [model.kind(operator) for operator in model.graph.operators]
    assert kinds.count("QUANTIZE") == quantize
    assert kinds.count("DEQUANTIZE") == 17 - integer + (integer if quantize else 0)
    layers = model.layers()
    unpacked = [o for o, weight in layers if int(o.inputs[1]) != weight]
    assert len(unpacked) == 17 - integer
    inputs = {model.type(int(o.inputs[0])) for o, w in layers if int(o.inputs[1]) == w}
    assert inputs == ({input_type} if recipe != "w8" else set())
    read = {int(i) for o in model.graph.operators for i in o.inputs}
    read |= {int(i) for i in model.graph.outputs}
    unread = set(range(len(model.tensors))) - read
    assert all(model.kind(model.maker[index]) == "SPLIT" for index in unread)
    names = [tensor.name for tensor in model.tensors]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("recipe", RECIPES)
def test_everything_is_still_read_from_the_file(file, prepared, recipe):
    target = get_target("tflite")
    path = file(recipe)
    assert target.read_metadata(path)["t"] == "u"
    assert target.gelu_forms(path) == {"exact"}
    assert target.norm_epsilons(path) == pytest.approx(
        [norm.epsilon for norm in prepared.reference.norms(parse_recipe("w8"))], rel=1e-3
    )
    assert target.count_operations(path)["FULLY_CONNECTED"] == 16
    # Codes take a quarter; what is left of a tiny model is mostly names.
    assert path.stat().st_size < 0.5 * len(prepared.content)


def test_the_makers_own_quantizer_finds_the_same_codes(prepared, file, tmp_path):
    """Its symmetric scales, of the numbers that the codes stand for, are ours again."""
    from ai_edge_quantizer import qtyping, quantizer

    source = tmp_path / "float.tflite"
    source.write_bytes(prepared.content)
    tool = quantizer.Quantizer(str(source))
    tool.add_dynamic_config(
        regex=".*", operation_name=qtyping.TFLOperationName.FULLY_CONNECTED, num_bits=8
    )
    theirs = tmp_path / "theirs.tflite"
    theirs.write_bytes(bytes(tool.quantize().quantized_model or b""))
    details = Interpreter(model_path=str(theirs)).get_tensor_details()
    scales = [d["quantization_parameters"]["scales"] for d in details if d["dtype"] is np.int8]
    model = Model(file("w8a8-dynamic"))
    ours = [
        model.tensors[weight].quantization.scale
        for operator, weight in model.layers()
        if model.kind(operator) == "FULLY_CONNECTED"
    ]
    assert len(ours) == len(scales) == 16
    for scale in ours:
        # Their division is rounded once more than ours.
        near = [s for s in scales if len(s) == len(scale) and np.allclose(s, scale, rtol=1e-6)]
        assert near


# --- the arithmetic ------------------------------------------------------------------------------


def run_keeping_all(path: Path, prepared: Prepared) -> Interpreter:
    interpreter = Interpreter(
        model_path=str(path),
        experimental_preserve_all_tensors=True,
        experimental_op_resolver_type=OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES,
    )
    interpreter.allocate_tensors()
    interpreter.get_signature_runner()(
        **{name: image[None] for name, image in prepared.reference.sample(0).items()}
    )
    return interpreter


@pytest.mark.parametrize(("recipe", "low", "high"), [("w8a8", -128, 127), ("w8a16", -32768, 32767)])
def test_an_integer_layer_is_its_plain_formula(file, prepared, recipe, low, high):
    model = Model(file(recipe))
    run = run_keeping_all(file(recipe), prepared)
    seen = 0
    for operator, weight in model.layers():
        if int(operator.inputs[1]) != weight:
            continue
        seen += 1
        source, _, bias = (int(i) for i in operator.inputs)
        target = int(operator.outputs[0])
        (s_in, z_in), (s_out, z_out) = (
            (float(q.scale[0]), int(q.zeroPoint[0]))
            for q in (model.tensors[i].quantization for i in (source, target))
        )
        x = run.get_tensor(int(model.maker[source].inputs[0])).astype(np.float64)
        codes = np.clip(np.round(x / s_in) + z_in, low, high)
        # Ties of the division may fall to either side.
        assert np.abs(codes - run.get_tensor(source)).max() <= 1
        total = (run.get_tensor(source).astype(np.int64) - z_in) @ model.values(weight).T.astype(
            np.int64
        ) + model.values(bias)
        step = s_in * np.asarray(model.tensors[weight].quantization.scale, np.float64)
        wanted = np.clip(np.round(total * step / s_out) + z_out, low, high)
        # Kernels multiply by a fixed-point number.
        assert np.abs(wanted - run.get_tensor(target)).max() <= 1
    assert seen == 12


def test_ranges_are_those_of_calibration(file, prepared):
    model = Model(file("w8a8"))
    static = [(o, weight) for o, weight in model.layers() if int(o.inputs[1]) == weight]
    assert len(static) == 12
    for operator, weight in static:
        layer = owner(model, operator, weight, prepared)
        assert layer.input_range and layer.output_range
        for index, ends in (
            (operator.inputs[0], layer.input_range),
            (operator.outputs[0], layer.output_range),
        ):
            record = model.tensors[int(index)].quantization
            scale, zero = float(record.scale[0]), int(record.zeroPoint[0])
            assert scale * (-128 - zero) == pytest.approx(min(ends[0], 0), abs=0.51 * scale)
            assert scale * (127 - zero) == pytest.approx(max(ends[1], 0), abs=0.51 * scale)


def test_a_dynamic_layer_quantises_its_input_row_by_row(file, prepared):
    path = file("w8a8-dynamic")
    model = Model(path)
    run = run_keeping_all(path, prepared)
    for operator, weight in model.layers():
        if int(operator.inputs[1]) != weight:
            continue
        x = run.get_tensor(int(operator.inputs[0])).astype(np.float64)
        low = np.minimum(x.min(axis=-1, keepdims=True), 0)
        step = (np.maximum(x.max(axis=-1, keepdims=True), 0) - low) / 255
        rounded = np.round((x - low) / step) * step + low
        scale = np.asarray(model.tensors[weight].quantization.scale, np.float64)
        bias = np.asarray(model.buffer(int(operator.inputs[2])).data, np.uint8).view(np.float32)
        wanted = rounded @ (model.values(weight) * scale[:, None]).T + bias
        found = run.get_tensor(int(operator.outputs[0]))
        # The zero of a kernel's input is a whole code, so its roundings fall elsewhere.
        assert sqnr_db(wanted, found) > 38
        unrounded = x @ (model.values(weight) * scale[:, None]).T + bias
        assert 38 < sqnr_db(unrounded, found) < 60


# --- mixtures, and four bits ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def mixture(tiny_checkpoint: Path, tmp_path_factory) -> tuple[Prepared, Path]:
    model, _ = load_checkpoint(tiny_checkpoint)
    found = prepare(model, parse_recipe(MIXTURE), locate=False)
    path = tmp_path_factory.mktemp("mixture") / "mixture.tflite"
    store(found, found.program, path)
    return found, path


def test_a_mixture_ships_each_layer_in_its_own_way(mixture, prepared):
    found, path = mixture
    # Tensors are numbered alike: the graph is the same, only numbers differ.
    assert structure(path, found, prepared.taps, MIXTURE) >= STRUCTURE_DB
    model = Model(path)
    forms = [
        (model.type(weight), model.type(int(operator.inputs[0])), int(operator.inputs[1]) == weight)
        for operator, weight in model.layers()
    ]
    patch, dynamic = ("INT8", "FLOAT32", False), ("INT8", "FLOAT32", True)
    blocks, static = ("INT4", "FLOAT32", True), ("INT8", "INT8", True)
    half, single = ("FLOAT16", "FLOAT32", False), ("FLOAT32", "FLOAT32", True)
    assert forms == [
        patch,
        *[dynamic] * 4,
        *[blocks] * 2,
        *[static] * 4,
        *[half] * 2,
        *[single] * 4,
    ]


def test_a_mixture_measures_within_the_budget_of_its_coarsest_part(mixture):
    found, path = mixture
    task = get_task("eyelid")
    values = run_samples(get_target("tflite").runtime(path), found.reference)
    outputs, few = values.outputs, values.at(found.reference.few).outputs
    for name, wanted in found.reference.exact.outputs.items():
        error = max_error(wanted, outputs[name], task.error)
        assert error <= budget_of(task, parse_recipe(MIXTURE))
    # Against the same numbers only rounded activations are left. XNNPACK would round scales of
    # blocks to bfloat16, if they were not such numbers already.
    for name, wanted in found.reference.deployed[MIXTURE].outputs.items():
        error = max_error(wanted, few[name], task.error)
        assert error <= budget_of(task, parse_recipe("w8a8"))


def test_blocks_are_packed_two_to_a_byte(mixture):
    found, path = mixture
    model = Model(path)
    layers = [found.program.layers[f"blocks.0.mlp.{name}"].stored for name in ("fc1", "fc2")]
    for stored, (_, weight) in zip(layers, model.layers()[FC2 - 1 :], strict=False):
        assert stored is not None
        pairs = np.asarray(model.buffer(weight).data, np.uint8).view(np.int8)
        codes = np.stack((pairs << 4 >> 4, pairs >> 4), axis=1)
        np.testing.assert_array_equal(codes.reshape(stored.codes.shape), stored.codes)
        details = model.tensors[weight].quantization.details
        assert details.blockSize == 32
        scale = np.asarray(model.buffer(details.scales).data, np.uint8).view(np.float16)
        np.testing.assert_array_equal(scale.reshape(stored.scale.shape), stored.scale)
        # Numbers of bfloat16 end in 16 zeros.
        assert not np.any(stored.scale.view(np.uint32) & 0xFFFF)


def test_a_wrong_scale_of_a_block_is_caught(mixture, prepared, tmp_path):
    found, path = mixture
    model = Model(path)
    weight = model.layers()[FC2][1]
    scales = model.buffer(model.tensors[weight].quantization.details.scales)
    scales.data = (np.asarray(scales.data).view(np.float16) * np.float16(1.05)).view(np.uint8)
    fault = model.save(tmp_path / "fault.tflite")
    assert structure(fault, found, prepared.taps, MIXTURE) < STRUCTURE_DB


def test_every_precision_of_eight_bits_is_tested():
    names = {n for n, p in PRECISIONS.items() if p.bits == 8 and n.startswith("w")}
    assert names == set(RECIPES) <= set(get_target("tflite").supports)
