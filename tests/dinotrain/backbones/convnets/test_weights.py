"""Weights of convolutional backbones from files as timm publishes them, and from hostile ones."""

import hashlib
import json
from pathlib import Path

import msgspec
import pytest
import torch
from safetensors.torch import save_file

from dinotrain.backbones import hub
from dinotrain.backbones.convnets import weights
from dinotrain.backbones.convnets.config import CONVNETS, ConvNetConfig
from dinotrain.backbones.convnets.published import REPOSITORIES, TAGS
from dinotrain.backbones.convnets.table import build_convnet
from dinotrain.backbones.convnets.weights import (
    convnet_name,
    family_of,
    interpret,
    load_convnet,
    save_convnet,
)
from dinotrain.backbones.vit import VARIANTS
from dinotrain.backbones.weight_files import open_weights
from dinotrain.errors import DownloadError, ShapeError, UsageError, WeightsError

State = dict[str, torch.Tensor]
B0 = CONVNETS["efficientnet_b0"]
TF_B0 = CONVNETS["tf_efficientnet_b0"]


@pytest.fixture(scope="module")
def ours(randomised) -> State:
    """B0's weights under our keys, in values that half precision holds."""
    return {key: value.half().float() for key, value in randomised(B0).state_dict().items()}


@pytest.fixture
def timm(ours) -> State:
    """The same as timm's models save them: with a classifier and BatchNorm's counters."""
    state = {key: value.clone() for key, value in ours.items()}
    for key in ours:
        if key.endswith("running_var"):
            state[key.replace("running_var", "num_batches_tracked")] = torch.tensor(7)
    return state | {"classifier.weight": torch.zeros(10, 1280), "classifier.bias": torch.zeros(10)}


def same(one: State, other: State) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def one_line(error: pytest.ExceptionInfo[Exception], *parts: str) -> None:
    message = str(error.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


def write(state: State, path: Path) -> Path:
    if path.suffix == ".safetensors":
        save_file(state, path, metadata={"format": "pt"})
    else:
        torch.save(state, path)
    return path


FILE_NAMES = {
    # As timm's releases and its hub repositories name them.
    "efficientnet_b0_ra-3dd342df.pth": B0,
    "tf_efficientnet_b0_ns-c0e6a31c.pth": TF_B0,
    "tf_efficientnet_b0-0af12548.pth": TF_B0,
    "efficientnet_b0.safetensors": B0,
    "tf_efficientnet_b0.in1k.safetensors": TF_B0,
}


@pytest.mark.parametrize("name", list(FILE_NAMES))
def test_published_file_loads_by_its_name(name, timm, ours, tmp_path):
    model = load_convnet(write(timm, tmp_path / name))

    assert model.config == FILE_NAMES[name]
    assert same(model.state_dict(), ours)
    assert not model.training
    assert not any(value.requires_grad for value in model.parameters())


@pytest.mark.parametrize("nest", ["state_dict", "model"])
def test_training_checkpoint_loads(nest, timm, ours, tmp_path):
    prefixed = {f"module.{key}": value for key, value in timm.items()}
    torch.save({nest: prefixed, "epoch": 3}, tmp_path / "efficientnet_b0.pth")

    assert same(load_convnet(tmp_path / "efficientnet_b0.pth").state_dict(), ours)


def test_file_without_counters_or_classifier_loads_from_half_precision(ours, tmp_path):
    half = {key: value.half() for key, value in ours.items()}
    model = load_convnet(write(half, tmp_path / "efficientnet_b0.safetensors"))

    assert same(model.state_dict(), ours)
    assert {value.dtype for value in model.state_dict().values()} == {torch.float32}


def test_seresnet_needs_no_name(randomised, tmp_path):
    config = CONVNETS["seresnet50"]
    state = {key: value.half() for key, value in randomised(config).state_dict().items()}
    state |= {"fc.weight": torch.zeros(10, 2048), "fc.bias": torch.zeros(10)}
    model = load_convnet(write(state, tmp_path / "weights.pth"))

    assert model.config == config
    assert torch.equal(model.state_dict()["conv1.weight"], state["conv1.weight"].float())


def folder(state: State, path: Path, **config: object) -> Path:
    write(state, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(config))
    return path


def test_config_beside_the_file_names_the_form(timm, tmp_path):
    pixels = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225], "tag": "ra_in1k"}
    path = folder(timm, tmp_path, architecture="tf_efficientnet_b0", pretrained_cfg=pixels)

    assert load_convnet(path).config == TF_B0
    assert load_convnet(path / "model.safetensors").config == TF_B0


