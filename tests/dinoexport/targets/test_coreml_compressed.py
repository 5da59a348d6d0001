"""Quantised Core ML packages: what is stored is the recipe's, and faults in it are seen."""

import copy
import dataclasses
import logging
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

logging.getLogger("coremltools").setLevel(logging.ERROR)

import coremltools as ct  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from coremltools.converters.mil.frontend.milproto.load import load  # noqa: E402
from coremltools.converters.mil.mil import Builder, Program, types  # noqa: E402
from coremltools.proto import MIL_pb2  # noqa: E402

from dinoexport.errors import BuildError  # noqa: E402
from dinoexport.graph.capture import CapturedProgram, capture_deploy  # noqa: E402
from dinoexport.passes.sequence import build_deploy_model  # noqa: E402
from dinoexport.quantize.calibration import CalibrationSet  # noqa: E402
from dinoexport.quantize.collect import calibrate  # noqa: E402
from dinoexport.quantize.layers import Layer  # noqa: E402
from dinoexport.quantize.prepare import prepare_  # noqa: E402
from dinoexport.quantize.weights import store_weight  # noqa: E402
from dinoexport.recipes import PRECISIONS, WeightKind, parse_recipe  # noqa: E402
from dinoexport.targets.base import LowerOptions  # noqa: E402
from dinoexport.targets.coreml import CoremlTarget  # noqa: E402
from dinoexport.targets.coreml.compression import (  # noqa: E402
    PIXEL_STEP,
    activation_scale,
    compress_weights,
)
from dinoexport.targets.coreml.evaluator import PackageEvaluator  # noqa: E402
from dinoexport.targets.coreml.package import normalise_package, open_package  # noqa: E402
from dinoexport.verify.metrics import sqnr_db  # noqa: E402
from dinoexport.verify.parity import STRUCTURE_DB  # noqa: E402
from dinotrain.checkpoint import load_checkpoint  # noqa: E402
from dinotrain.errors import UsageError  # noqa: E402

pytestmark = pytest.mark.e2e
mb: Any = Builder
Pictures = dict[str, np.ndarray]
MIXED = "w8a8:patch_embed=fp16,blocks.0.attn=fp32,blocks.1.mlp.fc1=pal6,head=w4-block32"
SINGLE = "fp32:blocks.0.mlp=w8,blocks.1.attn=fp16,blocks.1.mlp.fc2=w8a8"
RECIPES = ("w8", "w8a8", "w4-block32", "pal8", "pal6", "pal4", MIXED, SINGLE)
RECIPE_IDS = (*RECIPES[:6], "mixed", "single")
IOS = {"w8": 17, "w8a8": 17, SINGLE: 17}
WORD = {"w8": "INT8", "w4-block32": "INT4", "pal8": "UINT8", "pal6": "UINT6", "pal4": "UINT4"}
KINDS = {
    "constexpr_affine_dequantize": "quantized_data",
    "constexpr_blockwise_shift_scale": "data",
    "constexpr_lut_to_dense": "indices",
}


@dataclass(frozen=True)
class Built:
    """One package, and what torch gives with the numbers that it should hold."""

    path: Path
    taps: dict[str, str]
    layers: dict[str, Layer]
    outputs: dict[str, float]
    values: dict[str, np.ndarray]


