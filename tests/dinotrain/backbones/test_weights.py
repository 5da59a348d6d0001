"""Every published key layout, the reading of hostile files, and the position rule's default."""

import json
import os
import pickle
from pathlib import Path

import msgspec
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    Dinov2Config,
    Dinov2ForImageClassification,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersForImageClassification,
    Dinov2WithRegistersModel,
)

from dinotrain.backbones.layouts import detect, library_rule, to_layout, to_ours, variant_name
from dinotrain.backbones.vit import VARIANTS, VisionTransformer, ViTConfig, swiglu_hidden_dim
from dinotrain.backbones.weights import (
    check_image_size,
    load_backbone,
    read_weights,
    save_backbone,
)
from dinotrain.errors import ShapeError, UsageError, WeightsError

DIM, DEPTH, SIDE = 128, 3, 5
KINDS = [("gelu", 0), ("gelu", 4), ("swiglu", 0), ("swiglu", 4)]
KIND_IDS = ["gelu", "gelu-reg", "swiglu", "swiglu-reg"]
LAYOUTS = ("hub", "hf", "hf_v5", "timm", "training")


def tiny_config(ffn: str = "gelu", registers: int = 0) -> ViTConfig:
    return ViTConfig(
        name=f"vit_d{DIM}_l{DEPTH}" + (f"_reg{registers}" if registers else ""),
        embed_dim=DIM,
        depth=DEPTH,
        heads=2,
        ffn=ffn,  # type: ignore[arg-type]
        ffn_dim=swiglu_hidden_dim(DIM) if ffn == "swiglu" else 4 * DIM,
        registers=registers,
        grid=(SIDE, SIDE),
        position_rule="size_antialias" if registers else "scale",
    )