def test_form_that_nothing_tells_is_not_guessed(timm, tmp_path):
    for name in ("weights.pth", "efficientnet_b0x.pth", "my_efficientnet_b0.pth"):
        with pytest.raises(WeightsError) as error:
            load_convnet(write(timm, tmp_path / name))
        one_line(error, name, "both efficientnet_b0's and tf_efficientnet_b0's")


@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        ({"architecture": "efficientnet_b9"}, "architecture 'efficientnet_b9'. Known: seresnet50"),
        ({"architecture": "efficientnet_b1"}, "do not match efficientnet_b1"),
        ({"architecture": "seresnet50"}, "do not match seresnet50"),
        (
            {"architecture": "tf_efficientnet_b0", "pretrained_cfg": {"mean": [0.5, 0.5, 0.5]}},
            "normalised with [0.5, 0.5, 0.5]; this program does it with [0.485",
        ),
        ({"architecture": 3}, "config.json cannot be used"),
    ],
)
def test_config_that_contradicts_is_refused(config, complaint, timm, tmp_path):
    with pytest.raises(WeightsError) as error:
        load_convnet(folder(timm, tmp_path, **config))
    one_line(error, str(tmp_path), complaint)


@pytest.mark.parametrize(
    "name", ["tf_efficientnet_b0_ap-f262efe1.pth", "efficientnet_b0.ra4_x.pth"]
)
def test_weights_for_other_pixels_are_refused(name, timm, tmp_path):
    with pytest.raises(WeightsError, match="not normalised as ImageNet's"):
        load_convnet(write(timm, tmp_path / name))


def drop(state: State) -> None:
    del state["blocks.3.1.conv_dw.weight"]


def add(state: State) -> None:
    state["blocks.0.1.conv_dw.weight"] = torch.zeros(1)


def reshape(state: State) -> None:
    state["bn1.weight"] = torch.ones(31)


def not_finite(state: State) -> None:
    state["conv_head.weight"][5, 5] = float("nan")


def negative_variance(state: State) -> None:
    state["blocks.1.0.bn2.running_var"][3] = -1


def whole_numbers(state: State) -> None:
    state["bn1.weight"] = torch.ones(32, dtype=torch.int32)


def no_tensor(state: State) -> None:
    state["bn1.weight"] = 3  # type: ignore[assignment]


def too_large(state: State) -> None:
    state["conv_head.weight"] = torch.zeros(1).expand(1280, 320, 1, 1)


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (drop, "missing blocks.3.1.conv_dw.weight"),
        (add, "unexpected blocks.0.1.conv_dw.weight"),
        (reshape, "shape bn1.weight (31,) instead of (32,)"),
        (not_finite, "conv_head.weight holds values that are not finite"),
        (negative_variance, "blocks.1.0.bn2.running_var holds a negative variance"),
        (whole_numbers, "bn1.weight is torch.int32"),
        (no_tensor, "'bn1.weight' is no tensor but 3"),
        (too_large, "more than the file holds"),
    ],
)
def test_damaged_file_is_refused(damage, complaint, timm, tmp_path):
    damage(timm)
    torch.save(timm, tmp_path / "efficientnet_b0.pth")
    with pytest.raises(WeightsError) as error:
        load_convnet(tmp_path / "efficientnet_b0.pth")
    one_line(error, "efficientnet_b0.pth", complaint)