class Packages:
    """Builds a recipe at its first request; all share one captured graph, whose numbers change."""

    def __init__(self, checkpoint: Path, eyes: list[Pictures], folder: Path) -> None:
        deploy = build_deploy_model(load_checkpoint(checkpoint)[0])
        # Another picture than the one that is run: some of its values are clipped.
        self._calibration = calibrate(deploy, CalibrationSet((eyes[1],), "test", 0, ""))
        self._deploy = copy.deepcopy(deploy)
        recipe = parse_recipe("fp16")
        self._captured = capture_deploy(deploy, recipe, prepare_(deploy, recipe))
        self._pixels = [
            torch.from_numpy(i).permute(2, 0, 1)[None].float() for i in eyes[0].values()
        ]
        self._folder = folder
        self._done: dict[str, Built] = {}

    def __call__(self, name: str) -> Built:
        if name not in self._done:
            self._done[name] = self._build(name, self._folder / f"{len(self._done)}.mlpackage")
        return self._done[name]

    def lower(self, program: CapturedProgram, path: Path) -> dict[str, str]:
        return CoremlTarget().lower(program, path, LowerOptions(), {"name": "t"})

    def program(self, name: str) -> CapturedProgram:
        """The graph with the numbers of a recipe, until the next one is asked for."""
        deploy, recipe = copy.deepcopy(self._deploy), parse_recipe(name)
        layers = prepare_(deploy, recipe, self._calibration)
        for key, value in deploy.state_dict(keep_vars=True).items():
            for program in (self._captured.program, self._captured.debug_program):
                if key in program.state_dict:
                    program.state_dict[key] = value
        placed = {
            name: dataclasses.replace(layers[name], node=old.node, weight=old.weight)
            for name, old in self._captured.layers.items()
        }
        return dataclasses.replace(self._captured, recipe=recipe, layers=placed)

    def _build(self, name: str, path: Path) -> Built:
        program = self.program(name)
        taps = self.lower(program, path)
        with torch.no_grad():
            values = [v.numpy() for v in program.debug_program.module()(*self._pixels)]
        names = [*program.output_names, *program.tap_nodes]
        found = dict(zip(names, values, strict=True))
        outputs = {name: float(found.pop(name)) for name in program.output_names}
        return Built(path, taps, program.layers, outputs, found)


@pytest.fixture(scope="module")
def packages(tiny_checkpoint, eyes, tmp_path_factory) -> Packages:
    return Packages(tiny_checkpoint, eyes, tmp_path_factory.mktemp("compressed"))


def worst_db(built: Built, path: Path, sample: Pictures) -> float:
    found = CoremlTarget().runtime(path, built.taps, exact=True).run(sample).taps
    assert found.keys() == built.values.keys()
    return min(sqnr_db(wanted, found[tap]) for tap, wanted in built.values.items())


def read_program(path: Path) -> Program:
    """By coremltools alone."""
    package = open_package(path)
    return load(package.spec, package.spec.specificationVersion, str(package.weights_dir))


def weight_ops(path: Path) -> dict[str, Any]:
    """{name of a layer's parameter: the operation that its weights come from}."""
    return {
        op.weight.name.split("_to_fp16")[0].removesuffix("_quantized").removesuffix("_palettized"):
        op.weight.op
        for op in read_program(path).functions["main"].operations
        if op.op_type in ("linear", "conv")
    }  # fmt: skip


def factor(layer: Layer, operation: Any) -> int:
    """The layer that reads pixels has them divided, and its scales multiplied, by this."""
    integer = "scale" in operation.inputs and operation.scale.val.dtype == np.float16
    return PIXEL_STEP if integer and layer.name == "patch_embed.proj" else 1


def parameter(layer: Layer) -> str:
    return "p_" + layer.weight.replace(".", "_")


# --- what is stored ------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", RECIPES, ids=RECIPE_IDS)
def test_taps_are_torchs_with_the_same_numbers(packages, eyes, recipe):
    built = packages(recipe)
    assert len(built.taps) == 6
    assert worst_db(built, built.path, eyes[0]) >= STRUCTURE_DB
    found = CoremlTarget().runtime(built.path, exact=True).run(eyes[0]).outputs
    assert {n: float(v) for n, v in found.items()} == pytest.approx(built.outputs, abs=1e-4)


