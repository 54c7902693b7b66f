import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from fedftg.data import decode, read
from fedftg.data.classes import RawLabels
from fedftg.data.decode import decode as decoded
from fedftg.errors import InputError


def empty(shape):
    return np.empty(shape, np.uint8)


def whole(*splits):
    """Images, how many were converted, and progress, of splits that are lists of encoded images."""
    wanted, counts = [], []
    for number, images in enumerate(splits):
        labels = RawLabels(np.zeros(len(images), int), lambda row, number=number: f"split {number}, row {row}")
        split = read.Split(labels, lambda rows, images=images: [images[row] for row in rows])
        wanted.append((split, np.arange(len(images))))
    images, converted = decode.decode_all(wanted, None, "crop", empty, lambda *given: counts.append(given))
    return images, converted, counts


def test_orientation_of_the_camera_is_applied(hub):
    """Orientation 6: the camera was turned right, so the stored left column is the top row of the upright image."""
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = np.array([[0, 1, 2], [3, 4, 5]], dtype=np.uint8)
    pixels, mode = decoded(hub.encode(stored, exif=exif))
    assert pixels.tolist() == [[3, 0], [4, 1], [5, 2]]
    assert mode == "L"


def test_crop_keeps_the_middle_and_stretch_keeps_all(hub):
    """32x16, black left of column 16: the middle 16x16 is columns 8..23, black in its left half; so is the whole."""
    wide = np.zeros((16, 32, 3), dtype=np.uint8)
    wide[:, 24:] = 255  # only outside the middle
    content = hub.encode(wide)
    cropped, _ = decoded(content, 16, "crop")
    stretched, _ = decoded(content, 16, "stretch")
    assert cropped.shape == stretched.shape == (16, 16, 3)
    assert cropped.max() == 0
    assert stretched[:, :10].max() < 10
    assert stretched[:, -2:].min() > 245


def test_reduced_jpeg_looks_like_the_whole_one(hub):
    """JPEG may be decoded at a fraction of its size; the result stays within a few levels of the plain way."""
    smooth = np.add.outer(np.arange(256), np.arange(256)) // 2
    image = Image.fromarray(np.stack([smooth, smooth[::-1], smooth.T[:, ::-1]], axis=2).astype(np.uint8))
    content = hub.encode(image, "JPEG", quality=95)
    plain = np.asarray(Image.open(io.BytesIO(content)).resize((16, 16), Image.Resampling.BICUBIC))
    pixels, _ = decoded(content, 16)
    assert np.abs(pixels.astype(int) - plain).max() <= 4


@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
def test_more_than_8_bits_are_refused(hub, mode):
    with pytest.raises(InputError, match=f"images of mode '{mode}' are not supported; convert"):
        decoded(hub.encode(Image.new(mode, (8, 8)), "TIFF"))


def test_order_is_kept_and_the_first_bad_image_is_named(hub):
    images = hub.colour(200, size=8)
    encoded = [hub.encode(image) for image in images]
    found, converted, counts = whole(encoded[:150], encoded[150:])
    assert np.array_equal(found.transpose(0, 2, 3, 1), images)
    assert (converted, counts) == ({}, [(64, 200), (128, 200), (192, 200), (200, 200)])
    encoded[170] = encoded[171] = b"no image"
    with pytest.raises(InputError, match="split 1, row 20: the image cannot be decoded"):
        whole(encoded[:150], encoded[150:])
    encoded[100] = hub.encode(hub.colour(1, size=9)[0])
    with pytest.raises(InputError, match=r"split 0, row 100: the image is 9x9 \(H x W\), the first one 8x8; set"):
        whole(encoded)


def test_all_grey_stays_grey_and_one_colour_image_makes_all_colour(hub):
    grey = hub.grey(100)
    content = [hub.encode(image) for image in grey]
    images, converted, _ = whole(content)
    assert np.array_equal(images, grey[:, None])
    assert converted == {}
    content[90] = hub.encode(hub.colour(1, size=8)[0])
    images, converted, _ = whole(content)
    assert images.shape == (100, 3, 8, 8)
    assert np.array_equal(np.delete(images, 90, 0), np.delete(grey[:, None].repeat(3, axis=1), 90, 0))
    assert converted == {"grey": 99}