def test_file_that_runs_code_is_refused(timm, tmp_path):
    class Bomb:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    torch.save({**timm, "bomb": Bomb()}, tmp_path / "efficientnet_b0.pth")
    with pytest.raises(WeightsError, match="asks to run code"):
        load_convnet(tmp_path / "efficientnet_b0.pth")
    assert not (tmp_path / "ran").exists()


def test_foreign_files_are_told_apart(tmp_path):
    plain_resnet = {
        "conv1.weight": torch.zeros(64, 3, 7, 7),
        "layer1.0.conv1.weight": torch.ones(1),
    }
    with pytest.raises(WeightsError, match="do not match seresnet50: missing"):
        load_convnet(write(plain_resnet, tmp_path / "resnet50.pth"))
    other = write({"cls_token": torch.zeros(1), "blocks.0.x": torch.zeros(1)}, tmp_path / "v.pth")
    assert family_of(open_weights(other)) is None
    with pytest.raises(WeightsError, match="no convolutional backbone"):
        load_convnet(other)
    torch.save([1, 2], tmp_path / "list.pth")
    assert family_of(open_weights(tmp_path / "list.pth")) is None
    with pytest.raises(WeightsError, match="no such file"):
        load_convnet(tmp_path / "absent.pth")


# Our own files


def test_own_file_needs_no_name_and_no_published_architecture(small, randomised, tmp_path):
    model = randomised(small)
    save_convnet(model, tmp_path / "own.safetensors")
    again = load_convnet(tmp_path / "own.safetensors")

    assert again.config == small
    assert same(again.state_dict(), model.state_dict())


def test_backbone_of_a_checkpoint_loads(small, randomised, tmp_path):
    model = randomised(small)
    tensors = {f"backbone.{key}": value.clone() for key, value in model.state_dict().items()}
    header = {"task": "x", "backbone": json.loads(msgspec.json.encode(small))}
    save_file(
        {**tensors, "head.weight": torch.zeros(3)},
        tmp_path / "checkpoint.safetensors",
        metadata={"config": json.dumps(header)},
    )
    again = load_convnet(tmp_path / "checkpoint.safetensors")

    assert again.config == small
    assert same(again.state_dict(), model.state_dict())


@pytest.mark.parametrize(
    ("header", "complaint"),
    [
        ("{", "its header names no backbone"),
        ('{"name": "x", "family": "vgg"}', "its header names no backbone"),
        ('{"name": "x", "family": "efficientnet", "depth": 1e12}', "depth multiplier"),
        ('{"name": "x", "family": "efficientnet", "width": 2.0}', "do not match x"),
    ],
)
def test_header_that_lies_is_refused(header, complaint, ours, tmp_path):
    save_file(ours, tmp_path / "own.safetensors", metadata={"backbone": header})
    with pytest.raises(WeightsError, match=complaint):
        load_convnet(tmp_path / "own.safetensors")


def test_model_does_not_change_with_its_file(timm, tmp_path):
    path = write(timm, tmp_path / "efficientnet_b0.pth")
    model = load_convnet(path)
    before = model.conv_head.weight.clone()
    path.write_bytes(b"\0" * path.stat().st_size)

    assert torch.equal(model.conv_head.weight, before)


def test_image_size_is_checked_first(tmp_path):
    with pytest.raises(ShapeError, match="image size 20 is under 32"):
        load_convnet(tmp_path / "absent.pth", image_size=(20, 64))


# Names


def test_names_and_repositories():
    assert TAGS.keys() == CONVNETS.keys() - {"efficientnet_b6", "efficientnet_b7"}
    assert REPOSITORIES["seresnet50"] == "timm/seresnet50.ra2_in1k"
    assert REPOSITORIES["seresnet50.a1_in1k"] == "timm/seresnet50.a1_in1k"
    assert REPOSITORIES["efficientnet_b0"] == "timm/efficientnet_b0.ra_in1k"
    assert REPOSITORIES["tf_efficientnet_b7"] == "timm/tf_efficientnet_b7.ns_jft_in1k"
    assert not REPOSITORIES.keys() & VARIANTS.keys()
    assert not any(tag.startswith(("ap", "ra4")) for tags in TAGS.values() for tag in tags)