@pytest.mark.parametrize("recipe", RECIPES, ids=RECIPE_IDS)
def test_codes_scales_and_tables_are_the_recipes(packages, recipe):
    built = packages(recipe)
    operations = weight_ops(built.path)
    quantised = [layer for layer in built.layers.values() if layer.stored is not None]
    assert len(quantised) >= 3
    for layer in built.layers.values():
        operation, stored = operations[parameter(layer)], layer.stored
        if stored is None:
            single = layer.precision.name == "fp32"
            assert operation.val.val.dtype == (np.float32 if single else np.float16), layer.name
            continue
        if operation.op_type == "const":
            # A table larger than what it would save.
            assert layer.precision.name == "pal8"
            np.testing.assert_array_equal(operation.val.val, stored.values())
            continue
        codes = operation.inputs[KINDS[operation.op_type]].val
        np.testing.assert_array_equal(codes.reshape(stored.codes.shape), stored.codes)
        if stored.precision.kind is WeightKind.PALETTE:
            tables = operation.lut.val.reshape(-1, 2**stored.precision.bits)
            np.testing.assert_array_equal(tables, stored.table)
        else:
            scale = operation.scale.val.reshape(stored.scale.shape)
            np.testing.assert_array_equal(scale, stored.scale * factor(layer, operation))
            # Hardware may take smaller numbers for zero.
            assert scale.min() >= np.finfo(np.float16).smallest_normal
        # Apple's own unpacking gives the rounded numbers.
        values = operation.materialized_val_inference()
        wanted = stored.values() * factor(layer, operation)
        np.testing.assert_array_equal(values, wanted.astype(values.dtype))


@pytest.mark.parametrize("recipe", RECIPES, ids=RECIPE_IDS)
def test_weights_are_unpacked_as_core_ml_would(packages, eyes, recipe):
    """Rounded to the program's type as shipped, whole in exact arithmetic."""
    built = packages(recipe)
    evaluator = PackageEvaluator(built.path)
    operations = weight_ops(built.path)
    packed = {n: op for n, op in operations.items() if op.op_type in KINDS}
    layers = [layer for layer in built.layers.values() if parameter(layer) in packed]
    assert len(layers) >= 3
    wanted = {operations[parameter(layer)].outputs[0].name: layer.stored for layer in layers}
    shipped = evaluator.run(eyes[0], True, keep=wanted).values
    exact = evaluator.run(eyes[0], False, keep=wanted).values
    for layer in layers:
        operation = operations[parameter(layer)]
        name = operation.outputs[0].name
        np.testing.assert_array_equal(shipped[name], operation.materialized_val_inference())
        whole = wanted[name].values() * factor(layer, operation)
        np.testing.assert_array_equal(exact[name], whole)


@pytest.mark.parametrize("recipe", WORD)
def test_codes_take_as_many_bits_as_they_have(packages, recipe):
    built = packages(recipe)
    size = (open_package(built.path).weights_dir / "weight.bin").stat().st_size
    stored = [layer.stored for layer in built.layers.values() if layer.stored is not None]
    codes = sum(s.codes.size * s.precision.bits / 8 for s in stored)
    halves = sum(2 * (s.scale.size + s.table.size) for s in stored)
    # Biases, tokens and positions in half precision, and 64 bytes for each record and its padding.
    assert codes + halves < size < codes + halves + 12_000
    spec = open_package(built.path).spec
    declared = {MIL_pb2.DataType.Name(v.type.tensorType.dataType) for v in blobs(spec).values()}
    assert WORD[recipe] in declared


def blobs(spec: Any) -> dict[str, Any]:
    """{operation.operand: its value} of those in the weight file."""
    function = spec.mlProgram.functions["main"]
    found = {}
    for op in function.block_specializations[function.opset].operations:
        operands = dict(op.attributes)
        bound = {name: argument.arguments[0] for name, argument in op.inputs.items()}
        operands |= {n: first.value for n, first in bound.items() if first.HasField("value")}
        found |= {f"{op.outputs[0].name}.{name}": value for name, value in operands.items()}
    return {n: v for n, v in found.items() if v.WhichOneof("value") == "blobFileValue"}


def test_two_builds_are_the_same_bytes(packages, tmp_path):
    built = packages("w8a8")
    path = tmp_path / "again.mlpackage"
    packages.lower(packages.program("w8a8"), path)
    files = [f.relative_to(path) for f in sorted(path.rglob("*")) if f.is_file()]
    assert len(files) == 3
    for file in files:
        assert (path / file).read_bytes() == (built.path / file).read_bytes(), file


# --- activations ---------------------------------------------------------------------------------


