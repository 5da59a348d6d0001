"""The reference: right values, the same places each time, and a file that cannot lie unnoticed."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import save
from safetensors.torch import save_file
from torch import nn

from dinoexport.errors import ParityError
from dinoexport.passes import fold_layer_norms, fold_layer_scale, fold_normalisation
from dinoexport.passes.sequence import build_deploy_model
from dinoexport.recipes import parse_recipe
from dinoexport.verify import reference as module
from dinoexport.verify.metrics import max_error, sqnr_db
from dinoexport.verify.norms import Norm
from dinoexport.verify.parity import STRUCTURE_DB
from dinoexport.verify.reference import Reference, Values, make_reference
from dinoexport.verify.reference_file import encode_reference, load_reference
from dinotrain.backbones.vit import ViTConfig, init_weights_
from dinotrain.checkpoint import CheckpointConfig, load_checkpoint
from dinotrain.heads.branch import HeadConfig
from dinotrain.model import TaskModel
from dinotrain.tasks import get_task

CPU = torch.device("cpu")
TAPS = ["tokens", "blocks.0.attn", "blocks.0.mlp", "blocks.1.attn", "blocks.1.mlp", "features"]
OUTPUTS = ["mrd1_mm", "mrd2_mm", "lf_mm"]
PREFIX, TOKENS, WIDTH = 3, 19, 64
"""CLS and two registers, then 4 × 4 patches."""


@pytest.fixture
def model(tiny_checkpoint: Path) -> TaskModel:
    return load_checkpoint(tiny_checkpoint)[0]


def other_model(seed: int = 5, members: int = 1, depth: int = 1) -> TaskModel:
    torch.manual_seed(seed)
    backbone = ViTConfig(
        name="other", embed_dim=WIDTH, depth=depth, heads=1, ffn_dim=48, grid=(4, 4), registers=2
    )
    head = HeadConfig(kind="ensemble", members=members, hidden=8) if members > 1 else HeadConfig()
    made = TaskModel(
        CheckpointConfig(task="eyelid", backbone=backbone, image_size=(56, 56), head=head)
    )
    init_weights_(made.backbone)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return made.eval().requires_grad_(False)


EYELID = get_task("eyelid")
SEGMENT = get_task("segment")


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises(ParityError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def arrays(reference: Reference) -> dict[str, np.ndarray]:
    """Every array of a reference by a name of its own."""
    found = {f"input {n}": v for n, v in reference.inputs.items()}
    found |= {f"positions {n}": v for n, v in reference.positions.items()}
    for kind, values in {"exact": reference.exact, **reference.deployed}.items():
        found |= {f"{kind} output {n}": v for n, v in values.outputs.items()}
        found |= {f"{kind} tap {n}": v for n, v in values.taps.items()}
    return found


# --- its values ----------------------------------------------------------------------------------


@torch.no_grad()
def by_hooks(model: TaskModel, sample: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Taps of the trained model as its own layers read them, by hooks; outputs beside them.

    The model may run its images one by one, so what was seen is put together.
    """
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in TAPS}

    def keep(name: str):
        return lambda _module, inputs: seen[name].append(inputs[0])

    blocks: Any = model.backbone.blocks
    hooks = [
        blocks[0].norm1.register_forward_pre_hook(keep("tokens")),
        blocks[0].norm2.register_forward_pre_hook(keep("blocks.0.attn")),
        blocks[1].norm1.register_forward_pre_hook(keep("blocks.0.mlp")),
        blocks[1].norm2.register_forward_pre_hook(keep("blocks.1.attn")),
        model.backbone.norm.register_forward_pre_hook(keep("blocks.1.mlp")),
        model.pool.register_forward_hook(
            lambda _module, _inputs, output: seen["features"].append(output)
        ),
    ]
    pixels = {
        name: torch.from_numpy(image.astype(np.float32).transpose(2, 0, 1)[None])
        for name, image in sample.items()
    }
    outputs = model(pixels)
    for hook in hooks:
        hook.remove()
    taps = {name: torch.cat(values).numpy() for name, values in seen.items()}
    return taps | {name: value.numpy() for name, value in outputs.items()}


