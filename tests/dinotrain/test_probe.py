"""The linear probe: each classifier as if it were alone, the best one kept, k-NN beside it."""

import math

import msgspec
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from sklearn.neighbors import KNeighborsClassifier

from dinotrain import probe as module
from dinotrain.backbones.vit import VisionTransformer, ViTConfig, init_weights_
from dinotrain.checkpoint import load_checkpoint, read_config
from dinotrain.errors import DataError, UsageError
from dinotrain.probe import RATES, _columns, _neighbours, _sweep, _Table, probe
from dinotrain.train_config import TrainConfig

DIM = 16


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    config = ViTConfig(
        name="tiny", embed_dim=DIM, depth=4, heads=1, ffn_dim=32, grid=(2, 2), position_rule="size"
    )
    torch.manual_seed(0)
    model = init_weights_(VisionTransformer(config))
    path = tmp_path_factory.mktemp("backbone") / "tiny.safetensors"
    header = {"backbone": msgspec.json.encode(config).decode()}
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, path, metadata=header)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three colours with noise, twenty pictures each."""
    out = tmp_path_factory.mktemp("colours")
    rng = np.random.default_rng(0)
    for place, name in enumerate(("red", "green", "blue")):
        (out / name).mkdir()
        for index in range(20):
            pixels = rng.integers(0, 120, (40, 40, 3))
            pixels[..., place] += 110
            Image.fromarray(pixels.astype(np.uint8)).save(out / name / f"{index}.png")
    return out


@pytest.fixture
def config(backbone, folder, tmp_path):
    return TrainConfig(
        data=folder,
        backbone=str(backbone),
        out=tmp_path / "probe.safetensors",
        task="classify",
        image_size=(28, 28),
        batch_size=16,
        cache=tmp_path / "cache",
    )


def test_the_best_classifier_becomes_a_checkpoint(config):
    result = probe(config, 150)
    model, header = load_checkpoint(result.path)
    assert header.head.kind == "probe"
    assert header.features.kind == result.features
    assert header.training["lr"] == result.rate
    assert header.training["probe"]["val_accuracy"] == result.linear
    assert result.linear.keys() == {"cls", "cls_mean", "cls4", "cls4_mean"}
    assert all(len(row) == len(RATES) for row in result.linear.values())
    best = max(a for row in result.linear.values() for a in row.values())
    assert result.linear[result.features][f"{result.rate:g}"] == best
    assert header.metrics["val"]["probabilities"]["accuracy"] == pytest.approx(best, abs=1e-4)
    # Colours are plain to see, even by a random backbone.
    assert header.metrics["test"]["probabilities"]["accuracy"] > 0.8
    # What is stored does from pixels what the table promised.
    pixels = torch.zeros(1, 3, 28, 28)
    pixels[:, 2] = 170
    given = model({"image": pixels})["probabilities"]
    assert header.classes[int(given.argmax())] == "blue"


def test_the_same_seed_gives_the_same_bytes(config):
    first = probe(config, 20).path.read_bytes()
    assert probe(config, 20).path.read_bytes() == first
    assert probe(msgspec.structs.replace(config, seed=3), 20).path.read_bytes() != first


def test_each_classifier_is_trained_as_if_alone(config):
    """Against torch's own SGD with its cosine schedule, one rate at a time."""
    torch.manual_seed(1)
    table = _Table(torch.randn(40, 6), torch.randint(0, 3, (40,)))
    steps = 12
    weight, bias = _sweep(table, 3, config, steps)
    for index in (0, 6, len(RATES) - 1):
        generator = torch.Generator().manual_seed(config.seed)
        start = torch.randn(len(RATES), 3, 6, generator=generator)[index] * module.INITIAL_STD
        layer = torch.nn.Linear(6, 3)
        layer.load_state_dict({"weight": start, "bias": torch.zeros(3)})
        rate = RATES[index] * config.batch_size / 256
        optimizer = torch.optim.SGD(layer.parameters(), lr=rate, momentum=0.9)
        for step in range(steps):
            rows = torch.randint(40, (config.batch_size,), generator=generator)
            optimizer.param_groups[0]["lr"] = rate * 0.5 * (1 + math.cos(math.pi * step / steps))
            optimizer.zero_grad()
            F.cross_entropy(layer(table.features[rows]), table.classes[rows]).backward()
            optimizer.step()
        torch.testing.assert_close(weight[index], layer.weight.detach(), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(bias[index], layer.bias.detach(), rtol=1e-4, atol=1e-6)


def test_columns_of_the_widest_features():
    vit = ViTConfig(name="tiny", embed_dim=DIM, depth=4, heads=1, ffn_dim=32)
    wide = torch.arange(5 * DIM)
    cls, mean = wide[3 * DIM : 4 * DIM], wide[4 * DIM :]
    assert torch.equal(_columns("cls", "cls4_mean", vit), cls)
    assert torch.equal(_columns("cls_mean", "cls4_mean", vit), torch.cat((cls, mean)))
    assert torch.equal(_columns("cls4", "cls4_mean", vit), wide[: 4 * DIM])
    assert torch.equal(_columns("cls4_mean", "cls4_mean", vit), wide)
    assert torch.equal(_columns("cls", "cls_mean", vit), wide[:DIM])


def test_neighbours_against_scikit_learn():
    torch.manual_seed(0)
    train = _Table(torch.randn(60, 8), torch.randint(0, 3, (60,)))
    held = _Table(torch.randn(30, 8), torch.randint(0, 3, (30,)))

    def weigh(distances):
        # On the unit sphere cosine = 1 − d²/2.
        return np.exp((1 - distances**2 / 2) / 0.07)

    found = _neighbours(train, held, 3)
    assert found.keys() == {"10", "20"}, "no vote of more neighbours than there are"
    for k, accuracy in found.items():
        peer = KNeighborsClassifier(int(k), weights=weigh)
        peer.fit(F.normalize(train.features, dim=-1), train.classes)
        wanted = peer.score(F.normalize(held.features, dim=-1), held.classes)
        assert accuracy == pytest.approx(wanted, abs=1e-4)


def test_what_cannot_be_probed(config, tmp_path):
    with pytest.raises(UsageError, match="iterations is 0"):
        probe(config, 0)
    for name in ("a", "b"):
        (tmp_path / "few" / name).mkdir(parents=True)
        for index in range(2):
            image = Image.new("RGB", (40, 40), (index * 60, 0, 90 if name == "a" else 9))
            image.save(tmp_path / "few" / name / f"{index}.png")
    with pytest.raises(DataError, match="no validation samples"):
        probe(msgspec.structs.replace(config, data=tmp_path / "few"), 5)
    assert not config.out.exists()


def test_a_backbone_of_few_blocks_is_probed_on_its_last(config, tmp_path):
    shallow = ViTConfig(
        name="two", embed_dim=DIM, depth=2, heads=1, ffn_dim=32, grid=(2, 2), position_rule="size"
    )
    model = init_weights_(VisionTransformer(shallow))
    path = tmp_path / "two.safetensors"
    header = {"backbone": msgspec.json.encode(shallow).decode()}
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, path, metadata=header)
    result = probe(msgspec.structs.replace(config, backbone=str(path)), 5)
    assert result.linear.keys() == {"cls", "cls_mean"}
    assert read_config(result.path).backbone.depth == 2
