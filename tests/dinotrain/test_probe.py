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
from sklearn.preprocessing import StandardScaler

from dinotrain import probe as module
from dinotrain.backbones.vit import VisionTransformer, ViTConfig, init_weights_
from dinotrain.checkpoint import load_checkpoint, read_config
from dinotrain.errors import DataError, UsageError
from dinotrain.heads.pool import CLS_KINDS
from dinotrain.probe import (
    RATES,
    SMALL_SWEEP,
    _choose_iterations,
    _columns,
    _fold,
    _logits,
    _measure_scale,
    _neighbours,
    _Recipe,
    _sweep,
    _Table,
    _train_linear,
    probe,
)
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
    assert result.linear.keys() == set(CLS_KINDS)
    rates = [f"{rate:g}" for rate in RATES["broad"]]
    assert all(list(row) == rates for row in result.linear.values())
    assert header.training["probe"]["iterations"] == result.iterations == 150
    assert result.sweep_s > 0
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


def test_the_published_protocol(config):
    result = probe(config, 20, protocol="published")
    assert result.linear.keys() == {"cls", "cls_mean", "cls4", "cls4_mean"}
    assert [float(rate) for rate in result.linear["cls"]] == list(RATES["published"])
    assert read_config(result.path).training["probe"]["protocol"] == "published"


def test_how_long_a_protocol_trains():
    assert _choose_iterations("published", 1000, 128) == 12500
    # 100 passes, within bounds.
    assert _choose_iterations("broad", 50, 128) == 1000
    assert _choose_iterations("broad", 1437, 128) == math.ceil(143700 / 128)
    assert _choose_iterations("broad", 10**6, 128) == 12500


def test_progress_counts_all_steps(config):
    told = []
    probe(config, 120, lambda *args: told.append(args))
    swept = [args for args in told if args[0] == "probe"]
    done = [args[1] for args in swept]
    assert done == sorted(done)
    assert done[-1] == swept[-1][2] == len(CLS_KINDS) * 120
    assert {args[3] for args in swept[:-1]} == set(CLS_KINDS)


def test_threads_are_given_back():
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        seen = []
        table = _Table(torch.randn(40, 6), torch.randint(0, 3, (40,)))
        for classes in (3, SMALL_SWEEP // 16):
            recipe = RECIPE._replace(classes=classes, steps=1)
            _train_linear(table, None, recipe, lambda _: seen.append(torch.get_num_threads()))
        assert seen == [1, 2], "a large sweep keeps all threads"
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)


RECIPE = _Recipe(rates=(1e-3, 0.05, 1.0), steps=12, batch_size=16, seed=5, classes=3)