def test_values_are_those_of_the_trained_model(reference: Reference, model: TaskModel) -> None:
    assert list(reference.exact.taps) == TAPS
    assert list(reference.exact.outputs) == OUTPUTS
    for index in range(reference.samples):
        seen = by_hooks(model, reference.sample(index))
        for name in TAPS:
            wanted = seen[name].reshape(-1)[reference.positions[name]]
            # The same operations in float32; blocks may be batched otherwise.
            assert sqnr_db(wanted, reference.exact.taps[name][index]) >= 130, name
        for name in OUTPUTS:
            assert abs(float(seen[name]) - float(reference.exact.outputs[name][index])) < 1e-5


def test_rounded_values_are_those_of_rounded_weights(reference: Reference) -> None:
    rounded, exact = reference.deployed["fp16"], reference.exact.at(reference.few)
    assert reference.structural(parse_recipe("fp16")) is rounded
    # The deploy graph's own: what is folded there is not the artifact's fault.
    assert reference.structural(parse_recipe("fp32")) is reference.deployed["fp32"]
    for name in TAPS:
        level = sqnr_db(exact.taps[name], rounded.taps[name])
        # Half precision keeps 11 bits: 66 dB for each weight, more or less in their sums.
        assert 50 < level < 90, name
    for name in OUTPUTS:
        assert 0 < max_error(exact.outputs[name], rounded.outputs[name]) < 0.02


def test_making_it_leaves_everything_as_it_was(model: TaskModel) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        make_reference(model, "0" * 64, CPU)
        assert torch.backends.cuda.matmul.allow_tf32 is True
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False
    assert torch.is_grad_enabled()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_it_says_where_it_comes_from(reference: Reference, tiny_checkpoint: Path) -> None:
    info = reference.info
    assert info.checkpoint_sha256 == hashlib.sha256(tiny_checkpoint.read_bytes()).hexdigest()
    assert info.device == "CPU (float32); no GPU was used"
    assert info.versions["torch"] == torch.__version__
    assert (info.task, info.image_size) == ("eyelid", (56, 56))


# --- its places ----------------------------------------------------------------------------------


def test_places_are_the_same_each_time(
    reference: Reference, make: Callable, tiny_checkpoint: Path
) -> None:
    torch.manual_seed(99)
    np.random.seed(99)
    again = make(tiny_checkpoint, CPU)
    assert encode_reference(again) == encode_reference(reference)


def test_places_do_not_depend_on_the_weights(reference: Reference) -> None:
    """So that references of two checkpoints of one architecture can be compared."""
    first, second = (
        make_reference(other_model(seed, depth=2), "0" * 64, CPU).positions for seed in (5, 6)
    )
    for name in TAPS:
        assert np.array_equal(first[name], second[name])
        assert np.array_equal(first[name], reference.positions[name])


def test_places_cover_prefix_and_patches(reference: Reference) -> None:
    for name, places in reference.positions.items():
        assert (np.diff(places) > 0).all()
        if name == "features":
            # Small enough to be kept whole: three inputs of CLS and mean.
            assert places.tolist() == list(range(3 * 2 * WIDTH))
            continue
        image, rest = np.divmod(places, TOKENS * WIDTH)
        token, channel = np.divmod(rest, WIDTH)
        assert set(image) == {0, 1, 2}
        assert set(token) == set(range(TOKENS))
        assert set(channel) == set(range(WIDTH))
        # A fault may sit in one register alone: each is looked at densely in every image.
        for number in range(3):
            for prefix in range(PREFIX):
                assert ((image == number) & (token == prefix)).sum() >= 16


def test_a_sketch_takes_those_places(reference: Reference) -> None:
    flat = np.arange(3 * TOKENS * WIDTH, dtype=np.float64).reshape(3, TOKENS, WIDTH)
    taken = reference.sketch("tokens", flat)
    assert taken.dtype == np.float32
    assert np.array_equal(taken, reference.positions["tokens"])


# --- LayerNorms ----------------------------------------------------------------------------------