def test_inputs_of_layers_within_blocks_are_quantised(packages, eyes):
    built = packages("w8a8")
    operations = read_program(built.path).functions["main"].operations
    pairs = [op for op in operations if op.op_type == "dequantize"]
    linears = [op for op in operations if op.op_type == "linear"]
    inside = [op for op in linears if "blocks" in op.weight.name]
    # Queries, keys and values read the same codes.
    assert list(dict.fromkeys(op.x.op for op in inside)) == pairs
    assert (len(inside), len(pairs)) == (12, 8)
    assert len(inside) < len(linears)
    evaluator = PackageEvaluator(built.path)
    first = pairs[0].input.op
    names = [first.input.name, pairs[0].outputs[0].name]
    given, found = evaluator.run(eyes[0], True, keep=names).values.values()
    reach = max(map(abs, built.layers["blocks.0.attn.q"].input_range))  # type: ignore[arg-type]
    scale = np.float32(np.float16(reach / 127))
    assert first.scale.val == pairs[0].scale.val == scale
    wanted = (np.clip(np.round(given / scale), -128, 127) * scale).astype(np.float16)
    np.testing.assert_array_equal(found, wanted)
    assert not np.array_equal(given, found)
    exact = evaluator.run(eyes[0], False, keep=names).values
    np.testing.assert_allclose(exact[names[1]], exact[names[0]], rtol=1e-6)


def test_a_layer_that_never_saw_anything_has_a_scale():
    assert activation_scale((0.0, 0.0), np.float16) > 0
    assert activation_scale((-254.0, 1.0), np.float16) == 2


# --- mixtures ------------------------------------------------------------------------------------


def test_float_layers_of_a_mixture_compute_in_their_type(packages):
    for recipe, rest in ((MIXED, "fp16"), (SINGLE, "fp32")):
        built = packages(recipe)
        operations = read_program(built.path).functions["main"].operations
        linears = {op.weight.name: op for op in operations if op.op_type == "linear"}
        found = set()
        for layer in built.layers.values():
            name = next((n for n in linears if n.startswith(parameter(layer))), "")
            if name:
                wanted = layer.precision.name if layer.precision.is_float else rest
                kind = types.fp16 if wanted == "fp16" else types.fp32
                assert linears[name].outputs[0].dtype is kind, layer.name
                found.add(wanted)
        assert found == {"fp16", "fp32"}


# --- systems -------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", RECIPES, ids=RECIPE_IDS)
def test_ios_is_raised_and_told(packages, recipe):
    needed = IOS.get(recipe, 18)
    options, parsed = LowerOptions(minimum_ios=17), parse_recipe(recipe)
    target = CoremlTarget()
    target.check(parsed)
    assert open_package(packages(recipe).path).spec.specificationVersion == {17: 8, 18: 9}[needed]
    assert target.minimum_os(parsed, options) == f"iOS {needed}, macOS {needed - 3}"
    notice = target.notice(parsed, options)
    assert bool(notice) == (needed == 18)
    if notice:
        assert notice.startswith(f"coreml: {recipe} needs iOS 18")
    assert target.notice(parsed, LowerOptions(minimum_ios=18)) == ""


def test_int8_activations_need_seventeen():
    asked = LowerOptions(minimum_ios=16)
    assert CoremlTarget().minimum_os(parse_recipe("w8"), asked) == "iOS 16, macOS 13"
    assert CoremlTarget().minimum_os(parse_recipe("w8a8"), asked) == "iOS 17, macOS 14"


@pytest.mark.parametrize("recipe", ["w8a8-dynamic", "w8a16"])
def test_what_core_ml_has_no_form_for_is_refused(recipe):
    with pytest.raises(UsageError, match=f"coreml has no {recipe}; the nearest it has is w8"):
        CoremlTarget().check(parse_recipe(recipe))


# --- faults --------------------------------------------------------------------------------------


def patch(source: Path, target: Path, part: str, change: Callable[[np.ndarray], None]) -> Path:
    """Change one constant of the first queries in the weight file, as bytes."""
    shutil.copytree(source, target)
    package = open_package(target)
    found = [
        v
        for n, v in blobs(package.spec).items()
        if "blocks_0_attn_q_" in n and n.endswith(f".{part}")
    ]
    assert len(found) == 1
    file = package.weights_dir / "weight.bin"
    content = bytearray(file.read_bytes())
    _, _, length, start = struct.unpack_from("<IIQQ", content, found[0].blobFileValue.offset)
    data = np.frombuffer(content, np.uint8, length, start)
    change(data)
    file.write_bytes(content)
    return target