def randomise_(module: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(11)
    for parameter in module.parameters():
        parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


def tiny_model(ffn: str = "gelu", registers: int = 0) -> VisionTransformer:
    model = VisionTransformer(tiny_config(ffn, registers)).eval()
    randomise_(model)
    return model


def tiny_state(ffn: str = "gelu", registers: int = 0) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in tiny_model(ffn, registers).state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def features(model: VisionTransformer) -> torch.Tensor:
    images = torch.randn(1, 3, 56, 84, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        out = model(images)
    return torch.cat((out.cls_token[:, None], out.register_tokens, out.patch_tokens), dim=1)


def their_model(ffn: str, registers: int, classifier: bool = False) -> torch.nn.Module:
    plain = (Dinov2Model, Dinov2ForImageClassification)
    registered = (Dinov2WithRegistersModel, Dinov2WithRegistersForImageClassification)
    config_kind = Dinov2WithRegistersConfig if registers else Dinov2Config
    config = config_kind(
        hidden_size=DIM,
        num_hidden_layers=DEPTH,
        num_attention_heads=2,
        image_size=SIDE * 14,
        patch_size=14,
        use_swiglu_ffn=ffn == "swiglu",
    )
    model = (registered if registers else plain)[classifier](config).eval()
    randomise_(model)
    return model


def one_line(error: pytest.ExceptionInfo[Exception], *parts: str) -> None:
    message = str(error.value)
    assert "\n" not in message
    assert len(message) < 500
    for part in parts:
        assert part in message


# Layouts


@pytest.mark.parametrize(("ffn", "registers"), KINDS, ids=KIND_IDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_is_detected_and_round_trips(layout, ffn, registers):
    config, state = tiny_config(ffn, registers), tiny_state(ffn, registers)

    theirs = to_layout(state, layout, config)
    found = detect(theirs)
    derived, ours = to_ours(theirs, found)
    again = to_layout(ours, layout, derived)

    assert found == layout
    assert msgspec.structs.replace(derived, position_rule=config.position_rule) == config
    assert same(again, theirs)
    if layout != "timm":
        assert same(ours, state)


@pytest.mark.parametrize(("ffn", "registers"), KINDS, ids=KIND_IDS)
def test_what_timm_drops(ffn, registers):
    config, state = tiny_config(ffn, registers), tiny_state(ffn, registers)

    _, ours = to_ours(to_layout(state, "timm", config), "timm")

    changed = {key for key in state if not torch.equal(state[key], ours[key])}
    assert changed == ({"mask_token", "cls_token", "pos_embed"} if registers else {"mask_token"})
    assert not ours["mask_token"].any()
    if registers:
        assert not ours["pos_embed"][:, 0].any()
        assert torch.equal(ours["pos_embed"][:, 1:], state["pos_embed"][:, 1:])
    model = tiny_model(ffn, registers)
    before = features(model)
    model.load_state_dict(ours)
    assert torch.equal(features(model), before)


def timm_by_hand(state: dict[str, torch.Tensor], registers: int) -> dict[str, torch.Tensor]:
    """METHODS A3's timm column, written out apart from the code under test."""
    out = {}
    for key, value in state.items():
        if key == "mask_token":
            continue
        renamed = key.replace("register_tokens", "reg_token")
        renamed = renamed.replace("mlp.w12", "mlp.fc1").replace("mlp.w3", "mlp.fc2")
        out[renamed] = value
    if registers:
        out["cls_token"] = state["cls_token"] + state["pos_embed"][:, 0]
        out["pos_embed"] = state["pos_embed"][:, 1:]
    return out


@pytest.mark.parametrize(("ffn", "registers"), KINDS, ids=KIND_IDS)
def test_timm_names(ffn, registers):
    state = tiny_state(ffn, registers)

    found = to_layout(state, "timm", tiny_config(ffn, registers))

    assert same(found, timm_by_hand(state, registers))


@pytest.mark.parametrize(("ffn", "registers"), KINDS, ids=KIND_IDS)
@pytest.mark.parametrize("classifier", [False, True], ids=["model", "classifier"])
def test_names_are_those_that_transformers_uses(tmp_path, ffn, registers, classifier):
    theirs = their_model(ffn, registers, classifier)
    theirs.save_pretrained(tmp_path)
    prefix = theirs.base_model_prefix + "." if classifier else ""
    config = tiny_config(ffn, registers)

    on_disk = read_weights(tmp_path)
    torch.save(theirs.state_dict(), tmp_path / "modules.bin")
    in_memory = read_weights(tmp_path / "modules.bin")

    assert (on_disk.layout, in_memory.layout) == ("hf", "hf_v5")
    assert same(on_disk.state, in_memory.state)
    for weights, state in (
        (on_disk, load_file(tmp_path / "model.safetensors")),
        (in_memory, theirs.state_dict()),
    ):
        backbone = {
            key.removeprefix(prefix): value
            for key, value in state.items()
            if not key.startswith("classifier")
        }
        assert same(to_layout(weights.state, weights.layout, config), backbone)


def test_transformers_loads_what_is_converted(tmp_path):
    config, state = tiny_config("swiglu", 4), tiny_state("swiglu", 4)
    theirs = their_model("swiglu", 4)
    theirs.save_pretrained(tmp_path)
    save_file(
        to_layout(state, "hf", config), tmp_path / "model.safetensors", metadata={"format": "pt"}
    )

    loaded, info = Dinov2WithRegistersModel.from_pretrained(tmp_path, output_loading_info=True)

    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert same(to_layout(state, "hf_v5", config), loaded.state_dict())


def chunked(state: dict[str, torch.Tensor], local: bool) -> dict[str, torch.Tensor]:
    """Two chunks: blocks 0 and 1, then block 2, numbered through or anew."""
    out = {}
    for key, value in state.items():
        if key.startswith("blocks."):
            _, index, leaf = key.split(".", 2)
            chunk, inner = divmod(int(index), 2)
            key = f"blocks.{chunk}.{inner if local else index}.{leaf}"
        out[key] = value
    return out


@pytest.mark.parametrize("local", [False, True], ids=["numbered-through", "numbered-anew"])
@pytest.mark.parametrize("nest", ["teacher", "model", "flat"])
def test_training_checkpoints(tmp_path, nest, local):
    state = tiny_state("gelu", 4)
    prefixed = {f"backbone.{key}": value for key, value in chunked(state, local).items()}
    prefixed["dino_head.mlp.0.weight"] = torch.ones(2, 2)
    prefixed["ibot_head.last_layer.weight"] = torch.ones(2, 2)
    loaded = {
        "teacher": {"teacher": prefixed, "iteration": 3},
        "model": {
            "model": {f"teacher.{key}": value for key, value in prefixed.items()}
            | {"student.backbone.cls_token": torch.ones(9), "dino_loss.center": torch.ones(2)}
        },
        "flat": prefixed,
    }[nest]
    torch.save(loaded, tmp_path / "teacher_checkpoint.pth")

    weights = read_weights(tmp_path / "teacher_checkpoint.pth")

    assert weights.layout == "training"
    assert same(weights.state, state)


@pytest.mark.parametrize(
    ("lost", "local", "message"),
    [
        ("blocks.0.1.", False, "block 1 is missing among 2 blocks"),
        ("blocks.0.0.", True, "block 0 is missing in chunk 0"),
    ],
    ids=["numbered-through", "numbered-anew"],
)
def test_chunked_checkpoint_with_a_lost_block_is_refused(tmp_path, lost, local, message):
    state = tiny_state()
    state |= {k.replace("blocks.2.", "blocks.3."): v for k, v in state.items()} if local else {}
    whole = chunked(state, local)
    torch.save(
        {"teacher": {k: v for k, v in whole.items() if not k.startswith(lost)}},
        tmp_path / "lost.pth",
    )

    with pytest.raises(WeightsError) as error:
        read_weights(tmp_path / "lost.pth")
    one_line(error, "lost.pth", message)


@pytest.mark.parametrize("twin", ["module.norm.bias", "backbone.norm.bias"])
def test_two_keys_for_one_tensor_are_refused(tmp_path, twin):
    torch.save(tiny_state() | {twin: torch.zeros(DIM)}, tmp_path / "twins.pth")

    with pytest.raises(WeightsError) as error:
        read_weights(tmp_path / "twins.pth")
    one_line(error, f"two of its keys stand for norm.bias, one of them {twin}")


def test_data_parallel_prefix_is_dropped(tmp_path):
    state = tiny_state()
    torch.save(
        {"state_dict": {f"module.{k}": v for k, v in state.items()}, "epoch": 1}, tmp_path / "a.pt"
    )

    assert same(read_weights(tmp_path / "a.pt").state, state)


def test_unknown_layout_is_refused():
    with pytest.raises(UsageError, match=r"unknown layout 'tim'\. Did you mean 'timm'"):
        to_layout(tiny_state(), "tim", tiny_config())  # type: ignore[arg-type]


# Strictness


def edited(layout: str, edit) -> dict[str, torch.Tensor]:
    state = to_layout(tiny_state(), layout, tiny_config())  # type: ignore[arg-type]
    edit(state)
    return state


@pytest.mark.parametrize(
    ("layout", "edit", "parts"),
    [
        ("hub", lambda s: s.pop("norm.bias"), ["missing norm.bias"]),
        ("hub", lambda s: s.update(fog=torch.ones(1)), ["unexpected fog"]),
        (
            "hub",
            lambda s: (s.update(register_tokens=torch.ones(1, 4, DIM)), s.pop("mask_token")),
            ["missing mask_token"],
        ),
        (
            "hub",
            lambda s: s.update({"norm.bias": torch.ones(7)}),
            ["shape norm.bias (7,) instead of (128,)"],
        ),
        (
            "hf",
            lambda s: s.pop("encoder.layer.1.attention.attention.key.weight"),
            ["missing encoder.layer.1.attention.attention.key.weight"],
        ),
        (
            "hf",
            lambda s: s.update(
                {"encoder.layer.1.attention.attention.key.weight": torch.ones(4, 4)}
            ),
            ["encoder.layer.1.attention.attention.key.weight", "of unequal shapes"],
        ),
        (
            "hf_v5",
            lambda s: s.pop("embeddings.position_embeddings"),
            ["missing key embeddings.position_embeddings of the hf_v5 layout"],
        ),
        (
            "timm",
            lambda s: [s.pop(f"blocks.{i}.ls{j}.gamma") for i in range(DEPTH) for j in (1, 2)],
            ["missing blocks.0.ls1.gamma, blocks.0.ls2.gamma, blocks.1.ls1.gamma and 3 more"],
        ),
        (
            "training",
            lambda s: s.update({"backbone.pos_embed": torch.ones(1, 24, DIM)}),
            ["position embedding of 23 patches is no square grid"],
        ),
        (
            "hub",
            lambda s: s.update({"blocks.99999999999.norm1.bias": torch.ones(DIM)}),
            ["unexpected blocks.99999999999.norm1.bias"],
        ),
        (
            "hub",
            lambda s: s.update({"blocks.7.norm1.bias": torch.ones(DIM)}),
            ["block 3 is missing"],
        ),
        ("hub", lambda s: s.update(cls_token=torch.ones(())), ["cls_token has shape ()"]),
        ("hub", lambda s: s.update(cls_token=torch.ones(1, 1, 100)), ["width 100"]),
        ("hub", lambda s: s.update(mask_token="none"), ["'mask_token' is no tensor"]),
        (
            "hub",
            lambda s: s.update({"norm.bias": torch.ones(DIM, dtype=torch.int64)}),
            ["norm.bias is torch.int64", "accepted: float16"],
        ),
        (
            "hub",
            lambda s: s["norm.bias"].fill_(float("nan")),
            ["norm.bias holds values that are not finite"],
        ),
        (
            "hub",
            lambda s: s.update({"norm.bias": torch.ones(1).expand(DIM)}),
            ["norm.bias claims 128 values"],
        ),
        (
            "hub",
            lambda s: s.update({"norm.bias": torch.ones(DIM).to_sparse()}),
            ["norm.bias is a torch.sparse_coo tensor"],
        ),
    ],
    ids=lambda value: value[0][:40] if isinstance(value, list) else None,
)
def test_state_dicts_are_held_to_their_architecture(tmp_path, layout, edit, parts):
    torch.save(edited(layout, edit), tmp_path / "weights.pth")

    with pytest.raises(WeightsError) as error:
        load_backbone(tmp_path / "weights.pth")
    one_line(error, "weights.pth: ", *parts)


def test_keys_cannot_write_to_the_terminal(tmp_path):
    state = tiny_state() | {"a\n\x1b[31mred": torch.ones(1), "b" * 9999: torch.ones(1)}
    torch.save(state, tmp_path / "w.pth")

    with pytest.raises(WeightsError) as error:
        load_backbone(tmp_path / "w.pth")
    one_line(error, "unexpected a??[31mred, bbb")
    assert "\x1b" not in str(error.value)


# Reading


class Payload:
    """Runs a command when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("form", ["zip", "legacy", "bare pickle"])
def test_code_in_a_pickle_is_refused_and_not_run(tmp_path, form):
    path, marker = tmp_path / "evil.pth", tmp_path / "ran"
    loaded = tiny_state() | {"extra": Payload(marker)}
    if form == "bare pickle":
        path.write_bytes(pickle.dumps(loaded["extra"], protocol=2))
    else:
        torch.save(loaded, path, _use_new_zipfile_serialization=form == "zip")

    with pytest.raises(WeightsError) as error:
        load_backbone(path)

    one_line(error, "evil.pth: refused", "asks to run code ('posix.mkdir')", ".safetensors")
    assert not marker.exists()
    if form != "bare pickle":
        # The payload is live: read without the guard, it runs.
        torch.load(path, weights_only=False)
        assert marker.exists()


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_torch_files(tmp_path, legacy):
    state = tiny_state()
    torch.save(state, tmp_path / "w.pth", _use_new_zipfile_serialization=not legacy)

    assert same(read_weights(tmp_path / "w.pth").state, state)


def resnet_state() -> dict[str, torch.Tensor]:
    return {
        "conv1.weight": torch.ones(64, 3, 7, 7),
        "bn1.weight": torch.ones(64),
        "bn1.running_mean": torch.zeros(64),
        "layer1.0.conv1.weight": torch.ones(64, 64, 3, 3),
        "fc.weight": torch.ones(10, 64),
    }


def truncated(path: Path, share: float) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])


@pytest.mark.parametrize(
    ("name", "write", "parts"),
    [
        ("gone.pth", lambda p: None, ["no such file or folder", "a hub name"]),
        ("empty.pth", lambda p: p.touch(), ["the file is empty"]),
        ("empty.safetensors", lambda p: p.touch(), ["the file is empty"]),
        ("text.pth", lambda p: p.write_text("hello\nthere"), ["neither a PyTorch nor"]),
        ("short.pth", lambda p: p.write_text("x"), ["neither a PyTorch nor"]),
        ("json.safetensors", lambda p: p.write_text("{}" * 9), ["neither a PyTorch nor"]),
        (
            "huge.safetensors",
            lambda p: p.write_bytes((50_000_000).to_bytes(8, "little") + b"{}"),
            ["truncated or corrupt"],
        ),
        (
            "half.pth",
            lambda p: (torch.save(tiny_state(), p), truncated(p, 0.5)),
            ["truncated or corrupt"],
        ),
        (
            "half-legacy.pth",
            lambda p: (
                torch.save(tiny_state(), p, _use_new_zipfile_serialization=False),
                truncated(p, 0.5),
            ),
            ["truncated or corrupt"],
        ),
        (
            "half.safetensors",
            lambda p: (save_file(tiny_state(), p), truncated(p, 0.5)),
            ["truncated or corrupt"],
        ),
        (
            "resnet.pth",
            lambda p: torch.save(resnet_state(), p),
            ["no DINOv2 backbone: its 5 keys begin with bn1.running_mean", "Accepted layouts"],
        ),
        ("list.pth", lambda p: torch.save([1, 2], p), ["a list is no state dict"]),
        ("numbers.pth", lambda p: torch.save({1: 2}, p), ["no state dict"]),
        ("nothing.pth", lambda p: torch.save({}, p), ["its 0 keys begin with none"]),
        ("folder.pth", lambda p: p.mkdir(), ["the folder holds none of model.safetensors"]),
        (
            "link.pth",
            lambda p: p.symlink_to("nowhere"),
            ["no such file or folder"],
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_unreadable_files_are_one_line(tmp_path, name, write, parts):
    path = tmp_path / name
    write(path)

    for source in (path, str(path)):
        with pytest.raises(WeightsError) as error:
            load_backbone(source)
        one_line(error, f"{path}: ", *parts)


def test_half_precision_becomes_float32(tmp_path):
    state = {key: value.bfloat16() for key, value in tiny_state().items()}
    save_file(state, tmp_path / "half.safetensors")

    model = load_backbone(tmp_path / "half.safetensors")

    assert {value.dtype for value in model.state_dict().values()} == {torch.float32}
    assert same(model.state_dict(), {key: value.float() for key, value in state.items()})


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_model_is_frozen_and_independent_of_its_file(tmp_path, suffix):
    path, state = tmp_path / f"w.{suffix}", tiny_state("swiglu", 4)
    (torch.save if suffix == "pth" else save_file)(state, path)

    model = load_backbone(str(path), image_size=(56, 84))
    with path.open("r+b") as file:
        file.write(b"\xff" * path.stat().st_size)

    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
    assert same(model.state_dict(), state)
    assert torch.isfinite(features(model)).all()


# Hugging Face folders


def test_sharded_folder(tmp_path):
    theirs = their_model("gelu", 4)
    theirs.save_pretrained(tmp_path / "one")
    theirs.save_pretrained(tmp_path / "many", max_shard_size="200KB")
    assert len(list((tmp_path / "many").glob("model-*.safetensors"))) > 2

    one, many = read_weights(tmp_path / "one"), read_weights(tmp_path / "many")

    assert same(one.state, many.state)
    assert one.config == many.config


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (lambda m: m | {"norm": "../secret.safetensors"}, ["outside its folder"]),
        (lambda m: m | {"norm": "/etc/passwd"}, ["outside its folder"]),
        (lambda m: m | {"norm": ".."}, ["outside its folder"]),
        (lambda m: m | {"norm": "model-9.safetensors"}, ["shard 'model-9.safetensors'"]),
        (lambda m: m | {"ghost": next(iter(m.values()))}, ["'ghost' is in none of the shards"]),
        (lambda m: [], ["model.safetensors.index.json cannot be used"]),
    ],
    ids=["parent", "absolute", "dots", "missing", "ghost", "list"],
)
def test_shard_index_is_hostile_until_checked(tmp_path, change, parts):
    their_model("gelu", 0).save_pretrained(tmp_path, max_shard_size="200KB")
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"] = change(index["weight_map"])
    path.write_text(json.dumps(index))

    with pytest.raises(WeightsError) as error:
        load_backbone(tmp_path)
    one_line(error, *parts)


@pytest.mark.parametrize(
    ("field", "value", "parts"),
    [
        ("hidden_act", "gelu_new", ["hidden_act 'gelu_new'", "'gelu'"]),
        ("num_attention_heads", 3, ["width 128 does not divide into 3 heads"]),
        ("patch_size", 16, ["patch_size 16", "14"]),
        ("patch_size", [14, 16], ["patch_size"]),
        ("num_hidden_layers", 12, ["num_hidden_layers 12", "3"]),
        ("hidden_size", 64, ["hidden_size 64", "128"]),
        ("qkv_bias", False, ["qkv_bias False"]),
        ("use_swiglu_ffn", True, ["use_swiglu_ffn True"]),
        ("model_type", "vit", ["model_type 'vit'", "dinov2_with_registers"]),
        ("layer_norm_eps", 0.0, ["LayerNorm epsilon 0.0"]),
        ("layer_norm_eps", "tiny", ["config.json cannot be used", "layer_norm_eps"]),
    ],
)
def test_config_json_is_cross_checked(tmp_path, field, value, parts):
    their_model("gelu", 0).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))

    with pytest.raises(WeightsError) as error:
        load_backbone(tmp_path)
    one_line(error, *parts)


def test_config_json_names_what_shapes_do_not_show(tmp_path):
    their_model("gelu", 0).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    changes = {"num_attention_heads": 4, "layer_norm_eps": 1e-5, "patch_size": [14, 14]}
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    for source in (tmp_path, tmp_path / "model.safetensors"):
        config = load_backbone(source).config
        assert (config.heads, config.layer_norm_eps) == (4, 1e-5)


def test_mask_token_may_be_absent(tmp_path):
    state = to_layout(tiny_state(), "hf", tiny_config())
    del state["embeddings.mask_token"]
    save_file(state, tmp_path / "model.safetensors")

    assert not load_backbone(tmp_path).mask_token.any()


# Our own files


def test_bare_backbone_file_round_trips(tmp_path):
    model = tiny_model("swiglu", 4)
    model.config = msgspec.structs.replace(
        model.config, name="mine", heads=4, layer_norm_eps=1e-5, position_rule="size"
    )
    save_backbone(model, tmp_path / "own.safetensors")

    again = load_backbone(tmp_path / "own.safetensors")

    assert again.config == model.config
    assert same(again.state_dict(), model.state_dict())
    assert [path.name for path in tmp_path.iterdir()] == ["own.safetensors"]


def test_checkpoint_file_gives_its_backbone(tmp_path):
    model = tiny_model("gelu", 4)
    config = {"backbone": msgspec.to_builtins(model.config), "task": "eyelid", "taps": [1]}
    tensors = {f"backbone.{key}": value.clone() for key, value in model.state_dict().items()}
    tensors["head.weight"] = torch.ones(2)
    save_file(tensors, tmp_path / "c.safetensors", metadata={"config": json.dumps(config)})

    again = load_backbone(tmp_path / "c.safetensors")

    assert again.config == model.config
    assert same(again.state_dict(), model.state_dict())


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"depth": 1_000_000_000}, ["declares depth 1000000000, its tensors have 3"]),
        ({"embed_dim": 64}, ["declares embed_dim 64, its tensors have 128"]),
        ({"registers": 4}, ["declares registers 4, its tensors have 0"]),
        ({"heads": 0}, ["width 128"]),
        ({"grid": [-5, -5]}, ["position grid (-5, -5)"]),
        ({"grid": [5, 6]}, ["shape pos_embed (1, 26, 128) instead of (1, 31, 128)"]),
        ({"position_rule": "nearest"}, ["its header names no backbone"]),
        ({"colour": "red"}, ["its header names no backbone", "colour"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_header_is_held_to_the_tensors(tmp_path, change, parts):
    header = msgspec.to_builtins(tiny_config()) | change
    save_file(tiny_state(), tmp_path / "own.safetensors", metadata={"backbone": json.dumps(header)})

    with pytest.raises(WeightsError) as error:
        load_backbone(tmp_path / "own.safetensors")
    one_line(error, "own.safetensors: ", *parts)


# Names and position rules


@pytest.mark.parametrize("name", list(VARIANTS))
def test_published_architectures_are_named(name):
    variant = VARIANTS[name]
    derived = msgspec.structs.replace(variant, name="", position_rule="size_antialias")

    assert variant_name(derived) == name
    assert variant_name(msgspec.structs.replace(derived, heads=1)).startswith("vit_d")


@pytest.mark.parametrize(
    ("layout", "registers", "rule"),
    [
        # METHODS A4.
        ("hub", 0, "scale"),
        ("hub", 4, "size_antialias"),
        ("training", 0, "scale"),
        ("training", 4, "size_antialias"),
        ("hf", 0, "size"),
        ("hf", 4, "size_antialias"),
        ("hf_v5", 0, "size"),
        ("timm", 0, "size_antialias"),
        ("timm", 4, "size_antialias"),
    ],
)
def test_position_rule_is_that_of_the_library(tmp_path, layout, registers, rule):
    config, state = tiny_config("gelu", registers), tiny_state("gelu", registers)
    torch.save(to_layout(state, layout, config), tmp_path / "w.pth")

    assert library_rule(layout, registers) == rule
    assert load_backbone(tmp_path / "w.pth").config.position_rule == rule
    forced = load_backbone(tmp_path / "w.pth", position_rule="scale")
    assert forced.config.position_rule == "scale"


def test_unknown_position_rule(tmp_path):
    with pytest.raises(UsageError, match=r"unknown position rule 'scaled'\. Did you mean 'scale'"):
        load_backbone(tmp_path / "w.pth", position_rule="scaled")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("source", "hint"),
    [("dinov2_vits", "'dinov2_vits14'"), ("dinov2_vitb14_rg", "'dinov2_vitb14_reg'")],
)
def test_unknown_backbone_names_the_nearest(source, hint):
    with pytest.raises(UsageError, match=f"unknown backbone '{source}'. Did you mean {hint}"):
        load_backbone(source)


@pytest.mark.parametrize(
    ("size", "advice"),
    [(230, "Use 224 or 238."), ((224, 100), "Use 98 or 112."), (5, "Use 14."), (-14, "Use 14.")],
)
def test_image_size_is_checked(tmp_path, size, advice):
    torch.save(tiny_state(), tmp_path / "w.pth")

    with pytest.raises(ShapeError) as error:
        load_backbone(tmp_path / "w.pth", image_size=size)
    one_line(error, "not a multiple of the patch size 14", advice)


def test_image_sizes_that_fit():
    for size in (None, 14, 518, (224, 322)):
        check_image_size(size, 14)