def test_norms_in_running_order(reference: Reference) -> None:
    norms = reference.norms(parse_recipe("fp32"))
    assert [n.layer for n in norms] == [*TAPS[1:], "head", "head"]
    assert [n.epsilon for n in norms] == [1e-6] * 5 + [1e-5] * 2
    # One of the head reads primary gaze, the other three gazes.
    assert not any(n.optional for n in norms)
    rounded = reference.norms(parse_recipe("fp16"))
    assert [n.epsilon for n in rounded] == [float(np.float16(n.epsilon)) for n in norms]
    assert [n.layer for n in rounded] == [n.layer for n in norms]


def test_norms_of_an_ensemble_are_repeated() -> None:
    """Its members read the same features, each with a LayerNorm per branch."""
    norms = make_reference(other_model(members=3), "0" * 64, CPU).info.norms
    head = [n for n in norms if n.layer == "head"]
    assert [n.optional for n in head] == [False] * 2 + [True] * 4
    assert not any(n.optional for n in norms if n.layer != "head")


def test_a_norm_of_another_epsilon_is_not_repeated() -> None:
    model = other_model(members=2)
    head = [m for m in model.head.modules() if isinstance(m, nn.LayerNorm)]
    head[-1].eps = 1e-3
    norms = make_reference(model, "0" * 64, CPU).info.norms
    assert norms[-1] == Norm("head", 1e-3, False)
    assert norms[-2].optional


# --- the deploy graph is checked -----------------------------------------------------------------


def scale_wrong(conv: nn.Conv2d, mean: torch.Tensor, std: torch.Tensor) -> None:
    FOLD(conv, mean, std * 1.01)


def mean_forgotten(conv: nn.Conv2d, mean: torch.Tensor, std: torch.Tensor) -> None:
    FOLD(conv, torch.zeros_like(mean), std)


def bias_forgotten(block: Any) -> None:
    block.norm1.bias.zero_()
    FOLD_NORMS(block)


def scale_forgotten(block: Any) -> None:
    block.ls2.gamma.fill_(1.0)
    FOLD_SCALE(block)


FOLD = fold_normalisation.fold_normalisation_
FOLD_NORMS = fold_layer_norms.fold_layer_norms_
FOLD_SCALE = fold_layer_scale.fold_layer_scale_


@pytest.mark.parametrize(
    ("where", "fault"),
    [
        (fold_normalisation, scale_wrong),
        (fold_normalisation, mean_forgotten),
        (fold_layer_norms, bias_forgotten),
        (fold_layer_scale, scale_forgotten),
    ],
    ids=["std", "mean", "bias", "scale"],
)
def test_a_fault_in_the_deploy_graph_is_caught(
    model: TaskModel, monkeypatch, where: Any, fault: Callable[..., None]
) -> None:
    monkeypatch.setattr(where, f"{where.__name__.split('.')[-1]}_", fault)
    error = refusal(lambda: make_reference(model, "0" * 64, CPU))
    assert error.startswith("the deploy graph")
    assert "please report it" in error


def test_folding_nothing_passes_that_check(model: TaskModel, monkeypatch) -> None:
    """It is the values that are compared, not the way."""
    monkeypatch.setattr(fold_layer_scale, "fold_layer_scale_", lambda _block: None)
    make_reference(model, "0" * 64, CPU)


def test_what_the_deploy_check_accepts() -> None:
    good = Values({"lf_mm": np.full(6, 20.0)}, {"tokens": np.ones((6, 9)), "features": np.ones(6)})
    module._check_deploy(good, good, EYELID)
    near = good.outputs["lf_mm"] + 0.9 * EYELID.budgets.deploy
    module._check_deploy(good, Values({"lf_mm": near}, good.taps), EYELID)
    far = good.outputs["lf_mm"].copy()
    far[3] += 1.1 * EYELID.budgets.deploy
    error = refusal(lambda: module._check_deploy(good, Values({"lf_mm": far}, good.taps), EYELID))
    assert "lf_mm leaves the training model by 0.00011, budget 0.0001" in error
    # 1e-5 off is 100 dB; where outputs hide it, the tap does not.
    off = good.taps | {"features": np.full(6, 1 + 1.2e-5)}
    error = refusal(lambda: module._check_deploy(good, Values(good.outputs, off), EYELID))
    assert "leaves the training model at features" in error


