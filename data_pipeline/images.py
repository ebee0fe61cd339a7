"""Picture bytes to an upright RGB picture, whatever the bytes: what image shards of the web really hold.

Only JPEG, PNG, WebP, GIF (first frame) and BMP are opened, by Pillow's own decoders; every other format
(SVG, HEIF, TIFF, EPS ...) is refused before any of its content is read. The size is checked against a cap
before anything is decoded, so that a small file cannot unpack into gigabytes.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from PIL import Image, ImageCms, UnidentifiedImageError

from data_pipeline.ingest.samples import foreign_json

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
ORIENTATION_TAG = 0x0112

# What undoes each EXIF orientation. 1 is upright; numbers outside are ignored, as viewers do.
_UNDO = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# The spellings of the `exifread` library, which img2dataset writes into the json.
_SPELLED = {
    "horizontal (normal)": 1,
    "mirrored horizontal": 2,
    "rotated 180": 3,
    "mirrored vertical": 4,
    "mirrored horizontal then rotated 90 ccw": 5,
    "rotated 90 cw": 6,
    "mirrored horizontal then rotated 90 cw": 7,
    "rotated 90 ccw": 8,
}


class BadImage(Exception):
    """One picture cannot be used; the message is the reason, for the quarantine list."""


@contextmanager
def blaming_the_picture() -> Iterator[None]:
    """Turns whatever decoders raise on a picture into BadImage: strangers made it, and nobody foresees all.

    What the machine lacks is not the picture's fault and passes: memory, a library, and what the operating
    system says (an OSError with a number; those of decoders have none).
    """
    try:
        yield
    except (BadImage, MemoryError, ImportError):
        raise
    except UnidentifiedImageError:
        raise BadImage(f"not a picture of the formats {', '.join(FORMATS)}") from None
    except Image.DecompressionBombError as error:
        raise BadImage(f"decompression bomb: {error}") from None
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise BadImage(f"cannot be decoded: {type(error).__name__}: {error}") from None


def decode_image(data: bytes, max_pixels: int, json_exif: str | None = None) -> Image.Image:
    """Decode a picture to RGB, upright, in sRGB, alpha on white.

    Args:
        data: the file's bytes.
        max_pixels: cap on width times height, checked before decoding.
        json_exif: the shard's `exif` field, a JSON object such as `{"Image Orientation": "Rotated 90 CW"}`.
            It is used where the picture has no orientation of its own: the downloader's resizer drops it.

    Raises:
        BadImage: not an accepted format, over the cap, truncated or broken.
    """
    with blaming_the_picture(), warnings.catch_warnings():
        # Pillow warns of broken EXIF and of 89 megapixels, at each picture anew. Neither is a reason to
        # leave a picture out: the cap is the recipe's, and an error.
        warnings.simplefilter("ignore")
        # Pillow looks at the size earlier still (WebP's canvas is made when it is opened), and refuses what
        # has more than twice this number, by default 179 megapixels.
        Image.MAX_IMAGE_PIXELS = -(-max_pixels // 2)
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        width, height = image.size
        if width * height > max_pixels:
            raise BadImage(f"{width} x {height} pixels, over the cap of {max_pixels}")
        orientation = _orientation(image, json_exif)
        profile = image.info.get("icc_profile")
        image.load()
        upright = image.transpose(_UNDO[orientation]) if orientation in _UNDO else image
        return _to_srgb(upright, profile)


def _to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """RGB on white, with an embedded ICC profile applied where it fits the picture's mode."""
    if image.mode in ("I;16", "I;16B", "I"):
        image = _sixteen_bits_to_grey(image)
    alpha = None
    if image.mode == "P":
        image = image.convert("RGBA" if "transparency" in image.info else "RGB")
    elif image.mode in ("1", "L", "RGB") and "transparency" in image.info:
        image = image.convert("RGBA")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La"):
        image = image.convert("RGBA")
        alpha = image.getchannel("A")
        image = image.convert("RGB")
    if profile:
        image = _apply_profile(image, profile)
    image = image if image.mode == "RGB" else image.convert("RGB")
    if alpha is not None:
        ground = Image.new("RGB", image.size, "white")
        ground.paste(image, mask=alpha)
        return ground
    return image


def _apply_profile(image: Image.Image, profile: bytes) -> Image.Image:
    """Into sRGB; a profile that is broken or is for another mode is ignored, as browsers do."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if source.profile.profile_description and "srgb" in source.profile.profile_description.lower():
            return image
        target = ImageCms.createProfile("sRGB")
        converted = ImageCms.profileToProfile(image, source, target, outputMode="RGB")
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return image
    return converted or image


def _sixteen_bits_to_grey(image: Image.Image) -> Image.Image:
    """16 bits a pixel scaled to 8: Pillow's own conversion clips everything above 255 to white.

    With alpha where the picture names a transparent value, which has 16 bits, too.
    """
    import numpy as np

    values = np.clip(np.asarray(image), 0, 65535).astype(np.uint16, copy=False)
    if values.size and values.max() > 255:
        # values / 257, rounded, in sixteen bits: floats would take gigabytes at 100 megapixels.
        scaled = (values // 257).astype(np.uint8)
        scaled += values % 257 > 128
    else:
        scaled = values.astype(np.uint8)
    grey = Image.fromarray(scaled)
    hidden = image.info.get("transparency")
    if isinstance(hidden, int):
        grey.putalpha(Image.fromarray((values != hidden) * np.uint8(255)))
    return grey


def _orientation(image: Image.Image, json_exif: str | None) -> int:
    """The EXIF orientation, 1 to 8: the picture's own tag, else the json's; 1 where there is none."""
    try:
        with blaming_the_picture():
            own = image.getexif().get(ORIENTATION_TAG)
    except BadImage:  # broken EXIF is common and says nothing about the pixels
        own = None
    if isinstance(own, int) and 1 <= own <= 8:
        return own
    return spelled_orientation(json_exif)


def spelled_orientation(json_exif: str | None) -> int:
    """The orientation that a shard's `exif` field spells; 1 where there is none."""
    if not json_exif or "Orientation" not in json_exif:
        return 1
    try:
        tags: Any = foreign_json(json_exif)
    except ValueError:
        return 1
    value = tags.get("Image Orientation") if isinstance(tags, dict) else None
    if not isinstance(value, (str, int)):
        return 1
    text = re.sub(r"\s+", " ", str(value)).strip().lower()
    return int(text) if re.fullmatch("[1-8]", text) else _SPELLED.get(text, 1)