def test_each_classifier_is_trained_as_if_alone():
    """Against torch's own SGD with its cosine schedule, one rate at a time."""
    torch.manual_seed(1)
    table = _Table(torch.randn(40, 6), torch.randint(0, 3, (40,)))
    weight, bias = _sweep(table, RECIPE)
    for index, rate in enumerate(RECIPE.rates):
        generator = torch.Generator().manual_seed(RECIPE.seed)
        start = torch.randn(len(RECIPE.rates), 3, 6, generator=generator)[index]
        layer = torch.nn.Linear(6, 3)
        layer.load_state_dict({"weight": start * module.INITIAL_STD, "bias": torch.zeros(3)})
        rate = rate * RECIPE.batch_size / 256
        optimizer = torch.optim.SGD(layer.parameters(), lr=rate, momentum=0.9)
        for step in range(RECIPE.steps):
            rows = torch.randint(40, (RECIPE.batch_size,), generator=generator)
            now = rate * 0.5 * (1 + math.cos(math.pi * step / RECIPE.steps))
            optimizer.param_groups[0]["lr"] = now
            optimizer.zero_grad()
            F.cross_entropy(layer(table.features[rows]), table.classes[rows]).backward()
            optimizer.step()
        torch.testing.assert_close(weight[index], layer.weight.detach(), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(bias[index], layer.bias.detach(), rtol=1e-4, atol=1e-6)


@pytest.fixture
def uneven() -> _Table:
    """Columns of other means and scales, of which one hardly varies and one does not."""
    generator = torch.Generator().manual_seed(2)
    features = torch.randn(200, 5, generator=generator) * torch.tensor([30.0, 1.0, 0.1, 1e-6, 0.0])
    features += torch.tensor([-5.0, 300.0, 0.0, 0.5, 2.0])
    classes = (features[:, 1] - 300 + 10 * features[:, 2] > 0).long()
    return _Table(features, classes)


def test_scale_against_scikit_learn(uneven):
    peer = StandardScaler().fit(uneven.features[:, :3].double().numpy())
    scale = _measure_scale(uneven)
    np.testing.assert_allclose(scale.mean[:3], peer.mean_, rtol=1e-12)
    np.testing.assert_allclose(scale.deviation[:3], peer.scale_, rtol=1e-12)
    # The floor is a hundredth of the mean deviation of all columns, here about 31 / 5.
    assert scale.deviation[3:].tolist() == pytest.approx([0.062] * 2, rel=0.2)
    same = _measure_scale(_Table(torch.full((4, 2), 7.0), torch.zeros(4, dtype=torch.long)))
    assert same.deviation.tolist() == [1.0, 1.0]


def test_folded_classifiers_give_the_same_logits(uneven):
    scale = _measure_scale(uneven)
    generator = torch.Generator().manual_seed(3)
    weight, bias = torch.randn(2, 3, 5, generator=generator), torch.randn(2, 3, generator=generator)
    standardised = ((uneven.features.double() - scale.mean) / scale.deviation).float()
    wanted = _logits(standardised, weight, bias)
    given = _logits(uneven.features, *_fold(weight, bias, scale))
    # Sums of terms up to 300 / 1 · w in float32.
    torch.testing.assert_close(given, wanted, rtol=0, atol=2e-3)
    # Without the mean it would be another classifier.
    wrong = _logits(uneven.features, (weight / scale.deviation).float(), bias)
    assert (wrong - wanted).abs().max() > 1


def test_standardised_features_train_where_raw_ones_do_not(uneven):
    """Column 0 is noise and 30 times as large: no rate suits both."""
    recipe = RECIPE._replace(rates=RATES["published"], steps=300, classes=2)
    found = []
    for scale in (None, _measure_scale(uneven)):
        weight, bias = _train_linear(uneven, scale, recipe, lambda step: None)
        right = _logits(uneven.features, weight, bias).argmax(-1) == uneven.classes
        found.append(float(right.double().mean(1).max()))
    assert found[0] < 0.8 < 0.95 < found[1], found


def test_columns_of_the_widest_features():
    vit = ViTConfig(name="tiny", embed_dim=DIM, depth=4, heads=1, ffn_dim=32)
    wide = torch.arange(5 * DIM)
    cls, mean = wide[3 * DIM : 4 * DIM], wide[4 * DIM :]
    assert torch.equal(_columns("cls", "cls4_mean", vit), cls)
    assert torch.equal(_columns("cls_mean", "cls4_mean", vit), torch.cat((cls, mean)))
    assert torch.equal(_columns("cls4", "cls4_mean", vit), wide[: 4 * DIM])
    assert torch.equal(_columns("cls4_mean", "cls4_mean", vit), wide)
    assert torch.equal(_columns("cls", "cls_mean", vit), wide[:DIM])
    # Four CLS, the mean, four quarters.
    assert torch.equal(_columns("cls4_quarters", "cls4_quarters", vit), torch.arange(9 * DIM))
    assert torch.equal(
        _columns("cls_quarters", "cls4_quarters", vit), torch.arange(3 * DIM, 9 * DIM)
    )
    assert torch.equal(_columns("cls4_mean", "cls4_quarters", vit), wide)


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
    assert result.linear.keys() == {"cls", "cls_mean", "cls_quarters"}
    assert read_config(result.path).backbone.depth == 2
