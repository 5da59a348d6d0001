"""The evaluator against torch on whole converted models, and the faults that it must show."""

import copy
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

logging.getLogger("coremltools").setLevel(logging.ERROR)

import coremltools as ct  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from coremltools.proto import Model_pb2  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from dinoexport.errors import BundleError, ParityError, UnknownOperationError  # noqa: E402
from dinoexport.targets.coreml.evaluator import (  # noqa: E402
    PackageEvaluator,
    _round_to_half,
)
from dinoexport.targets.coreml.precision import half_before  # noqa: E402
from dinotrain.backbones.vit import VisionTransformer, ViTConfig, init_weights_  # noqa: E402
from dinotrain.errors import ShapeError, UsageError  # noqa: E402

SIZE = 56
STRUCTURE_DB = 110
"""Clean programs read 125 dB and more, the smallest planted fault here 100 dB and less."""


class Pixels(nn.Module):
    """A backbone over pixels in 0..255: mean and std lie in its patch convolution."""

    def __init__(self, ffn: str) -> None:
        super().__init__()
        torch.manual_seed(3)
        config = ViTConfig(
            name="tiny",
            embed_dim=64,
            depth=2,
            # One head of 64: its scale 1/8 is exact in half precision.
            heads=1,
            ffn="swiglu" if ffn == "swiglu" else "gelu",
            ffn_dim=168 if ffn == "swiglu" else 256,
            registers=4,
            grid=(SIZE // 14, SIZE // 14),
        )
        self.backbone = init_weights_(VisionTransformer(config), layer_scale=0.7)
        with torch.no_grad():
            # The converter adds CLS and its position before it rounds them; keep the sum exact.
            self.backbone.cls_token.zero_()
            # At their initial 1e-6 they round to zero, where the converter puts 6e-8 instead.
            self.backbone.register_tokens.normal_(std=0.02)
            conv = self.backbone.patch_embed.proj
            conv.weight /= 58
            conv.bias -= conv.weight.sum((1, 2, 3)) * 118
        self.eval()

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(1, 3, H, W) pixels → CLS, patches, and a tap after block 0."""
        out, taps = self.backbone.forward_taps(image, [0], norm="none")
        return out.cls_token, out.patch_tokens, taps[0]


def sqnr_db(reference: Tensor | np.ndarray, found: np.ndarray) -> float:
    wanted = np.asarray(reference, dtype=np.float64)
    noise = np.square(wanted - found).sum()
    return float(10 * np.log10(np.square(wanted).sum() / max(noise, 1e-300)))


def convert(model: nn.Module, example: Tensor, path: Path, precision, **keywords) -> Path:
    program = torch.export.export(model, (example,)).run_decompositions({})
    keywords.setdefault("inputs", [ct.ImageType(name="image", shape=tuple(example.shape))])
    keywords.setdefault("minimum_deployment_target", ct.target.iOS17)
    converted = ct.convert(program, compute_precision=precision, skip_model_load=True, **keywords)
    converted.save(str(path))
    return path


IMAGE = np.random.default_rng(5).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
PLANES = torch.from_numpy(IMAGE.transpose(2, 0, 1)[None].copy()).float()
OUTPUTS = [ct.TensorType(name=name, dtype=np.float32) for name in ("cls", "patches", "tap")]


@pytest.fixture(scope="module", params=["gelu", "swiglu"])
def ffn(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    folder = tmp_path_factory.mktemp("packages")

    def get(ffn: str, precision: str) -> Path:
        path = folder / f"{ffn}-{precision}.mlpackage"
        if not path.exists():
            convert(Pixels(ffn), PLANES, path, getattr(ct.precision, precision), outputs=OUTPUTS)
        return path

    return get


def half_weights(model: nn.Module) -> nn.Module:
    """The model with all that the converter stores in half precision rounded, epsilon included.

    The epsilon matters: 1e-6 becomes 1.0133e-6, which alone costs the tokens of small variance
    (CLS in block 0) all above about 95 dB.
    """
    rounded = copy.deepcopy(model)
    for module in rounded.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = float(np.float16(module.eps))
    with torch.no_grad():
        for parameter in rounded.parameters():
            parameter.copy_(parameter.half().float())
    return rounded


def reference(model: nn.Module) -> list[np.ndarray]:
    with torch.inference_mode():
        return [value.numpy() for value in model(PLANES)]


def parity_db(path: Path, model: nn.Module, round_activations: bool) -> list[float]:
    outputs = PackageEvaluator(path).run({"image": IMAGE}, round_activations).outputs
    assert list(outputs) == ["cls", "patches", "tap"]
    return [sqnr_db(r, f) for r, f in zip(reference(model), outputs.values(), strict=True)]


def test_float32_package_is_the_model(ffn: str, packages) -> None:
    assert min(parity_db(packages(ffn, "FLOAT32"), Pixels(ffn), False)) >= STRUCTURE_DB


def test_half_package_without_rounding_is_the_model_with_half_weights(ffn: str, packages) -> None:
    model = half_weights(Pixels(ffn))
    assert min(parity_db(packages(ffn, "FLOAT16"), model, False)) >= STRUCTURE_DB


def test_rounding_costs_what_half_precision_costs(ffn: str, packages) -> None:
    found = parity_db(packages(ffn, "FLOAT16"), half_weights(Pixels(ffn)), True)
    # 11 significant bits give about 66 dB per rounding; two blocks add some twenty of them.
    assert all(40 <= value <= 80 for value in found)


def test_named_outputs_stay_float32(packages) -> None:
    evaluator = PackageEvaluator(packages("gelu", "FLOAT16"))
    assert {name: port.dtype for name, port in evaluator.outputs.items()} == {
        "cls": "fp32",
        "patches": "fp32",
        "tap": "fp32",
    }
    assert evaluator.outputs["patches"].shape == (1, 16, 64)
    port = evaluator.inputs["image"]
    assert (port.shape, port.color) == ((1, 3, SIZE, SIZE), "RGB")


# Faults planted in a saved package.


def edit(source: Path, target: Path, change: Callable) -> Path:
    shutil.copytree(source, target)
    file = target / "Data/com.apple.CoreML/model.mlmodel"
    spec = Model_pb2.Model()
    spec.ParseFromString(file.read_bytes())
    function = spec.mlProgram.functions["main"]
    change(function.block_specializations[function.opset].operations)
    file.write_bytes(spec.SerializeToString())
    return target


def constant_of(operations, kind: str, name: str):
    """The value of a constant operand of the first operation of a kind."""
    user = next(op for op in operations if op.type == kind)
    wanted = user.inputs[name].arguments[0].name
    source = next(op for op in operations if op.outputs[0].name == wanted)
    return source.attributes["val"]


def tanh_gelu(operations) -> None:
    value = constant_of(operations, "gelu", "mode").immediateValue.tensor.strings
    assert value.values[0] == "EXACT"
    value.values[0] = "TANH_APPROXIMATION"


def ten_times_epsilon(operations) -> None:
    tensor = constant_of(operations, "layer_norm", "epsilon").immediateValue.tensor
    if tensor.WhichOneof("value") == "floats":
        tensor.floats.values[0] *= 10
    else:
        tensor.bytes.values = (np.frombuffer(tensor.bytes.values, np.float16) * 10).tobytes()


def missing_input(operations) -> None:
    next(op for op in operations if op.type == "matmul").inputs["x"].arguments[0].name = "nobody"


@pytest.mark.parametrize("precision", ["FLOAT32", "FLOAT16"])
@pytest.mark.parametrize("fault", [tanh_gelu, ten_times_epsilon], ids=lambda fault: fault.__name__)
def test_structural_gate_shows_a_fault(
    fault: Callable, precision: str, packages, tmp_path: Path
) -> None:
    path = edit(packages("gelu", precision), tmp_path / "faulty.mlpackage", fault)
    model = Pixels("gelu")
    model = half_weights(model) if precision == "FLOAT16" else model
    assert min(parity_db(path, model, False)) < STRUCTURE_DB - 5


def test_settings_show_a_fault_that_small_activations_hide(packages, tmp_path: Path) -> None:
    clean = packages("gelu", "FLOAT16")
    path = edit(clean, tmp_path / "faulty.mlpackage", tanh_gelu)
    modes = [
        [op.settings["mode"] for op in PackageEvaluator(package).operations if op.kind == "gelu"]
        for package in (clean, path)
    ]
    assert modes == [["EXACT", "EXACT"], ["TANH_APPROXIMATION", "EXACT"]]
    norm = next(op for op in PackageEvaluator(clean).operations if op.kind == "layer_norm")
    assert norm.settings == {"epsilon": float(np.float16(1e-6))}


def test_structural_gate_shows_one_changed_byte(packages, tmp_path: Path) -> None:
    path = tmp_path / "faulty.mlpackage"
    shutil.copytree(packages("gelu", "FLOAT16"), path)
    weights = path / "Data/com.apple.CoreML/weights/weight.bin"
    data = bytearray(weights.read_bytes())
    # Upper half of a patch-convolution weight: its exponent changes by one.
    data[len(data) // 8 * 2 + 1] ^= 0x04
    weights.write_bytes(data)
    assert min(parity_db(path, half_weights(Pixels("gelu")), False)) < STRUCTURE_DB - 5


def test_unknown_operation_is_refused_before_anything_runs(packages, tmp_path: Path) -> None:
    def rename(operations) -> None:
        next(op for op in operations if op.type == "softmax").type = "softmax_of_tomorrow"

    path = edit(packages("gelu", "FLOAT32"), tmp_path / "odd.mlpackage", rename)
    with pytest.raises(UnknownOperationError, match=r"softmax_of_tomorrow.*softmax.*'main'"):
        PackageEvaluator(path)


def test_program_that_cannot_be_read_is_a_bundle_error(packages, tmp_path: Path) -> None:
    path = edit(packages("gelu", "FLOAT32"), tmp_path / "odd.mlpackage", missing_input)
    with pytest.raises(BundleError, match="cannot be read") as caught:
        PackageEvaluator(path)
    assert "\n" not in str(caught.value)


# Names.


class Recorder(torch.fx.Interpreter):
    """Keeps every tensor of one run of a captured program by node name."""

    def __init__(self, module: torch.fx.GraphModule) -> None:
        super().__init__(module)
        self.found: dict[str, Tensor] = {}

    def run_node(self, n: torch.fx.Node):
        value = super().run_node(n)
        if isinstance(value, Tensor):
            self.found[n.name] = value
        return value


@pytest.mark.parametrize("precision", ["FLOAT32", "FLOAT16"])
def test_located_nodes_hold_the_nodes_values(precision: str, packages) -> None:
    evaluator = PackageEvaluator(packages("gelu", precision))
    program = torch.export.export(half_weights(Pixels("gelu")), (PLANES,))
    if precision == "FLOAT32":
        program = torch.export.export(Pixels("gelu"), (PLANES,))
    recorder = Recorder(program.run_decompositions({}).module())
    with torch.inference_mode():
        recorder.run(PLANES)
    located, refused = {}, []
    for name, value in recorder.found.items():
        try:
            located[name] = evaluator.locate(name, tuple(value.shape))
        except ParityError:
            refused.append(name)
    values = evaluator.run({"image": IMAGE}, False, keep=located.values()).values
    for name, variable in located.items():
        assert sqnr_db(recorder.found[name], values[variable]) >= STRUCTURE_DB, name
    # The sum with the position, and two residual sums in each of two blocks.
    suffix = "" if precision == "FLOAT32" else "_cast_fp16"
    for name in ("add", "add_2", "add_3", "add_4", "add_5"):
        assert located[name] == name + suffix
    assert "transpose_1" in refused


def test_nodes_named_stay_float32_with_all_after_them(tmp_path: Path) -> None:
    precision = ct.transform.FP16ComputePrecision(op_selector=half_before({"add_5"}))
    path = convert(Pixels("gelu"), PLANES, tmp_path / "p.mlpackage", precision, outputs=OUTPUTS)
    evaluator = PackageEvaluator(path)
    dtypes = {name: op.dtypes[0] for op in evaluator.operations for name in op.outputs}
    assert dtypes[evaluator.locate("add_5")] == "fp32"
    assert dtypes["cls"] == "fp32"
    assert dtypes[evaluator.locate("add_4")] == "fp16"


# Overflow, and other kinds of input.


class Squares(nn.Module):
    """Overflows half precision for inputs above 255 and ends small and finite again."""

    def forward(self, image: Tensor) -> Tensor:
        """x → x²/(x² + 1)."""
        squares = image * image
        return squares / (squares + 1)


@pytest.mark.parametrize("rounded", [True, False], ids=["rounded", "exact"])
def test_watching_finds_where_half_precision_overflows(rounded: bool, tmp_path: Path) -> None:
    example = torch.rand(1, 3, 4, 4)
    inputs = [ct.TensorType(name="image", shape=example.shape)]
    path = convert(
        Squares(), example, tmp_path / "s.mlpackage", ct.precision.FLOAT16, inputs=inputs
    )
    evaluator = PackageEvaluator(path)
    mul = evaluator.locate("mul")
    calm = evaluator.run({"image": np.full((1, 3, 4, 4), 200.0)}, rounded, watch=True)
    loud = evaluator.run({"image": np.full((1, 3, 4, 4), 300.0)}, rounded, watch=True)
    assert calm.overflowed == ()
    assert loud.overflowed[0] == mul
    peak = next(peak for peak in loud.peaks if peak.output == mul)
    assert (peak.kind, peak.dtype, peak.max_abs) == ("mul", "fp16", 90000.0)


@pytest.mark.parametrize("layout", ["RGB", "BGR", "GRAYSCALE"])
def test_image_layout_scale_and_bias(layout: str, tmp_path: Path) -> None:
    gray = layout == "GRAYSCALE"
    channels = 1 if gray else 3
    bias = [-1.0] if gray else [-1.0, -2.0, -3.0]
    example = torch.rand(1, channels, SIZE, SIZE)
    image_type = ct.ImageType(
        name="image",
        shape=example.shape,
        scale=0.5,
        bias=bias[0] if gray else bias,
        color_layout=getattr(ct.colorlayout, layout),
    )
    path = convert(
        nn.Hardtanh(-50.5, 50.5), example, tmp_path / "i.mlpackage", ct.precision.FLOAT32,
        inputs=[image_type],
    )  # fmt: skip
    evaluator = PackageEvaluator(path)
    assert evaluator.inputs["image"].color == layout
    image = IMAGE[..., 0] if gray else IMAGE
    (found,) = evaluator.run({"image": image}, False).outputs.values()
    planes = [image] if gray else [image[..., c] for c in range(3)]
    planes = planes[::-1] if layout == "BGR" else planes
    for channel, plane in enumerate(planes):
        wanted = (plane * 0.5 + bias[channel]).clip(-50.5, 50.5)
        np.testing.assert_allclose(found[0, channel], wanted, rtol=1e-6)


class Three(nn.Module):
    """Three images in one batch, as the lid-distance model takes them."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = Pixels("gelu")

    def forward(self, left: Tensor, right: Tensor, both: Tensor) -> Tensor:
        """Three (1, 3, H, W) → (1, 3·D)."""
        return self.backbone(torch.cat([left, right, both]))[0].reshape(1, -1)


def test_three_images(tmp_path: Path) -> None:
    program = torch.export.export(Three(), (PLANES, PLANES.clone(), PLANES.clone()))
    names = ("left", "right", "both")
    converted = ct.convert(
        program.run_decompositions({}),
        minimum_deployment_target=ct.target.iOS17,
        compute_precision=ct.precision.FLOAT32,
        inputs=[ct.ImageType(name=name, shape=tuple(PLANES.shape)) for name in names],
        skip_model_load=True,
    )
    path = tmp_path / "three.mlpackage"
    converted.save(str(path))
    images = {name: np.roll(IMAGE, 9 * index, axis=1) for index, name in enumerate(names)}
    (found,) = PackageEvaluator(path).run(images, False).outputs.values()
    tensors = [torch.from_numpy(i.transpose(2, 0, 1)[None].copy()).float() for i in images.values()]
    with torch.inference_mode():
        assert sqnr_db(Three()(*tensors), found) >= STRUCTURE_DB


class Decoder(nn.Module):
    """What a segmentation head is made of, beside an attention that stays one operation."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.up = nn.ConvTranspose2d(3, 8, 3, stride=2, padding=1, output_padding=1)
        self.norm = nn.GroupNorm(4, 8)
        self.batch = nn.BatchNorm2d(8)
        self.batch.running_var.uniform_(0.5, 2)
        self.out = nn.Conv2d(8, 5, 3, padding=1)
        self.eval()

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """(1, 3, H, W) → logits and classes."""
        x = F.silu(self.batch(self.norm(self.up(image / 255))))
        x = F.interpolate(F.avg_pool2d(x, 2), scale_factor=2, mode="nearest") + x
        x = F.max_pool2d(F.leaky_relu(x), 3, stride=2, padding=1)
        rows = x.flatten(2).transpose(1, 2)[None][:, :, :20]
        mixed = F.scaled_dot_product_attention(rows, rows, rows).mean((1, 2))[..., None, None]
        x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False) + mixed
        logits = self.out(x)
        return logits, logits.argmax(1)


def test_decoder_for_ios18(tmp_path: Path) -> None:
    path = convert(
        Decoder(), PLANES, tmp_path / "d.mlpackage", ct.precision.FLOAT32,
        minimum_deployment_target=ct.target.iOS18,
    )  # fmt: skip
    evaluator = PackageEvaluator(path)
    assert evaluator.counts["scaled_dot_product_attention"] == 1
    assert evaluator.counts["conv_transpose"] == 1
    logits, classes = evaluator.run({"image": IMAGE}, False).outputs.values()
    with torch.inference_mode():
        wanted, wanted_classes = Decoder()(PLANES)
    assert sqnr_db(wanted, logits) >= STRUCTURE_DB
    assert classes.dtype == np.int32
    # Ties within float32 noise may fall either way.
    assert (classes == wanted_classes.numpy()).mean() > 0.999


# What a caller may get wrong.


def test_inputs_are_checked(packages) -> None:
    evaluator = PackageEvaluator(packages("gelu", "FLOAT32"))
    with pytest.raises(UsageError, match=r"unknown input 'imge'\. Did you mean 'image'"):
        evaluator.run({"imge": IMAGE}, False)
    with pytest.raises(UsageError, match="'image' was not given"):
        evaluator.run({}, False)
    with pytest.raises(ShapeError, match=r"float32 \(56, 56, 3\); it takes uint8 \(56, 56, 3\)"):
        evaluator.run({"image": IMAGE.astype(np.float32)}, False)
    with pytest.raises(ShapeError, match=r"\(28, 56, 3\)"):
        evaluator.run({"image": IMAGE[::2]}, False)
    with pytest.raises(UsageError, match="unknown variable 'add_33'"):
        evaluator.run({"image": IMAGE}, False, keep=["add_33"])
    with pytest.raises(UsageError, match="unknown function 'mian'"):
        PackageEvaluator(evaluator.path, function="mian")
    with pytest.raises(ParityError, match="no variable for node 'div_7'"):
        evaluator.locate("div_7")


def test_rounding_in_parts_is_rounding() -> None:
    """Every kind of number, and a number of them that is no multiple of a part."""
    torch.manual_seed(0)
    kinds = torch.tensor([0.0, -0.0, 65519.9, 65520.0, -1e9, 6e-8, 2e-8, 1 + 2**-11, torch.inf])
    spread = torch.randn(3, 7001) * 10.0 ** torch.randint(-9, 6, (3, 7001))
    for values in (kinds, spread, torch.tensor(0.1), torch.empty(0, 4)):
        wanted = values.half().float()
        found = _round_to_half(values)
        assert found.shape == values.shape
        assert torch.equal(found.view(torch.int32), wanted.view(torch.int32))
    assert torch.equal(_round_to_half(spread.T), spread.T.half().float())
    assert _round_to_half(torch.tensor([torch.nan])).isnan().all()