def test_a_pixel_between_two_classes_is_no_fault_of_the_deploy_graph() -> None:
    """Float32 sums of another order settle ties another way; one pixel of 84×98 is 1.2e-4."""
    good = Values({"class_map": np.zeros((6, 84, 98))}, {"features": np.ones(6)})
    changed = good.outputs["class_map"].copy()
    changed[2, 40, :1] = 1
    module._check_deploy(good, Values({"class_map": changed}, good.taps), SEGMENT)
    changed[2, 40, :5] = 1
    other = Values({"class_map": changed}, good.taps)
    error = refusal(lambda: module._check_deploy(good, other, SEGMENT))
    assert "class_map leaves the training model by 0.00061, budget 0.0005" in error


@pytest.mark.parametrize("size", [1e30, 1e38])
def test_a_model_that_overflows_is_the_checkpoints_fault(model: TaskModel, size: float) -> None:
    with torch.no_grad():
        model.backbone.blocks[1].mlp.fc1.weight[0] = size  # type: ignore[union-attr,index]
        model.backbone.blocks[1].mlp.fc2.weight[:, 0] = size  # type: ignore[union-attr,index]
    error = refusal(lambda: make_reference(model, "0" * 64, CPU))
    assert "the checkpoint gives values that are not finite at blocks.1.mlp" in error
    assert "please report" not in error


# --- the file ------------------------------------------------------------------------------------


def test_round_trip_keeps_every_bit(reference: Reference, tmp_path: Path) -> None:
    raw = encode_reference(reference)
    assert encode_reference(reference) == raw
    file = tmp_path / "reference.safetensors"
    file.write_bytes(raw)
    again = load_reference(file)
    assert again.info == reference.info
    assert again.samples == reference.samples == 6
    first, second = arrays(reference), arrays(again)
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert value.dtype == second[name].dtype, name
        assert value.shape == second[name].shape, name
        assert value.tobytes() == second[name].tobytes(), name
    assert encode_reference(again) == raw


def test_special_values_keep_their_bits(reference: Reference, tmp_path: Path) -> None:
    odd = np.array([0.0, -0.0, 1e-45, -1e-38, 3.4e38, np.nextafter(1, 2)], np.float32)
    outputs = reference.exact.outputs | {"lf_mm": odd}
    file = tmp_path / "r"
    file.write_bytes(
        encode_reference(
            Reference(
                reference.info,
                reference.inputs,
                Values(outputs, reference.exact.taps),
                reference.deployed,
                reference.positions,
            )
        )
    )
    assert load_reference(file).exact.outputs["lf_mm"].tobytes() == odd.tobytes()


Parts = tuple[dict[str, np.ndarray], dict[str, Any]]


@pytest.fixture
def edit(reference: Reference, tmp_path: Path) -> Callable[[Callable[..., object]], Path]:
    """Give a reference file of which ``change(tensors, header)`` changed the parts."""

    def write(change: Callable[..., object]) -> Path:
        file = tmp_path / "r.safetensors"
        file.write_bytes(encode_reference(reference))
        with safe_open(file, framework="numpy") as opened:
            tensors = {name: opened.get_tensor(name).copy() for name in opened.keys()}  # noqa: SIM118
            header = json.loads(opened.metadata()["reference"])
        change(tensors, header)
        file.write_bytes(save(tensors, metadata={"reference": json.dumps(header)}))
        return file

    return write


def test_an_unedited_file_is_read(edit, reference: Reference) -> None:
    assert load_reference(edit(lambda _tensors, _header: None)).info == reference.info


def drop(prefix: str) -> Callable[..., None]:
    def change(tensors: dict[str, np.ndarray], _header: object) -> None:
        names = [name for name in tensors if name.startswith(prefix)]
        assert names
        for name in names:
            del tensors[name]

    return change


def alter(name: str, how: Callable[[np.ndarray], np.ndarray]) -> Callable[..., None]:
    def change(tensors: dict[str, np.ndarray], _header: object) -> None:
        tensors[name] = np.ascontiguousarray(how(tensors[name]))

    return change


def no_samples(tensors: dict[str, np.ndarray], _header: object) -> None:
    for name, value in tensors.items():
        if not name.startswith("positions."):
            tensors[name] = np.ascontiguousarray(value[:0])


