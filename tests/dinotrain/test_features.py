"""The feature cache: exact, keyed by everything that counts, and suspicious of its own files."""

import msgspec
import numpy as np
import pytest
import torch

from dinotrain.backbones import load_backbone
from dinotrain.data.augment import sample_stream
from dinotrain.data.dataset import Dataset
from dinotrain.errors import DataError, UsageError, WeightsError
from dinotrain.features import FeatureStore, default_cache
from dinotrain.heads.pool import FeatureConfig
from dinotrain.model import ModelConfig, TaskModel
from dinotrain.tasks import get_task


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


def first(dataset):
    return dataset.samples[0], "primary"


def with_image(sample, **changes):
    """The sample with another primary picture."""
    image = msgspec.structs.replace(sample.images["primary"], **changes)
    return msgspec.structs.replace(sample, images=sample.images | {"primary": image})


def test_features_are_what_the_model_extracts(model, dataset, tmp_path):
    store = FeatureStore(model, tmp_path)
    store.prepare(dataset)
    assert store.computed == count(dataset) > 8
    sample, name = first(dataset)
    pixels = torch.from_numpy(dataset.load(sample.images[name])).permute(2, 0, 1).unsqueeze(0)
    (found,) = store.get(sample, name)
    (wanted,) = model.extract(pixels)
    assert torch.equal(found, wanted[0])


def test_a_second_run_computes_nothing(model, dataset, tmp_path):
    before = FeatureStore(model, tmp_path)
    before.prepare(dataset)
    told = []
    again = FeatureStore(model, tmp_path)
    again.prepare(dataset, lambda *args: told.append(args))
    assert again.computed == 0
    assert told == [("features", count(dataset), count(dataset), f"{count(dataset)} cached")]
    assert torch.equal(before.get(*first(dataset))[0], again.get(*first(dataset))[0])


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
    other = build(tiny_backbone, **change)
    before = FeatureStore(model, tmp_path).key(*first(dataset))
    assert FeatureStore(other, tmp_path).key(*first(dataset)) != before


def test_weights_and_crops_have_their_own_key(model, dataset, tmp_path):
    sample, name = first(dataset)
    before = FeatureStore(model, tmp_path).key(sample, name)
    mirrored = not sample.images[name].mirror
    for change in ({"px_per_mm": 2.0}, {"mirror": mirrored}, {"digest": "0"}):
        assert FeatureStore(model, tmp_path).key(with_image(sample, **change), name) != before
    moved = with_image(sample, path=tmp_path / "elsewhere.png")
    assert FeatureStore(model, tmp_path).key(moved, name) == before
    with torch.no_grad():
        model.backbone.cls_token += 1e-3
    assert FeatureStore(model, tmp_path).key(sample, name) != before


def test_each_draw_of_the_augmentation_has_its_own_entry(model, dataset, tmp_path):
    sample, name = first(dataset)
    store = FeatureStore(model, tmp_path, copies=2, seed=3)
    keys = {store.key(sample, name, copy) for copy in range(3)}
    keys |= {FeatureStore(model, tmp_path, copies=2, seed=4).key(sample, name, 1)}
    assert len(keys) == 4
    # The picture as it is is one entry, whatever is drawn beside it.
    assert store.key(sample, name) == FeatureStore(model, tmp_path).key(sample, name)


def test_copies_are_of_training_pictures_alone_and_take_turns(model, dataset, tmp_path):
    store = FeatureStore(model, tmp_path, copies=2, seed=3)
    store.prepare(dataset)
    train = dataset.split("train")
    assert store.computed == count(dataset) + 2 * count(train)
    epochs = [store.batch(train.samples, epoch=e).inputs["primary"][0] for e in (None, 1, 2, 3)]
    assert torch.equal(epochs[1], epochs[3])
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert not torch.equal(epochs[one], epochs[other])
    # One draw is the task's own change of the picture, from the sample's own stream.
    sample = train.samples[0]
    pixels, _ = model.task.load(sample, (28, 28), sample_stream(3, 1, sample.name))
    image = torch.from_numpy(pixels["primary"].copy()).permute(2, 0, 1).unsqueeze(0)
    assert torch.equal(model.extract(image)[0][0], epochs[1][0])


def test_half_precision_on_disk_is_what_every_run_reads(model, dataset, tmp_path):
    stores = [FeatureStore(model, tmp_path, precision="float16") for _ in range(2)]
    for store in stores:
        store.prepare(dataset)
    assert [store.computed for store in stores] == [count(dataset), 0]
    one, two = (store.get(*first(dataset))[0] for store in stores)
    exact = FeatureStore(model, tmp_path).get(*first(dataset))[0]
    assert one.dtype == torch.float32
    assert torch.equal(one, two)
    assert torch.equal(one, exact.half().float())
    assert not torch.equal(one, exact)


def test_shards_are_disjoint_and_whole(model, dataset, tmp_path):
    parts = [FeatureStore(model, tmp_path) for _ in range(3)]
    for rank, store in enumerate(parts):
        store.prepare(dataset, shard=(rank, 3))
    assert sum(store.computed for store in parts) == count(dataset)
    whole = FeatureStore(model, tmp_path)
    whole.prepare(dataset)
    assert whole.computed == 0


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
    store = FeatureStore(model, tmp_path)
    store.prepare(dataset)
    (wanted,) = store.get(*first(dataset))
    damage(store.entry(*first(dataset)))
    again = FeatureStore(model, tmp_path)
    again.prepare(dataset)
    assert again.computed == 1
    assert torch.equal(again.get(*first(dataset))[0], wanted)
    fresh = FeatureStore(model, tmp_path)
    assert torch.equal(fresh.get(*first(dataset))[0], wanted)
    assert fresh.computed == 0
    assert not list(tmp_path.rglob("*.part"))


def test_features_beyond_memory_come_from_disk(model, dataset, tmp_path, monkeypatch):
    monkeypatch.setattr("dinotrain.features.MEMORY_BYTES", 0)
    store = FeatureStore(model, tmp_path)
    store.prepare(dataset)
    features = store.batch(dataset.samples).inputs
    monkeypatch.undo()
    wanted = FeatureStore(model, tmp_path).batch(dataset.samples).inputs
    assert all(torch.equal(features[name][0], wanted[name][0]) for name in wanted)
    assert store.computed == count(dataset)


def test_missing_and_withheld_pictures_are_zeros(model, dataset, tmp_path):
    store = FeatureStore(model, tmp_path)
    features, present, truth = store.batch(dataset.samples, lambda index, name: index == 0)
    # Sample 6 has no up- and no down-gaze; the primary gaze is never withheld.
    assert present["primary"].all()
    assert present["up"].tolist() == [False, True, True, True, True, True, False, True]
    assert torch.equal(features["up"][0].abs().sum(1) > 0, present["up"])
    np.testing.assert_array_equal(truth, dataset.labels(model.task.labels))


def test_unreadable_pictures_are_reported_together(model, dataset, tiny_eyes, tmp_path):
    broken = []
    for number in range(2):
        path = tmp_path / f"broken{number}.png"
        raw = (tiny_eyes / "0_primary.png").read_bytes()
        path.write_bytes(raw[: len(raw) // 2])
        broken.append(with_image(dataset.samples[0], path=path, digest=str(number)))
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
    FeatureStore(model, tmp_path).get(*first(dataset))
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
