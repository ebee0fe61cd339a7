"""Pictures as the web has them: orientation, modes, alpha, profiles, damage, bombs."""

import io
import json
import os
import struct
import tracemalloc
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageFile

from data_pipeline.images import BadImage, _sixteen_bits_to_grey, decode_image, spelled_orientation

CAP = 10_000_000
FIXTURES = Path(os.environ.get("GOLDEN_DIR", "../shared/golden")).parent / "fixtures"


def encode(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def landmark():
    """2 x 3 blocks of 16 px, every one of another colour, so that every turn and mirroring shows."""
    colours = np.array(
        [[[255, 0, 0], [0, 255, 0], [0, 0, 255]], [[255, 255, 0], [0, 255, 255], [255, 0, 255]]]
    )
    return Image.fromarray(np.repeat(np.repeat(colours, 16, 0), 16, 1).astype(np.uint8))


def same(one, other, tolerance=0):
    one, other = np.asarray(one, np.int32), np.asarray(other, np.int32)
    return one.shape == other.shape and np.abs(one - other).max() <= tolerance


# How a camera that is held so stores an upright picture; applying the tag must give it back.
STORED = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, 1),
    7: lambda a: np.rot90(a.transpose(1, 0, 2), 2),
    8: lambda a: np.rot90(a, -1),
}
SPELLINGS = {
    1: "Horizontal (normal)",
    2: "Mirrored horizontal",
    3: "Rotated 180",
    4: "Mirrored vertical",
    5: "Mirrored horizontal then rotated 90 CCW",
    6: "Rotated 90 CW",
    7: "Mirrored horizontal then rotated 90 CW",
    8: "Rotated 90 CCW",
}


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_from_the_picture_and_from_the_json(orientation):
    upright = landmark()
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](np.asarray(upright))))
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert same(decode_image(encode(stored, exif=exif), CAP), upright)
    spelled = json.dumps({"Image Orientation": SPELLINGS[orientation]})
    assert same(decode_image(encode(stored), CAP, spelled), upright)


def test_the_pictures_own_orientation_goes_before_the_jsons():
    exif = Image.Exif()
    exif[0x0112] = 1
    rotated = json.dumps({"Image Orientation": "Rotated 90 CW"})
    assert same(decode_image(encode(landmark(), exif=exif), CAP, rotated), landmark())


def test_broken_exif_is_passed_over_in_silence():
    """Pillow warns of it at each picture: in a log of millions nobody finds anything else."""
    broken = b"Exif\x00\x00II*\x00\x08\x00\x00\x00\x05\x00\x12\x01\x03\x00"
    data = encode(landmark(), "JPEG", exif=broken, quality=95, subsampling=0)
    with pytest.warns(UserWarning, match="EXIF"):
        Image.open(io.BytesIO(data)).getexif()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert same(decode_image(data, CAP), landmark(), 60)


@pytest.mark.parametrize(
    ("kind", "options"),
    [("JPEG", {"dpi": (72, 72)}), ("JPEG", {}), ("PNG", {}), ("WEBP", {"lossless": True})],
)
def test_exif_of_any_length_says_nothing_about_the_pixels(kind, options):
    """Cut at every byte: Pillow's parser raises what it likes, among it `struct.error` at 4 to 7 bytes."""
    tag = struct.pack("<HHIHH", 0x0112, 3, 1, 3, 0)  # upside down
    whole = b"II*\x00\x08\x00\x00\x00\x02\x00" + tag + b"\x1a\x01\x05\x00\x01\x00\x00\x00"
    if kind == "JPEG":
        options = options | {"quality": 95, "subsampling": 0}
    turned = landmark().transpose(Image.Transpose.ROTATE_180)
    for start in (b"Exif\x00\x00", b""):
        for length in range(41):
            decoded = decode_image(encode(landmark(), kind, exif=(start + whole)[:length], **options), CAP)
            assert same(decoded, landmark(), 60) or same(decoded, turned, 60), length


@pytest.mark.parametrize("text", [None, "", "{", '["Orientation"]', '{"Image Orientation": "upside"}', "{}"])
def test_odd_json_exif_means_upright(text):
    assert spelled_orientation(text) == 1


