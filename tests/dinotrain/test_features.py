"""The feature cache: exact, keyed by everything that counts, and suspicious of its own files."""

import msgspec
import pytest
import torch

from dinotrain.backbones import load_backbone
from dinotrain.data.dataset import Dataset
from dinotrain.errors import DataError, UsageError, WeightsError
from dinotrain.features import FeatureStore, default_cache
from dinotrain.heads.pool import FeatureConfig
from dinotrain.model import ModelConfig, TaskModel
from dinotrain.tasks import get_task


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def build(backbone_file, **changes) -> TaskModel:
    backbone = load_backbone(backbone_file)
    config = {"task": "eyelid", "backbone": backbone.config, "image_size": (28, 28)} | changes
    model = TaskModel(ModelConfig(**config)).eval()
    model.backbone = backbone
    return model


@pytest.fixture
def model(tiny_backbone) -> TaskModel:
    return build(tiny_backbone)


@pytest.fixture(scope="module")
def dataset(tiny_eyes) -> Dataset:
    found = get_task("eyelid").read(tiny_eyes, image_size=(28, 28))
    return msgspec.structs.replace(found, samples=found.samples[:8])


def count(dataset: Dataset) -> int:
    return sum(len(sample.images) for sample in dataset.samples)


def first_image(dataset):
    return dataset.samples[0].images["primary"]


def test_features_are_what_the_model_extracts(model, dataset, tmp_path):
    store = FeatureStore(model, tmp_path)
    store.prepare(dataset)
    assert store.computed == count(dataset) > 8
    image = first_image(dataset)
    pixels = torch.from_numpy(dataset.load(image)).permute(2, 0, 1).unsqueeze(0)
    assert torch.equal(store.get(image), model.extract(pixels)[0])


def test_a_second_run_computes_nothing(model, dataset, tmp_path):
    first = FeatureStore(model, tmp_path)
    first.prepare(dataset)
    told = []
    again = FeatureStore(model, tmp_path)
    again.prepare(dataset, lambda *args: told.append(args))
    assert again.computed == 0
    assert told == [("features", count(dataset), count(dataset), f"{count(dataset)} cached")]
    assert torch.equal(first.get(first_image(dataset)), again.get(first_image(dataset)))


@pytest.mark.parametrize(
    "change",
    [
        {"image_size": (28, 42)},
        {"features": FeatureConfig(kind="pyramid", taps=(0, 1, 2, 3))},
        {"mean": (0.5, 0.5, 0.5)},
    ],
    ids=["size", "kind", "mean"],
)
def test_another_model_has_another_key(model, dataset, tiny_backbone, tmp_path, change):
    image = first_image(dataset)
    other = build(tiny_backbone, **change)
    assert FeatureStore(other, tmp_path).key(image) != FeatureStore(model, tmp_path).key(image)


def test_weights_and_crops_have_their_own_key(model, dataset, tmp_path):
    image = first_image(dataset)
    before = FeatureStore(model, tmp_path).key(image)
    for change in ({"px_per_mm": 2.0}, {"mirror": not image.mirror}, {"digest": "0"}):
        other = msgspec.structs.replace(image, **change)
        assert FeatureStore(model, tmp_path).key(other) != before
    moved = msgspec.structs.replace(image, path=tmp_path / "elsewhere.png")
    assert FeatureStore(model, tmp_path).key(moved) == before
    with torch.no_grad():
        model.backbone.cls_token += 1e-3
    assert FeatureStore(model, tmp_path).key(image) != before


def flip_a_bit(path):
    raw = bytearray(path.read_bytes())
    raw[-3] ^= 1
    path.write_bytes(raw)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes()[:-10]),
        flip_a_bit,
        lambda path: path.write_text("hello"),
        lambda path: path.unlink(),
    ],
    ids=["empty", "partial", "one bit", "text", "gone"],
)
def test_a_damaged_entry_is_computed_again(model, dataset, tmp_path, damage):
    image = first_image(dataset)
    store = FeatureStore(model, tmp_path)
    store.prepare(dataset)
    wanted = store.get(image)
    damage(store.entry(image))
    again = FeatureStore(model, tmp_path)
    again.prepare(dataset)
    assert again.computed == 1
    assert torch.equal(again.get(image), wanted)
    fresh = FeatureStore(model, tmp_path)
    assert torch.equal(fresh.get(image), wanted)
    assert fresh.computed == 0
    assert not list(tmp_path.rglob("*.part"))


def test_features_beyond_memory_come_from_disk(model, dataset, tmp_path, monkeypatch):
    monkeypatch.setattr("dinotrain.features.MEMORY_BYTES", 0)
    store = FeatureStore(model, tmp_path)
    store.prepare(dataset)
    features, _ = store.batch(dataset.samples)
    monkeypatch.undo()
    wanted, _ = FeatureStore(model, tmp_path).batch(dataset.samples)
    assert all(torch.equal(features[name], wanted[name]) for name in wanted)
    assert store.computed == count(dataset)


def test_missing_and_withheld_pictures_are_zeros(model, dataset, tmp_path):
    store = FeatureStore(model, tmp_path)
    features, present = store.batch(dataset.samples, lambda index, name: index == 0)
    # Sample 6 has no up- and no down-gaze; the primary gaze is never withheld.
    assert present["primary"].all()
    assert present["up"].tolist() == [False, True, True, True, True, True, False, True]
    assert torch.equal(features["up"].abs().sum(1) > 0, present["up"])


def test_unreadable_pictures_are_reported_together(model, dataset, tiny_eyes, tmp_path):
    broken = []
    for number in range(2):
        path = tmp_path / f"broken{number}.png"
        raw = (tiny_eyes / "0_primary.png").read_bytes()
        path.write_bytes(raw[: len(raw) // 2])
        image = msgspec.structs.replace(first_image(dataset), path=path, digest=str(number))
        broken.append(msgspec.structs.replace(dataset.samples[0], images={"primary": image}))
    bad = msgspec.structs.replace(dataset, samples=tuple(broken))
    with pytest.raises(DataError, match=r"(?s)broken0.png.*truncated.*broken1.png"):
        FeatureStore(model, tmp_path / "cache").prepare(bad)


def test_a_backbone_that_gives_nan_is_refused(model, dataset, tmp_path):
    with torch.no_grad():
        model.backbone.norm.weight.fill_(float("nan"))
    with pytest.raises(WeightsError, match="NaN"):
        FeatureStore(model, tmp_path).prepare(dataset)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_features_are_taken_in_full_float32(model, dataset, tmp_path, monkeypatch):
    seen = []
    extract = model.extract

    def spy(pixels):
        seen.append(torch.backends.cudnn.allow_tf32)
        return extract(pixels)

    monkeypatch.setattr(model, "extract", spy)
    FeatureStore(model, tmp_path).get(first_image(dataset))
    assert seen == [False]


def test_a_cache_that_cannot_be_written(model, dataset, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="--cache"):
        FeatureStore(model, tmp_path / "file").prepare(dataset)


def test_the_default_folder_can_be_named(monkeypatch, tmp_path):
    monkeypatch.setenv("DINOEXPORT_CACHE", str(tmp_path))
    assert default_cache() == tmp_path / "features"
    monkeypatch.delenv("DINOEXPORT_CACHE")
    assert default_cache().name == "features"
