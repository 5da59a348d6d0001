"""The .mlpackage as Xcode meets it: by coremltools and the specification it ships."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import coremltools as ct
import numpy as np
import pytest
import torch
from coremltools.proto import FeatureTypes_pb2, MIL_pb2

from dinoexport.bundle import open_bundle
from dinoexport.errors import BuildError
from dinoexport.graph.capture import CapturedProgram, capture
from dinoexport.recipes import parse_recipe
from dinoexport.targets.base import LowerOptions
from dinoexport.targets.coreml import CoremlTarget
from dinoexport.targets.coreml.evaluator import PackageEvaluator
from dinoexport.verify.parity import budget_of
from dinotrain.backbones.vit import ViTConfig, init_weights_
from dinotrain.heads.branch import HeadConfig
from dinotrain.model import ModelConfig, TaskModel
from dinotrain.tasks import get_task

pytestmark = pytest.mark.e2e
PRECISIONS = ("fp32", "fp16")
IMAGE: Any = FeatureTypes_pb2.ImageFeatureType
ARRAY: Any = FeatureTypes_pb2.ArrayFeatureType
WIDE = (28, 42)
# The specification of each system; coremltools' own table, from its proto's comments.
VERSIONS = {16: (7, "CoreML6"), 17: (8, "CoreML7"), 18: (9, "CoreML8")}
METADATA = {
    "licence": "Apache-2.0",
    "summary": "lids",
    "input.up": "the eye looks up",
    "output.lf_mm": "excursion (mm)",
}


@pytest.fixture(params=PRECISIONS)
def package(request, built: Callable[[str, str], Path]) -> Path:
    return open_bundle(built("coreml", request.param)).artifact


@pytest.fixture(scope="module")
def wide() -> CapturedProgram:
    """A program that is wider than high, the smallest that holds every part."""
    torch.manual_seed(2)
    backbone = ViTConfig(name="tiny", embed_dim=32, depth=1, heads=1, ffn_dim=48, grid=(2, 3))
    config = ModelConfig(
        task="eyelid", backbone=backbone, image_size=WIDE, head=HeadConfig(hidden=16)
    )
    model = TaskModel(config)
    init_weights_(model.backbone)
    return capture(model.eval(), "fp16")


def precision_of(path: Path) -> str:
    return "fp16" if "fp16" in path.name else "fp32"


def operations(spec: Any) -> list[Any]:
    function = spec.mlProgram.functions["main"]
    return [
        operation
        for operation in function.block_specializations[function.opset].operations
        if operation.type != "const"
    ]


def kinds_of(operation: Any) -> set[str]:
    return {
        MIL_pb2.DataType.Name(out.type.tensorType.dataType)
        for out in operation.outputs
        if out.type.HasField("tensorType")
    }


def read_names(operation: Any) -> Iterator[str]:
    for argument in operation.inputs.values():
        for bound in argument.arguments:
            if bound.WhichOneof("binding") == "name":
                yield bound.name


# --- ports ---------------------------------------------------------------------------------------


def test_inputs_are_rgb_images_of_one_size(package):
    manifest = open_bundle(package.parent).manifest
    spec = ct.utils.load_spec(str(package))
    assert [port.name for port in spec.description.input] == [p.name for p in manifest.inputs]
    for feature, port in zip(spec.description.input, manifest.inputs, strict=True):
        assert feature.type.WhichOneof("Type") == "imageType"
        image = feature.type.imageType
        assert IMAGE.ColorSpace.Name(image.colorSpace) == "RGB"
        assert (image.height, image.width, 3) == port.shape
        # One size: Core ML would scale a picture by itself to the nearest of several.
        assert image.WhichOneof("SizeFlexibility") is None
        assert not feature.type.isOptional
        assert feature.shortDescription == port.description


def test_outputs_are_single_numbers_with_their_unit(package):
    manifest = open_bundle(package.parent).manifest
    spec = ct.utils.load_spec(str(package))
    assert [port.name for port in spec.description.output] == [p.name for p in manifest.outputs]
    for feature, port in zip(spec.description.output, manifest.outputs, strict=True):
        array = feature.type.multiArrayType
        assert tuple(array.shape) == port.shape == (1,)
        assert ARRAY.ArrayDataType.Name(array.dataType) == "FLOAT32"
        assert feature.shortDescription == f"{port.description} ({port.unit})"
        assert port.name.endswith(f"_{port.unit}")


def test_xcode_shows_who_made_it_and_of_what(package):
    manifest = open_bundle(package.parent).manifest
    model = ct.models.MLModel(str(package), skip_model_load=True)
    assert model.author == "dinoexport"
    assert model.license == manifest.licence
    assert model.short_description == get_task("eyelid").summary
    assert model.user_defined_metadata["checkpoint_sha256"] == manifest.checkpoint.sha256
    assert model.user_defined_metadata["notice"] == manifest.notice
    assert model.output_description["mrd1_mm"].endswith("(mm)")
    # A date would make each build another file.
    assert not [key for key in model.user_defined_metadata if "date" in key]


def test_pixels_reach_the_convolution_as_they_are(package):
    """Mean and std are folded in: nothing scales what the camera gives."""
    before = []
    for operation in operations(ct.utils.load_spec(str(package))):
        if operation.type == "conv":
            break
        before.append(operation.type)
    assert set(before) <= {"cast", "concat"}
    assert before.count("concat") == 1


def test_width_and_height_are_not_exchanged(wide, tmp_path):
    path = tmp_path / "wide.mlpackage"
    CoremlTarget().lower(wide, path, LowerOptions(), METADATA)
    for feature in ct.utils.load_spec(str(path)).description.input:
        assert (feature.type.imageType.height, feature.type.imageType.width) == WIDE


# --- minimum iOS ---------------------------------------------------------------------------------


@pytest.mark.parametrize("minimum_ios", VERSIONS)
def test_the_specification_follows_the_minimum_ios(wide, tmp_path, minimum_ios):
    options = LowerOptions(minimum_ios=minimum_ios)
    path = tmp_path / "model.mlpackage"
    taps = CoremlTarget().lower(wide, path, options, METADATA)
    spec = ct.utils.load_spec(str(path))
    version, opset = VERSIONS[minimum_ios]
    assert spec.specificationVersion == version
    assert spec.mlProgram.functions["main"].opset == opset
    # macOS has been three behind since iOS 14.
    assert (
        CoremlTarget().minimum_os(parse_recipe("fp16"), options)
        == f"iOS {minimum_ios}, macOS {minimum_ios - 3}"
    )
    # The same numbers, whichever it is.
    rng = np.random.default_rng(3)
    images = {name: rng.integers(0, 256, (*WIDE, 3), dtype=np.uint8) for name in wide.input_names}
    pixels = [torch.from_numpy(i).permute(2, 0, 1)[None].float() for i in images.values()]
    wanted = wide.program.module()(*pixels)
    evaluator = PackageEvaluator(path)
    found = evaluator.run(images, round_activations=False, keep=list(taps.values()))
    for name, value in zip(wide.output_names, wanted, strict=True):
        assert float(found.outputs[name]) == pytest.approx(float(value), abs=1e-4)
    assert len(taps) == 4
    assert found.values.keys() == set(taps.values())
    assert spec.description.metadata.shortDescription == "lids"
    assert spec.description.metadata.license == "Apache-2.0"
    assert spec.description.input[1].shortDescription == "the eye looks up"
    assert spec.description.output[2].shortDescription == "excursion (mm)"


def test_seventeen_is_the_default(package):
    spec = ct.utils.load_spec(str(package))
    assert LowerOptions().minimum_ios == 17
    assert spec.specificationVersion == VERSIONS[17][0]
    assert open_bundle(package.parent).manifest.minimum_os == "iOS 17, macOS 14"


@pytest.mark.parametrize("minimum_ios", [0, 13, 15, 19, 26])
def test_an_unknown_minimum_is_refused_before_anything_is_written(wide, tmp_path, minimum_ios):
    options = LowerOptions(minimum_ios=minimum_ios)
    with pytest.raises(BuildError) as caught:
        CoremlTarget().lower(wide, tmp_path / "model.mlpackage", options, METADATA)
    text = str(caught.value)
    assert f"minimum iOS {minimum_ios} is not supported; accepted: 16, 17, 18" in text
    assert "\n" not in text
    assert not list(tmp_path.iterdir())


# --- precision -----------------------------------------------------------------------------------


def test_the_full_precision_program_has_no_half(built):
    spec = ct.utils.load_spec(str(open_bundle(built("coreml", "fp32")).artifact))
    found = set().union(*(kinds_of(operation) for operation in operations(spec)))
    assert found == {"FLOAT32"}
    assert len(operations(spec)) > 50


NETWORK = {"linear", "matmul", "layer_norm", "gelu", "softmax", "conv"}


def misplaced(program: list[Any]) -> list[str]:
    """What breaks the rule: half up to the one cast back, single behind it, where decoding is."""
    border = [o for o in program if o.type == "cast" and kinds_of(o) == {"FLOAT32"}]
    if len(border) != 1:
        return [f"{len(border)} casts back"]
    behind = {out.name for out in border[0].outputs}
    problems = []
    for operation in program:
        names = {out.name for out in operation.outputs}
        if behind.intersection(read_names(operation)):
            behind |= names
        inside = names <= behind
        if kinds_of(operation) != {"FLOAT32" if inside else "FLOAT16"}:
            problems += sorted(names)
        if operation.type == "sigmoid" and not inside:
            problems.append(f"{names}: decoded in half precision")
        if operation.type in NETWORK and inside:
            problems.append(f"{names}: part of the network")
    return problems + sorted({"mrd1_mm", "mrd2_mm", "lf_mm"} - behind)


def test_half_precision_ends_where_decoding_starts(built):
    path = open_bundle(built("coreml", "fp16")).artifact
    assert misplaced(operations(ct.utils.load_spec(str(path)))) == []


@pytest.mark.parametrize("border", [(), ("gelu_1",)], ids=["too-late", "too-early"])
def test_a_border_elsewhere_is_seen(wide, tmp_path, border):
    path = tmp_path / "model.mlpackage"
    moved = replace(wide, decode_nodes=frozenset(border))
    CoremlTarget().lower(moved, path, LowerOptions(), METADATA)
    assert misplaced(operations(ct.utils.load_spec(str(path))))


def test_decoding_constants_are_single(built):
    """Half precision has no 2^-25, and holds whole numbers only to 2048."""
    path = open_bundle(built("coreml", "fp16")).artifact
    function = ct.utils.load_spec(str(path)).mlProgram.functions["main"]
    block = function.block_specializations[function.opset]
    constants = {o.outputs[0].name: kinds_of(o) for o in block.operations if o.type == "const"}
    behind: set[str] = set()
    read: set[str] = set()
    for operation in operations(ct.utils.load_spec(str(path))):
        names = set(read_names(operation))
        if operation.type == "sigmoid" or behind & names:
            behind |= {out.name for out in operation.outputs}
            read |= names & constants.keys()
    floats = {name for name in read if constants[name] & {"FLOAT16", "FLOAT32"}}
    assert len(floats) >= 3
    assert all(constants[name] == {"FLOAT32"} for name in floats)


def test_taps_are_half_precision(built):
    bundle = open_bundle(built("coreml", "fp16"))
    program = operations(ct.utils.load_spec(str(bundle.artifact)))
    types = {out.name: kinds_of(operation) for operation in program for out in operation.outputs}
    taps = bundle.manifest.taps
    assert len(taps) == 6
    assert all(types[value] == {"FLOAT16"} for value in taps.values())


# --- values --------------------------------------------------------------------------------------


def test_the_package_measures_what_the_trained_model_does(package, eyes, measured):
    """By the evaluator, and on a Mac by Core ML."""
    runtime = CoremlTarget().runtime(package)
    budget = budget_of(get_task("eyelid"), parse_recipe(precision_of(package)))
    for sample, wanted in zip(eyes, measured, strict=True):
        found = runtime.run(sample).outputs
        assert found.keys() == wanted.keys()
        for name, value in found.items():
            assert float(value.reshape(-1)[0]) == pytest.approx(wanted[name], abs=budget)
