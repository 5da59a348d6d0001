"""Pictures: what is read, turned and cropped, and every kind that is refused."""

import struct
import zlib

import numpy as np
import pytest
from PIL import Image
from skimage.transform import downscale_local_mean

from dinotrain.data.images import (
    crop_window,
    fit_image,
    read_image,
    verify_image,
)
from dinotrain.errors import DataError, ShapeError


@pytest.fixture
def photo():
    """Return 48×64 pixels whose corners tell where they are."""
    image = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    image[:4, :4] = (255, 0, 0)
    return image


def save(image, path, **options):
    Image.fromarray(image).save(path, **options)
    return path


@pytest.mark.parametrize("suffix", ["png", "bmp", "tiff", "webp"])
def test_lossless_formats_come_back_exactly(photo, tmp_path, suffix):
    options = {"lossless": True, "exact": True} if suffix == "webp" else {}
    path = save(photo, tmp_path / f"a.{suffix}", **options)
    assert np.array_equal(read_image(path), photo)
    assert verify_image(path) == (48, 64)


# What a viewer must do to the stored pixels, by EXIF 2.3, table of orientation.
TURNS = {
    1: lambda a: a,
    2: np.fliplr,
    3: lambda a: np.rot90(a, 2),
    4: np.flipud,
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).transpose(1, 0, 2),
    8: lambda a: np.rot90(a, 1),
}


@pytest.mark.parametrize("orientation", TURNS)
def test_exif_orientation(photo, tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(photo, tmp_path / "a.png", exif=exif)
    wanted = TURNS[orientation](photo)
    assert np.array_equal(read_image(path), wanted)
    assert verify_image(path) == wanted.shape[:2]


def test_opaque_alpha_and_palettes_are_converted(photo, tmp_path):
    opaque = np.dstack([photo, np.full(photo.shape[:2], 255, np.uint8)])
    assert np.array_equal(read_image(save(opaque, tmp_path / "a.png")), photo)
    palette = Image.fromarray(photo).quantize(32)
    palette.save(tmp_path / "p.png")
    assert np.array_equal(read_image(tmp_path / "p.png"), np.array(palette.convert("RGB")))


@pytest.mark.parametrize("suffix", ["png", "tiff", "bmp", "jpg"])
def test_greyscale_is_repeated_in_all_channels(photo, tmp_path, suffix):
    path = save(photo[..., 0], tmp_path / f"a.{suffix}")
    found = read_image(path)
    assert found.shape == (48, 64, 3)
    assert verify_image(path) == (48, 64)
    # What Pillow itself decodes; JPEG loses some of it.
    wanted = np.array(Image.open(path))
    assert wanted.ndim == 2
    assert all(np.array_equal(found[..., channel], wanted) for channel in range(3))


def test_transparent_greyscale_becomes_black(photo, tmp_path):
    alpha = np.full(photo.shape[:2], 255, np.uint8)
    alpha[:10] = 0
    path = save(np.dstack([photo[..., 0], alpha]), tmp_path / "a.png")
    found = read_image(path)
    assert not found[:10].any()
    assert np.array_equal(found[10:], np.repeat(photo[10:, :, :1], 3, axis=2))


def test_transparency_becomes_black(photo, tmp_path):
    alpha = np.full(photo.shape[:2], 255, np.uint8)
    alpha[:10] = 0
    found = read_image(save(np.dstack([photo, alpha]), tmp_path / "a.png"))
    assert not found[:10].any()
    assert np.array_equal(found[10:], photo[10:])


def test_the_first_frame_of_an_animation_is_read(photo, tmp_path):
    frames = [Image.fromarray(photo), Image.fromarray(255 - photo)]
    frames[0].save(
        tmp_path / "a.webp", save_all=True, append_images=frames[1:], lossless=True, exact=True
    )
    assert np.array_equal(read_image(tmp_path / "a.webp"), photo)


@pytest.mark.parametrize(
    ("mode", "suffix", "message"),
    [
        ("1", "png", "black and white"),
        ("I;16", "png", "16 bits"),
        ("I;16", "tiff", "16 bits"),
        ("I", "tiff", "32-bit greyscale"),
        ("F", "tiff", "floating-point"),
        ("CMYK", "jpg", "CMYK"),
        ("LAB", "tiff", "LAB"),
    ],
)
def test_modes_that_are_refused(tmp_path, mode, suffix, message):
    path = tmp_path / f"a.{suffix}"
    Image.new(mode, (64, 64)).save(path)
    for read in (read_image, verify_image):
        with pytest.raises(DataError, match=message) as caught:
            read(path)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)