@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK", "YCbCr"])
def test_modes_become_rgb(mode):
    image = landmark().convert(mode)
    kind = "JPEG" if mode in ("CMYK", "YCbCr") else "PNG"
    options = {"quality": 100, "subsampling": 0} if kind == "JPEG" else {}
    decoded = decode_image(encode(image, kind, **options), CAP)
    assert decoded.mode == "RGB"
    assert same(decoded, image.convert("RGB"), tolerance=0 if kind == "PNG" else 8)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_alpha_goes_on_white(mode):
    image = Image.new(mode, (8, 8), (0, 0, 0, 0) if mode == "RGBA" else (0, 0))
    assert same(decode_image(encode(image), CAP), Image.new("RGB", (8, 8), "white"))


def test_transparent_palette_and_grey_go_on_white():
    palette = Image.new("P", (8, 8), 0)
    palette.putpalette([10, 20, 30] + [0] * 765)
    white = Image.new("RGB", (8, 8), "white")
    assert same(decode_image(encode(palette, transparency=0), CAP), white)
    assert same(decode_image(encode(Image.new("L", (8, 8), 7), transparency=7), CAP), white)


def test_transparent_grey_of_one_and_sixteen_bits_goes_on_white():
    black = decode_image(encode(Image.new("1", (4, 4), 0), transparency=0), CAP)
    assert black.getpixel((0, 0)) == (255, 255, 255)
    values = np.full((4, 4), 30_000, np.uint16)
    values[0, 0] = 20_000
    data = encode(Image.fromarray(values))
    at = data.index(b"IDAT") - 4
    chunk = b"tRNS" + struct.pack(">H", 20_000)
    hidden = data[:at] + struct.pack(">I", 2) + chunk + struct.pack(">I", zlib.crc32(chunk)) + data[at:]
    grey = decode_image(hidden, CAP)
    assert grey.getpixel((0, 0)) == (255, 255, 255) and grey.getpixel((1, 1)) == (117, 117, 117)


def test_half_transparent_black_is_grey():
    image = Image.new("RGBA", (4, 4), (0, 0, 0, 128))
    assert same(decode_image(encode(image), CAP), Image.new("RGB", (4, 4), (127, 127, 127)), tolerance=1)


def test_sixteen_bit_grey_is_scaled_not_clipped():
    ramp = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    decoded = np.asarray(decode_image(encode(Image.fromarray(ramp)), CAP))[..., 0]
    np.testing.assert_allclose(decoded, ramp / 257, atol=0.51)


def grey_by_floats(values):
    scale = 257.0 if values.max() > 255 else 1.0
    return np.clip(values.astype(np.float64) / scale, 0, 255).round().astype(np.uint8)


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I"])
@pytest.mark.parametrize("values", [range(1 << 16), range(256), range(257), range(-300, 70_000), [0]])
def test_sixteen_bits_are_scaled_as_by_floats_in_every_value(mode, values):
    values = np.array([values]) if mode == "I" else np.clip([values], 0, 65535)
    stored = values.astype({"I;16": "<u2", "I;16B": ">u2", "I": np.int32}[mode])
    image = Image.frombytes(mode, (values.size, 1), stored.tobytes())
    assert np.array_equal(np.asarray(_sixteen_bits_to_grey(image)), grey_by_floats(values))


def test_sixteen_bits_are_scaled_in_the_memory_of_integers():
    """Floats took thirty bytes a pixel."""
    image = Image.fromarray(np.arange(1 << 20, dtype=np.uint32).astype(np.uint16).reshape(1024, 1024))
    _sixteen_bits_to_grey(image)
    tracemalloc.start()
    try:
        _sixteen_bits_to_grey(image)
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


def test_icc_profile_is_applied_and_a_broken_one_ignored():
    grey = Image.new("RGB", (4, 4), (128, 128, 128))
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("XYZ")).tobytes()  # not a profile for RGB
    assert same(decode_image(encode(grey, icc_profile=lab), CAP), grey)
    assert same(decode_image(encode(grey, icc_profile=b"not a profile"), CAP), grey)
    swapped = decode_image(encode(Image.new("RGB", (4, 4), (200, 30, 40)), icc_profile=linear_profile()), CAP)
    # A linear profile: 200/255 of the light is far brighter once encoded for sRGB.
    assert np.asarray(swapped)[0, 0, 0] > 220
    assert np.asarray(swapped)[0, 0, 1] > 80