def no_places(tensors: dict[str, np.ndarray], _header: object) -> None:
    for kind in ("exact.tap.tokens", "fp16.tap.tokens"):
        tensors[kind] = np.ascontiguousarray(tensors[kind][:, :0])
    tensors["positions.tokens"] = tensors["positions.tokens"][:0].copy()


def with_nan(value: np.ndarray) -> np.ndarray:
    value[-1] = np.nan
    return value


def add(name: str) -> Callable[..., None]:
    def change(tensors: dict[str, np.ndarray], _header: object) -> None:
        tensors[name] = np.zeros((6, 4), np.float32)

    return change


MISFITS = {
    "no-inputs": drop("input."),
    "no-outputs": drop("exact.output."),
    "no-taps": drop("exact.tap."),
    "no-places": drop("positions."),
    "no-rounded-values": drop("fp16."),
    "a-rounded-tap-missing": drop("fp16.tap.features"),
    "a-tap-missing": drop("exact.tap.features"),
    "a-place-missing": drop("positions.features"),
    "an-output-missing": drop("fp16.output.lf_mm"),
    "a-tap-more": add("exact.tap.blocks.9.attn"),
    "places-of-no-tap": add("positions.blocks.9.attn"),
    "inputs-of-another-size": alter("input.up", lambda v: v[:, :42]),
    "inputs-of-another-count": alter("input.up", lambda v: v[:5]),
    "inputs-of-another-type": alter("input.up", lambda v: v.astype(np.float32)),
    "an-input-that-is-a-number": alter("input.primary", lambda _v: np.array(3, np.uint8)),
    "outputs-of-another-count": alter("exact.output.lf_mm", lambda v: v[:5]),
    "outputs-misshapen": alter("fp16.output.lf_mm", lambda v: v[:, None]),
    "taps-of-another-count": alter("exact.tap.tokens", lambda v: v[:5]),
    "taps-of-other-places": alter("exact.tap.tokens", lambda v: v[:, 1:]),
    "places-cut": alter("positions.tokens", lambda v: v[1:]),
    "places-misshapen": alter("positions.tokens", lambda v: v[:, None]),
    "places-of-one-number": alter("positions.tokens", lambda _v: np.array(3, np.int32)),
    "places-no-integers": alter("positions.tokens", lambda v: v.astype(np.float32)),
    "places-below-zero": alter("positions.tokens", lambda v: v - 1000),
    "no-samples": no_samples,
    "a-tap-without-places": no_places,
    "output-nan": alter("exact.output.lf_mm", with_nan),
    "tap-nan": alter("exact.tap.features", with_nan),
    "rounded-tap-nan": alter("fp16.tap.features", with_nan),
    "another-size-in-the-header": lambda _t, header: header.update(image_size=[70, 56]),
    "a-precision-that-is-not-there": lambda _t, header: header["deployed"].append("int8"),
}


@pytest.mark.parametrize("change", MISFITS.values(), ids=MISFITS)
def test_parts_that_do_not_fit(edit, change: Callable[..., object]) -> None:
    file = edit(change)
    error = refusal(lambda: load_reference(file))
    assert error == (
        f"{file}: the parts of the reference do not fit together. "
        "Make it again with `dinoexport reference`."
    )


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda h: h.update(format_version=9), "reference format 9, this version reads 2"),
        (lambda h: h.update(colour="red"), "unknown field `colour`"),
        (lambda h: h["norms"][0].pop("optional"), "missing required field `optional`"),
        (lambda h: h.update(image_size=[56]), "image_size"),
        (lambda h: h.pop("task"), "missing required field `task`"),
        (lambda h: h.clear(), "missing required field"),
    ],
    ids=["version", "unknown", "norm", "size", "missing", "empty"],
)
def test_foreign_headers(edit, change: Callable[[dict], object], says: str) -> None:
    file = edit(lambda _tensors, header: change(header))
    error = refusal(lambda: load_reference(file))
    assert error.startswith(f"{file}: ")
    assert says in error
    assert "`dinoexport reference`" in error


