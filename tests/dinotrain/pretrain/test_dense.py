"""Dense pretraining: its labels fit its crops, its probe tells good from bad, tiny runs repeat."""

import hashlib
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from safetensors import safe_open

from dinotrain.backbones.vit import VisionTransformer, ViTConfig, init_weights_
from dinotrain.errors import DataError, UsageError
from dinotrain.pretrain import dense, eye_pool
from dinotrain.pretrain.dense import DenseConfig
from dinotrain.pretrain.eye_pool import EyePool, load_pool

SMALL = ViTConfig(
    name="tiny", embed_dim=24, depth=2, heads=2, ffn_dim=48, grid=(16, 16), position_rule="size"
)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("eyes")


@pytest.fixture(scope="module")
def pool(cache: Path) -> EyePool:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(eye_pool, "CHUNK_EYES", 4)
        return load_pool(8, 1, cache)


def no_shift(eyes: int) -> np.ndarray:
    return np.zeros((3 * eyes, 2), dtype=np.int64)


def test_heights_hold_the_labels_of_the_eye_whatever_the_shift(pool: EyePool) -> None:
    shifts = np.random.default_rng(0).integers(-8, 9, (24, 2))
    heights = dense.take(pool, np.arange(8), shifts).heights.reshape(8, 3, -1).numpy()
    # float32 sums of a few millimetres
    np.testing.assert_allclose(heights[:, 0, 0], pool.labels[:, 0], atol=1e-4)
    np.testing.assert_allclose(heights[:, 0, 1], pool.labels[:, 1], atol=1e-4)
    lift = heights[:, 1, 2] - heights[:, 2, 2]
    np.testing.assert_allclose(lift, pool.labels[:, 2], atol=1e-4)


def test_a_shifted_crop_moves_its_cells_and_heights_alike(pool: EyePool) -> None:
    """Seven pixels down is one cell: shares move by one row, absolute heights by 1.25 mm."""
    down = no_shift(1)
    down[:, 1] = 7
    still = dense.take(pool, np.array([2]), no_shift(1))
    moved = dense.take(pool, np.array([2]), down)
    assert torch.equal(moved.cells[:, :, :-1], still.cells[:, :, 1:])
    assert torch.equal(moved.images[:, :, :-7], still.images[:, :, 7:])
    change = (moved.heights - still.heights)[:, 3:]
    torch.testing.assert_close(change, torch.full_like(change, -1.25))


def test_cells_are_shares_of_classes(pool: EyePool) -> None:
    cells = dense.take(pool, np.arange(3), no_shift(3)).cells
    assert cells.shape == (9, dense.CLASSES, 32, 32)
    torch.testing.assert_close(cells.sum(dim=1), torch.ones(9, 32, 32))
    assert (cells.amax(dim=(0, 2, 3)) > 0.9).all()  # every class is seen somewhere


def test_rows_of_patches_keep_their_places() -> None:
    torch.manual_seed(0)
    model = init_weights_(VisionTransformer(SMALL)).eval()
    images = torch.randn(2, 3, 224, 224)
    with torch.inference_mode():
        whole, all_rows = model(images), dense.encode(model, images, (0, 16))
        torch.testing.assert_close(all_rows.patch_tokens, whole.patch_tokens)
        # Without attention and MLP a patch knows only itself and its place.
        model.blocks = torch.nn.ModuleList()
        some = dense.encode(model, images, (2, 13)).patch_tokens
        torch.testing.assert_close(some, model(images).patch_tokens[:, 32 : 13 * 16])


def test_disturbed_pictures_stay_pictures_and_repeat(pool: EyePool) -> None:
    images = dense.take(pool, np.arange(4), no_shift(4)).images
    first = dense.disturb(images, torch.Generator().manual_seed(5))
    again = dense.disturb(images, torch.Generator().manual_seed(5))
    assert torch.equal(first, again)
    assert not torch.equal(first, images)
    assert first.shape == images.shape
    assert float(first.min()) >= 0 and float(first.max()) <= 1


def test_the_probe_tells_features_with_the_answer_from_noise() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randn(140, 3, generator=generator) * 3
    noise = torch.randn(140, 3, 16, generator=generator)
    knowing = noise.clone()
    knowing[:, 0, 0], knowing[:, 0, 1] = labels[:, 0], labels[:, 1]
    knowing[:, 1, 2], knowing[:, 2, 2] = labels[:, 2] / 2, -labels[:, 2] / 2
    good, bad = dense.probe(knowing, labels, 100), dense.probe(noise, labels, 100)
    for name in ("mrd1_mm", "mrd2_mm", "lf_mm"):
        baseline = getattr(good, f"mean_{name}")
        # A ridge of 3 on 100 eyes shrinks a perfect answer by 3 %; noise can only lose.
        assert getattr(good, name) < 0.25 * baseline
        assert getattr(bad, name) > 0.8 * baseline
    mean = labels[:100, 0].mean()
    assert good.mean_mrd1_mm == pytest.approx(
        float((labels[100:, 0] - mean).abs().mean()), abs=1e-3
    )
    with pytest.raises(UsageError):
        dense.probe(noise, labels, 140)


def test_a_tiny_run_repeats_and_writes_what_it_is(pool: EyePool, tmp_path: Path) -> None:
    config = DenseConfig(eyes=8, held_out_eyes=8, seed=3, batch_eyes=2, steps=3)
    outs = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for out in outs:
            dense.train(config, SMALL, pool, pool, out)
    finally:
        torch.set_num_threads(threads)
    with safe_open(outs[0], "pt") as first, safe_open(outs[1], "pt") as second:
        assert set(first.keys()) == set(VisionTransformer(SMALL).state_dict())
        for key in first.keys():  # noqa: SIM118
            assert first.get_tensor(key).dtype == torch.float32
            assert torch.equal(first.get_tensor(key), second.get_tensor(key))
        header = first.metadata()
    assert msgspec.json.decode(header["backbone"], type=ViTConfig) == SMALL
    assert msgspec.json.decode(header["training"])["kept"]["step"] == 3
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_training_lowers_the_loss(pool: EyePool) -> None:
    torch.manual_seed(0)
    model, heads = init_weights_(VisionTransformer(SMALL)), dense.PooledHeads(24)
    optimizer = torch.optim.AdamW([*model.parameters(), *heads.parameters()], lr=3e-3)
    batch = dense.take(pool, np.arange(2), no_shift(2))
    found = []
    for _ in range(12):
        total, _ = dense.losses(model(dense.normalise(batch.images)), heads, batch, None)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        found.append(total.item())
    assert found[-1] < 0.75 * found[0]


def test_rendered_eyes_are_kept_and_a_damaged_file_is_named(
    pool: EyePool, cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(eye_pool, "CHUNK_EYES", 4)
    monkeypatch.setattr(eye_pool, "render_eye", None)  # rendering again would fail
    again = load_pool(8, 1, cache)
    digests = [hashlib.sha256(p.images.tobytes()).hexdigest() for p in (pool, again)]
    assert digests[0] == digests[1]
    kept = sorted(cache.glob("eyes-*.npz"))
    assert len(kept) == 2
    (tmp_path / kept[0].name).write_bytes(kept[0].read_bytes()[:500])
    with pytest.raises(DataError, match="damaged"):
        load_pool(4, 1, tmp_path)


def test_left_eyes_are_turned_to_right_orientation(pool: EyePool) -> None:
    nasal = eye_pool.POINTS.index("nasal")
    assert (pool.points[:, :, nasal, 0] > 0).all()