def test_mixed_modes_become_rgb_and_are_counted(hub):
    rgb = Image.fromarray(hub.colour(1, size=8)[0])
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    content = [
        hub.encode(rgb),
        hub.encode(hub.grey(1)[0]),
        hub.encode(palette, transparency=b"\x00\x80"),
        hub.encode(rgb.convert("RGBA")),
        hub.encode(Image.new("CMYK", (8, 8), (0, 0, 0, 255)), "JPEG"),
        hub.encode(Image.new("1", (8, 8), 1)),
        hub.encode(rgb, "PPM"),
        hub.encode(rgb, "TIFF"),
    ]
    images, converted, _ = whole(content)
    assert images.shape == (8, 3, 8, 8)
    assert all(np.array_equal(images[0], images[row]) for row in (3, 6, 7))
    assert np.array_equal(images[1], np.broadcast_to(hub.grey(1), (3, 8, 8)))
    assert images[2, :, 0, 0].tolist() == [132, 137, 142]  # half transparent: x * 128 / 255 + 127
    assert images[4].max() < 10
    assert images[5].min() == 255
    assert converted == {"CMYK": 1, "P": 1, "RGBA": 1, "grey": 2}


def test_arrays_are_resized_like_files(hub):
    for image in (*hub.colour(2, size=12), *hub.grey(2, size=12)):
        pixels, mode = decoded(image, 8)
        assert np.array_equal(pixels, decoded(hub.encode(image), 8)[0])
        assert mode == ("L" if image.ndim == 2 else "RGB")


def test_a_very_large_image_is_not_called_corrupt(hub, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(InputError, match=r"DecompressionBombError: Image size \(64 pixels\) exceeds"):
        decoded(hub.encode(hub.grey(1)[0]))


def png_of_16_bits():
    """A 1x1 PNG of colour type 2 and depth 16, by hand: IHDR, one row of filter 0 and three 16-bit values, IEND."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 16, 2, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(b"\0" + struct.pack(">HHH", 1000, 2000, 3000)))
    return b"\x89PNG\r\n\x1a\n" + head + body + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"P6 8 8 1023\n" + b"\x03\xff" * 192, ([255, 255, 255], "16-bit RGB")),
        (b"P3 1 1 255 1 2 3", ([1, 2, 3], "RGB")),
        (png_of_16_bits(), ([3, 7, 11], "16-bit RGB")),
    ],
    ids=["ppm", "plain-8-bit-ppm", "png"],
)
def test_sixteen_bit_colour_becomes_eight_bit_and_is_named(content, expected):
    pixels, mode = decoded(content)
    assert (pixels[0, 0].tolist(), mode) == expected


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA"])
def test_what_is_only_in_the_transparency_and_white_is_refused(hub, mode):
    """White drawings, and pixels that an alpha channel of zeros hides; a blank image is one."""
    shape = Image.fromarray(hub.grey(1)[0])
    white = Image.new("L", (8, 8), 255)
    layers = Image.merge("LA", (white, shape)) if mode == "LA" else Image.merge("RGBA", (white, white, white, shape))
    content = hub.encode(layers if mode != "PA" else layers.quantize(256), "PNG")
    with pytest.raises(
        InputError, match=r"^all white after its transparent parts are filled with white; flatten it onto"
    ):
        decoded(content)
    hidden = Image.merge("RGBA", (shape, shape, shape, Image.new("L", (8, 8), 0)))
    with pytest.raises(InputError, match="all white after"):
        decoded(hub.encode(hidden))
    assert decoded(hub.encode(Image.new("RGBA", (8, 8))))[0].min() == 255


@pytest.mark.parametrize(("kind", "mode"), [("GIF", "P"), ("TIFF", "RGB"), ("WEBP", "RGB"), ("PNG", "RGB")])
def test_further_frames_are_counted(hub, kind, mode):
    frames = [Image.fromarray(image) for image in hub.colour(3, size=8)]
    several = hub.encode(frames[0], kind, save_all=True, append_images=frames[1:])
    _, converted, _ = whole([several, hub.encode(frames[0])])
    assert converted == {f"{mode} (first of several frames)": 1}


def test_transparent_images_are_put_on_white(hub):
    """Black at an alpha of 51 of 255 is four fifths white; an opaque image keeps its bytes."""
    for mode, black in (("LA", (0, 51)), ("RGBA", (0, 0, 0, 51))):
        pixels, found = decoded(hub.encode(Image.new(mode, (8, 8), black)))
        assert (found, np.unique(pixels).tolist(), pixels.ndim) == (mode, [204], len(black) // 2 + 1)
    image = hub.colour(1)[0]
    assert np.array_equal(decoded(hub.encode(np.dstack([image, np.full(image.shape[:2], 255, np.uint8)])))[0], image)