def linear_profile():
    """The sRGB primaries with a linear tone curve, made from Pillow's own sRGB profile."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    count = struct.unpack(">I", profile[128:132])[0]
    for entry in range(count):
        tag, offset, _ = struct.unpack(">4sII", profile[132 + 12 * entry : 144 + 12 * entry])
        if tag in (b"rTRC", b"gTRC", b"bTRC"):  # a parametric curve; type 0 with gamma 1 is linear
            profile[offset : offset + 16] = b"para" + bytes(4) + struct.pack(">HHI", 0, 0, 1 << 16)
        if tag == b"desc":
            profile[offset : offset + 12] = b"XXXX" + profile[offset + 4 : offset + 12]
    return bytes(profile)


def test_truncated_and_random_bytes_are_bad():
    whole = encode(landmark(), "JPEG")
    for data in (whole[: len(whole) // 2], b"", b"hello", os.urandom(4096), encode(landmark())[:60]):
        with pytest.raises(BadImage):
            decode_image(data, CAP)


@pytest.mark.parametrize(
    "error", [RuntimeError, struct.error, RecursionError, SystemError, OSError, KeyError]
)
def test_whatever_a_decoder_raises_is_the_pictures_fault(monkeypatch, error):
    def fails(self):
        raise error("odd")

    monkeypatch.setattr(ImageFile.ImageFile, "load", fails)
    with pytest.raises(BadImage, match=f"{error.__name__}.*odd"):
        decode_image(encode(landmark()), CAP)


@pytest.mark.parametrize("error", [MemoryError(), ImportError("no such library"), OSError(5, "disk")])
def test_what_the_machine_lacks_is_not(monkeypatch, error):
    def fails(self):
        raise error

    monkeypatch.setattr(ImageFile.ImageFile, "load", fails)
    with pytest.raises(type(error)):
        decode_image(encode(landmark()), CAP)


@pytest.mark.parametrize(
    "data",
    [
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        # Entities that unpack into gigabytes, for whoever parses them.
        b"<?xml version='1.0'?><!DOCTYPE svg [<!ENTITY a '" + b"x" * 999 + b"'>"
        b"<!ENTITY b '" + b"&a;" * 999 + b"'>]><svg>" + b"&b;" * 999 + b"</svg>",
        b"\0\0\0\x18ftypheic" + bytes(64),
        b"\0\0\0\x1cftypavif" + bytes(64),
    ],
)
def test_formats_that_are_no_photographs_are_refused(data):
    with pytest.raises(BadImage, match="not a picture of the formats"):
        decode_image(data, CAP)


def test_a_format_that_pillow_knows_but_we_do_not_accept():
    with pytest.raises(BadImage, match="not a picture of the formats"):
        decode_image(encode(landmark(), "TIFF"), CAP)


def test_a_bomb_is_refused_before_it_is_decoded():
    # 30000 x 30000 pixels of zeros in a kilobyte: decoding it would take 2.7 GB.
    header = struct.pack(">IIBBBBB", 30000, 30000, 8, 2, 0, 0, 0)

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000)))
    with pytest.raises(BadImage, match=r"30000 x 30000 pixels, over the cap|decompression bomb"):
        decode_image(bomb, CAP)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_the_cap_is_the_callers_alone(monkeypatch, kind):
    """Pillow has one of its own, 178,956,970 pixels, which held above it; here it is tiny."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    data = encode(landmark(), kind)  # 1536 pixels
    assert decode_image(data, 1536).size == (48, 32)
    for cap in (1, 500, 1535):
        with pytest.raises(BadImage, match=rf"1536 pixels.*limit of {cap + cap % 2} |48 x 32.*cap of {cap}$"):
            decode_image(data, cap)


@pytest.mark.skipif(not (FIXTURES / "photos_edge").is_dir(), reason="no folder of odd photographs")
def test_real_odd_photographs_decode():
    for path in sorted((FIXTURES / "photos_edge").iterdir()):
        assert decode_image(path.read_bytes(), 100_000_000).mode == "RGB"