@pytest.mark.parametrize("share", [0.0, 0.0001, 0.01, 0.5, 0.99999])
def test_a_truncated_file(reference: Reference, tmp_path: Path, share: float) -> None:
    file = tmp_path / "cut.safetensors"
    raw = encode_reference(reference)
    file.write_bytes(raw[: int(share * len(raw))])
    assert f"{file}: not a reference file" in refusal(lambda: load_reference(file))


def test_a_file_that_is_too_long(reference: Reference, tmp_path: Path) -> None:
    file = tmp_path / "long.safetensors"
    file.write_bytes(encode_reference(reference) + b"\0")
    assert "not a reference file" in refusal(lambda: load_reference(file))


def test_any_changed_byte_of_the_header_is_refused_or_harmless(
    reference: Reference, tmp_path: Path
) -> None:
    """Whatever a byte turns into, there is no traceback."""
    raw = encode_reference(reference)
    size = int.from_bytes(raw[:8], "little")
    file = tmp_path / "r.safetensors"
    refused = 0
    for place in range(0, 8 + size, 61):
        for value in (0x00, 0x22, 0x5B, 0xFF, raw[place] ^ 1):
            file.write_bytes(raw[:place] + bytes([value]) + raw[place + 1 :])
            try:
                load_reference(file)
            except ParityError as error:
                assert "\n" not in str(error)
                refused += 1
    # A digit of a version or a letter of the device's name may differ and nothing be wrong.
    assert refused > 100


def test_files_that_are_something_else(tmp_path: Path) -> None:
    cases = {
        "text": b"this is no reference, and it is longer than a header's length",
        "pickle": b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00\x8c\x02os\x94.",
        "zip": b"PK\x03\x04" + bytes(60),
        "zeros": bytes(100),
        "huge-header": (2**62).to_bytes(8, "little") + b"{}",
    }
    for name, content in cases.items():
        (tmp_path / name).write_bytes(content)
        assert "not a reference file" in refusal(lambda n=name: load_reference(tmp_path / n))
    for name in ("missing", "."):
        assert "no such reference" in refusal(lambda n=name: load_reference(tmp_path / n))


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "float8_e4m3fn"])
def test_other_safetensors_files(tmp_path: Path, kind: str, reference: Reference) -> None:
    """Some types are unknown to NumPy, with and without the header of a reference."""
    tensor = {"a": torch.zeros(3).to(getattr(torch, kind))}
    header = json.loads(save_header(reference))
    for metadata in (
        None,
        {"format": "pt"},
        {"reference": "[]"},
        {"reference": json.dumps(header)},
    ):
        file = tmp_path / "weights.safetensors"
        save_file(tensor, file, metadata=metadata)
        error = refusal(lambda f=file: load_reference(f))
        assert "not a reference file" in error or "do not fit together" in error


def save_header(reference: Reference) -> str:
    return msgspec.json.encode(reference.info).decode()


# --- on a GPU ------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_and_cpu_give_the_same_reference(
    reference: Reference, make: Callable, tiny_checkpoint: Path
) -> None:
    """Or a bundle that was verified on one machine would fail on another."""
    made = make(tiny_checkpoint, torch.device("cuda"))
    assert "TF32 off" in made.info.device
    assert made.info.versions["cuda"]
    assert made.info.norms == reference.info.norms
    for name, images in reference.inputs.items():
        assert np.array_equal(images, made.inputs[name])
    pairs = [(reference.exact, made.exact), (reference.deployed["fp16"], made.deployed["fp16"])]
    for cpu, cuda in pairs:
        for name in TAPS:
            assert np.array_equal(reference.positions[name], made.positions[name])
            # What a build must reach against either of them.
            assert sqnr_db(cpu.taps[name], cuda.taps[name]) >= STRUCTURE_DB, name
        for name in OUTPUTS:
            # The task's budget at fp32.
            assert max_error(cpu.outputs[name], cuda.outputs[name]) <= 1e-3, name


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_gives_the_same_bytes_twice(model: TaskModel) -> None:
    first, second = (make_reference(model, "0" * 64, torch.device("cuda")) for _ in range(2))
    assert encode_reference(first) == encode_reference(second)


def test_the_deploy_model_has_these_taps(model: TaskModel) -> None:
    assert build_deploy_model(model).tap_names == TAPS