def png(width: int, height: int, depth: int, data: bytes) -> bytes:
    """Write an RGB PNG by hand; Pillow cannot write 16 bits, nor a header that lies."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        crc = zlib.crc32(kind + body)
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", crc)

    header = struct.pack(">IIBBBBB", width, height, depth, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def test_16_bit_colour_is_refused(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(png(40, 40, 16, (b"\0" + b"\x12\x34" * 120) * 40))
    with pytest.raises(DataError, match="16 bits"):
        read_image(path)
    path.write_bytes(png(40, 40, 8, (b"\0" + b"\x12" * 120) * 40))
    assert read_image(path).shape == (40, 40, 3)


@pytest.mark.parametrize("side", [8000, 60000], ids=["64MP", "bomb"])
def test_a_huge_picture_is_refused_by_its_header(tmp_path, side):
    path = tmp_path / "a.png"
    path.write_bytes(png(side, side, 8, b""))
    for read in (read_image, verify_image):
        with pytest.raises(DataError, match="megapixels"):
            read(path)


def test_a_tiny_picture_is_refused(tmp_path):
    path = save(np.zeros((8, 64, 3), np.uint8), tmp_path / "a.png")
    with pytest.raises(DataError, match="64×8 pixels"):
        read_image(path)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_a_truncated_picture_is_refused(photo, tmp_path, suffix):
    path = save(photo, tmp_path / f"a.{suffix}")
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    for read in (read_image, verify_image):
        with pytest.raises(DataError, match="a\\." + suffix):
            read(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty"),
        (b"hello, I am no picture", "not a picture"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not a picture"),
        (b"\0\0\0\x18ftypheic\0\0\0\0", "HEIC"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", "not a picture"),
    ],
    ids=["empty", "text", "svg", "heic", "eps"],
)
def test_what_is_no_picture(tmp_path, content, message):
    path = tmp_path / "a.jpg"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_image(path)


def test_missing_and_folder(tmp_path):
    with pytest.raises(DataError, match="no such picture"):
        read_image(tmp_path / "a.jpg")
    with pytest.raises(DataError, match="a folder"):
        read_image(tmp_path)


def test_crop_window_keeps_the_scale():
    # 5 px/mm, window 8 mm: the middle 40×40 of 60×100, halved to 20×20.
    image = np.zeros((60, 100, 3), np.uint8)
    smooth = np.linspace(20, 230, 40)[:, None] + np.linspace(-10, 10, 40)
    image[10:50, 30:70] = smooth[..., None].round()
    found = crop_window(image, 5.0, 8.0, (20, 20))
    wanted = downscale_local_mean(image[10:50, 30:70].astype(float), (2, 2, 1))
    # Bicubic equals the local mean on a slope, up to rounding and the outermost pixels.
    assert np.abs(found.astype(float) - wanted)[2:-2, 2:-2].max() <= 1.0


def test_crop_window_paints_what_is_missing_black():
    image = np.full((40, 80, 3), 200, np.uint8)
    found = crop_window(image, 1.0, 80.0, (40, 40))
    assert (found[10:30] == 200).all()
    assert not found[:10].any()
    assert not found[30:].any()


def test_crop_window_at_its_own_scale_is_a_slice(photo):
    assert np.array_equal(crop_window(photo, 1.0, 32.0, (32, 32)), photo[8:40, 16:48])


def test_a_wrong_scale_costs_no_memory(photo):
    with pytest.raises(ShapeError, match="px_per_mm"):
        crop_window(photo, 1e9, 40.0, (224, 224))


def test_fit_image_cuts_the_centre(photo):
    assert fit_image(photo, (48, 64)) is photo
    assert np.array_equal(fit_image(photo, (48, 48)), photo[:, 8:56])
    assert np.array_equal(fit_image(photo, (32, 64)), photo[8:40])
    assert fit_image(photo, (224, 224)).shape == (224, 224, 3)


def test_arrays_that_are_no_picture_are_refused():
    with pytest.raises(ShapeError, match="float64"):
        fit_image(np.zeros((40, 40, 3)), (14, 14))
    with pytest.raises(ShapeError, match=r"\(40, 40\)"):
        crop_window(np.zeros((40, 40), np.uint8), 1.0, 40.0, (14, 14))
