"""Maps of classes in every target: the segmentation decoder alone, its norms, and whole numbers."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import coremltools as ct
import numpy as np
import pytest
import torch
from coremltools.proto import FeatureTypes_pb2
from onnx import TensorProto
from torch import Tensor, nn

from dinoexport.errors import BundleError, ParityError
from dinoexport.graph.capture import CapturedProgram, _downstream
from dinoexport.recipes import parse_recipe
from dinoexport.targets.base import LowerOptions, Runtime
from dinoexport.targets.coreml import lower as coreml_lower
from dinoexport.targets.coreml import precision as coreml_precision
from dinoexport.targets.coreml.evaluator import PackageEvaluator
from dinoexport.targets.ports import check_outputs
from dinoexport.targets.table import get_target
from dinoexport.targets.tflite.lower import lower as lower_tflite
from dinoexport.targets.tflite.quantize import store_layers_
from dinoexport.verify.metrics import sqnr_db
from dinoexport.verify.parity import STRUCTURE_DB
from dinotrain.decoders import ClassMapDecoder
from dinotrain.heads.segmentation import DecoderConfig, SegmentationDecoder
from dinotrain.tasks.base import OutputSpec

pytestmark = pytest.mark.e2e
SIZE = (56, 70)
NAMES = ("class_map", "logits")
BUILDS = [("onnx", "fp32"), ("onnx", "fp16"), ("coreml", "fp32"), ("coreml", "fp16")]
BUILDS += [("tflite", "fp32"), ("tflite", "fp16")]
PROMISED = (
    OutputSpec(
        name="class_map", unit="class", shape=(1, *SIZE), dtype="int32", description="classes"
    ),
    OutputSpec(
        name="logits", unit="", shape=(1, 4, *SIZE), dtype="float32", description="before argmax"
    ),
)


def group_norms(model: nn.Module) -> list[nn.GroupNorm]:
    return [module for module in model.modules() if isinstance(module, nn.GroupNorm)]


class Segmenter(nn.Module):
    """A patch convolution in place of a backbone, the decoder, and the class map.

    Args:
        loud: scale of the taps; raw taps of large backbones have channels in the hundreds.
    """

    def __init__(self, loud: float = 1.0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.patches = nn.Conv2d(3, 12, 14, stride=14)
            self.head = SegmentationDecoder(
                (12,) * 3, (4, 5), SIZE, 4, DecoderConfig(channels=(16, 12, 8, 8))
            )
            with torch.no_grad():
                for parameter in self.head.parameters():
                    parameter.add_(0.1 * torch.randn_like(parameter))
                # Reads 0 to 255, as a backbone does with its normalisation folded in.
                self.patches.weight.mul_(loud / 56)
                self.patches.bias.copy_(-127 * self.patches.weight.sum(dim=(1, 2, 3)))
                # Each its own, so that the order shows.
                for place, norm in enumerate(group_norms(self)):
                    norm.eps = 1e-5 * (1 + place)
        self.decoder = ClassMapDecoder()
        self.eval().requires_grad_(False)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """(1, 3, H, W) of 0..255 → class map and logits."""
        tap = self.patches(pixels)
        logits = self.head({"image": [tap, -tap, tap]})
        return self.decoder(logits)["class_map"], logits


class Twins(nn.Module):
    """Four classes of which the second and the last are always equally likely, and likeliest."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Conv2d(3, 4, 1)
        weight = torch.tensor([[0.0] * 3, [1.0] * 3, [0.5] * 3, [1.0] * 3])
        self.mix.weight = nn.Parameter(weight.reshape(4, 3, 1, 1))
        self.mix.bias = nn.Parameter(torch.tensor([0.0, 1.0, 0.0, 1.0]))
        self.decoder = ClassMapDecoder()
        self.eval().requires_grad_(False)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """(1, 3, H, W) of 0..255 → class map and logits."""
        logits = self.mix(pixels)
        return self.decoder(logits)["class_map"], logits


def capture(model: nn.Module, recipe: str = "fp32") -> CapturedProgram:
    program = torch.export.export(model, (torch.zeros(1, 3, *SIZE),)).run_decompositions({})
    decoded = frozenset(_downstream(program, model.decoder))  # type: ignore[arg-type]
    return CapturedProgram(
        program, program, SIZE, ("image",), NAMES, {}, decoded, parse_recipe(recipe), {}
    )


def half(model: nn.Module) -> nn.Module:
    """Round in place what an fp16 build rounds."""
    for parameter in model.parameters():
        parameter.data = parameter.half().float()
    for norm in group_norms(model):
        norm.eps = float(torch.tensor(norm.eps).half())
    return model


@dataclass(frozen=True)
class Build:
    path: Path
    exact: nn.Module
    """Full precision."""
    stored: nn.Module
    """With the weights as they are stored."""
    target: str

    def runtime(self, exact: bool = False) -> Runtime:
        return get_target(self.target).runtime(self.path, exact=exact)


