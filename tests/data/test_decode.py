import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fedftg.data import decode
from fedftg.data.decode import Sizing, resized
from fedftg.errors import InputError


def decoded(content, sizing=None):
    return decode.decode("here", content, sizing or Sizing())


def halves(width, height, left=0, right=200):
    """A grey image whose left half is one value and whose right half another."""
    pixels = np.full((height, width), left, dtype=np.uint8)
    pixels[:, width // 2 :] = right
    return pixels


def test_orientation_of_the_camera_is_applied(hub):
    """Orientation 6: the camera was turned right, so the stored left column is the top row of the upright image."""
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = np.array([[0, 1, 2], [3, 4, 5]], dtype=np.uint8)
    pixels, mode = decoded(hub.encode(stored, exif=exif))
    assert pixels.tolist() == [[3, 0], [4, 1], [5, 2]]
    assert mode == "L"


def test_damaged_note_of_the_camera_is_no_reason_to_refuse(hub):
    pixels, _ = decoded(hub.encode(halves(4, 4), exif=b"Exif\x00\x00nonsense"))
    assert pixels.tolist() == halves(4, 4).tolist()


def test_crop_keeps_the_middle_and_stretch_keeps_all(hub):
    """32x16, black left of column 16: the middle 16x16 is columns 8..23, black in its left half; so is the whole."""
    wide = np.zeros((16, 32, 3), dtype=np.uint8)
    wide[:, 24:] = 255  # only outside the middle
    content = hub.encode(wide)
    cropped, _ = decoded(content, Sizing(16, "crop"))
    stretched, _ = decoded(content, Sizing(16, "stretch"))
    assert cropped.shape == stretched.shape == (16, 16, 3)
    assert cropped.max() == 0
    assert stretched[:, :10].max() < 10
    assert stretched[:, -2:].min() > 245


def test_reduction_is_antialiased(hub):
    """Columns of 0 and 200 in turn at an eighth of the size: a filter that covers its pixels gives their mean 100."""
    stripes = np.tile(np.array([0, 200], dtype=np.uint8), (64, 32))
    pixels, _ = decoded(hub.encode(stripes), Sizing(8))
    assert np.abs(pixels[:, 1:-1].astype(int) - 100).max() <= 2


def test_reduced_jpeg_looks_like_the_whole_one(hub):
    """JPEG may be decoded at a fraction of its size; the result stays within a few levels of the plain way."""
    smooth = np.add.outer(np.arange(256), np.arange(256)) // 2
    image = Image.fromarray(np.stack([smooth, smooth[::-1], smooth.T[:, ::-1]], axis=2).astype(np.uint8))
    content = hub.encode(image, "JPEG", quality=95)
    plain = np.asarray(Image.open(io.BytesIO(content)).resize((16, 16), Image.Resampling.BICUBIC))
    pixels, _ = decoded(content, Sizing(16))
    assert np.abs(pixels.astype(int) - plain).max() <= 4


def test_image_that_has_the_size_is_left_alone(hub):
    image = hub.colour(1, size=16)[0]
    assert np.array_equal(decoded(hub.encode(image), Sizing(16))[0], image)


@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
def test_more_than_8_bits_are_refused(hub, mode):
    image = Image.new(mode, (8, 8))
    content = hub.encode(image, "TIFF")
    with pytest.raises(InputError, match=f"here: images of mode '{mode}' are not supported; convert them to 8-bit"):
        decoded(content)


def test_order_is_kept_over_blocks_and_the_first_bad_image_is_told(hub):
    images = hub.colour(200, size=8)
    encoded = [(f"row {row}", hub.encode(image)) for row, image in enumerate(images)]
    found = [item for block in decode.decoded(encoded, Sizing()) for item in block]
    assert [where for where, _, _ in found] == [f"row {row}" for row in range(200)]
    assert np.array_equal(np.stack([pixels for _, pixels, _ in found]), images)
    encoded[70] = ("row 70", b"no image")
    encoded[71] = ("row 71", b"no image either")
    with pytest.raises(InputError, match="row 70: the image is corrupt"):
        list(decode.decoded(encoded, Sizing()))


def test_few_images_are_in_memory_at_a_time(hub):
    """The source is asked for no more than a block ahead of what is handed on."""
    content = hub.encode(hub.grey(1)[0])
    asked = []

    def source():
        for row in range(300):
            asked.append(row)
            yield str(row), content

    blocks = decode.decoded(source(), Sizing())
    assert len(next(blocks)) == len(asked) == 64


def test_file_that_is_gone():
    with pytest.raises(InputError, match="here: the image is corrupt"):
        decoded(Path("/nowhere/x.png"))


def test_arrays_are_resized_like_files(hub):
    images = hub.colour(2, size=12)
    expected = np.stack([decoded(hub.encode(image), Sizing(8))[0] for image in images])
    assert np.array_equal(resized(images.transpose(0, 3, 1, 2), Sizing(8)).transpose(0, 2, 3, 1), expected)
    grey = hub.grey(2, size=12)
    expected = np.stack([decoded(hub.encode(image), Sizing(8))[0] for image in grey])
    assert np.array_equal(resized(grey[:, None], Sizing(8))[:, 0], expected)


def test_sixteen_bit_colour_is_refused_though_pillow_takes_it_for_rgb():
    """A 1x1 PNG of colour type 2 and depth 16, by hand: IHDR, one row of filter 0 and three 16-bit values, IEND."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 16, 2, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(b"\0" + struct.pack(">HHH", 1000, 2000, 3000)))
    png = b"\x89PNG\r\n\x1a\n" + head + body + chunk(b"IEND", b"")
    with pytest.raises(InputError, match="here: images of mode 'RGB;16' are not supported"):
        decoded(png)