@pytest.mark.parametrize(
    "source",
    [
        "dinov2_vits14",
        "seresnet50.pth",
        "efficientnet_b0.safetensors",
        "folder/efficientnet_b0",
        Path("efficientnet_b0"),
    ],
    ids=str,
)
def test_what_is_no_convnets_name(source):
    assert convnet_name(source) is None


def test_path_that_exists_wins_over_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert convnet_name("efficientnet_b0@sha256:0") == "efficientnet_b0"
    Path("efficientnet_b0").touch()
    assert convnet_name("efficientnet_b0") is None


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        ("efficientnet_b7", "efficientnet_b7 has no published weights. Use tf_efficientnet_b7"),
        ("efficientnet_b6.ra_in1k", "Use tf_efficientnet_b6"),
        ("seresnet50.rb2_in1k", "Did you mean 'seresnet50.ra2_in1k'?"),
    ],
)
def test_name_without_weights_is_refused(source, complaint):
    with pytest.raises(UsageError) as error:
        load_convnet(source)
    one_line(error, complaint)


@pytest.fixture
def cached(timm, tmp_path, monkeypatch):
    """Hugging Face's cache as a download of efficientnet_b0 leaves it; gives the digest."""
    content = write(timm, tmp_path / "x.safetensors").read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    repository = tmp_path / "cache" / "models--timm--efficientnet_b0.ra_in1k"
    snapshot = repository / "snapshots" / ("a" * 40)
    for made in (repository / "blobs", repository / "refs", snapshot):
        made.mkdir(parents=True)
    (repository / "refs" / "main").write_text("a" * 40)
    (repository / "blobs" / digest).write_bytes(content)
    (snapshot / hub.FILE).symlink_to(repository / "blobs" / digest)
    real = hub.fetch
    monkeypatch.setattr(
        hub,
        "fetch",
        lambda source, repositories: real(
            source,
            repositories=repositories,
            cache_dir=tmp_path / "cache",
            endpoint="http://[::1]:1",
        ),
    )
    monkeypatch.chdir(tmp_path)
    return digest


def test_named_backbone_loads_verified(cached, ours):
    # The file itself is called model.safetensors: the name alone tells the form.
    for source in ("efficientnet_b0", f"efficientnet_b0.ra_in1k@sha256:{cached}"):
        model = load_convnet(source)

        assert model.config == B0
        assert same(model.state_dict(), ours)


def test_named_backbone_must_have_its_digest(cached, tmp_path):
    with pytest.raises(DownloadError, match="is pinned to sha256 0000"):
        load_convnet(f"efficientnet_b0@sha256:{'0' * 64}")
    blob = next((tmp_path / "cache").rglob(f"blobs/{cached}"))
    content = bytearray(blob.read_bytes())
    content[-1] ^= 1
    blob.write_bytes(content)
    with pytest.raises(DownloadError, match="the hub declares"):
        load_convnet("efficientnet_b0")


def test_named_backbone_must_be_what_its_name_says(cached, monkeypatch):
    monkeypatch.setitem(CONVNETS, "efficientnet_b0", CONVNETS["efficientnet_b1"])
    with pytest.raises(WeightsError, match="do not match efficientnet_b1"):
        load_convnet("efficientnet_b0")


def test_every_published_scale_is_told_from_the_others():
    for number in range(8):
        config = CONVNETS[f"efficientnet_b{number}"]
        with torch.device("meta"):
            state = build_convnet(config).state_dict()

        assert weights._nearest("efficientnet", state) == config


def test_interpret_takes_the_architecture_that_is_known(timm, tmp_path):
    contents = open_weights(write(timm, tmp_path / "weights.pth"))

    assert interpret(contents, TF_B0).config == TF_B0
    assert isinstance(interpret(contents, TF_B0).config, ConvNetConfig)