def build(make: Callable[[], nn.Module], target: str, precision: str, folder: Path) -> Build:
    stored = half(make()) if precision == "fp16" else make()
    path = folder / f"{target}-{precision}{get_target(target).suffix}"
    program = capture(stored, precision)
    if target == "tflite":
        # Without the second conversion that only locates taps.
        graph = lower_tflite(program)
        if precision == "fp16":
            store_layers_(graph, program)
        graph.save(path)
    else:
        get_target(target).lower(program, path, LowerOptions(), {"name": "t"})
    return Build(path, make(), stored, target)


@pytest.fixture(scope="module")
def builds(tmp_path_factory) -> Callable[[str, str], Build]:
    folder = tmp_path_factory.mktemp("maps")
    done: dict[tuple[str, str], Build] = {}

    def get(target: str, precision: str) -> Build:
        key = (target, precision)
        done[key] = done.get(key) or build(Segmenter, *key, folder)
        return done[key]

    return get


def picture(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*SIZE, 3), dtype=np.uint8)


def wanted(model: nn.Module, image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """In double: torch's own GroupNorm in float32 is 105 to 115 dB away on few pixels."""
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None].double()
    with torch.inference_mode():
        classes, logits = copy.deepcopy(model).double()(pixels)
    return classes.numpy(), logits.numpy()


@pytest.mark.parametrize(("target", "precision"), BUILDS)
def test_the_shipped_program_is_the_decoder(builds, target, precision):
    """With its stored weights, in float32; batch 1 of several pictures."""
    made = builds(target, precision)
    for seed in range(2):
        classes, logits = wanted(made.stored, picture(seed))
        found = made.runtime(exact=True).run({"image": picture(seed)}).outputs
        assert sqnr_db(logits, found["logits"]) >= STRUCTURE_DB
        # One pixel: where two classes are equal to the last bit either may be named.
        assert (found["class_map"] != classes).sum() <= 1
        assert len(np.unique(classes)) > 1, "a constant map shows nothing"


@pytest.mark.parametrize(("target", "precision"), BUILDS)
def test_what_is_shipped_names_the_same_classes(builds, target, precision):
    made = builds(target, precision)
    differing = []
    for seed in range(4):
        classes, logits = wanted(made.exact, picture(seed))
        found = made.runtime().run({"image": picture(seed)}).outputs
        differing.append((found["class_map"] != classes).mean())
        # Measured 52 to 63 dB at half precision, above 110 at full.
        assert sqnr_db(logits, found["logits"]) >= (110 if precision == "fp32" else 45)
    # A pixel of 3920 is 0.00026; random weights give broad ties, trained ones do not.
    assert max(differing) <= (0.0005 if precision == "fp32" else 0.01)


@pytest.mark.parametrize(("target", "precision"), BUILDS)
def test_names_shapes_and_types_are_those_promised(builds, target, precision):
    made = builds(target, precision)
    for exact in (False, True):
        found = made.runtime(exact=exact).run({"image": picture()}).outputs
        check_outputs(found, PROMISED, made.path)
        assert found["class_map"].min() >= 0
        assert found["class_map"].max() < 4


