"""Masks: the stored ids come back, every other kind is refused, and the resize keeps geometry."""

import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from dinotrain.data.images import fit_image
from dinotrain.data.masks import IGNORE, fit_mask, read_mask
from dinotrain.errors import DataError


@pytest.fixture
def ids():
    """Return a mask of all ids up to 3 and of ignored pixels, whose corners differ."""
    mask = np.random.default_rng(0).choice([0, 1, 2, 3, IGNORE], (40, 56)).astype(np.uint8)
    mask[:8, :8] = 1
    return mask


def indexed(ids):
    image = Image.fromarray(ids, "P")
    # Colours that would betray a reader that takes them for ids.
    image.putpalette([value for c in range(256) for value in (255 - c, 7, c)])
    return image


def grey_png(depth: int) -> bytes:
    """Write a greyscale PNG of a chosen bit depth by hand, 32×32 of zeros."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    rows = b"".join(b"\0" + bytes(32 * depth // 8) for _ in range(32))
    header = struct.pack(">IIBBBBB", 32, 32, depth, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


def test_greyscale_and_indexed_give_the_stored_ids(ids, tmp_path):
    Image.fromarray(ids).save(tmp_path / "grey.png")
    indexed(ids).save(tmp_path / "indexed.png")
    few = (ids % 4).astype(np.uint8)
    indexed(few).save(tmp_path / "two_bits.png", bits=2)
    assert np.array_equal(read_mask(tmp_path / "grey.png"), ids)
    assert np.array_equal(read_mask(tmp_path / "indexed.png"), ids)
    assert np.array_equal(read_mask(tmp_path / "two_bits.png"), few)


def test_a_turned_mask_comes_upright(ids, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90° clockwise to view
    indexed(ids).save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(read_mask(tmp_path / "a.png"), np.rot90(ids, -1))


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "I;16", "1"])
def test_other_kinds_are_refused(mode, tmp_path):
    path = tmp_path / "a.png"
    Image.new(mode, (32, 32)).save(path)
    with pytest.raises(DataError, match=r"8-bit indexed or greyscale PNG of class ids is accepted"):
        read_mask(path)


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_grey_of_few_bits_is_refused_because_it_is_read_spread(depth, tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(grey_png(depth))
    with pytest.raises(DataError, match="fewer than 8 bits"):
        read_mask(path)
    (tmp_path / "b.png").write_bytes(grey_png(8))
    assert read_mask(tmp_path / "b.png").shape == (32, 32)


def test_damage_and_other_formats_are_refused(ids, tmp_path):
    path = tmp_path / "a.png"
    with pytest.raises(DataError, match="no such mask"):
        read_mask(path)
    path.write_bytes(b"")
    with pytest.raises(DataError, match="not a PNG"):
        read_mask(path)
    Image.fromarray(ids).save(path, "JPEG")
    with pytest.raises(DataError, match="other formats change values"):
        read_mask(path)
    Image.fromarray(ids).save(path, "PNG")
    path.write_bytes(path.read_bytes()[:-60])
    with pytest.raises(DataError, match="truncated or damaged"):
        read_mask(path)


@pytest.mark.parametrize(
    ("shape", "size"),
    [((480, 640), (224, 224)), ((333, 517), (518, 518)), ((200, 300), (70, 112))],
    ids=["shrunk", "enlarged", "wide"],
)
def test_a_mask_is_resized_as_its_picture(shape, size):
    """A disc that is drawn in both ends in the same place in both."""
    y, x = np.mgrid[: shape[0], : shape[1]]
    disc = np.hypot(y - 0.4 * shape[0], x - 0.55 * shape[1]) < 0.3 * min(shape)
    picture = np.repeat((disc * 255).astype(np.uint8)[..., None], 3, axis=2)
    mask = fit_mask(disc.astype(np.uint8), size)
    assert mask.shape == size
    shown = fit_image(picture, size)[..., 0] > 127
    # Nearest moves an edge by at most half a pixel of the coarser grid.
    edge = 2 * np.pi * 0.3 * min(shape) * max(size[0] / shape[0], size[1] / shape[1])
    assert (shown != mask).sum() < 0.5 * edge
    # A shift by two pixels of the result is seen.
    assert (np.roll(shown, 2, axis=1) != mask).sum() > 0.5 * edge


def test_a_resize_invents_no_value(ids):
    assert set(np.unique(fit_mask(ids, (97, 61)))) <= set(np.unique(ids))
    assert fit_mask(ids, (40, 56)) is ids