def scale_by_5_percent(data: np.ndarray) -> None:
    """One of all scales."""
    data.view(np.float16)[0] *= np.float16(1.05)


def move_a_table_entry(data: np.ndarray) -> None:
    data.view(np.float16)[8] *= np.float16(1.05)


def swap_nibbles(data: np.ndarray) -> None:
    data[:] = data << 4 | data >> 4


def take_the_wrong_groups(data: np.ndarray) -> None:
    """Tables of 16 entries, those of the first two groups exchanged."""
    tables = data.view(np.float16).reshape(-1, 16)
    tables[:2] = tables[1::-1].copy()


FAULTS = {
    "w8-scale": ("w8", "scale", scale_by_5_percent),
    "int4-scale": ("w4-block32", "scale", scale_by_5_percent),
    "int4-nibbles": ("w4-block32", "data", swap_nibbles),
    "pal4-entry": ("pal4", "lut", move_a_table_entry),
    "pal4-group": ("pal4", "lut", take_the_wrong_groups),
    "pal4-nibbles": ("pal4", "indices", swap_nibbles),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_fail_the_structural_gate(packages, eyes, tmp_path, fault):
    recipe, part, change = FAULTS[fault]
    built = packages(recipe)
    path = patch(built.path, tmp_path / "bad.mlpackage", part, change)
    assert worst_db(built, path, eyes[0]) < STRUCTURE_DB


def test_another_step_back_than_forth_fails_the_structural_gate(packages, eyes, tmp_path):
    built = packages("w8a8")
    path = tmp_path / "bad.mlpackage"
    shutil.copytree(built.path, path)
    package = open_package(path)
    function = package.spec.mlProgram.functions["main"]
    operations = function.block_specializations[function.opset].operations
    constants = {o.outputs[0].name: o for o in operations if o.type == "const"}
    back = next(o for o in operations if o.type == "dequantize")
    forth = next(
        o for o in operations if o.outputs[0].name == back.inputs["input"].arguments[0].name
    )
    names = [o.inputs["scale"].arguments[0].name for o in (back, forth)]
    assert names[0] != names[1]
    content = constants[names[0]].attributes["val"].immediateValue.tensor.bytes
    content.values = (np.frombuffer(content.values, np.float16) * np.float16(1.05)).tobytes()
    package.model_file.write_bytes(package.spec.SerializeToString())
    assert worst_db(built, path, eyes[0]) < STRUCTURE_DB


# --- the pass by itself --------------------------------------------------------------------------


def stored_layer(weight: np.ndarray, precision: str, name: str = "w") -> Layer:
    stored = store_weight(weight, PRECISIONS[precision])
    return Layer(name, PRECISIONS[precision], stored, (-1.0, 1.0), weight=name)


def small_program(weights: list[np.ndarray], names: list[str], ios: Any) -> Program:
    """Half precision; linear layers, or convolutions of four-dimensional weights, in a row."""
    first = weights[0]
    shape = (1, first.shape[1], 6, 6) if first.ndim == 4 else (2, first.shape[1])

    def body(x):
        value = mb.cast(x=x, dtype="fp16")
        for place, (weight, name) in enumerate(zip(weights, names, strict=True)):
            half = mb.const(val=weight.astype(np.float16), name=f"{name}_to_fp16" + "_" * place)
            half.name = f"{name}_to_fp16"
            build = mb.conv if weight.ndim == 4 else mb.linear
            value = build(x=value, weight=half, name=f"out{place}")
        return mb.cast(x=value, dtype="fp32", name="y")

    return mb.program(input_specs=[mb.TensorSpec(shape)], opset_version=ios)(body)


def compressed(program: Program, layers: dict[str, Layer], ios: int) -> Program:
    graph_pass: Any = compress_weights()
    graph_pass.layers, graph_pass.ios = layers, ios
    graph_pass(program)
    return program


def kinds(program: Program) -> list[str]:
    return [op.op_type for op in program.functions["main"].operations if op.op_type != "const"]


@pytest.mark.parametrize(
    ("shape", "precision", "form"),
    [
        ((24, 64), "pal4", "constexpr_lut_to_dense"),
        ((8, 64), "pal6", "constexpr_lut_to_dense"),
        ((31, 64), "pal8", "linear"),
        ((32, 16, 3, 3), "pal4", "constexpr_lut_to_dense"),
        ((32, 16, 3, 3), "w4-block32", "constexpr_blockwise_shift_scale"),
        ((32, 64, 1, 1), "w4-block32", "constexpr_blockwise_shift_scale"),
        ((32, 48), "w4-block32", "constexpr_blockwise_shift_scale"),
    ],
    ids=str,
)
def test_every_shape_has_a_form(shape, precision, form, tmp_path):
    """Groups that do not divide the channels, blocks that do not divide the inputs, convolutions.

    With 31 tables of 256 entries, 31 × 64 weights are smaller as they are.
    """
    rng = np.random.default_rng(1)
    layer = stored_layer(rng.standard_normal(shape).astype(np.float32), precision)
    values = layer.stored.values()  # type: ignore[union-attr]
    program = small_program([values], ["w"], ct.target.iOS18)
    before = kinds(program)
    compressed(program, {"w": layer}, 18)
    assert form in kinds(program)
    assert (kinds(program) == before) == (form == "linear")
    path = tmp_path / "small.mlpackage"
    passes: Any = ct.PassPipeline.EMPTY
    model: Any = ct.convert(
        program,
        convert_to="mlprogram",
        minimum_deployment_target=ct.target.iOS18,
        compute_precision=ct.precision.FLOAT32,
        pass_pipeline=passes,
        skip_model_load=True,
    )
    model.save(str(path))
    normalise_package(path)
    evaluator = PackageEvaluator(path)
    name, port = next(iter(evaluator.inputs.items()))
    x = rng.standard_normal(port.shape).astype(np.float32)
    found = evaluator.run({name: x}, False).outputs["y"]
    apply = torch.nn.functional.conv2d if len(shape) == 4 else torch.nn.functional.linear
    wanted = apply(torch.from_numpy(x), torch.from_numpy(values)).numpy()
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


def test_a_layer_that_runs_twice_is_packed_once():
    layer = stored_layer(np.random.default_rng(1).standard_normal((64, 64), np.float32), "w8a8")
    values = layer.stored.values()  # type: ignore[union-attr]
    program = small_program([values], ["w"], ct.target.iOS17)
    block = program.functions["main"]
    first = next(op for op in block.operations if op.op_type == "linear")
    with block:
        again = mb.linear(x=first.x, weight=first.weight, name="again")
    compressed(program, {"w": layer}, 17)
    found = kinds(program)
    assert found.count("constexpr_affine_dequantize") == found.count("quantize") == 1
    assert first.weight is again.op.weight
    assert first.x is again.op.x


def test_weights_that_the_converter_changed_are_refused():
    layer = stored_layer(np.random.default_rng(1).standard_normal((64, 64), np.float32), "w8")
    values = layer.stored.values()  # type: ignore[union-attr]
    program = small_program([values * 1.001], ["w"], ct.target.iOS17)
    with pytest.raises(BuildError, match="changed the weights of layer w"):
        compressed(program, {"w": layer}, 17)


def test_a_layer_that_is_gone_is_told():
    rng = np.random.default_rng(1)
    layer = stored_layer(rng.standard_normal((64, 64), np.float32), "w8")
    other = stored_layer(rng.standard_normal((64, 64), np.float32), "w8", "other")
    values = layer.stored.values()  # type: ignore[union-attr]
    program = small_program([values], ["w"], ct.target.iOS17)
    with pytest.raises(BuildError, match=r"fused or moved layer other.*other=fp16"):
        compressed(program, {"w": layer, "other": other}, 17)


def test_a_layer_without_a_range_is_told():
    layer = stored_layer(np.random.default_rng(1).standard_normal((64, 64), np.float32), "w8a8")
    values = layer.stored.values()  # type: ignore[union-attr]
    program = small_program([values], ["w"], ct.target.iOS17)
    without = dataclasses.replace(layer, input_range=None)
    with pytest.raises(BuildError, match=r"layer w has no range.*--calibration"):
        compressed(program, {"w": without}, 17)