@pytest.mark.parametrize("fault", ["renamed", "swapped", "missing", "float", "planes"])
def test_other_outputs_than_promised_are_told(fault):
    good = {spec.name: np.zeros(spec.shape, spec.dtype) for spec in PROMISED}
    check_outputs(good, PROMISED, Path("a.onnx"))
    classes, logits = good["class_map"], good["logits"]
    faults = {
        "renamed": {"classes": classes, "logits": logits},
        "swapped": {"logits": logits, "class_map": classes},
        "missing": {"class_map": classes},
        "float": good | {"class_map": classes.astype(np.float32)},
        "planes": good | {"class_map": classes[:, None]},
    }
    with pytest.raises(BundleError, match=r"^a.onnx: .* promised.* Build it again.$") as caught:
        check_outputs(faults[fault], PROMISED, Path("a.onnx"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("target", ["onnx", "coreml", "tflite"])
def test_the_first_of_equal_classes_is_named(target, tmp_path):
    made = build(Twins, target, "fp32", tmp_path)
    assert (made.runtime().run({"image": picture()}).outputs["class_map"] == 1).all()


@pytest.mark.parametrize(("target", "precision"), BUILDS)
def test_every_group_norm_is_counted_in_running_order(builds, target, precision):
    made = builds(target, precision)
    found = get_target(target).norm_epsilons(made.path)
    epsilons = [norm.eps for norm in group_norms(made.stored)]
    assert len(set(epsilons)) == 8
    assert found == pytest.approx(epsilons, rel=1e-6)


def test_onnx_files_declare_whole_numbers(builds):
    import onnx

    for precision in ("fp32", "fp16"):
        graph = onnx.load(builds("onnx", precision).path).graph
        types = [port.type.tensor_type.elem_type for port in graph.output]
        assert types == [TensorProto.INT32, TensorProto.FLOAT]
        # No value may be declared half that an InstanceNormalization reads or gives.
        kinds = {v.name: v.type.tensor_type.elem_type for v in graph.value_info}
        norms = [node for node in graph.node if node.op_type == "InstanceNormalization"]
        assert len(norms) == 8
        for node in norms:
            assert kinds[node.output[0]] == TensorProto.FLOAT
            assert kinds.get(node.input[0], TensorProto.FLOAT) == TensorProto.FLOAT
        halves = [k for k in kinds.values() if k == TensorProto.FLOAT16]
        assert bool(halves) == (precision == "fp16")


def test_core_ml_declares_an_array_of_whole_numbers(builds):
    array: Any = FeatureTypes_pb2.ArrayFeatureType
    for precision in ("fp32", "fp16"):
        spec = ct.utils.load_spec(str(builds("coreml", precision).path))
        ports = {port.name: port.type.multiArrayType for port in spec.description.output}
        assert list(ports) == list(NAMES)
        assert tuple(ports["class_map"].shape) == (1, *SIZE)
        assert array.ArrayDataType.Name(ports["class_map"].dataType) == "INT32"
        assert array.ArrayDataType.Name(ports["logits"].dataType) == "FLOAT32"


# --- names: what a GroupNorm is written out to takes names of the same kinds


class Sums(nn.Module):
    """Sums before and behind a GroupNorm, whose own sum with epsilon is an ``add`` too."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.GroupNorm(2, 4) for _ in range(3))
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        """(1, 4, H, W) → the same."""
        for norm in self.norms:
            x = x + norm(x)
        return x


def test_a_sum_is_found_by_its_shape_where_its_name_is_taken(tmp_path):
    example = torch.randn(1, 4, 3, 5)
    program = torch.export.export(Sums(), (example,)).run_decompositions({})
    path = tmp_path / "sums.mlpackage"
    ct.convert(
        program,
        minimum_deployment_target=ct.target.iOS17,
        compute_precision=ct.precision.FLOAT32,
        skip_model_load=True,
    ).save(str(path))
    evaluator = PackageEvaluator(path)
    ambiguous = 0
    nodes = [node for node in program.graph.nodes if node.name.startswith("add")]
    wanted = [example]
    for norm in Sums().norms:
        wanted.append(wanted[-1] + norm(wanted[-1]).detach())
    values = {f"add_{k}" if k else "add": x for k, x in enumerate(wanted[1:])}
    assert [node.name for node in nodes] == list(values)
    for node in nodes:
        name = evaluator.locate(node.name, node.meta["val"].shape)
        found = evaluator.run({next(iter(evaluator.inputs)): example.numpy()}, False, keep=[name])
        assert sqnr_db(values[node.name].numpy(), found.values[name]) >= STRUCTURE_DB
        try:
            evaluator.locate(node.name)
        except ParityError:
            ambiguous += 1
    assert ambiguous, "no name was taken: this shows nothing"


def test_an_onnx_value_has_its_captured_name_behind_the_adaptors_own(builds):
    """The adaptor casts and transposes too; its nodes must not be taken for the decoder's."""
    import onnx

    for precision in ("fp32", "fp16"):
        graph = onnx.load(builds("onnx", precision).path).graph
        first, second = graph.node[:2]
        assert (first.op_type, list(first.output)) == ("Cast", ["adaptor__to_copy"])
        assert (second.op_type, list(second.output)) == ("Transpose", ["adaptor_permute"])
        program = capture(Segmenter()).program
        convolutions = [n.name for n in program.graph.nodes if n.name.startswith("conv2d")]
        assert [n.output[0] for n in graph.node if n.op_type == "Conv"][:-1] == convolutions[:-1]


# --- half precision and the statistics of group normalisations


def test_loud_activations_do_not_overflow(tmp_path):
    made = build(lambda: Segmenter(loud=150), "coreml", "fp16", tmp_path)
    found = made.runtime(exact=True).run({"image": picture()}).outputs
    assert sqnr_db(wanted(made.stored, picture())[1], found["logits"]) >= STRUCTURE_DB
    shipped = made.runtime().run({"image": picture()}).outputs
    assert sqnr_db(wanted(made.exact, picture())[1], shipped["logits"]) >= 45


def test_without_the_rule_they_do_and_it_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(coreml_precision, "normalisation_parts", lambda mean: [])
    made = build(lambda: Segmenter(loud=150), "coreml", "fp16", tmp_path)
    with pytest.raises(ParityError, match="half precision overflows at square_0"):
        made.runtime(exact=True).run({"image": picture()})
    shipped = made.runtime().run({"image": picture()}).outputs
    assert sqnr_db(wanted(made.exact, picture())[1], shipped["logits"]) < 45


def test_norms_written_as_batch_norms_would_fail_the_structural_gate(tmp_path, monkeypatch):
    """The converter's own pass divides by √1.00001 behind each of them."""
    monkeypatch.setattr(coreml_lower, "_UNWANTED_PASSES", ())
    made = build(Segmenter, "coreml", "fp32", tmp_path)
    assert get_target("coreml").count_operations(made.path)["batch_norm"] == 8
    found = made.runtime(exact=True).run({"image": picture()}).outputs
    assert sqnr_db(wanted(made.stored, picture())[1], found["logits"]) < STRUCTURE_DB
